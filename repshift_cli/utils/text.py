"""Text for the user, also of untrusted files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_LONGEST_OPTION = 24
"""Longer options are fitted weights and are not shown."""


def visible(text: str) -> str:
    """The text with control characters, line breaks, surrogates and other invisible characters escaped."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def describe_tokens(tokens: int, grid: Sequence[int] | None) -> str:
    """The number of tokens, and the size of a feature map: `3136 (56x56)`."""
    return f"{tokens} ({grid[0]}x{grid[1]})" if grid else str(tokens)


def describe_metric(metric: Mapping[str, object]) -> str:
    """`mlp, l2, update, largest` for representation shift, kind and options for others, of a score inside its kind."""
    parts = (value["kind"] if isinstance(value, Mapping) else value for key, value in metric.items() if key != "kind")
    options = [str(part) for part in parts]
    values = ", ".join(option for option in options if len(option) <= _LONGEST_OPTION)
    return values if metric["kind"] == "representation_shift" else f"{metric['kind']} ({values})"
