"""What training scripts write around weights: wrappers, averaged weights, options; and tensors that are no weights."""

from __future__ import annotations

import argparse
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from tiny import images, save_weights, tiny_vit
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from repshift_cli.checkpoints import artifact, weights
from repshift_cli.checkpoints.artifact import separated
from repshift_cli.checkpoints.create import quickly_on_meta
from repshift_cli.checkpoints.identify.match import identify
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.checkpoints.loaded import LoadedModel
from repshift_cli.checkpoints.options import ImageSize, LoadOptions
from repshift_cli.checkpoints.weights import INDEX_SUFFIX, read_weights
from repshift_cli.errors import CheckpointError, RepshiftError, UsageError

State = dict[str, Tensor]
HEADS = LoadOptions(heads=2)


@pytest.fixture(scope="module")
def state() -> State:
    return {key: value.clone() for key, value in tiny_vit(depth=2).state_dict().items()}


@pytest.fixture(scope="module")
def named() -> State:
    """Weights that fit several timm models, which have other preprocessing."""
    torch.manual_seed(0)
    return dict(timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=7, depth=12).state_dict())


def load(content: Any, folder: Path, **options: Any) -> LoadedModel:
    torch.save(content, folder / "weights.pth")
    return load_checkpoint(folder / "weights.pth", LoadOptions(**options))


