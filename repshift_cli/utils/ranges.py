"""Ranges of numbers that the commands and the Python API accept."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from repshift_cli.errors import UsageError

RANGES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "agreement": (0, 1),
        "batch_size": (1, 65_536),
        "blocks": (1, 1000),
        "calibration_images": (8, 10_000),
        "checkpoint_frames": (1, 1024),
        "evaluations": (1, 100_000),
        "frame_step": (1, 1024),
        "frames": (1, 1024),
        "heads": (1, 1024),
        "images": (1, 1_000_000),
        "img_size": (1, 4096),
        "limit": (1, 10_000_000),
        "min_runs": (1, 100_000),
        "patch_tokens": (1, 1_000_000),
        "prefix_tokens": (0, 1000),
        "recover": (1, 1000),
        "rerank_k": (1, 65_536),
        "search_images": (16, 10_000),
        "seconds": (0, 86_400),
        "seed": (0, 2**31 - 1),
        "threads": (1, 1024),
        "workers": (0, 256),
    }
)
"""The lowest and the highest value by name."""


def check_ranges(**values: float | None) -> None:
    """Raise a UsageError for a value that is not None and not in its range, NaN among them."""
    for name, value in values.items():
        low, high = RANGES[name]
        if value is not None and not low <= value <= high:
            raise UsageError(f"invalid {name.replace('_', ' ')} {value}", f"Allowed are {low} to {high}.")
