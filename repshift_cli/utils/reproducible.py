"""Outputs that are equal byte by byte for equal inputs: the variable SOURCE_DATE_EPOCH (reproducible-builds.org)."""

from __future__ import annotations

import os
from datetime import datetime, timezone
from typing import Any

from repshift_cli.errors import UsageError

VARIABLE = "SOURCE_DATE_EPOCH"
_TIMINGS = ("latency_ms", "throughput", "peak_memory_mb", "latency", "latency_clear")
"""Keys of the documents whose values differ between equal runs."""


def is_reproducible() -> bool:
    """Whether the user asks for outputs that do not differ between equal runs."""
    return bool(os.environ.get(VARIABLE))


def now() -> datetime:
    """The time that outputs state: that of SOURCE_DATE_EPOCH if it is set.

    Raises:
        UsageError: the variable is not a time.
    """
    text = os.environ.get(VARIABLE)
    try:
        return datetime.fromtimestamp(int(text), timezone.utc) if text else datetime.now(timezone.utc)
    except (ValueError, OverflowError, OSError) as error:
        raise UsageError(f"invalid {VARIABLE}={text}: must be an integer", "It has seconds since 1970.") from error


def without_timings(value: Any) -> Any:
    """A document, with null for what was timed if outputs must not differ between equal runs."""
    if not is_reproducible():
        return value
    if isinstance(value, dict):
        return {key: None if key in _TIMINGS else without_timings(inner) for key, inner in value.items()}
    return [without_timings(inner) for inner in value] if isinstance(value, list) else value