def refusal(content: Any, folder: Path, **options: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load(content, folder, **options)
    return caught.value


def equal(found: LoadedModel, state: State) -> bool:
    return all(torch.equal(found.tensors[key], value) for key, value in state.items())


def shifted(state: State) -> State:
    return {key: value + 1 for key, value in state.items()}


class TestTrainingScripts:
    """A file of timm's training script names its model and preprocessing."""

    ARGS: dict[str, Any] = {  # noqa: RUF012
        "mean": (0.1, 0.2, 0.3),
        "std": None,
        "crop_pct": 0.5,
        "interpolation": "bilinear",
        "img_size": None,
        "num_classes": 7,
    }

    @pytest.mark.parametrize("kind", [dict, lambda args: argparse.Namespace(**args)])
    def test_model_and_preprocessing(self, kind: Callable[[Any], Any], named: State, tmp_path: Path) -> None:
        found = load({"arch": "deit_tiny_patch16_224", "state_dict": named, "args": kind(self.ARGS)}, tmp_path)
        preprocessing = found.description.preprocessing
        assert found.description.name == "deit_tiny_patch16_224"
        assert (preprocessing.mean, preprocessing.std) == ((0.1, 0.2, 0.3), (0.229, 0.224, 0.225))
        assert (preprocessing.crop_pct, preprocessing.interpolation) == (0.5, "bilinear")
        assert preprocessing.input_size == (3, 32, 32)
        assert any("assumed std" in note for note in found.notes)

    def test_the_name_in_the_options(self, named: State, tmp_path: Path) -> None:
        found = load({"model": named, "args": {"model": "deit_tiny_patch16_224"}}, tmp_path)
        assert found.description.name == "deit_tiny_patch16_224"
        assert any("assumed mean, std, crop_pct" in note for note in found.notes)

    def test_the_user_decides(self, named: State, tmp_path: Path) -> None:
        content = {"model": named, "arch": "deit_tiny_patch16_224"}
        assert load(content, tmp_path, model_name="vit_tiny_patch16_224").description.name == "vit_tiny_patch16_224"

    @pytest.mark.parametrize(
        "name", ["deit_small_patch16_224", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224.x"]
    )
    def test_a_model_that_does_not_fit(self, name: str, named: State, tmp_path: Path) -> None:
        assert name in refusal({"arch": name, "state_dict": named}, tmp_path).message

    def test_a_name_that_is_not_known_is_said(self, named: State, tmp_path: Path) -> None:
        assert (
            "the file names a model that is not known: my_vit" in load({"arch": "my_vit", "net": named}, tmp_path).notes
        )

    @pytest.mark.parametrize("value", ["x", [float("nan")] * 3, [0.5]])
    def test_invalid_preprocessing(self, value: Any, state: State, tmp_path: Path) -> None:
        error = refusal({"model": state, "args": {"mean": value}}, tmp_path, heads=2)
        assert "weights.pth: the preprocessing of the model" in error.message

    @pytest.mark.parametrize("value", [torch.zeros(3), {1: 2}, [[]], "x", -1, 2**70, [1, 2, 3, "x"], ()])
    def test_other_values_are_ignored(self, value: Any, state: State, tmp_path: Path) -> None:
        args = {"img_size": value, "model": value if not isinstance(value, str) else None}
        assert equal(load({"model": state, "arch": torch.zeros(2), "args": args}, tmp_path, heads=2), state)

    def test_image_size_of_a_convolutional_network(self, tmp_path: Path) -> None:
        weights = timm.create_model("test_resnet").state_dict()
        found = load({"arch": "test_resnet", "model": weights, "args": {"img_size": (64, 32)}}, tmp_path)
        assert found.description.preprocessing.input_size == (3, 64, 32)


class TestAveragedWeights:
    @pytest.mark.parametrize("key", ["model_ema", "state_dict_ema", "ema_state_dict"])
    @pytest.mark.parametrize("which", [None, "ema", "raw"])
    def test_the_choice(self, key: str, which: Any, state: State, tmp_path: Path) -> None:
        found = load({"model": state, key: shifted(state)}, tmp_path, heads=2, weights=which)
        assert equal(found, state if which == "raw" else shifted(state))
        used = "raw weights (model)" if which == "raw" else f"averaged weights ({key})"
        assert any(note.startswith(f"{used} are used") for note in found.notes)

    def test_those_of_torchvision(self, tmp_path: Path) -> None:
        averaged = AveragedModel(tiny_vit(depth=2, seed=1))
        found = load({"model": tiny_vit(depth=2).state_dict(), "model_ema": averaged.state_dict()}, tmp_path, heads=2)
        assert equal(found, tiny_vit(depth=2, seed=1).state_dict())

    def test_a_kind_that_is_missing(self, state: State, tmp_path: Path) -> None:
        assert "holds no averaged weights" in refusal(state, tmp_path, weights="ema").message
        assert (
            "holds averaged weights only (model_ema)" in refusal({"model_ema": state}, tmp_path, weights="raw").message
        )
        assert equal(load(state, tmp_path, heads=2, weights="raw"), state)
        save_file(state, tmp_path / "w.safetensors")
        for name in (tmp_path / "w.safetensors", "test_vit", "builtin:vit-digits"):
            with pytest.raises(CheckpointError, match="holds no averaged weights"):
                load_checkpoint(name, LoadOptions(weights="ema"))


class TestWrappers:
    @pytest.mark.parametrize("prefix", ["model.", "backbone.", "module.", "module._orig_mod.", "module.a.b."])
    def test_prefixes(self, prefix: str, state: State, tmp_path: Path) -> None:
        assert equal(load({f"{prefix}{key}": value for key, value in state.items()}, tmp_path, heads=2), state)

    def test_the_only_mapping_full_of_tensors(self, state: State, tmp_path: Path) -> None:
        content = {"epoch": 5, "model_state_dict": state, "loss": torch.tensor(0.3)}
        assert equal(load(content, tmp_path, heads=2), state)
        content = {"net": state, "optimizer": {"state": {0: {"step": torch.zeros(3)}}}, "model": {"depth": 12}}
        assert equal(load(content, tmp_path, heads=2), state)

    def test_several_mappings(self, state: State, tmp_path: Path) -> None:
        error = refusal({"net": state, "teacher": dict(state), "epoch": 3}, tmp_path)
        assert "under net, teacher" in str(error)


UNUSUAL: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": lambda value: value.to_sparse(),
    "sparse_csr": lambda value: value.to_sparse_csr(),
    "nested": lambda value: torch.nested.nested_tensor([value, value[:2]]),
    "meta": lambda value: value.to("meta"),
    "empty": lambda value: value[:0],
    "complex": lambda value: torch.complex(value, value).conj(),
}


class TestTensors:
    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("kind", UNUSUAL)
    def test_those_that_are_no_weights(self, kind: str, state: State, tmp_path: Path) -> None:
        error = refusal({**state, "head.weight": UNUSUAL[kind](state["head.weight"])}, tmp_path, heads=2)
        assert "head.weight is" in error.message

    def test_a_complex_buffer(self, tmp_path: Path) -> None:
        weights = timm.create_model("test_resnet").state_dict()
        weights["layer1.0.bn1.running_mean"] = weights["layer1.0.bn1.running_mean"] * 1j
        assert (
            "layer1.0.bn1.running_mean is torch.complex64"
            in refusal(weights, tmp_path, model_name="test_resnet").message
        )

    def test_an_expanded_tensor(self, state: State, tmp_path: Path) -> None:
        error = refusal({**state, "head.weight": state["head.weight"][:1].expand(10**9, -1)}, tmp_path)
        assert "but the file only" in error.message

    def test_a_name_that_is_no_text_is_refused(self, state: State, tmp_path: Path) -> None:
        for key in ("\ud800", "blocks.0.\udfff"):
            error = refusal({**state, key: torch.zeros(2)}, tmp_path, heads=2)
            assert "surrogate" in error.message

    @pytest.mark.parametrize("view", [torch._neg_view, lambda value: torch.complex(value, value).conj().imag])
    def test_negative_views(self, view: Callable[[Tensor], Tensor], state: State, tmp_path: Path) -> None:
        found = load({**state, "head.weight": view(state["head.weight"])}, tmp_path, heads=2)
        assert torch.equal(found.tensors["head.weight"], -state["head.weight"])
        save_file(separated({"a": view(state["head.weight"])}), tmp_path / "a.safetensors")
        assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], -state["head.weight"])

    def test_shared_strided_memory_is_written(self, tmp_path: Path) -> None:
        stacked = torch.arange(24.0).reshape(2, 3, 4)
        views = {"a": stacked[0].T, "b": stacked[1].T, "c": stacked[:, 0], "d": stacked[0]}
        save_file(separated(views), tmp_path / "a.safetensors")
        found = load_file(tmp_path / "a.safetensors")
        assert all(torch.equal(found[key], value) for key, value in views.items())

    @pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e38])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_values_that_cannot_be_computed_with(
        self, value: float, dtype: torch.dtype, state: State, tmp_path: Path
    ) -> None:
        changed = state["norm.weight"].to(dtype)
        changed[3] = value
        notes = load({**state, "norm.weight": changed}, tmp_path, heads=2).notes
        assert "1 tensors hold values that are not finite or are very large: norm.weight" in notes

    @pytest.mark.parametrize("tokens", [1, 2])
    def test_a_grid_of_one_patch(self, tokens: int, state: State, tmp_path: Path) -> None:
        error = refusal({**state, "pos_embed": torch.zeros(1, tokens, 32)}, tmp_path, heads=2)
        assert "make no square grid" in error.message


