"""Equal runs with SOURCE_DATE_EPOCH write equal files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from outcome import Command, explained

from repshift_cli.checkpoints.artifact import write_tensors
from repshift_cli.utils.files import sha256_of


def test_equal_runs_write_equal_checkpoints(
    cli: Command, dense: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    for name in ("a.safetensors", "b.safetensors"):
        outcome = cli("compress", dense, "-r", recipe, "--seconds", "0", "-b", "2", "-o", name)
        assert outcome.rc == 0, outcome.stderr
        assert "ms" in outcome.stdout  # timings are printed
    assert sha256_of(Path("a.safetensors")) == sha256_of(Path("b.safetensors"))
    shown = cli("inspect", "a.safetensors")
    assert "made     1970-01-02 by" in shown.stdout
    assert "speed " not in shown.stdout
    measured = json.loads(cli("inspect", "a.safetensors", "--json").stdout)["provenance"]["measured"]
    assert measured["dense"]["latency_ms"] is measured["ratio"]["latency"] is None
    assert measured["ratio"]["macs"] > 1


def test_metadata_is_written_in_one_order(tmp_path: Path) -> None:
    import torch

    digests = set()
    for index in range(12):  # the order of safetensors is random
        path = tmp_path / str(index)
        write_tensors(path, {"a": torch.zeros(2), "é": torch.ones(1)}, {"model": "\u2028é"})
        digests.add(sha256_of(path))
    assert len(digests) == 1


def test_an_invalid_time_is_refused(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "today")
    explained(cli("doctor"), 2, "invalid SOURCE_DATE_EPOCH=today: must be an integer")
