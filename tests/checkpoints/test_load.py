"""Reading weights: all containers, and errors of damaged or unsafe ones."""

from __future__ import annotations

import argparse
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from tiny import images, save_weights, tiny_vit
from torch import nn

import repshift_cli
from repshift_cli.checkpoints.build import build
from repshift_cli.checkpoints.builtin import BUILTIN
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.checkpoints.loaded import LoadedModel, ModelDescription
from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.checkpoints.weights import read_weights
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import CheckpointError, UsageError

NAME = "vit_tiny_patch16_224"


def timm_model(name: str = NAME, **options: Any) -> nn.Module:
    """A small registered model with distinct outputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = timm.create_model(name, **{"img_size": 32, "num_classes": 7, **options})
        nn.init.normal_(model.head.weight)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return timm_model()


def same(loaded: LoadedModel, model: nn.Module) -> bool:
    with torch.no_grad():
        return torch.equal(loaded.model(images(2)), model(images(2)))


def refusal(path: Path | str, **options: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, LoadOptions(**options))
    assert caught.value.exit_code == 3
    return caught.value


Wrap = Callable[[dict[str, Any]], Any]

CONTAINERS: dict[str, Wrap] = {
    "plain": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 3},
    "state_dict": lambda state: {"state_dict": state, "optimizer": {"lr": 0.1}, "arch": NAME},
    "module": lambda state: {f"module.{key}": value for key, value in state.items()},
    "compiled": lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
    "compiled_inside_module": lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
    "state_dict_of_module": lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
    "prefixes_in_turn": lambda state: {f"_orig_mod.module._orig_mod.{key}": value for key, value in state.items()},
    "no_averaged_weights": lambda state: {"model_ema": None, "state_dict_ema": {}, "model": state},
    "deepspeed": lambda state: {"module": state, "global_steps": 5},
    "deit": lambda state: {"model": state, "args": argparse.Namespace(lr=1e-4, data_path="/data"), "epoch": 299},
}


class TestContainers:
    @pytest.mark.parametrize("name", CONTAINERS)
    def test_torch_files(self, name: str, model: nn.Module, tmp_path: Path) -> None:
        path = tmp_path / "weights.pth"
        torch.save(CONTAINERS[name](model.state_dict()), path)
        loaded = load_checkpoint(path, LoadOptions(model_name=NAME))
        assert same(loaded, model)
        assert list(loaded.tensors) == list(model.state_dict())

    @pytest.mark.parametrize("key", ["model_ema", "state_dict_ema"])
    def test_averaged_weights_are_used_and_noted(self, key: str, model: nn.Module, tmp_path: Path) -> None:
        path = tmp_path / "weights.pth"
        torch.save({"model": timm_model(num_classes=5).state_dict(), key: model.state_dict()}, path)
        loaded = load_checkpoint(path, LoadOptions(model_name=NAME))
        assert same(loaded, model)
        assert any(f"averaged weights ({key}) are used" in note for note in loaded.notes)

    @pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".tar"])
    def test_suffixes_of_torch_files(self, suffix: str, model: nn.Module, tmp_path: Path) -> None:
        path = tmp_path / f"weights{suffix}"
        torch.save(model.state_dict(), path)
        assert same(load_checkpoint(path, LoadOptions(model_name=NAME)), model)

    def test_the_old_torch_format(self, model: nn.Module, tmp_path: Path) -> None:
        path = tmp_path / "weights.pth"
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)
        assert same(load_checkpoint(path, LoadOptions(model_name=NAME)), model)

    def test_safetensors(self, model: nn.Module, tmp_path: Path) -> None:
        loaded = load_checkpoint(save_weights(model, tmp_path / "weights.safetensors"))
        assert same(loaded, model)
        assert not loaded.model.training
        assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
        assert loaded.description.name == NAME
        assert loaded.description.args == {"img_size": 32, "num_classes": 7}
        assert loaded.description.preprocessing.input_size == (3, 32, 32)
        assert loaded.source.origin == "file"
        assert loaded.document is None

    def test_safetensors_with_prefixes(self, model: nn.Module, tmp_path: Path) -> None:
        path = tmp_path / "weights.safetensors"
        save_file({f"_orig_mod.module.{key}": value for key, value in model.state_dict().items()}, path)
        loaded = load_checkpoint(path)
        assert same(loaded, model)
        assert loaded.tensors.keys() == model.state_dict().keys()

    def test_a_mapping_that_holds_itself(self, tmp_path: Path) -> None:
        content: dict[str, Any] = {"epoch": 3}
        content["model"] = content
        torch.save(content, tmp_path / "weights.pth")
        assert "holds no tensors" in refusal(tmp_path / "weights.pth").message

    def test_hash_of_the_file(self, model: nn.Module, tmp_path: Path) -> None:
        import hashlib

        path = save_weights(model, tmp_path / "weights.safetensors")
        assert (
            load_checkpoint(path, LoadOptions(model_name=NAME)).source.sha256
            == hashlib.sha256(path.read_bytes()).hexdigest()
        )

    def test_loading_does_not_change_the_random_state(self, model: nn.Module, tmp_path: Path) -> None:
        path = save_weights(model, tmp_path / "weights.safetensors")
        torch.manual_seed(1)
        load_checkpoint(path, LoadOptions(model_name=NAME))
        load_checkpoint("test_vit")
        found = torch.rand(1)
        torch.manual_seed(1)
        assert torch.equal(found, torch.rand(1))


class TestFolder:
    @pytest.mark.parametrize("safe", [True, False])
    def test_as_timm_writes_it(self, safe: bool, model: nn.Module, tmp_path: Path) -> None:
        save_for_hf(model, tmp_path, safe_serialization=safe)
        loaded = load_checkpoint(tmp_path)
        assert same(loaded, model)
        assert loaded.source.origin == "folder"
        assert loaded.description.name == NAME

    def test_arguments_that_shapes_do_not_give(self, tmp_path: Path) -> None:
        options = {"img_size": 32, "patch_size": 8, "num_heads": 4}
        other = timm_model(**options)
        save_for_hf(other, tmp_path, safe_serialization=True, model_args=options)
        loaded = load_checkpoint(tmp_path)
        assert same(loaded, other)
        assert loaded.description.preprocessing.input_size == (3, 32, 32)

    def test_preprocessing_of_the_folder_takes_precedence(self, model: nn.Module, tmp_path: Path) -> None:
        save_for_hf(model, tmp_path, safe_serialization=True)
        config = json.loads((tmp_path / "config.json").read_text())
        config["pretrained_cfg"] |= {"mean": [0.1, 0.2, 0.3], "crop_pct": 0.5, "interpolation": "bilinear"}
        (tmp_path / "config.json").write_text(json.dumps(config))
        found = load_checkpoint(tmp_path).description.preprocessing
        assert (found.mean, found.crop_pct, found.interpolation) == ((0.1, 0.2, 0.3), 0.5, "bilinear")
        assert found.input_size == (3, 32, 32)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (None, "is not a model folder"),
            ("{", "is not readable JSON"),
            ("[]", "is not a JSON object"),
            ("{}", "has no key 'architecture'"),
            ('{"architecture": 3}', "has no key 'architecture'"),
            ('{"architecture": "nothing_like_it"}', "unknown model 'nothing_like_it'"),
            ('{"architectures": ["ViTForImageClassification"]}', "the weights do not fit ViTForImageClassification"),
            ('{"architecture": "vit_tiny_patch16_224", "model_args": {"no_such": 1}}', "cannot be built"),
            ('{"architecture": "vit_tiny_patch16_224", "model_args": [1]}', "model_args"),
            ('{"architecture": "vit_tiny_patch16_224", "pretrained_cfg": 4}', "pretrained_cfg"),
            (
                '{"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"mean": "x"}}',
                "the preprocessing of the model",
            ),
            ('{"architecture": "deit_small_patch16_224"}', "do not fit deit_small_patch16_224"),
        ],
    )
    def test_an_invalid_config(self, config: str | None, message: str, model: nn.Module, tmp_path: Path) -> None:
        save_weights(model, tmp_path / "model.safetensors")
        if config is not None:
            (tmp_path / "config.json").write_text(config)
        assert message in refusal(tmp_path).message

    @pytest.mark.parametrize("key", ["checkpoint_path", "pretrained", "pretrained_cfg", "cache_dir", "features_only"])
    def test_arguments_that_would_read_other_files(self, key: str, model: nn.Module, tmp_path: Path) -> None:
        save_weights(model, tmp_path / "model.safetensors")
        config = {"architecture": NAME, "model_args": {key: "elsewhere"}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert f"unsupported model arguments {key}" in refusal(tmp_path).message
        description = ModelDescription("a ViT", NAME, {key: "elsewhere"}, Preprocessing.of_model(model))
        with pytest.raises(CheckpointError, match=f"unsupported model arguments {key}"):
            build(description, model.state_dict(), "weights.safetensors")

    def test_the_config_takes_precedence_over_a_recipe(self, model: nn.Module, tmp_path: Path) -> None:
        save_for_hf(model, tmp_path, safe_serialization=True)
        assert load_checkpoint(tmp_path, LoadOptions(fallback_name="deit_tiny_patch16_224")).description.name == NAME

    def test_heads_that_contradict_it(self, model: nn.Module, tmp_path: Path) -> None:
        save_for_hf(model, tmp_path, safe_serialization=True)
        assert "has 3 attention heads, not 6" in refusal(tmp_path, heads=6).message
        assert same(load_checkpoint(tmp_path, LoadOptions(heads=3)), model)

    def test_no_weights(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"architecture": NAME}))
        assert "model.safetensors or pytorch_model.bin" in str(refusal(tmp_path))


class TestNames:
    def test_a_timm_name_gives_random_weights_and_a_note(self) -> None:
        first, second = load_checkpoint("test_vit"), load_checkpoint("test_vit")
        assert first.source.origin == "random"
        assert any("RANDOM" in note for note in first.notes)
        assert all(torch.equal(first.tensors[key], second.tensors[key]) for key in first.tensors)

    def test_cached_weights_are_used(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        cached = save_weights(timm_model("test_vit", img_size=160, num_classes=1000), tmp_path / "model.safetensors")
        monkeypatch.setattr("repshift_cli.checkpoints.load._cached_weights", lambda name: cached)
        loaded = load_checkpoint("test_vit")
        assert (loaded.source.origin, loaded.source.path) == ("cache", str(cached))
        assert torch.equal(loaded.tensors["head.weight"], safetensors.torch.load_file(cached)["head.weight"])

    def test_an_unknown_name_has_a_nearest_match(self) -> None:
        error = refusal("vit_bas_patch16_224")
        assert "neither a file nor the name of a model" in error.message
        assert "Did you mean vit_base_patch16_224?" in str(error)

    @pytest.mark.parametrize("name", ["missing.safetensors", "./missing", "folder/missing.pth"])
    def test_a_missing_file(self, name: str) -> None:
        assert refusal(name).message == f"there is no file {name}"

    @pytest.mark.parametrize("name", ["hf-hub:timm/vit_tiny_patch16_224", "local-dir:models"])
    def test_names_that_would_read_other_places(self, name: str) -> None:
        refusal(name)

    def test_an_unknown_builtin(self) -> None:
        with pytest.raises(UsageError, match="unknown built-in model builtin:vit-digit") as caught:
            load_checkpoint("builtin:vit-digit")
        assert caught.value.exit_code == 2
        assert "Did you mean builtin:vit-digits?" in str(caught.value)

    @pytest.mark.parametrize("name", BUILTIN)
    def test_builtin_models_load(self, name: str) -> None:
        loaded = load_checkpoint(name)
        assert loaded.source.origin == "builtin"
        assert loaded.description.preprocessing.frames or loaded.model.num_classes == 10
        assert loaded.description.preprocessing.input_size[0] == 3
        assert {each.dtype for each in loaded.tensors.values() if each.is_floating_point()} == {torch.float32}

    def test_the_built_in_models_are_small(self) -> None:
        assets = Path(repshift_cli.__file__).parent / "assets"
        assert sum(path.stat().st_size for path in assets.iterdir()) < 11_000_000

    def test_what_models_share_is_stored_once(self) -> None:
        first, second = (load_checkpoint(name) for name in ("builtin:umt-shapes", "builtin:umt-shapes-qa"))
        shared = [key for key in first.tensors.keys() & second.tensors.keys() if first.tensors[key].ndim > 1]
        assert len(shared) > 50
        assert all(first.tensors[key].equal(second.tensors[key]) for key in shared)
        assert first.source.sha256 != second.source.sha256

    def test_a_model_name_that_timm_does_not_have(self, model: nn.Module, tmp_path: Path) -> None:
        path = save_weights(model, tmp_path / "weights.safetensors")
        with pytest.raises(UsageError, match="unknown model 'vit_tiny_patch16_24'") as caught:
            load_checkpoint(path, LoadOptions(model_name="vit_tiny_patch16_24"))
        assert "Did you mean vit_tiny_patch16_224?" in str(caught.value)

    def test_a_tag_that_timm_does_not_have(self, model: nn.Module, tmp_path: Path) -> None:
        error = refusal("vit_base_patch16_224.augreg_in22k")
        assert "timm has no weights named vit_base_patch16_224.augreg_in22k" in error.message
        assert "Did you mean vit_base_patch16_224.augreg_in21k?" in str(error)
        path = save_weights(model, tmp_path / "weights.safetensors")
        assert "timm has no weights" in refusal(path, model_name=f"{NAME}.no_such_tag").message

    @pytest.mark.parametrize("name", ["test_vit", "builtin:vit-digits"])
    def test_heads_that_contradict_a_name(self, name: str) -> None:
        assert "attention heads, not 7" in refusal(name, heads=7).message

    def test_the_name_that_a_recipe_gives(self, model: nn.Module, tmp_path: Path) -> None:
        path = save_weights(model, tmp_path / "weights.safetensors")
        loaded = load_checkpoint(path, LoadOptions(fallback_name="deit_tiny_patch16_224"))
        assert loaded.description.name == "deit_tiny_patch16_224"
        assert same(loaded, model)
        assert load_checkpoint(path, LoadOptions(fallback_name="no_such_model")).description.name == NAME

    def test_a_name_that_is_too_long_for_a_file(self) -> None:
        refusal("x" * 5000)


class TestDamage:
    @pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
    def test_empty(self, suffix: str, tmp_path: Path) -> None:
        path = tmp_path / f"empty{suffix}"
        path.touch()
        assert refusal(path).message == f"{path} is empty"

    @pytest.mark.parametrize("share", [0.0001, 0.01, 0.5, 0.99])
    def test_truncated_safetensors(self, share: float, model: nn.Module, tmp_path: Path) -> None:
        path = save_weights(model, tmp_path / "weights.safetensors")
        whole = path.read_bytes()
        path.write_bytes(whole[: max(1, int(share * len(whole)))])
        assert "is not a safetensors file, or is damaged" in refusal(path).message

    @pytest.mark.parametrize("share", [0.0001, 0.01, 0.5, 0.99])
    @pytest.mark.parametrize("zipped", [True, False])
    def test_truncated_torch_file(self, share: float, zipped: bool, model: nn.Module, tmp_path: Path) -> None:
        path = tmp_path / "weights.pth"
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        path.write_bytes(whole[: max(1, int(share * len(whole)))])
        assert "is not a PyTorch weights file, or is damaged" in refusal(path).message

    @pytest.mark.parametrize(
        "content", [b"\x00", b"hello world", b"\xff" * 4096, b"\x80\x04", b"PK\x03\x04" + b"\x00" * 99]
    )
    @pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
    def test_other_bytes(self, suffix: str, content: bytes, tmp_path: Path) -> None:
        path = tmp_path / f"weights{suffix}"
        path.write_bytes(content)
        assert "or is damaged" in refusal(path).message

    def test_an_inconsistent_safetensors_header(self, tmp_path: Path) -> None:
        header = json.dumps({"a": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}).encode()
        path = tmp_path / "weights.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + b"\x00" * 16)
        assert "or is damaged" in refusal(path).message

    def test_an_unknown_suffix(self, tmp_path: Path) -> None:
        path = tmp_path / "weights.gguf"
        path.write_bytes(b"1234")
        assert "Allowed: .safetensors, .pth" in str(refusal(path))

    def test_a_torch_file_under_the_name_of_safetensors(self, model: nn.Module, tmp_path: Path) -> None:
        path = tmp_path / "weights.safetensors"
        torch.save(model.state_dict(), path)
        assert "is not a safetensors file" in refusal(path).message

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ([1, 2, 3], "holds a list, not a mapping of weights"),
            (torch.zeros(3), "holds a Tensor, not a mapping of weights"),
            ({}, "holds no tensors"),
            ({"epoch": 3, "lr": 0.1}, "holds no tensors"),
            ({"state_dict": {}}, "holds no tensors"),
            ({"model": 3, "a": "b"}, "holds no tensors"),
        ],
    )
    def test_a_torch_file_without_weights(self, content: object, message: str, tmp_path: Path) -> None:
        path = tmp_path / "weights.pth"
        torch.save(content, path)
        assert message in refusal(path).message

    def test_safetensors_without_tensors(self, tmp_path: Path) -> None:
        path = tmp_path / "weights.safetensors"
        save_file({}, path)
        refusal(path)


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


class TestOptions:
    def test_options_of_umt_are_plain_data(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """UMT checkpoints hold a mapping of a class that is not installed."""
        module = ModuleType("utils.easydict")
        kind = type("EasyDict", (dict,), {"__module__": "utils.easydict"})
        module.EasyDict = kind  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "utils", ModuleType("utils"))
        monkeypatch.setitem(sys.modules, "utils.easydict", module)
        state = tiny_vit().state_dict()
        path = tmp_path / "umt.pth"
        torch.save({"model": state, "config": kind(lr=1e-4, inner=kind(depth=12)), "epoch": 3}, path)
        monkeypatch.delitem(sys.modules, "utils.easydict")
        assert set(read_weights(path).tensors) == set(state)


class TestCode:
    """Code in a pickle must not run."""

    @pytest.fixture
    def marker(self, tmp_path: Path) -> Path:
        return tmp_path / "the-payload-ran"

    def test_the_payload_works(self, marker: Path) -> None:
        pickle.loads(pickle.dumps(Payload(marker)))
        assert marker.exists()

    @pytest.mark.parametrize("zipped", [True, False])
    @pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".tar"])
    def test_code_in_a_checkpoint(
        self, suffix: str, zipped: bool, marker: Path, tmp_path: Path, model: nn.Module
    ) -> None:
        path = tmp_path / f"weights{suffix}"
        state = {"model": model.state_dict(), "args": Payload(marker)}
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
        error = refusal(path)
        assert "which could run code when loaded" in error.message
        assert "safetensors" in str(error)
        assert not marker.exists()

    def test_a_bare_pickle(self, marker: Path, tmp_path: Path) -> None:
        path = tmp_path / "weights.pth"
        path.write_bytes(pickle.dumps({"a": Payload(marker)}))
        refusal(path)
        assert not marker.exists()

    def test_inside_the_options_of_deit(self, marker: Path, tmp_path: Path, model: nn.Module) -> None:
        path = tmp_path / "weights.pth"
        torch.save({"model": model.state_dict(), "args": argparse.Namespace(hook=Payload(marker))}, path)
        refusal(path)
        assert not marker.exists()

    def test_in_a_folder(self, marker: Path, tmp_path: Path) -> None:
        torch.save(Payload(marker), tmp_path / "pytorch_model.bin")
        (tmp_path / "config.json").write_text(json.dumps({"architecture": NAME}))
        refusal(tmp_path)
        assert not marker.exists()

    def test_a_whole_model(self, tmp_path: Path, model: nn.Module) -> None:
        path = tmp_path / "weights.pth"
        torch.save(model, path)
        assert "Save only the weights" in str(refusal(path))


class TestFit:
    def test_keys_and_shapes_are_named(self, model: nn.Module, tmp_path: Path) -> None:
        state = dict(model.state_dict())
        del state["norm.weight"]
        state["surprise"] = torch.zeros(3)
        state["blocks.0.mlp.fc1.weight"] = torch.zeros(5, 192)
        save_file(state, tmp_path / "weights.safetensors")
        message = refusal(tmp_path / "weights.safetensors", model_name=NAME).message
        assert "the weights do not fit vit_tiny_patch16_224" in message
        assert "missing: norm.weight" in message
        assert "unknown: surprise" in message
        assert "blocks.0.mlp.fc1.weight is [5, 192], not [768, 192]" in message

    @pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8])
    def test_integers_are_refused(self, dtype: torch.dtype, model: nn.Module, tmp_path: Path) -> None:
        state = dict(model.state_dict())
        state["blocks.0.mlp.fc1.weight"] = state["blocks.0.mlp.fc1.weight"].to(dtype)
        save_file(state, tmp_path / "weights.safetensors")
        message = refusal(tmp_path / "weights.safetensors").message
        assert f"not floating point: blocks.0.mlp.fc1.weight is {dtype}" in message

    def test_quantised_tensors_are_refused(self, model: nn.Module, tmp_path: Path) -> None:
        state = dict(model.state_dict())
        state["head.weight"] = torch.quantize_per_tensor(state["head.weight"], 0.1, 0, torch.qint8)
        torch.save(state, tmp_path / "weights.pth")
        assert "not floating point: head.weight is torch.qint8" in refusal(tmp_path / "weights.pth").message

    def test_many_keys_are_cut_short(self, model: nn.Module, tmp_path: Path) -> None:
        path = save_weights(model, tmp_path / "weights.safetensors")
        message = refusal(path, model_name="deit_small_patch16_224").message
        assert "and 146 more" in message
        assert len(message) < 800

    def test_a_model_of_another_kind_by_name(self, model: nn.Module, tmp_path: Path) -> None:
        path = save_weights(model, tmp_path / "weights.safetensors")
        assert "do not fit resnet18" in refusal(path, model_name="resnet18").message


def test_read_weights_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a folder"):
        read_weights(tmp_path)


def test_a_description_reads_back() -> None:
    preprocessing = Preprocessing((3, 32, 48), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), "bilinear", 0.9, "squash")
    description = ModelDescription("a ViT", None, {"depth": 2}, preprocessing)
    assert ModelDescription.from_dict(json.loads(json.dumps(description.to_dict()))) == description


def test_preprocessing_equals_timms(tmp_path: Path) -> None:
    from PIL import Image
    from timm.data import create_transform, resolve_model_data_config

    model = timm_model("test_vit", img_size=160, num_classes=3)
    image = Image.effect_noise((200, 140), 60).convert("RGB")
    wanted = create_transform(**resolve_model_data_config(model), is_training=False)(image)
    assert torch.equal(Preprocessing.of_model(model).transform()(image), wanted)


def test_tied_weights_are_loaded(tmp_path: Path) -> None:
    model = tiny_vit(embed_dim=64)
    model.blocks[1].norm1.weight = model.blocks[0].norm1.weight
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    loaded = load_checkpoint(tmp_path / "weights.pth", LoadOptions(heads=2))
    assert same(loaded, model)
