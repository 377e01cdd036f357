"""Exported files: kinds by content, modules that run them, errors."""

from __future__ import annotations

import json
import pickle
import struct
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

    @pytest.mark.slow
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
    @pytest.mark.slow
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


def edited(path: Path, edit: Callable[[str, bytes], bytes | None], **added: bytes) -> Path:
    """Write an archive again, with other contents of its members (None leaves one out) and more members."""
    with zipfile.ZipFile(path) as before:
        members = [(name, edit(name, before.read(name))) for name in before.namelist()]
    with zipfile.ZipFile(path, "w") as after:
        for name, content in [*members, *((key.replace("__", "/"), value) for key, value in added.items())]:
            if content is not None:
                after.writestr(name, content)
    return path


def kept(name: str, content: bytes) -> bytes:
    return content


class TestTrust:
    def test_a_program_needs_trust(self, folder: Path) -> None:
        with pytest.raises(UsageError, match="opening it can run code that its author put there") as caught:
            open_exported(folder / "vit.pt2")
        assert "--trust" in (caught.value.hint or "")
        assert "ONNX files are safe" in (caught.value.hint or "")
        assert open_any(folder / "vit.pt2", trust=True).macs > 0

    def test_its_code_does_not_run_without(self, folder: Path) -> None:
        marker = folder / "ran"

        class Code:
            def __reduce__(self) -> Any:
                return Path.touch, (marker,)

        def edit(name: str, content: bytes) -> bytes:
            return pickle.dumps(Code()) if "weight" in name and not name.endswith(".json") else content

        edited(folder / "vit.pt2", edit)
        with pytest.raises(UsageError, match="can run code"):
            open_exported(folder / "vit.pt2")
        assert not marker.exists()

    def test_a_package_needs_trust(self, folder: Path) -> None:
        def edit(name: str, content: bytes) -> bytes:
            return content.replace(b'"kind":"pt2"', b'"kind":"aoti"') if name.endswith("repshift.json") else content

        edited(folder / "vit.pt2", edit, model__data__aotinductor__model__a=b"")
        with pytest.raises(UsageError, match="is a compiled package: opening it can run code"):
            open_exported(folder / "vit.pt2")

    def test_a_package_that_calls_itself_a_program(self, folder: Path) -> None:
        edited(folder / "vit.pt2", kept, model__data__aotinductor__model__a=b"")
        with pytest.raises(CheckpointError, match="names the kind pt2, but the content is aoti"):
            open_exported(folder / "vit.pt2", trust=True)


def cut_library() -> bytes:
    header = bytearray(struct.pack("<5s35xQ10xHH2x", b"\x7fELF\x02", 5000, 64, 3))
    return bytes(header) + b"code" * 100


class TestArchives:
    @pytest.mark.parametrize(
        ("member", "content", "words"),
        [
            ("model__..__..__x", b"", "would leave its folder"),
            ("__x", b"", "would leave its folder"),
            ("archive__archive_format", b"pt2", "the same name"),
            ("model__a.so", cut_library(), "is cut off"),
            ("model__a.so", b"\x7fELF", "is cut off"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:Duplicate name")
    def test_invalid_members(self, member: str, content: bytes, words: str, folder: Path) -> None:
        edited(folder / "vit.pt2", kept, **{member: content})
        with pytest.raises(CheckpointError, match=words):
            open_exported(folder / "vit.pt2", trust=True)

    def test_compressed_members(self, folder: Path) -> None:
        with zipfile.ZipFile(folder / "vit.pt2", "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("model/zeros", bytes(1 << 20))
        with pytest.raises(CheckpointError, match="is compressed"):
            open_exported(folder / "vit.pt2", trust=True)

    def test_other_bytes_of_a_weight(self, folder: Path) -> None:
        path = folder / "vit.pt2"
        with zipfile.ZipFile(path) as archive:
            largest = max(archive.infolist(), key=lambda member: member.file_size)
        content = bytearray(path.read_bytes())
        content[largest.header_offset + 2000] ^= 1
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="Bad CRC-32"):
            open_exported(path, trust=True)

    @pytest.mark.parametrize("damage", ["nested", "empty", "cut"])
    def test_no_traceback_of_torch_is_shown(self, damage: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        def edit(name: str, content: bytes) -> bytes:
            if damage == "nested":
                return b"[" * 100_000 if name.endswith("models/model.json") else content
            if "weight" not in name or name.endswith(".json"):
                return content
            return b"" if damage == "empty" else content[: len(content) // 2]

        edited(folder / "vit.pt2", edit)
        with pytest.raises(CheckpointError, match=r"vit\.pt2"):
            open_exported(folder / "vit.pt2", trust=True).module(torch.zeros(1, 3, 24, 24))
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err + captured.out


def changed(document: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy with another value at a dotted key."""
    copy: dict[str, Any] = json.loads(json.dumps(document))
    *above, last = key.split(".")
    holder = copy
    for step in above:
        holder = holder[step]
    holder[last] = value
    return copy


class TestDocument:
    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("device", "x y"),
            ("macs", 10**400),
            ("macs", 0),
            ("kind", "aoti"),
            ("num_classes", 7),
            ("source", [1]),
            ("recipe", "x"),
            ("measured", {"agreement": float("nan")}),
            ("model.name", "\ud800"),
            ("model.name", "a\nb"),
            ("model.preprocessing.crop_pct", 0.001),
            ("input.shape", [None, 3, 2**40, 24]),
            ("input.dtype", "complex64"),
            ("plan.prefix_tokens", -1),
        ],
    )
    def test_an_invalid_value(self, key: str, value: Any, folder: Path) -> None:
        path = folder / "vit.onnx"
        set_onnx(path, json.dumps(changed(document_of(path), key, value)))
        with pytest.raises(CheckpointError, match="metadata is damaged"):
            open_exported(path)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("input.name", "other"),
            ("input.dtype", "float16"),
            ("input.shape", [2, 3, 24, 24]),
            ("output.name", "other"),
            ("output.dtype", "float16"),
            ("output.shape", [None, 2, 4]),
        ],
    )
    def test_another_graph_than_the_document_says(self, key: str, value: Any, folder: Path) -> None:
        path = folder / "vit.onnx"
        set_onnx(path, json.dumps(changed(document_of(path), key, value)))
        with pytest.raises(CheckpointError, match="input and output of its graph are not those"):
            open_exported(path)


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
