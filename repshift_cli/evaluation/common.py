"""Shared parts of image and video evaluations."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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


def check_table_suffix(option: str, path: Path, allowed: Sequence[str]) -> None:
    """Raise UsageError for a suffix that is not allowed, or if pyarrow is missing."""
    if path.suffix not in allowed:
        raise UsageError(f"{option} {path}: unknown suffix", f"Allowed are {' and '.join(allowed)}.")
    if path.suffix == ".parquet":
        import_pyarrow(str(path), allowed[0])


def import_pyarrow(what: str, other: str = ".npz") -> tuple[Any, Any]:
    """`pyarrow` and `pyarrow.parquet`; raises UsageError if they are missing."""
    if find_spec("pyarrow") is None:
        raise UsageError(
            f"{what}: parquet needs pyarrow, which is not installed",
            f"Run `pip install 'repshift-cli[parquet]'`, or use the suffix {other}.",
        )
    return import_module("pyarrow"), import_module("pyarrow.parquet")
