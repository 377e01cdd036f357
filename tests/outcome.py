"""How a command ended, and that it said why."""

from __future__ import annotations

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
    """The command ended with this code, told all this on stderr, and printed no result and no traceback."""
    assert outcome.rc == rc, outcome.stderr
    assert outcome.stdout == ""
    assert "Traceback" not in outcome.stderr
    assert "unexpected" not in outcome.stderr
    said = " ".join(outcome.stderr.split())
    for word in words:
        assert word in said
