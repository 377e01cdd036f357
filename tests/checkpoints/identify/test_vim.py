"""Vision Mamba: detection of the authors' checkpoints, and refusal of other forms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import VECTORS
from safetensors.torch import save_file
from tiny import images, save_weights
from tiny_vim import tiny_vim
from torch import Tensor

from repshift_cli.checkpoints.build import build
from repshift_cli.checkpoints.create import on_meta
from repshift_cli.checkpoints.identify.identity import Identity
from repshift_cli.checkpoints.identify.match import identify
from repshift_cli.checkpoints.identify.names import canonical_name
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.checkpoints.loaded import LoadedModel, ModelDescription
from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import CheckpointError, UsageError
from repshift_cli.models import vim
from repshift_cli.models.vim import VisionMamba

KEYS = VECTORS / "vim_tiny_keys.txt"
OFFICIAL = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"

State = dict[str, Tensor]


def small(**options: Any) -> VisionMamba:
    """A Vim of two layers with random weights."""
    return tiny_vim(**{"depth": 2, **options})


def named(name: str = "vim_tiny_patch16_224", **options: Any) -> State:
    """Names and shapes of the tensors of one of the authors' models, without values."""
    with on_meta():
        return dict(vim.create(name, **options).state_dict())


def found(tensors: State, **options: Any) -> Identity:
    return identify(tensors, "weights.pth", LoadOptions(**options), "weights")


def same(loaded: LoadedModel, model: VisionMamba) -> bool:
    batch = images(2, model.patch_embed.img_size[0])
    with torch.no_grad():
        return torch.equal(loaded.model(batch), model(batch))


class TestRoundTrip:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"class_token": "double"},
            {"d_state": 8, "depth": 3, "embed_dim": 48},
            {"img_size": 40},
            {"num_classes": 0},
            {"img_size": 224, "patch_size": 32},
            {"img_size": 224, "patch_size": 32, "stride": 16},
        ],
    )
    def test_the_form_is_detected(self, options: dict[str, Any], tmp_path: Path) -> None:
        model = small(**options)
        loaded = load_checkpoint(save_weights(model, tmp_path / "weights.safetensors"))
        assert loaded.description.architecture == "vim"
        assert loaded.description.name.startswith("Vim of width ")
        assert loaded.description.preprocessing == Preprocessing.of_model(model)
        assert loaded.model.patch_embed.stride == model.patch_embed.stride
        assert any("div2" in note for note in loaded.notes)
        assert same(loaded, model)

    def test_stride_eight_at_another_size(self, tmp_path: Path) -> None:
        model = small(img_size=64, patch_size=16, stride=8)
        path = save_weights(model, tmp_path / "weights.safetensors")
        guessed = load_checkpoint(path)
        assert guessed.description.preprocessing.input_size == (3, 112, 112)
        assert any("7x7 positions mean images of 112x112 with stride 16" in note for note in guessed.notes)
        loaded = load_checkpoint(path, LoadOptions(img_size=64))
        assert loaded.description.args["stride"] == 8
        assert not any("--img-size" in note for note in loaded.notes)
        assert same(loaded, model)

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda state: {"model": state, "epoch": 299},
            lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
            lambda state: {f"module.{key}": value for key, value in state.items()},
        ],
    )
    def test_wrapped(self, wrap: Callable[[State], Any], tmp_path: Path) -> None:
        model = small()
        torch.save(wrap(dict(model.state_dict())), tmp_path / "weights.pth")
        assert same(load_checkpoint(tmp_path / "weights.pth"), model)

    def test_a_description_builds_it_again(self, tmp_path: Path) -> None:
        model = small(class_token="double")
        first = load_checkpoint(save_weights(model, tmp_path / "weights.safetensors"))
        again = ModelDescription.from_dict(first.description.to_dict())
        with torch.no_grad():
            built = build(again, first.tensors, "weights.safetensors")
            assert torch.equal(built(images(1)), model(images(1)))


