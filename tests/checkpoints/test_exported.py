"""Exported files: kinds by content, modules that run them, errors."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from exported import export_to, inputs_for, open_family, stored
from torch import nn

from repshift_cli.benchmark.run import BenchSettings, contenders_of, run_bench
from repshift_cli.checkpoints.exported import InChunks, is_exported, kind_of, open_any, open_exported
from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.checkpoints.schema import EXPORT_VERSION
from repshift_cli.errors import CheckpointError, UsageError
from repshift_cli.utils.progress import Silent

SETTINGS = BenchSettings(torch.device("cpu"), torch.float32, seconds=0, min_runs=1, threads=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`vit.onnx`, `dense.onnx` and `vit.pt2`, not compared with torch."""
    folder = tmp_path_factory.mktemp("runtimes")
    for target in ("onnx", "pt2"):
        export_to(open_family("timm_vit"), target, folder / f"vit.{target}", verify=False)
    export_to(open_family("timm_vit"), "onnx", folder / "dense.onnx", dense=True, verify=False)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """Copies for tests that damage them."""
    for path in made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def archive(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as made:
        for name in names:
            made.writestr(name, "{}")
    return path


def set_onnx(path: Path, text: str | None) -> None:
    """Replace the document of an ONNX file."""
    model = onnx.load(path)
    del model.metadata_props[:]
    if text is not None:
        onnx.helper.set_model_props(model, {"repshift": text})
    onnx.save(model, path)


def document_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(onnx.load(path).metadata_props[0].value)
    return found


class TestKinds:
    @pytest.mark.parametrize(
        ("names", "kind"),
        [
            (["m/models/model.json", "m/archive_format"], "pt2"),
            (["m/serialized_exported_program.json"], "pt2"),
            (["m/data/aotinductor/model/a.so", "m/archive_format"], "aoti"),
        ],
    )
    def test_by_content(self, names: list[str], kind: str, tmp_path: Path) -> None:
        assert kind_of(archive(tmp_path / "x.pt2", *names)) == kind

    def test_something_else(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="holds neither a program"):
            kind_of(archive(tmp_path / "x.pt2", "m/other.txt"))

    def test_names_of_exported_files(self, folder: Path) -> None:
        assert is_exported(folder / "vit.onnx")
        assert is_exported(str(folder / "vit.pt2"))
        assert not is_exported(folder / "missing.onnx")
        assert not is_exported(stored(1))


class TestOpen:
    def test_checkpoints_open_too(self) -> None:
        assert open_any(stored(1)).compressed is not None

    @pytest.mark.parametrize(
        "given", [{"model_name": "deit_tiny_patch16_224"}, {"heads": 2}, {"img_size": 24}, {"frames": 4}]
    )
    def test_an_exported_file_allows_no_options(self, given: dict[str, Any], folder: Path) -> None:
        with pytest.raises(UsageError, match="is an exported file"):
            open_any(folder / "vit.onnx", LoadOptions(**given))

    def test_moving_it_does_not_change_it(self, folder: Path) -> None:
        opened = open_exported(folder / "vit.pt2", trust=True)
        images = inputs_for(opened)
        before = opened.module(images)
        assert torch.equal(opened.module.to(dtype=torch.float16).eval()(images), before)
        assert not list(opened.module.parameters())

    def test_other_inputs(self, folder: Path) -> None:
        for name in ("vit.onnx", "vit.pt2"):
            module = open_exported(folder / name, trust=True).module
            with pytest.raises(UsageError, match="takes float32, not float16"):
                module(torch.zeros(1, 3, 24, 24, dtype=torch.float16))
            with pytest.raises(UsageError, match="takes inputs of 3x24x24, not 3x32x32"):
                module(torch.zeros(1, 3, 32, 32))

    def test_threads_are_those_of_torch(self, folder: Path) -> None:
        module = open_exported(folder / "vit.onnx").module
        images = torch.zeros(1, 3, 24, 24)
        before, threads = module(images), torch.get_num_threads()
        try:
            torch.set_num_threads(2)
            torch.testing.assert_close(module(images), before)
        finally:
            torch.set_num_threads(threads)


class TestDamage:
    @pytest.mark.parametrize("name", ["vit.onnx", "vit.pt2"])
    @pytest.mark.parametrize(
        "damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: b"no model", lambda raw: raw[:-40]]
    )
    def test_a_damaged_file(self, damage: Callable[[bytes], bytes], name: str, folder: Path) -> None:
        path = folder / name
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(CheckpointError) as caught:
            open_exported(path)
        assert str(path) in caught.value.message
        assert caught.value.exit_code == 3

    @pytest.mark.parametrize("text", ["{", "[]", "{}", '{"export_version": 1}', "[" * 100_000])
    def test_damaged_metadata(self, text: str, folder: Path) -> None:
        set_onnx(folder / "vit.onnx", text)
        with pytest.raises(CheckpointError, match="metadata is damaged"):
            open_exported(folder / "vit.onnx")

    @pytest.mark.parametrize("damage", ["too large", "another compression", "locked"])
    def test_an_archive_that_cannot_be_unpacked(self, damage: str, tmp_path: Path) -> None:
        path = tmp_path / "bomb.pt2"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
            made.writestr("e/models/model.json", "{}")
            made.writestr("e/repshift.json", " " * (17 << 20 if damage == "too large" else 10))
        content = bytearray(path.read_bytes())
        entry = content.rindex(b"PK\x01\x02")
        if damage == "another compression":
            content[entry + 10] = 77
        if damage == "locked":
            content[entry + 8] |= 1
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"bomb.pt2 is not a .pt2 archive, or is damaged: "):
            open_exported(path)

    def test_a_file_of_another_tool(self, folder: Path) -> None:
        set_onnx(folder / "vit.onnx", None)
        with pytest.raises(CheckpointError, match="was not written by `repshift export`"):
            open_exported(folder / "vit.onnx")

    def test_a_newer_version_says_what_to_do(self, folder: Path) -> None:
        path = folder / "vit.onnx"
        set_onnx(path, json.dumps({**document_of(path), "export_version": EXPORT_VERSION + 1, "new": {}}))
        with pytest.raises(CheckpointError, match="written by a newer repshift") as caught:
            open_exported(path)
        assert "pip install --upgrade repshift-cli" in (caught.value.hint or "")