class TestArchives:
    def rewritten(self, folder: Path, change: Callable[[str, bytes], bytes], how: int = zipfile.ZIP_STORED) -> Path:
        torch.save({"a": torch.arange(1000.0)}, folder / "good.pth")
        path = folder / "bad.pth"
        with zipfile.ZipFile(folder / "good.pth") as good, zipfile.ZipFile(path, "w", how) as bad:
            for name in good.namelist():
                bad.writestr(name, change(name, good.read(name)))
        return path

    def test_compressed_members(self, tmp_path: Path) -> None:
        path = self.rewritten(tmp_path, lambda _, content: content, zipfile.ZIP_DEFLATED)
        with pytest.raises(CheckpointError, match="is compressed"):
            read_weights(path)

    def test_a_large_pickle(self, tmp_path: Path) -> None:
        path = self.rewritten(tmp_path, lambda name, content: content * (1 << 17 if name.endswith(".pkl") else 1))
        with pytest.raises(CheckpointError, match="bytes besides tensors, more than 16777216"):
            read_weights(path)

    def test_changed_bytes(self, tmp_path: Path) -> None:
        torch.save({"a": torch.arange(1000.0)}, tmp_path / "a.pth")
        content = bytearray((tmp_path / "a.pth").read_bytes())
        content[len(content) // 2] ^= 1
        (tmp_path / "a.pth").write_bytes(content)
        with pytest.raises(CheckpointError, match="Bad CRC-32"):
            read_weights(tmp_path / "a.pth")

    def test_files_without_checksums(self, tmp_path: Path) -> None:
        torch.serialization.set_crc32_options(False)
        try:
            torch.save({"a": torch.arange(9.0)}, tmp_path / "a.pth")
        finally:
            torch.serialization.set_crc32_options(True)
        assert torch.equal(read_weights(tmp_path / "a.pth").tensors["a"], torch.arange(9.0))

    def test_a_torchscript_program(self, tmp_path: Path) -> None:
        path = self.rewritten(tmp_path, lambda _, content: content)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("good/constants.pkl", b"")
        with pytest.raises(CheckpointError, match="is a TorchScript program, not a weights file"):
            read_weights(path)


class TestFiles:
    @pytest.mark.parametrize("name", ["a.PTH", "a.SafeTensors", "a", "a.v2", "link"])
    @pytest.mark.parametrize("zipped", [True, False, None])
    def test_endings(self, name: str, zipped: bool | None, state: State, tmp_path: Path) -> None:
        suffix = Path(name).suffix.lower()
        if suffix in (".pth", ".safetensors") and (suffix == ".safetensors") != (zipped is None):
            pytest.skip("the suffix decides")
        path = tmp_path / ("a.v1" if name == "link" else name)
        if zipped is None:
            save_file(state, path)
        else:
            torch.save(state, path, _use_new_zipfile_serialization=zipped)
        if name == "link":
            path = tmp_path / "latest"
            path.symlink_to("a.v1")
        assert equal(load_checkpoint(path, HEADS), state)

    def test_a_file_that_is_overwritten_after_it_was_read(self, state: State, tmp_path: Path) -> None:
        save_file(state, tmp_path / "a.safetensors")
        found = load_checkpoint(tmp_path / "a.safetensors", HEADS)
        os.truncate(tmp_path / "a.safetensors", 10)
        assert equal(found, state)
        assert found.model(images()).isfinite().all()

    def test_a_file_that_changes_while_it_is_read(
        self, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "a.pth"
        torch.save(state, path)
        read = torch.load

        def slowly(*args: Any, **options: Any) -> Any:
            os.utime(path, (1, 1))
            return read(*args, **options)

        monkeypatch.setattr(torch, "load", slowly)
        with pytest.raises(CheckpointError, match="changed while it was read"):
            read_weights(path)

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
    def test_devices(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo.pth")
        (tmp_path / "zero.pth").symlink_to("/dev/zero")
        for name in ("fifo.pth", "zero.pth", "/dev/zero"):
            with pytest.raises(CheckpointError, match="is not a regular file"):
                load_checkpoint(tmp_path / name)

    def test_memory_is_taken_after_the_header_is_checked(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with (tmp_path / "a.safetensors").open("wb") as file:
            file.truncate(50 << 30)
        monkeypatch.setattr(weights, "bytearray", lambda size: pytest.fail(f"{size} bytes"), raising=False)
        with pytest.raises(CheckpointError, match="is not a safetensors file"):
            read_weights(tmp_path / "a.safetensors")

    def test_a_folder_without_permission(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def denied(path: Path) -> bool:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Path, "is_file", denied)
        with pytest.raises(CheckpointError, match=r"cannot read .*: Permission denied"):
            load_checkpoint(tmp_path)


class TestShards:
    @pytest.fixture
    def folder(self, named: State, tmp_path: Path) -> Path:
        names = dict.fromkeys(list(named)[:70], "a-1.safetensors") | dict.fromkeys(list(named)[70:], "a-2.safetensors")
        for shard in set(names.values()):
            save_file({f"module.{key}": named[key] for key in named if names[key] == shard}, tmp_path / shard)
        self.write(tmp_path, {f"module.{key}": name for key, name in names.items()})
        (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224"}))
        return tmp_path

    @staticmethod
    def write(folder: Path, names: Any) -> None:
        (folder / f"model{INDEX_SUFFIX}").write_text(json.dumps({"weight_map": names}))

    def test_a_folder_and_its_index(self, folder: Path, named: State) -> None:
        found = load_checkpoint(folder)
        assert equal(found, named)
        again = load_checkpoint(folder / f"model{INDEX_SUFFIX}")
        assert equal(again, named)
        assert again.source.sha256 == found.source.sha256
        (folder / "a-2.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"cannot read .*a-2\.safetensors: No such file"):
            load_checkpoint(folder)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"x": "a-1.safetensors"}, "do not agree on x"),
            ({"module.norm.bias": "a-1.safetensors"}, "do not agree on module.norm.bias"),
            ({"x": "../a-1.safetensors"}, r"in its own folder: \.\./a-1"),
            ({"x": f"model{INDEX_SUFFIX}"}, "in its own folder"),
            ({"x": "\ud800.safetensors"}, "surrogates not allowed"),
            ({"x": "\0.safetensors"}, "no file can have this name"),
            ({"x": 3}, "is not the index of a checkpoint"),
            ({"x": []}, "is not the index of a checkpoint"),
        ],
    )
    def test_an_invalid_index(self, changed: dict[str, Any], message: str, folder: Path) -> None:
        index = json.loads((folder / f"model{INDEX_SUFFIX}").read_text())["weight_map"]
        self.write(folder, index | changed)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(folder)

    @pytest.mark.parametrize("name", ["config.json", f"model{INDEX_SUFFIX}"])
    def test_deep_documents(self, name: str, folder: Path) -> None:
        (folder / name).write_text("[" * 100_000)
        with pytest.raises(CheckpointError, match="nested too deeply"):
            load_checkpoint(folder)


class TestImageSize:
    SIZE = (64, 32)

    def test_the_user_gives_it(self, tmp_path: Path) -> None:
        model = tiny_vit(img_size=self.SIZE)
        path = save_weights(model, tmp_path / "a.safetensors")
        with pytest.raises(CheckpointError, match="33 positions and 1 prefix tokens make no square grid") as caught:
            load_checkpoint(path, HEADS)
        assert "Give --img-size HEIGHTxWIDTH" in str(caught.value)
        found = load_checkpoint(path, LoadOptions(heads=2, img_size=self.SIZE))
        inputs = torch.randn(2, 3, *self.SIZE)
        assert found.description.preprocessing.input_size == (3, *self.SIZE)
        assert torch.equal(found.model(inputs), model(inputs))

    @pytest.mark.parametrize("size", [(256, 128), (256, 64)])
    def test_of_a_named_model(self, size: tuple[int, int], tmp_path: Path) -> None:
        weights = timm.create_model("vit_tiny_patch16_224", img_size=size, num_classes=3).state_dict()
        content = {"state_dict": weights, "arch": "vit_tiny_patch16_224", "args": {"img_size": size}}
        assert load(content, tmp_path).description.args == {"img_size": list(size), "num_classes": 3}
        found = load(weights, tmp_path, img_size=size)
        assert (found.description.name, found.description.args["img_size"]) == ("vit_tiny_patch16_224", list(size))
        with pytest.raises(RepshiftError):
            load(weights, tmp_path, img_size=(32, 48))

    def test_models_of_squares(self) -> None:
        with pytest.raises(UsageError, match="umt_base takes square images only"):
            load_checkpoint("umt_base", LoadOptions(img_size=self.SIZE))

    @pytest.mark.parametrize(("text", "size"), [("224", (224, 224)), ("256x128", (256, 128))])
    def test_texts(self, text: str, size: tuple[int, int]) -> None:
        assert ImageSize.parse(text) == size
        assert str(ImageSize.parse(text)) == text

    @pytest.mark.parametrize("text", ["", "x", "12x", "1x2x3", "-3", "0", "0x4", "16385", "9" * 5000, "\u0662", "3.5"])
    def test_invalid_texts(self, text: str) -> None:
        with pytest.raises(UsageError, match="invalid --img-size"):
            ImageSize.parse(text)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("swin_tiny_patch4_window7_224", "Swin Transformer"),
        ("swinv2_tiny_window8_256", "Swin Transformer V2"),
    ],
)
def test_kinds_that_are_not_supported(name: str, kind: str) -> None:
    weights = dict(quickly_on_meta(name, {}).state_dict())
    for options in (LoadOptions(), LoadOptions(model_name=name)):
        with pytest.raises(CheckpointError, match="which is not supported") as caught:
            identify(weights, "weights.pth", options, "weights")
        assert "--model" not in str(caught.value)
    with pytest.raises(CheckpointError, match=kind):
        identify(weights, "weights.pth", LoadOptions(), "weights")


@pytest.mark.parametrize("name", ["x.pth", "x.onnx", "x.tar", "x", ".safetensors"])
def test_compressed_checkpoints_are_safetensors(name: str, tmp_path: Path) -> None:
    loaded = load_checkpoint("builtin:vit-digits")
    with pytest.raises(UsageError, match="a compressed checkpoint is a safetensors file"):
        artifact.save(tmp_path / name, loaded, {})
    assert not list(tmp_path.iterdir())
