"""How a command ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Command", "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """Exit code and everything that was printed."""

    rc: int
    stdout: str
    stderr: str


Command = Callable[..., Outcome]
