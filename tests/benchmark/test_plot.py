"""Plots of benchmark reports."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from benches import SETTING, report, sweep_report

from repshift_cli.benchmark.plot import plot_report
from repshift_cli.benchmark.report import EndToEnd, Passes
from repshift_cli.measure.latency import Speedup


@pytest.mark.parametrize(("file_format", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_formats(tmp_path: Path, file_format: str, start: bytes) -> None:
    path = tmp_path / "without_ending"
    plot_report(report(), path, file_format)
    assert path.read_bytes().startswith(start)


def test_a_panel_for_each_setting(tmp_path: Path) -> None:
    times = ((2.0, 2.1), (1.0, 1.1))
    settings = [replace(SETTING, dtype=dtype, batch=batch) for dtype in ("float32", "bfloat16") for batch in (1, 8)]
    found = sweep_report(dict.fromkeys([*settings, replace(SETTING, compile="default")], times))
    passes = Passes(8, (2.0, 2.0), (0.5, 0.5))
    found = replace(found, end_to_end=(EndToEnd(settings[0], "photos", 0, passes, {"dense": passes}),))
    path = tmp_path / "a.svg"
    plot_report(found, path, "svg")
    text = path.read_text()
    for words in ("float32, attention auto, 224x224", "bfloat16", "compile default", "from image files"):
        assert f"<!-- {words}" in text or words in text


def test_unclear_speedups_have_no_number(tmp_path: Path) -> None:
    clear, path = report(), tmp_path / "a.svg"
    plot_report(clear, path, "svg")
    assert "2.00x" in path.read_text()
    noise = replace(clear.ratios[0], speedup=Speedup(2.0, 0.9, 2.5, overlap=True))
    plot_report(replace(clear, ratios=(noise,)), path, "svg")
    assert "2.00x" not in path.read_text()
