"""Timing of the scripts: pieces of a model in turn, and whole models on this CPU."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from repshift_cli.benchmark.report import MemoryFormat
from repshift_cli.benchmark.run import BenchSettings

WARMUP = 10


def timed(group: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each function, run in turn after a warm-up."""
    samples: dict[str, list[float]] = {name: [] for name in group}
    for done in range(WARMUP + rounds):
        for name, run in group.items():
            begin = time.perf_counter()
            run()
            if done >= WARMUP:
                samples[name].append(time.perf_counter() - begin)
    return {name: statistics.median(found) for name, found in samples.items()}


def pieces_parser(doc: str | None, batches: Sequence[int], rounds: int) -> argparse.ArgumentParser:
    """Options of a script that times pieces of a model: batch sizes, how many rounds, threads, whether to publish."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--batches", nargs="+", type=int, default=list(batches))
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dry-run", action="store_true", help="print the page, write no file")
    return parser


def cpu_settings(
    options: argparse.Namespace, dtype: torch.dtype = torch.float32, memory_format: MemoryFormat = "contiguous"
) -> BenchSettings:
    """Settings from the options `--seconds`, `--min-runs` and `--threads`, on the CPU."""
    return BenchSettings(
        device=torch.device("cpu"),
        dtype=dtype,
        seconds=options.seconds,
        min_runs=options.min_runs,
        threads=options.threads,
        memory_format=memory_format,
    )
