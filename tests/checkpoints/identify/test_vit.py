"""Detection of ViTs from names and shapes of tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny import images, save_weights, tiny_vit
from torch import Tensor, nn

from repshift_cli.checkpoints.create import quickly_on_meta
from repshift_cli.checkpoints.identify.identity import Identity
from repshift_cli.checkpoints.identify.match import identify
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.errors import CheckpointError


def weights_of(name: str, **options: Any) -> dict[str, Tensor]:
    """Names and shapes of a timm model's tensors, without values."""
    return dict(quickly_on_meta(name, options).state_dict())


def found(tensors: dict[str, Tensor], hint: str = "weights", **options: Any) -> Identity:
    return identify(tensors, "weights.pth", LoadOptions(**options), hint)


def refusal(tensors: dict[str, Tensor], hint: str = "weights", **options: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        found(tensors, hint, **options)
    return caught.value


@pytest.mark.parametrize(
    ("name", "detected"),
    [
        ("vit_tiny_patch16_224", "vit_tiny_patch16_224"),
        ("deit_small_patch16_224", "vit_small_patch16_224"),
        ("vit_base_patch16_224", "vit_base_patch16_224"),
        ("vit_base_patch32_384", "vit_base_patch32_384"),
        ("deit_tiny_distilled_patch16_224", "deit_tiny_distilled_patch16_224"),
        ("deit3_small_patch16_224", "deit3_small_patch16_224"),
        ("vit_small_patch14_reg4_dinov2", "vit_small_patch14_reg4_dinov2"),
        ("vit_small_patch14_dinov2", "vit_small_patch14_dinov2"),
        ("vit_base_patch16_siglip_224", "vit_base_patch16_siglip_224"),
    ],
)
def test_registered_models_are_detected(name: str, detected: str) -> None:
    identity = found(weights_of(name))
    assert (identity.name, identity.architecture, identity.args) == (detected, detected, {})
    assert any("from tensor names and shapes" in note for note in identity.notes)


def test_image_size_and_classes_are_detected() -> None:
    identity = found(weights_of("vit_small_patch16_224", img_size=96, num_classes=12))
    assert identity.name == "vit_small_patch16_224"
    assert identity.args == {"img_size": 96, "num_classes": 12}
    assert identity.preprocessing.input_size == (3, 96, 96)


def test_weights_without_a_head() -> None:
    assert found(weights_of("vit_small_patch16_224", num_classes=0)).args == {"num_classes": 0}


def test_the_file_name_chooses_among_equivalent_models() -> None:
    tensors = weights_of("deit_small_patch16_224")
    named, unnamed = found(tensors, hint="deit_small_patch16_224-cd65a155"), found(tensors)
    assert named.name == "deit_small_patch16_224"
    assert unnamed.name == "vit_small_patch16_224"
    assert named.preprocessing != unnamed.preprocessing


@pytest.mark.parametrize("hint", ["weights", "v", "vit"])
def test_another_possible_preprocessing_is_noted(hint: str) -> None:
    identity = found(weights_of("deit_small_patch16_224"), hint=hint)
    assert any("deit_small_patch16_224" in note and "preprocessing" in note for note in identity.notes)


def test_the_model_option_comes_first() -> None:
    identity = found(weights_of("vit_small_patch16_224", num_classes=5), model_name="deit_small_patch16_224")
    assert (identity.name, identity.args) == ("deit_small_patch16_224", {"num_classes": 5})
    assert identity.notes == ["num_classes 5 is read from the weights"]


def test_models_that_compute_different_things_are_listed() -> None:
    tensors = weights_of("vit_base_patch32_clip_224")
    error = refusal(tensors)
    assert "several models have exactly these tensors but compute different things" in error.message
    assert "vit_base_patch32_clip_224" in error.message
    assert "vit_base_patch32_clip_quickgelu_224" in error.message
    assert "--model" in str(error)
    assert found(tensors, model_name="vit_base_patch32_clip_quickgelu_224").name.endswith("quickgelu_224")


class TestFallbackName:
    def test_it_comes_before_detection(self) -> None:
        identity = found(weights_of("vit_small_patch16_224", num_classes=5), fallback_name="deit_small_patch16_224")
        assert (identity.name, identity.args) == ("deit_small_patch16_224", {"num_classes": 5})
        assert "assumed deit_small_patch16_224, which the recipe names: the tensors fit it" in identity.notes

    def test_it_chooses_among_several(self) -> None:
        name = "vit_base_patch32_clip_quickgelu_224"
        assert found(weights_of("vit_base_patch32_clip_224"), fallback_name=name).name == name

    def test_it_does_not_make_a_model_supported(self) -> None:
        tensors = weights_of("swin_tiny_patch4_window7_224")
        assert "is not supported" in refusal(tensors, fallback_name="swin_tiny_patch4_window7_224").message

    @pytest.mark.parametrize("fallback", ["deit_tiny_patch16_224", "resnet18", "deit_small_patch16_224.no_such_tag"])
    def test_it_is_ignored_if_it_does_not_fit(self, fallback: str) -> None:
        tensors = weights_of("vit_small_patch16_224")
        assert found(tensors, fallback_name=fallback) == found(tensors)

    def test_the_model_option_comes_before_it(self) -> None:
        tensors = weights_of("vit_small_patch16_224")
        identity = found(tensors, model_name="vit_small_patch16_224", fallback_name="deit_small_patch16_224")
        assert identity.name == "vit_small_patch16_224"

    def test_the_heads_option_comes_before_it(self) -> None:
        identity = found(weights_of("vit_small_patch16_224"), heads=12, fallback_name="deit_small_patch16_224")
        assert (identity.architecture, identity.args["num_heads"]) == (None, 12)


class TestHeads:
    @pytest.mark.parametrize("name", [None, "resnet18"])
    def test_of_a_model_without_attention(self, name: str | None) -> None:
        tensors = weights_of("resnet18")
        assert "has no attention heads" in refusal(tensors, "resnet18", model_name=name, heads=3).message

    def test_registered_models_are_found_with_their_own(self) -> None:
        assert found(weights_of("vit_small_patch16_224"), heads=6).name == "vit_small_patch16_224"

    def test_others_are_of_a_model_without_a_name(self) -> None:
        identity = found(weights_of("vit_small_patch16_224"), heads=12)
        assert (identity.architecture, identity.args["num_heads"]) == (None, 12)

    def test_against_the_named_model(self) -> None:
        tensors = weights_of("vit_small_patch16_224")
        error = refusal(tensors, model_name="deit_small_patch16_224", heads=3)
        assert "deit_small_patch16_224 has 6 attention heads, not 3" in error.message
        assert found(tensors, model_name="deit_small_patch16_224", heads=6).name == "deit_small_patch16_224"


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("model_name", [None, "vit_tiny_patch16_224"])
def test_other_numbers_of_channels(channels: int, model_name: str | None) -> None:
    error = refusal(weights_of("vit_tiny_patch16_224", in_chans=channels), model_name=model_name)
    assert f"3 input channels are supported, these weights take {channels}" in error.message


def official_dinov2(registers: int) -> tuple[dict[str, Tensor], nn.Module]:
    """Weights under the keys of DINOv2's authors, and the same timm model."""
    name = f"vit_small_patch14_{'reg4_' if registers else ''}dinov2"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(name, img_size=56, depth=12).eval()
        class_position = torch.randn(1, 1, 384)
    state = dict(model.state_dict())
    if registers:
        state["register_tokens"] = state.pop("reg_token")
        state["cls_token"] = state["cls_token"] - class_position
        state["pos_embed"] = torch.cat((class_position, state["pos_embed"]), dim=1)
    state["mask_token"] = torch.zeros(1, 384)
    return state, model


@pytest.mark.parametrize("registers", [0, 4])
def test_official_dinov2_keys(registers: int, tmp_path: Path) -> None:
    state, model = official_dinov2(registers)
    torch.save(state, tmp_path / "dinov2.pth")
    loaded = load_checkpoint(tmp_path / "dinov2.pth")
    assert set(loaded.tensors) == set(loaded.model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(images(1, size=56)), model(images(1, size=56)), rtol=1e-3, atol=1e-3)


class TestUnregisteredShapes:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"class_token": False, "global_pool": "avg"},
            {"reg_tokens": 3},
            {"init_values": 0.5},
            {"qk_norm": True},
            {"pre_norm": True},
            {"qkv_bias": False},
            {"mlp_ratio": 3},
            {"class_token": False, "global_pool": "map"},
            {"num_classes": 0},
            {"reg_tokens": 2, "no_embed_class": True},
            {"global_pool": "avg"},
        ],
    )
    def test_the_form_is_detected(self, options: dict[str, Any], tmp_path: Path) -> None:
        model = tiny_vit(embed_dim=128, **options)
        loaded = load_checkpoint(save_weights(model, tmp_path / "weights.safetensors"))
        assert loaded.description.architecture is None
        assert any("built as a ViT of width 128, depth 4, patch 8 with 2 heads" in note for note in loaded.notes)
        with torch.no_grad():
            assert torch.equal(loaded.model(images(2)), model(images(2)))

    def test_unknown_heads_are_asked_for(self, tmp_path: Path) -> None:
        model = tiny_vit(embed_dim=96, num_heads=3)
        path = save_weights(model, tmp_path / "weights.safetensors")
        with pytest.raises(CheckpointError, match="unknown number of attention heads") as caught:
            load_checkpoint(path)
        assert "Give --heads. Allowed: 1, 2, 3, 4, 6." in str(caught.value)
        with torch.no_grad():
            assert torch.equal(load_checkpoint(path, LoadOptions(heads=3)).model(images()), model(images()))
        with pytest.raises(CheckpointError, match="5 heads do not divide a width of 96"):
            load_checkpoint(path, LoadOptions(heads=5))

    def test_a_shape_that_no_vit_has(self, tmp_path: Path) -> None:
        state = dict(tiny_vit(embed_dim=64).state_dict()) | {"blocks.0.attn.rel_pos": torch.zeros(3)}
        save_file(state, tmp_path / "weights.safetensors")
        with pytest.raises(CheckpointError, match=r"unknown: blocks\.0\.attn\.rel_pos"):
            load_checkpoint(tmp_path / "weights.safetensors", LoadOptions(heads=1))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("swin_tiny_patch4_window7_224", "looks like a Swin Transformer, whose windows need the whole grid"),
    ],
)
def test_other_kinds_of_models_are_refused_with_the_reason(name: str, message: str) -> None:
    error = refusal(weights_of(name))
    assert message in error.message
    assert error.exit_code == 3


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("trunk_output.block1.block1-0.f.a.0.weight", "a RegNet of torchvision"),
        ("backbone.layers.0.mixer.A_log", "a Mamba language model"),
    ],
)
def test_supported_models_are_listed(key: str, kind: str) -> None:
    error = refusal({key: torch.zeros(3)})
    assert f"looks like {kind}, which is not supported" in error.message
    for family in ("Vision Transformers", "ResNet", "ConvNeXt", "RegNet", "Vision Mamba"):
        assert family in str(error)


