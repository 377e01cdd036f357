"""Shells complete commands and options."""

from __future__ import annotations

import pytest
from outcome import Command


def test_bash_completes(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_REPSHIFT_COMPLETE", "complete_bash")
    cases = {"repshift ben": "bench", "repshift bench -b 1 -b 2 --thr": "--threads", "repshift recipes sh": "show"}
    for typed, found in cases.items():
        monkeypatch.setenv("COMP_WORDS", typed)
        monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
        outcome = cli()
        assert (outcome.rc, outcome.stdout.split(), outcome.stderr) == (0, [found], "")
