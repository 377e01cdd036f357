"""Shared parts of image and video evaluations."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from repshift_cli.errors import CheckFailed, UsageError
from repshift_cli.measure.device import out_of_memory, wait_for


@dataclass(frozen=True)
class Skipped:
    """A sample that could not be read, and why."""

    sample: str
    reason: str


def per_second(count: int, seconds: float) -> float:
    """Rate; 0 if no time has passed."""
    return count / seconds if seconds > 0 else 0.0


def alternate_order(names: list[str], turn: int) -> list[str]:
    """The names, reversed on every odd turn, so that no model always runs on warmer caches."""
    return names[::-1] if turn % 2 else names


def check_finite(name: str, values: Tensor) -> Tensor:
    """Return `values` unchanged; `name` is the model, for the message.

    Raises:
        CheckFailed: a value is NaN or infinite.
    """
    if not bool(torch.isfinite(values).all()):
        raise CheckFailed(
            f"{name}: the model returns values that are not finite in {str(values.dtype).removeprefix('torch.')}",
            "Evaluate with --dtype float32 or bfloat16. If that fails too, the weights are damaged.",
        )
    return values


def timed(run: Callable[[Tensor], Tensor], inputs: Tensor, device: torch.device) -> tuple[Tensor, float]:
    """The output of `run`, and the seconds until the device has computed it."""
    wait_for(device)
    started = time.perf_counter()
    output = run(inputs)
    wait_for(device)
    return output, time.perf_counter() - started


@contextmanager
def explain_out_of_memory(what: str) -> Iterator[None]:
    """Turn an out-of-memory error of the device into a UsageError; `what` is processed at a time, e.g. `8 videos`."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise UsageError(f"the device has not enough memory for {what} at a time", "Lower --batch-size.") from error
