"""Small pieces of a model, timed in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

WARMUP = 10


def timed(group: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, in turn, after a warm-up."""
    samples: dict[str, list[float]] = {name: [] for name in group}
    for done in range(WARMUP + rounds):
        for name, run in group.items():
            begin = time.perf_counter()
            run()
            if done >= WARMUP:
                samples[name].append(time.perf_counter() - begin)
    return {name: statistics.median(found) for name, found in samples.items()}
