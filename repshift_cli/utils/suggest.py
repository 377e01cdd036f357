"""Suggesting the closest allowed name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, words: Iterable[str]) -> str:
    """`Did you mean X? ` for the closest of `words`, or an empty string."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f"Did you mean {close[0]}? " if close else ""
