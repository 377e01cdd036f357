"""`repshift demo` in a process of its own."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from paths import ROOT

ONNX = ("vit_digits_dense.onnx", "vit_digits_repshift.onnx")
FILES = {"vit_digits_repshift.safetensors", "kept_tokens.png", "report.html", "report.json", *ONNX}


def call(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "repshift_cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "80", "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder where the demo ran, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    done = call("demo", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def commands(printed: str) -> list[list[str]]:
    """The commands that the demo prints, as words."""
    joined = printed.replace("\\\n", " ")
    return [shlex.split(line[2:]) for line in joined.splitlines() if line.startswith("$ ")]


@pytest.mark.slow
def test_writes_everything_into_one_folder(run: tuple[Path, str]) -> None:
    folder, _ = run
    assert {path.name for path in (folder / "repshift_demo").iterdir()} == FILES
    assert (folder / "repshift_demo" / "kept_tokens.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_results(run: tuple[Path, str]) -> None:
    folder, _ = run
    report = json.loads((folder / "repshift_demo" / "report.json").read_text())
    assert report["seconds"] > 0
    summary = report["summary"]
    assert summary["top1"]["dense"] > 80
    assert summary["top1"]["compressed"] > summary["top1"]["dense"] - 5
    assert summary["ratio_macs"] == report["compress"]["ratio"]["macs"] > 1.3
    assert report["eval"]["images"] == 1000
    assert report["eval"]["top1"] == summary["top1"]["compressed"]
    assert report["eval"]["dense"]["top1"] == summary["top1"]["dense"]
    assert [(entry["runtime"], entry["batch"]) for entry in summary["speedup"]] == [("torch", 32), ("onnx", 1)]
    assert {entry["name"] for entry in report["bench_onnx"]["runs"]} == {Path(name).stem for name in ONNX}
    assert {entry["name"] for entry in report["bench"]["runs"]} == {"dense", "compressed"}
    assert report["compress"]["search"]["met"]
    assert report["compress"]["search"]["limit"]["reached"] <= 1
    assert len(report["visualize"]["images"]) == 6


@pytest.mark.slow
def test_fits_80_columns_and_ends_with_a_summary(run: tuple[Path, str]) -> None:
    _, printed = run
    assert max(len(line.rstrip()) for line in printed.splitlines()) <= 80
    summary = printed[printed.index("Summary ---") :]
    share = r"[\d.]+% \[[\d.]+-[\d.]+\]"
    assert re.search(rf"accuracy  {share} dense -> {share} compressed\n +on 1000 test scenes", summary)
    assert re.search(r"batch 1, ONNX Runtime: (no speed-up|[\d.]+x faster)", summary)
    assert re.search(r"batch 32: (no speed-up|[\d.]+x faster)", summary)
    for name in FILES - {ONNX[0]}:
        assert name in summary


@pytest.mark.slow
def test_the_printed_commands_work(run: tuple[Path, str]) -> None:
    folder, printed = run
    steps = commands(printed)
    assert [words[:2] for words in steps] == [
        ["repshift", name] for name in ("compress", "eval", "bench", "export", "export", "bench", "visualize", "report")
    ] + [["repshift", "compress"], ["repshift", "export"]]
    report = json.loads((folder / "repshift_demo" / "report.json").read_text())
    evaluated = call(*steps[1][1:], "--json", cwd=folder)
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["top1"] == report["eval"]["top1"]
    shown = call(*steps[6][1:], "--json", "--force", cwd=folder)
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["images"] == report["visualize"]["images"]
    for index in (0, 2, 3, 4, 5):
        tried = call(*steps[index][1:], "--help", cwd=folder)  # options are checked for their names at least
        assert tried.returncode == 0, tried.stderr


@pytest.mark.slow
def test_files_of_an_earlier_run_are_kept(run: tuple[Path, str]) -> None:
    folder, _ = run
    before = {path: path.stat().st_mtime_ns for path in (folder / "repshift_demo").iterdir()}
    done = call("demo", cwd=folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Add --force" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in (folder / "repshift_demo").iterdir()} == before


@pytest.mark.slow
def test_json_is_one_document(tmp_path: Path) -> None:
    done = call("demo", "--output-dir", "new/folder", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document == json.loads((tmp_path / "new" / "folder" / "report.json").read_text())
    assert document["files"]["model"] == "new/folder/vit_digits_repshift.safetensors"


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("precious")
    done = call("demo", "--output-dir", "taken", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "is a file, not a folder" in done.stderr
    done = call("demo", "--output-dir", "taken/below", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "cannot create the folder" in done.stderr
    assert (tmp_path / "taken").read_text() == "precious"


def test_long_commands_break_before_an_option() -> None:
    from repshift_cli.cli.demo import _command_lines

    folder = "a folder/" + "x" * 60
    lines = _command_lines(["repshift", "compress", "builtin:vit-digits", "--output", folder, "--seconds", "2"])
    assert lines[0].startswith("$ repshift compress builtin:vit-digits")
    assert [line.endswith("\\") for line in lines] == [True] * (len(lines) - 1) + [False]
    (words,) = commands("\n".join(lines))
    assert words == ["repshift", "compress", "builtin:vit-digits", "--output", folder, "--seconds", "2"]


def test_without_onnx_runtime_the_summary_says_what_to_install(capsys: pytest.CaptureFixture[str]) -> None:
    from repshift_cli.cli.demo import _Files, _show_summary

    score = SimpleNamespace(top1=97.5, top1_interval=(96.0, 98.5))
    evaluation: Any = SimpleNamespace(scores={"dense": score, "compressed": score}, images=1000)
    timing: Any = SimpleNamespace(ratios=[SimpleNamespace(batch=32, speedup="1.90x faster")])
    _show_summary(evaluation, {"torch": timing}, {"dense": 10**9, "compressed": 4 * 10**8}, _Files(Path("demo")), 50.0)
    printed = capsys.readouterr().out
    assert "batch 32: 1.90x faster\n          batch 1: needs ONNX Runtime: pip install" in printed
    assert ".onnx" not in printed
    assert max(map(len, printed.splitlines())) <= 80
