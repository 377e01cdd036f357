"""The outcome of a command, and a check of its error message."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Command", "Outcome", "explained"]


@dataclass(frozen=True)
class Outcome:
    """Exit code and everything that was printed."""

    rc: int
    stdout: str
    stderr: str


Command = Callable[..., Outcome]


def explained(outcome: Outcome, rc: int, *words: str) -> None:
    """Assert the exit code and these words on stderr, no result and no traceback."""
    assert outcome.rc == rc, outcome.stderr
    assert outcome.stdout == "" or json.loads(outcome.stdout)["exit_code"] == rc
    assert "Traceback" not in outcome.stderr
    assert "unexpected" not in outcome.stderr
    said = " ".join(outcome.stderr.split())
    for word in words:
        assert word in said