class TestBench:
    def test_a_compressed_graph_is_compared_with_the_dense_one(self, folder: Path) -> None:
        opened = {name: open_exported(folder / name, trust=True) for name in ("vit.onnx", "dense.onnx", "vit.pt2")}
        found = {each.name: each.against for each in contenders_of(opened)}
        assert found == {"dense.onnx": None, "vit.onnx": "dense.onnx", "vit.pt2": None}

    def test_together_with_a_checkpoint(self, folder: Path) -> None:
        opened = {"vit": open_any(stored(1)), "vit.onnx": open_any(folder / "vit.onnx")}
        assert [each.name for each in contenders_of(opened)] == ["artifact_v1 dense", "vit", "vit.onnx"]

    def test_memory_is_reported_if_torch_measures_it(self, folder: Path) -> None:
        opened = {name: open_exported(folder / name, trust=True) for name in ("vit.onnx", "dense.onnx", "vit.pt2")}
        report = run_bench(contenders_of(opened), [2], SETTINGS, Silent())
        memory = {run.name: run.peak_bytes for run in report.runs}
        assert memory["vit.onnx"] is None
        assert memory["vit.pt2"]
        assert [ratio.name for ratio in report.ratios] == ["vit.onnx"]
        assert report.attention == "onnx's own, sdpa:flash"
        assert report.to_dict()["runs"][0]["peak_memory_mb"] is None


class Doubling(nn.Module):
    """Stand-in for a file with a batch of two."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert len(images) == 2
        return images.flatten(1).sum(dim=1, keepdim=True)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_in_chunks(count: int) -> None:
    images = torch.arange(12.0 * count).reshape(count, 3, 2, 2)
    runtime: Any = Doubling()
    assert torch.equal(InChunks(runtime, 2)(images), images.flatten(1).sum(dim=1, keepdim=True))
