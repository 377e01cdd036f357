"""Shared parts of image and video evaluations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from repshift_cli.errors import CheckFailed, UsageError

__all__ = [
    "Skipped",
    "explained_memory",
    "finite",
    "in_turn",
    "per_second",
]


@dataclass(frozen=True)
class Skipped:
    """A picture that took no part, and why."""

    sample: str
    reason: str


def per_second(count: int, seconds: float) -> float:
    """A rate; 0 where no time has passed."""
    return count / seconds if seconds > 0 else 0.0


def in_turn(names: list[str], turn: int) -> list[str]:
    """The names, every second time in reverse, so that none always runs on the warmer caches."""
    return names[::-1] if turn % 2 else names


def finite(name: str, values: Tensor) -> Tensor:
    """The values as they are.

    Raises:
        CheckFailed: one is not finite; `name` is what the model is called.
    """
    if not bool(torch.isfinite(values).all()):
        raise CheckFailed(
            f"{name}: the model returns values that are not finite in {str(values.dtype).removeprefix('torch.')}",
            "Evaluate with --dtype float32 or bfloat16; if that fails as well, the weights are damaged.",
        )
    return values


@contextmanager
def explained_memory(what: str) -> Iterator[None]:
    """Turn an error of the device's memory into one that says what to do; `what` is in memory at a time."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UsageError(f"the device has not enough memory for {what} at a time", "Lower --batch-size.") from error
