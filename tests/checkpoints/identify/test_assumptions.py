"""What tensors do not show: heads, activation, pooling, rotary positions and image size are asked for or noted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny import images, save_weights, tiny_vit
from torch import Tensor, nn

from repshift_cli.checkpoints import artifact
from repshift_cli.checkpoints.create import quickly_on_meta
from repshift_cli.checkpoints.identify.computation import computation
from repshift_cli.checkpoints.identify.identity import Identity
from repshift_cli.checkpoints.identify.match import identify
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.checkpoints.loaded import LoadedModel
from repshift_cli.checkpoints.options import LoadOptions, parse_model_args
from repshift_cli.errors import CheckpointError, UsageError


def weights_of(name: str, **options: Any) -> dict[str, Tensor]:
    """Names and shapes of a timm model's tensors, without values."""
    return dict(quickly_on_meta(name, options).state_dict())


def found(tensors: dict[str, Tensor], hint: str = "model", **options: Any) -> Identity:
    return identify(tensors, "model.safetensors", LoadOptions(**options), hint)


def refusal(tensors: dict[str, Tensor], hint: str = "model", **options: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        found(tensors, hint, **options)
    assert caught.value.hint
    return caught.value


def assumed(identity: Identity | LoadedModel) -> str:
    """The note on what is assumed."""
    return next(note for note in identity.notes if note.startswith("assumed, since"))


def trained(name: str = "test_vit", **options: Any) -> nn.Module:
    """A small registered model, whose output depends on all of its weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model: nn.Module = timm.create_model(name, **options).eval()
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def same(loaded: LoadedModel, model: nn.Module, size: int = 160) -> bool:
    with torch.no_grad():
        return torch.allclose(loaded.model(images(1, size)), model(images(1, size)), atol=1e-4)


class TestRotaryPositions:
    @pytest.mark.parametrize("hint", ["model", "vit_pe_core_tiny_patch16_384"])
    @pytest.mark.parametrize(
        "options",
        [{}, {"depth": 2}, {"depth": 2, "embed_dim": 64, "num_heads": 2}, {"num_classes": 0, "img_size": 224}],
    )
    def test_they_are_not_lost(self, options: dict[str, Any], hint: str) -> None:
        tensors = weights_of("vit_pe_core_tiny_patch16_384", **options)
        try:
            identity = found(tensors, hint)
        except CheckpointError as error:
            assert "vit_pe_core" in error.message or "heads" in error.message
        else:
            assert str(identity.architecture).startswith("vit_pe_core")


class TestHeads:
    def test_candidates_that_differ_in_heads(self) -> None:
        tensors = weights_of("vit_base_patch16_siglip_gap_224")
        error = refusal(tensors)
        assert "vit_base_patch16_gap_224, vit_base_patch16_siglip_gap_224" in error.message
        assert "--heads" in error.hint
        assert found(tensors, heads=12).name == "vit_base_patch16_siglip_gap_224"
        assert found(tensors, heads=16).name == "vit_base_patch16_gap_224"
        assert found(tensors, "vit_base_patch16_siglip_gap_224-ft").name == "vit_base_patch16_siglip_gap_224"

    @pytest.mark.parametrize(
        ("name", "width", "common"),
        [
            ("vit_huge_patch14_224", 1280, "16"),
            ("vit_so400m_patch14_siglip_224", 1152, "16"),
            ("vit_giant_patch14_224", 1408, "16"),
            ("vit_gigantic_patch14_224", 1664, "16"),
            ("vit_tiny_patch16_224", 192, "3, 6, 12"),
        ],
    )
    def test_an_unregistered_depth(self, name: str, width: int, common: str) -> None:
        error = refusal(weights_of(name, depth=2))
        assert f"unknown number of attention heads for width {width}" in error.message
        assert error.hint.startswith("Give --heads. Allowed: 1, 2,")
        assert error.hint.endswith(f"Common: {common}.")

    def test_an_unregistered_depth_of_a_usual_width(self) -> None:
        identity = found(weights_of("vit_base_patch16_224", depth=2))
        assert identity.args["num_heads"] == 12
        for word in ("12 heads", "activation GELU", "token pooling", "images of 224x224", "no rotary positions"):
            assert word in assumed(identity)

    def test_those_of_a_registered_model_are_noted(self) -> None:
        tensors = weights_of("vit_tiny_patch16_224", num_heads=12)
        assert "3 heads" in assumed(found(tensors))
        named = found(tensors, model_args={"num_heads": 12})
        assert (named.name, named.args) == ("vit_tiny_patch16_224", {"num_heads": 12})
        assert "heads" not in assumed(named).partition(".")[0]


class TestActivation:
    NAME = "vit_base_patch32_clip_quickgelu_224"

    @pytest.mark.parametrize("options", [{}, {"img_size": 256}, {"global_pool": "avg"}, {"depth": 2}])
    def test_it_is_asked_for(self, options: dict[str, Any]) -> None:
        tensors = weights_of(self.NAME, **options)
        error = refusal(tensors)
        assert "_clip_quickgelu_224" in error.message
        assert re.search(r"patch\d\d_clip_\d", error.message)
        assert "--model" in error.hint
        given = {key: value for key, value in options.items() if key == "depth"}
        identity = found(tensors, model_name=self.NAME, model_args=given)
        assert (identity.name, identity.args) == (self.NAME, options)


class TestPooling:
    def test_a_mean_without_a_norm_behind_it(self, tmp_path: Path) -> None:
        model = trained(global_pool="avg", fc_norm=False)
        path = save_weights(model, tmp_path / "model.safetensors")
        assert "token pooling" in assumed(load_checkpoint(path))
        for name in (None, "test_vit"):
            loaded = load_checkpoint(path, LoadOptions(name, model_args={"global_pool": "avg"}))
            assert loaded.description.args == {"global_pool": "avg", "fc_norm": False}
            assert same(loaded, model)

    @pytest.mark.parametrize("pooling", ["avg", "max", "avgmax"])
    def test_over_all_tokens(self, pooling: str, tmp_path: Path) -> None:
        model = trained(global_pool=pooling)
        path = save_weights(model, tmp_path / "model.safetensors")
        loaded = load_checkpoint(path)
        assert loaded.description.args == {"global_pool": "avg"}
        assert "avg pooling" in assumed(loaded)
        named = load_checkpoint(path, LoadOptions("test_vit"))
        assert any("assumed the mean" in note and "--model-args" in note for note in named.notes)
        assert same(load_checkpoint(path, LoadOptions(model_args={"global_pool": pooling})), model)

    def test_an_unregistered_shape(self, tmp_path: Path) -> None:
        model = tiny_vit(global_pool="max")
        path = save_weights(model, tmp_path / "model.safetensors")
        loaded = load_checkpoint(path, LoadOptions(heads=2, model_args={"global_pool": "max"}))
        assert same(loaded, model, 32)


class TestImageSize:
    def test_it_is_noted_or_given(self) -> None:
        tensors = weights_of("vit_tiny_patch16_224", img_size=(112, 448))
        assert "images of 224x224" in assumed(found(tensors))
        for options in ({"img_size": (112, 448)}, {"model_args": {"img_size": [112, 448]}}):
            identity = found(tensors, **options)
            assert identity.args == {"img_size": [112, 448]}
            assert identity.preprocessing.input_size == (3, 112, 448)

    def test_of_the_arguments_in_a_folder(self, tmp_path: Path) -> None:
        model = trained(img_size=(80, 320))
        save_weights(model, tmp_path / "model.safetensors")
        config = {
            "architecture": "test_vit",
            "model_args": {"img_size": [80, 320]},
            "pretrained_cfg": {"input_size": [3, 160, 160]},
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert load_checkpoint(tmp_path).description.preprocessing.input_size == (3, 80, 320)


class TestHint:
    @pytest.mark.parametrize("hint", ["b", "e", "resnet", "50", "blur", "myresnet50"])
    def test_a_part_of_a_name_chooses_nothing(self, hint: str) -> None:
        assert "resnet50, resnetaa50, resnetblur50" in refusal(weights_of("resnet50"), hint).message

    @pytest.mark.parametrize("hint", ["resnet50", "my-resnet50_epoch9", "resnet50.a1_in1k"])
    def test_a_whole_name_chooses(self, hint: str) -> None:
        assert found(weights_of("resnet50"), hint).architecture.partition(".")[0] == "resnet50"  # type: ignore[union-attr]


class TestComputation:
    @pytest.mark.parametrize(
        "options", [{"num_heads": 4}, {"global_pool": "max"}, {"act_layer": "relu"}, {"fc_norm": True}]
    )
    def test_it_shows_what_tensors_do_not(self, options: dict[str, Any]) -> None:
        assert computation(timm.create_model("test_vit", **options)) != computation(timm.create_model("test_vit"))

    @pytest.mark.parametrize("options", [{"drop_rate": 0.1}, {"drop_path_rate": 0.1}, {"proj_drop_rate": 0.2}])
    def test_it_leaves_out_what_only_training_uses(self, options: dict[str, Any]) -> None:
        assert computation(timm.create_model("test_vit", **options)) == computation(timm.create_model("test_vit"))


class TestModelArgs:
    def test_values(self) -> None:
        texts = ("a=1", "b=0.5", "c=true", "d=null", "e=avg", "f=[1, 2]", "g=False", "h=", "i=a=b", "j='12'")
        values: list[Any] = [1, 0.5, True, None, "avg", [1, 2], False, "", "a=b", "12"]
        assert parse_model_args(texts) == dict(zip("abcdefghij", values, strict=True))
        assert parse_model_args(()) is None

    @pytest.mark.parametrize("text", ["a", "=1", "a b=1", "a=1e999", "a={1, 2}", "a=1j"])
    def test_invalid(self, text: str) -> None:
        with pytest.raises(UsageError, match="invalid --model-args"):
            parse_model_args([text])
        with pytest.raises(UsageError, match="once per key"):
            parse_model_args(["a=1", "a=2"])

    @pytest.mark.parametrize("key", ["pretrained", "checkpoint_path", "cache_dir", "features_only"])
    def test_refused(self, key: str) -> None:
        with pytest.raises(UsageError, match=f"--model-args: unsupported {key}"):
            load_checkpoint("test_vit", LoadOptions(model_args={key: "x"}))

    def test_an_argument_that_the_model_does_not_take(self) -> None:
        with pytest.raises(UsageError, match="--model-args no_such=1 does not fit test_vit"):
            load_checkpoint("test_vit", LoadOptions(model_args={"no_such": 1}))
        with pytest.raises(CheckpointError, match="no_such"):
            found(weights_of("test_vit"), model_name="test_vit", model_args={"no_such": 1})

    def test_of_a_network_without_a_name(self) -> None:
        with pytest.raises(UsageError, match="the name of the model is not known"):
            found(weights_of("test_resnet"), model_args={"act_layer": "gelu"})
        identity = found(weights_of("test_resnet"), model_name="test_resnet", model_args={"act_layer": "gelu"})
        assert identity.args == {"act_layer": "gelu"}

    def test_with_the_name_in_the_file(self, tmp_path: Path) -> None:
        model = trained(num_heads=4, global_pool="avg")
        saved = {"arch": "test_vit", "args": {"gp": "avg"}, "state_dict": model.state_dict()}
        torch.save(saved, tmp_path / "model.pth")
        loaded = load_checkpoint(tmp_path / "model.pth", LoadOptions(model_args={"num_heads": 4}))
        assert loaded.description.args == {"global_pool": "avg", "num_heads": 4}
        assert same(loaded, model)

    def test_they_are_saved(self, tmp_path: Path) -> None:
        from repshift_cli import compress

        options = LoadOptions("test_vit", model_args={"global_pool": "max"})
        path = save_weights(trained(global_pool="max"), tmp_path / "model.safetensors")
        loaded = load_checkpoint(path, options)
        document = {"repshift": json.dumps({"model": loaded.description.to_dict()})}
        save_file(loaded.tensors, tmp_path / "mine.safetensors", document)
        again = artifact.open_model(tmp_path / "mine.safetensors", LoadOptions(model_args={"global_pool": "max"}))
        assert again.loaded.description.args == {"global_pool": "max"}
        with pytest.raises(UsageError, match="states its model"):
            load_checkpoint(tmp_path / "mine.safetensors", LoadOptions(model_args={"global_pool": "avg"}))
        fixed = LoadOptions("test_vit", model_args={"global_pool": "max", "dynamic_img_size": False})
        with pytest.warns(UserWarning, match="no images"):
            compressed = compress(path, options=fixed)
        assert compressed.model.global_pool == "max"
