"""Instruction sets of the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from repshift_cli.measure import cpu


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    cpu.cpu_features.cache_clear()
    yield
    cpu.cpu_features.cache_clear()


@pytest.mark.parametrize(
    ("text", "features", "warns"),
    [
        ("flags\t\t: fpu avx2\nvmx flags : x\n", {"fpu", "avx2"}, True),
        ("flags : avx2 avx_vnni\n", {"avx2", "avx_vnni"}, False),
        ("Features : asimd asimddp\n", {"asimd", "asimddp"}, False),
        (None, set(), False),
    ],
)
def test_features_of_the_cpu_decide_the_note_on_int8(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None, features: set[str], warns: bool
) -> None:
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(cpu, "_CPUINFO", tmp_path / "cpuinfo")
    assert cpu.cpu_features() == features
    assert (cpu.int8_note() is not None) == warns
