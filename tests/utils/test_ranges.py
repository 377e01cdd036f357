"""Ranges of numbers, in the options and in the Python API."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from outcome import Command, explained

from repshift_cli.benchmark.run import BenchSettings
from repshift_cli.checkpoints.options import ImageSize, LoadOptions
from repshift_cli.compression.settings import Settings
from repshift_cli.errors import UsageError
from repshift_cli.evaluation.video_text.settings import VideoSettings
from repshift_cli.measure.device import num_threads
from repshift_cli.utils.ranges import RANGES, check_ranges

CPU, FLOAT = torch.device("cpu"), torch.float32


@pytest.mark.parametrize("name", RANGES)
def test_both_ends_are_allowed_and_nothing_beyond(name: str) -> None:
    low, high = RANGES[name]
    check_ranges(**{name: low})
    check_ranges(**{name: high})
    check_ranges(**{name: None})
    for value in (low - 1, high + 1, 10**30, float("inf"), float("nan"), float("-inf")):
        with pytest.raises(UsageError, match=f"Allowed are {low} to {high}"):
            check_ranges(**{name: value})


@pytest.mark.parametrize(
    "make",
    [
        lambda: BenchSettings(CPU, FLOAT, seconds=float("inf")),
        lambda: BenchSettings(CPU, FLOAT, min_runs=9_999_999_999),
        lambda: ImageSize.of(16_384),
        lambda: LoadOptions(heads=-2),
        lambda: Settings(batch_size=10**12),
        lambda: Settings(seconds=float("nan")),
        lambda: Settings(calibration_images=10**9),
        lambda: VideoSettings(10**11, CPU, FLOAT),
        lambda: VideoSettings(8, CPU, FLOAT, rerank_k=0),
        lambda: num_threads(1_000_000).__enter__(),
    ],
)
def test_settings(make: Callable[[], object]) -> None:
    with pytest.raises(UsageError, match=r"Allowed are|must be from"):
        make()


@pytest.mark.parametrize(
    "arguments",
    [
        ("eval", "--workers", "9" * 20),
        ("eval", "--threads", "1000000"),
        ("eval", "-b", "1000000000000"),
        ("eval", "--limit", "99999999999"),
        ("eval", "--rerank-k", "99999999999"),
        ("bench", "--seconds", "inf"),
        ("bench", "--seconds", "nan"),
        ("bench", "--min-runs", "9999999999"),
        ("bench", "-b", "1,99999999999"),
        ("bench", "--img-size", "16384"),
        ("bench", "--img-size", "9" * 5000),
        ("compress", "x.safetensors", "--calibration-images", "1000000000"),
        ("search", "x.safetensors", "--images", "1000000000", "-t", "macs=0.7"),
        ("recipes", "show", "default", "--blocks", "100000000"),
    ],
    ids=" ".join,
)
def test_options(cli: Command, arguments: tuple[str, ...]) -> None:
    explained(cli(*arguments), 2)
