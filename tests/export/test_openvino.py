"""Folders with an OpenVINO IR: what they compute, what they hold, and which are refused."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openvino
import pytest
import torch
from exported import FAMILIES, export_to, inputs_for, open_family, stored
from outcome import Command

from repshift_cli.benchmark.run import BenchSettings, contenders_of, run_bench
from repshift_cli.checkpoints import artifact
from repshift_cli.checkpoints.exported import compile_ir, is_exported, open_any, open_exported
from repshift_cli.checkpoints.schema import ExportDocument
from repshift_cli.errors import CheckFailed, CheckpointError, UsageError
from repshift_cli.export.job import check
from repshift_cli.export.request import Request
from repshift_cli.utils.progress import Silent

XML, BIN = "openvino_model.xml", "openvino_model.bin"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny ViT, verified, in `vit`."""
    folder = tmp_path_factory.mktemp("openvino")
    export_to(open_family("timm_vit"), "openvino", folder / "vit")
    return folder


@pytest.fixture
def vit(made: Path, tmp_path: Path) -> Path:
    """A copy of `vit`, to be damaged."""
    shutil.copytree(made / "vit", tmp_path / "vit")
    return tmp_path / "vit"


def test_it_runs_in_openvino_alone(made: Path) -> None:
    assert sorted(path.name for path in (made / "vit").iterdir()) == [BIN, XML]
    model = openvino.Core().read_model(made / "vit" / XML)
    document = ExportDocument.model_validate_json(model.get_rt_info(["repshift"]).value)
    assert document.kind == "openvino"
    assert document.verified is not None
    assert document.verified.passed
    assert document.verified.kept_equal == 1.0
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    images = inputs_for(open_family("timm_vit"))
    found = compiled({"images": images.numpy()})["logits"]
    with torch.no_grad():
        wanted = artifact.load(stored(1))(images)
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_bench_compares_dense_and_compressed(made: Path, tmp_path: Path) -> None:
    export_to(open_family("timm_vit"), "openvino", tmp_path / "dense", dense=True, verify=False)
    opened = {folder.name: open_any(folder) for folder in (made / "vit", tmp_path / "dense")}
    settings = BenchSettings(torch.device("cpu"), torch.float32, seconds=0, min_runs=1, threads=1)
    report = run_bench(contenders_of(opened), [2], settings, Silent())
    assert [(ratio.name, ratio.against) for ratio in report.ratios] == [("vit", "dense")]
    assert {run.attention for run in report.runs} == {"openvino's own"}


def test_float32_stays_float32_and_threads_are_those_of_torch(made: Path) -> None:
    opened = open_exported(made / "vit" / XML)
    model, threads = openvino.Core().read_model(made / "vit" / XML), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        compiled = compile_ir(model, opened.runtime.document)
    finally:
        torch.set_num_threads(threads)
    assert compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 2


def test_other_commands_refuse_it(made: Path, cli: Command) -> None:
    assert is_exported(made / "vit")
    outcome = cli("visualize", made / "vit")
    assert outcome.rc == 3
    assert "is an exported file, which only bench, eval and inspect can open" in outcome.stderr


def flip(raw: bytes) -> bytes:
    return bytes([raw[0] ^ 1]) + raw[1:]


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        (XML, lambda raw: raw[: len(raw) // 2], "is not an OpenVINO IR, or is damaged"),
        (XML, lambda raw: b"", "is not an OpenVINO IR, or is damaged"),
        (XML, lambda raw: raw.replace(b'type="MatMul"', b'type="Unknown"'), "is not an OpenVINO IR, or is damaged"),
        (BIN, flip, f"{BIN} does not belong to {XML}, or is damaged"),
        (BIN, lambda raw: raw[: len(raw) // 2], "damaged"),
        (BIN, None, f"has no {BIN}"),
    ],
)
def test_damage(name: str, damage: Callable[[bytes], bytes] | None, words: str, vit: Path) -> None:
    path = vit / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=words) as caught:
        open_exported(vit)
    assert "Copy it again" in (caught.value.hint or "")


def set_document(folder: Path, change: Callable[[dict[str, Any]], None] | None) -> None:
    """Change the document of an IR, or remove it."""
    if change is None:
        text = (folder / XML).read_text(encoding="utf-8")
        (folder / XML).write_text(re.sub('<repshift value="[^"]*" ?/>', "", text), encoding="utf-8")
        return
    model = openvino.Core().read_model(folder / XML).clone()
    document = json.loads(model.get_rt_info(["repshift"]).value)
    change(document)
    model.set_rt_info(json.dumps(document), ["repshift"])
    openvino.save_model(model, folder / "changed.xml", compress_to_fp16=False)
    (folder / "changed.xml").replace(folder / XML)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (None, "was not written by `repshift export`"),
        (lambda document: document.update(kind="onnx"), "it names the kind onnx, but the content is openvino"),
        (lambda document: document["input"].update(name="x"), "are not those that its metadata names"),
        (lambda document: document["output"].update(dtype="float16"), "are not those that its metadata names"),
    ],
)
def test_another_model(change: Callable[[dict[str, Any]], None] | None, words: str, vit: Path) -> None:
    set_document(vit, change)
    with pytest.raises(CheckpointError, match=words):
        open_exported(vit)


def test_a_missing_package(made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else found(name))
    for call in (lambda: check(Request("openvino", tmp_path / "x")), lambda: open_exported(made / "vit")):
        with pytest.raises(UsageError, match="OpenVINO files need openvino") as caught:
            call()
        assert caught.value.hint == "Install it with: pip install 'repshift-cli[openvino]'"


def test_another_model_in_the_folder_is_kept(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"it has a config.json"):
        check(Request("openvino", tmp_path, force=True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "vim"])
def test_every_family(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    exported = export_to(open_family(family), "openvino", tmp_path / "x", dtype=dtype)
    assert exported.document.verified is not None
    opened = open_exported(tmp_path / "x")
    images = inputs_for(opened).to(dtype)
    with torch.no_grad():
        wanted = open_family(family).module.to(dtype)(images)
    limit = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(opened.module(images), wanted, rtol=limit, atol=limit)


@pytest.mark.slow
def test_other_kept_tokens_are_refused(tmp_path: Path) -> None:
    """OpenVINO 2026.4 computes Vim wrongly; a version that does not makes this test fail, and the docs change."""
    with pytest.raises(CheckFailed, match="of the kept positions are those of torch"):
        export_to(open_family("vim"), "openvino", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_force_replaces_it(vit: Path) -> None:
    before = (vit / XML).read_bytes()
    with pytest.raises(UsageError, match="already exists"):
        export_to(open_family("timm_vit"), "openvino", vit, batch=2)
    assert (vit / XML).read_bytes() == before
    export_to(open_family("timm_vit"), "openvino", vit, batch=2, force=True)
    assert open_exported(vit).runtime.document.input.shape[0] == 2
