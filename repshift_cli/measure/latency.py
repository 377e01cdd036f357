"""Time models in turn and compare the medians."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from repshift_cli.measure.device import wait_for
from repshift_cli.utils.garbage import without_collection
from repshift_cli.utils.progress import Progress
from repshift_cli.utils.ranges import check_ranges
from repshift_cli.utils.stats import significant

_NAMED = 4
"""The most models whose names are in the line of progress."""


@dataclass(frozen=True)
class Spread:
    """Median and 10th and 90th percentile of `count` samples; latencies are in milliseconds."""

    median: float
    p10: float
    p90: float
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """The spread of samples; percentiles are interpolated linearly. Raises a ValueError without samples."""
        if not samples:
            raise ValueError("a spread needs at least one sample")
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        deciles = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(statistics.median(samples), deciles[0], deciles[-1], len(samples))

    @classmethod
    def of_seconds(cls, samples_s: Sequence[float]) -> Spread:
        """The spread in milliseconds of samples in seconds."""
        return cls.of([sample * 1e3 for sample in samples_s])

    def overlaps(self, other: Spread) -> bool:
        """Whether the intervals from p10 to p90 overlap."""
        return self.p10 <= other.p90 and other.p10 <= self.p90

    def to_dict(self) -> dict[str, float]:
        """Median, p10 and p90, each with four significant digits."""
        return {name: significant(getattr(self, name)) for name in ("median", "p10", "p90")}


@dataclass(frozen=True)
class Timing:
    """Seconds of each run of one subject; sample `i` is from round `i` for every subject."""

    samples_s: tuple[float, ...]

    @property
    def spread(self) -> Spread:
        """The spread in milliseconds."""
        return Spread.of_seconds(self.samples_s)

    @property
    def p99_ms(self) -> float:
        """The 99th percentile in milliseconds; close to the maximum for fewer than a hundred samples."""
        if len(self.samples_s) == 1:
            return self.samples_s[0] * 1e3
        return statistics.quantiles(self.samples_s, n=100, method="inclusive")[-1] * 1e3


@dataclass(frozen=True)
class Speedup:
    """How many times faster one subject is than another: the ratio of the median latencies.

    `p10` and `p90` are percentiles of the ratios within a round. Drift of the machine affects both runs of a round, so
    these are tighter than the two latency intervals (p10 to p90), of which `overlap` is whether they overlap.
    """

    ratio: float
    p10: float
    p90: float
    overlap: bool

    @property
    def clear(self) -> bool:
        """Clearly faster: the latency intervals do not overlap, or nine of ten rounds are faster."""
        return self.ratio > 1 and (not self.overlap or self.p10 > 1)

    @property
    def clearly_slower(self) -> bool:
        """Clearly slower, by the same criterion."""
        return self.ratio < 1 and (not self.overlap or self.p90 < 1)

    def __str__(self) -> str:
        # If only the paired rounds separate, they are shown.
        if self.clear:
            note = f", {self.p10:.2f}-{self.p90:.2f} in paired rounds" if self.overlap else ""
            return f"{self.ratio:.2f}x faster{note}"
        if self.clearly_slower:
            return f"no speed-up: {1 / self.ratio:.2f}x slower"
        return "no speed-up: the intervals overlap"


def compute_speedup(dense: Timing, compressed: Timing) -> Speedup:
    """How many times faster `compressed` is than `dense`; both from one call of `measure_latency`."""
    paired = Spread.of([a / b for a, b in zip(dense.samples_s, compressed.samples_s, strict=True)])
    before, after = dense.spread, compressed.spread
    return Speedup(before.median / after.median, paired.p10, paired.p90, before.overlaps(after))


@dataclass(frozen=True)
class Subject:
    """A function to be timed: one run on the inputs.

    `name` is unique among the subjects that are timed together. `context` is entered before the timer starts and exited
    after it stops, such as a switch to the dense model.
    """

    name: str
    run: Callable[[Tensor], Any]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


def full_batch(images: Tensor, batch_size: int) -> Tensor:
    """A batch of `batch_size` images, repeated if there are fewer."""
    repeats = -(-batch_size // len(images))
    return torch.cat([images] * repeats)[:batch_size].contiguous()


def measure_latency(
    subjects: Sequence[Subject],
    inputs: Tensor,
    *,
    max_seconds: float,
    warmup: int,
    progress: Progress,
    min_runs: int = 10,
) -> dict[str, Timing]:
    """Time the subjects in turn, so that drift of the machine affects all of them alike.

    One round runs every subject once; the order is reversed each time (A B, B A, ...). Gradients and the garbage
    collector are off. On CUDA the timer waits for the device.

    Args:
        inputs: of every subject; their device is synchronised.
        max_seconds: no new round starts after this time, once there are `min_runs`; without warm-up.
        warmup: rounds that are not counted.

    Returns timings by name. Raises ValueError for two subjects of the same name, UsageError for a limit out of range.
    """
    names = [subject.name for subject in subjects]
    if len(set(names)) != len(names):
        raise ValueError(f"subjects need different names, not {names}")
    check_ranges(min_runs=min_runs, seconds=max_seconds / len(names))
    samples: dict[str, list[float]] = {name: [] for name in names}
    label = f"timing {', '.join(names) if len(names) <= _NAMED else f'{len(names)} models'}"
    gc.collect()
    with torch.inference_mode(), without_collection(), progress.task(label, max(1, round(max_seconds))) as task:
        for turn in range(warmup):
            _round(subjects, inputs, turn)
        start, elapsed, turn = time.perf_counter(), 0.0, 0
        while turn < min_runs or elapsed < max_seconds:
            for name, seconds in _round(subjects, inputs, turn):
                samples[name].append(seconds)
            before, elapsed = elapsed, time.perf_counter() - start
            task.advance(int(min(elapsed, max_seconds)) - int(min(before, max_seconds)))
            turn += 1
    return {name: Timing(tuple(found)) for name, found in samples.items()}


def _round(subjects: Sequence[Subject], inputs: Tensor, turn: int) -> list[tuple[str, float]]:
    order = subjects if turn % 2 == 0 else list(reversed(subjects))
    return [(subject.name, _time_once(subject, inputs)) for subject in order]


def _time_once(subject: Subject, inputs: Tensor) -> float:
    with subject.context():
        wait_for(inputs.device)
        start = time.perf_counter()
        output = subject.run(inputs)
        wait_for(inputs.device)
        seconds = time.perf_counter() - start
        del output  # freed after the timer has stopped
    return seconds