class TestNames:
    @pytest.mark.parametrize("name", vim.MODELS)
    def test_the_authors_models(self, name: str) -> None:
        identity = found(named(name))
        assert (identity.name, identity.architecture, identity.args) == (name, name, {})
        assert identity.preprocessing.input_size == (3, 224, 224)

    def test_the_keys_of_the_published_file(self) -> None:
        rows = (line.split("\t") for line in KEYS.read_text().splitlines())
        state = {key: torch.empty([int(side) for side in shape[1:-1].split(",")], device="meta") for key, shape in rows}
        assert found(state).name == "vim_tiny_patch16_224"

    @pytest.mark.parametrize("options", [{"num_classes": 10}, {"img_size": 448}])
    def test_at_other_sizes_and_classes(self, options: dict[str, Any]) -> None:
        identity = found(named(**options))
        assert (identity.name, identity.args) == ("vim_tiny_patch16_224", options)
        assert found(named(**options), model_name="vim_tiny_patch16_224").args == options

    def test_a_name_gives_the_stride(self) -> None:
        name = "vim_tiny_patch16_stride8_224"
        tensors = named(name, img_size=128)
        assert found(tensors).args == {"img_size": 240}
        identity = found(tensors, model_name=name)
        assert (identity.name, identity.args) == (name, {"img_size": 128})
        assert "img_size 128 is read from the weights" in identity.notes
        assert found(tensors, fallback_name=name).name == name
        by_size = found(tensors, img_size=128)
        assert (by_size.name, by_size.args) == (name, {"img_size": 128})

    @pytest.mark.parametrize(
        ("name", "short"),
        [
            (OFFICIAL, "vim_tiny_patch16_224"),
            ("vim_base_patch16_224_bimambav2_x_with_middle_cls_token_div2", "vim_base_patch16_224"),
            ("vim_tiny_patch16_stride8_" + OFFICIAL.removeprefix("vim_tiny_patch16_"), "vim_tiny_patch16_stride8_224"),
            ("vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_noclstok_div2", None),
            ("vim_tiny_patch16_224_bimambav2_rope_div2", None),
            ("vit_tiny_patch16_224_bimambav2", None),
        ],
    )
    def test_the_authors_long_names(self, name: str, short: str | None) -> None:
        assert canonical_name(name) == (short or name)

    def test_long_names_are_accepted_everywhere(self, tmp_path: Path) -> None:
        tensors = named(depth=1)
        for option in ("model_name", "fallback_name"):
            identity = found(named(), **{option: OFFICIAL})
            assert (identity.name, identity.architecture) == ("vim_tiny_patch16_224",) * 2
        with pytest.raises(CheckpointError, match="do not fit vim_tiny_patch16_224: missing: layers"):
            save_file({key: torch.zeros(value.shape) for key, value in tensors.items()}, tmp_path / "w.safetensors")
            load_checkpoint(tmp_path / "w.safetensors", LoadOptions(model_name=OFFICIAL))

    @pytest.mark.parametrize("name", ["vim_tiny_patch16_224", OFFICIAL])
    def test_random_weights(self, name: str) -> None:
        loaded = load_checkpoint(name, LoadOptions(img_size=64))
        assert (loaded.source.origin, loaded.description.name) == ("random", "vim_tiny_patch16_224")
        assert any("RANDOM" in note for note in loaded.notes)
        assert loaded.model.patch_embed.img_size == (64, 64)
        again = load_checkpoint(name, LoadOptions(img_size=64))
        assert all(torch.equal(loaded.tensors[key], again.tensors[key]) for key in loaded.tensors)

    def test_wrong_names(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="neither a file nor the name of a model") as caught:
            load_checkpoint("vim_tiny_patch16_stride4_224")
        assert "Did you mean vim_tiny_patch16_stride8_224?" in str(caught.value)
        path = save_weights(small(), tmp_path / "weights.safetensors")
        with pytest.raises(UsageError, match="unknown model 'vim_tyny_patch16_224'") as usage:
            load_checkpoint(path, LoadOptions(model_name="vim_tyny_patch16_224"))
        assert "Did you mean vim_tiny_patch16_224?" in str(usage.value)

    def test_weights_of_another_model(self) -> None:
        with pytest.raises(CheckpointError, match="the weights do not fit vim_tiny_patch16_224"):
            found({"conv1.weight": torch.zeros(64, 3, 7, 7)}, model_name="vim_tiny_patch16_224")


def without(*words: str) -> Callable[[State], State]:
    return lambda state: {key: value for key, value in state.items() if not any(word in key for word in words)}