def test_positions_without_a_square_grid() -> None:
    tensors = weights_of("vit_tiny_patch16_224") | {"pos_embed": torch.zeros(1, 193, 192)}
    assert "193 positions and 1 prefix tokens make no square grid" in refusal(tensors).message


def test_a_block_that_is_missing() -> None:
    tensors = weights_of("vit_tiny_patch16_224")
    without = {key: value for key, value in tensors.items() if not key.startswith("blocks.5.")}
    assert "no known model" in refusal(without).message


@pytest.mark.parametrize(
    "changes",
    [
        {"pos_embed": torch.zeros(3)},
        {"pos_embed": torch.zeros(())},
        {"head.weight": torch.zeros(())},
        {"head.weight": torch.zeros(7)},
        {"patch_embed.proj.weight": torch.zeros(3)},
        {"blocks.0.mlp.fc2.weight": torch.zeros(3)},
        {"blocks.0.attn.q_norm.weight": torch.zeros(())},
        {"reg_token": torch.zeros(())},
        {"pos_embed": torch.zeros(1, 0, 192)},
        {"cls_token": torch.zeros(())},
    ],
)
@pytest.mark.parametrize("model_name", [None, pytest.param("vit_tiny_patch16_224", marks=pytest.mark.slow)])
def test_tensors_of_odd_shapes_are_refused(changes: dict[str, Tensor], model_name: str | None, tmp_path: Path) -> None:
    tensors = {key: torch.zeros(value.shape) for key, value in weights_of("vit_tiny_patch16_224").items()} | changes
    save_file(tensors, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "weights.safetensors", LoadOptions(model_name=model_name))
