"""Suggest the nearest allowed value."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "nearest",
]


def nearest(word: str, words: Iterable[str]) -> str:
    """`Did you mean X? ` for a word that is close to one of `words`, else an empty string."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f"Did you mean {close[0]}? " if close else ""