def plus(**shapes: tuple[int, ...]) -> Callable[[State], State]:
    """Add or replace tensors; a double underscore stands for a dot in a key."""
    return lambda state: state | {key.replace("__", "."): torch.zeros(shape) for key, shape in shapes.items()}


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (without("A_b_log", "_b."), "it reads the tokens in one direction only (there is no A_b_log)"),
            (without("conv1d_b"), "both directions share one convolution, bimamba v1 (there is no conv1d_b)"),
            (plus(norm_f__bias=(32,)), "it has LayerNorm where RMSNorm is supported (there is a norm.bias)"),
            (plus(layers__0__norm__bias=(32,)), "it has LayerNorm where RMSNorm is supported"),
            (without("cls_token"), "it has no class token"),
            (without("pos_embed"), "it has no position table (pos_embed)"),
            (plus(rope__freqs_cos=(16, 32)), "it has rotary positions (rope)"),
            (
                plus(layers__0__mixer__conv1d__weight=(64, 1, 3)),
                "its convolution reads 3 tokens, where 4 are supported",
            ),
            (
                plus(layers__0__mixer__out_proj__weight=(32, 128)),
                "it widens 32 channels to 128, where 64 are supported (expand 2)",
            ),
            (plus(layers__0__mixer__in_proj__bias=(128,)), "its projections in and out have a bias"),
            (plus(layers__0__mixer__dt_proj__weight=(64, 5)), "its steps have rank 5, where 2 is supported (dt_rank"),
            (plus(pos_embed=(1, 19, 32)), "19 positions and 1 class tokens make no square grid"),
            (plus(pos_embed=(1, 1, 32)), "1 positions and 1 class tokens make no square grid"),
            (plus(pos_embed=(17, 32)), "a tensor has the wrong number of dimensions for a Vim"),
            (plus(layers__0__mixer__A_log=()), "a tensor has the wrong number of dimensions"),
            (plus(layers__0__mixer__A_log=(64, 0)), "state 0: must be at least 1"),
            (plus(patch_embed__proj__weight=(32, 3, 8, 4)), "its patches of 8x4 are not square"),
            (plus(patch_embed__proj__weight=(32, 3, 1, 8, 8)), "a tensor has the wrong number of dimensions"),
            (plus(patch_embed__proj__weight=(32, 1, 8, 8)), "3 input channels are supported, these weights take 1"),
            (without("patch_embed"), "it looks like a Vision Mamba without patch_embed.proj.weight"),
            (without("out_proj"), "it looks like a Vision Mamba without out_proj.weight"),
        ],
    )
    @pytest.mark.parametrize("model_name", [None, "vim_tiny_patch16_224"])
    def test_other_forms(self, change: Callable[[State], State], reason: str, model_name: str | None) -> None:
        with pytest.raises(CheckpointError) as caught:
            found(change(dict(small().state_dict())), model_name=model_name)
        assert reason in caught.value.message
        assert caught.value.exit_code == 3

    @pytest.mark.parametrize(
        "change",
        [plus(layers__1__mixer__D=(3,)), plus(layers__0__mixer__gamma=(32,)), without("layers.1.norm"), without("D_b")],
    )
    def test_tensors_that_do_not_fit(self, change: Callable[[State], State], tmp_path: Path) -> None:
        state = {key: value.contiguous() for key, value in change(dict(small().state_dict())).items()}
        save_file(state, tmp_path / "weights.safetensors")
        with pytest.raises(CheckpointError, match="the weights do not fit Vim of width 32, depth 2, patch 8"):
            load_checkpoint(tmp_path / "weights.safetensors")

    def test_heads(self) -> None:
        with pytest.raises(CheckpointError, match="has no attention heads"):
            found(dict(small().state_dict()), heads=3)

    @pytest.mark.parametrize(
        "changes",
        [
            {"depth": 10**9},
            {"img_size": 0},
            {"img_size": []},
            {"img_size": [32, 10**12]},
            {"stride": -8},
            {"patch_size": 0},
            {"d_state": 0},
            {"d_state": 10**30},
            {"embed_dim": -1},
            {"class_token": "none"},
            {"num_classes": 10**40},
            {"depth": "deep"},
            {"no_such": 1},
        ],
    )
    def test_invalid_arguments(self, changes: dict[str, Any]) -> None:
        model = small()
        args = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "d_state": 4, "num_classes": 10}
        description = ModelDescription("mine", "vim", args | changes, Preprocessing.of_model(model))
        with pytest.raises(CheckpointError):
            build(description, model.state_dict(), "mine.safetensors")


class TestImageSize:
    def test_allowed_sizes_are_listed(self) -> None:
        with pytest.raises(UsageError) as caught:
            found(named(), img_size=448)
        assert "--img-size 448: weights.pth has 196 positions (14x14) for patches of 16" in caught.value.message
        assert "Allowed: 224 (stride 16), 120 (stride 8)." in caught.value.hint

    def test_the_stride_of_a_named_model(self) -> None:
        with pytest.raises(UsageError) as caught:
            found(named(), img_size=120, model_name="vim_tiny_patch16_224")
        assert "Allowed: 224 (stride 16)." in caught.value.hint
        identity = found(named(), img_size=120)
        assert (identity.name, identity.args) == ("vim_tiny_patch16_stride8_224", {"img_size": 120})

    def test_of_a_self_describing_file(self, tmp_path: Path) -> None:
        import json

        model = small()
        args = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "d_state": 4, "num_classes": 10}
        description = ModelDescription("mine", "vim", args, Preprocessing.of_model(model))
        metadata = {"repshift": json.dumps({"model": description.to_dict()})}
        save_file(dict(model.state_dict()), tmp_path / "mine.safetensors", metadata)
        assert same(load_checkpoint(tmp_path / "mine.safetensors", LoadOptions(img_size=32)), model)
        with pytest.raises(UsageError, match="takes images of 32x32: its position table has that size"):
            load_checkpoint(tmp_path / "mine.safetensors", LoadOptions(img_size=64))
