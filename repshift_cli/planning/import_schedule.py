"""Import a schedule as the field writes it: ratios per block, ToMe's `r`, or DiffRate's kept counts. Text in, YAML out.

Nothing is evaluated: a regular expression finds names, lists and numbers.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import Any, Final, Literal, NamedTuple

import yaml

from repshift_cli.errors import UsageError
from repshift_cli.planning.recipe import Recipe
from repshift_cli.utils.ranges import RANGES, check_ranges

Kind = Literal["ratios", "counts", "kept"]
"""Share of the tokens to drop, number of tokens to merge, or number of tokens that are kept."""

_DIFFRATE: Final = ("merge_kept_num", "prune_kept_num")
"""Names of DiffRate's files. Their lists have one number for each block and count the class token."""

_NAMES: dict[str, Kind] = {
    "drop_r": "ratios",
    "drop_ratios": "ratios",
    "r": "counts",
    "merge_kept_num": "kept",
    "prune_kept_num": "kept",
}

_ENTRY = re.compile(
    r"""["']?(?:(?<!\w)(?P<name>[a-zA-Z_]\w*)["']?\s*[=:]\s*)?"""
    r"""["']?(?:[\[(](?P<list>[^\[\]()]*)[\])]|(?P<one>[-+.\d][\w.+-]*))["']?"""
)
_MOST_CHARACTERS, _MOST_TOKENS = 1 << 16, RANGES["patch_tokens"][1]
_EXAMPLES = "Examples: drop_r=[0.2,0,0,0.2], r=13, merge_kept_num=[197,194,176]."

_COMPONENTS: dict[Kind, tuple[str, dict[str, str], str]] = {
    "ratios": (
        "The numbers are shares of the tokens to drop after each block. The metric is left to calibration.",
        {"kind": "representation_shift"},
        "prune",
    ),
    "counts": (
        "The numbers are tokens to merge in each block, at most half of the patches. ToMe merges before the MLP of a "
        "block, this recipe after it. No score is used.",
        {"kind": "random"},
        "bipartite",
    ),
    "kept": (
        "The numbers are tokens that each block keeps. DiffRate prunes and merges by class attention before the MLP of "
        "a block, this recipe merges after it.",
        {"kind": "class_attention", "polarity": "largest"},
        "merge",
    ),
}
"""By kind: a comment, the metric and the reducer."""


class _Entry(NamedTuple):
    """A number, or a list of them, and its name, which may be empty."""

    name: str
    values: list[int | float]
    is_list: bool

    def __str__(self) -> str:
        numbers = ", ".join(map(str, self.values))
        return f"{self.name or 'schedule'}={f'[{numbers}]' if self.is_list else numbers}"


def import_schedule(
    text: str,
    kind: Kind | None = None,
    *,
    blocks: int | None = None,
    tokens: int | None = None,
    prefix: int | None = None,
) -> str:
    """Convert a schedule to a recipe in YAML, with a comment that says where it came from.

    Args:
        text: `drop_r=[0.2, 0, 0, 0.2]`, `r=13`, `r=[13, 13]`, `{"merge_kept_num": "[197, 194]"}`, or only the list.
        kind: what the numbers are; None for what their name says.
        blocks: blocks of the model. Required for one number, which is for each block. A list of counts may be shorter;
            one of ratios may not.
        tokens: patch tokens of the model. Required for counts and kept counts.
        prefix: class and other prefix tokens in kept counts; None for 1 if the name is one of DiffRate's.

    Raises:
        UsageError: the text is no schedule, a number is out of range, or an argument is missing.
    """
    check_ranges(blocks=blocks, patch_tokens=tokens, prefix_tokens=prefix)
    entry = _parse(text)
    kind = kind or _kind_of(entry)
    values = _per_block(entry, kind, blocks)
    comment, metric, reducer = _COMPONENTS[kind]
    sizes = f" for {tokens} patch tokens" if tokens else ""
    comments = [f"Imported from {entry}{sizes} by `repshift recipes import`.", comment]
    data: dict[str, Any] = {"version": 1, "metric": metric, "reducer": {"kind": reducer}}
    if kind == "ratios":
        data["drop_ratios"] = values
    else:
        if blocks == len(values) or entry.name in _DIFFRATE:
            comments.append("The last block is left out: fewer tokens behind it save nothing.")
            values = values[:-1]
        data["layers"] = _layers(entry, kind, values, tokens, prefix)
    if not any(data.get("drop_ratios") or data["layers"]):
        raise UsageError(f"{entry} drops nothing")
    lines = [f"# {line}\n" for comment in comments for line in textwrap.wrap(comment, 110)]
    dumped = yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=100)
    return Recipe.parse("".join(lines) + dumped, "imported recipe").text


def _parse(text: str) -> _Entry:
    """The entry of a text; of DiffRate's two lists, that after merging."""
    text = text[: _MOST_CHARACTERS + 1]
    found = [
        _Entry(match["name"] or "", _numbers(match["one"] or match["list"]), match["one"] is None)
        for match in _ENTRY.finditer(text)
    ]
    found = [entry for entry in found if entry.name == "merge_kept_num"] or found
    if len(found) != 1 or len(text) > _MOST_CHARACTERS or _ENTRY.sub("", text).strip(" \t\r\n{},"):
        raise UsageError("invalid schedule: must be one number or one list, with or without a name", _EXAMPLES)
    return found[0]


def _numbers(text: str) -> list[int | float]:
    parts = [part.strip() for part in text.rstrip(", \t\r\n").split(",")]
    try:
        return [int(part) if re.fullmatch(r"[-+]?\d+", part) else float(part) for part in parts]
    except ValueError:
        raise UsageError("invalid schedule: not a list of numbers", _EXAMPLES) from None


def _kind_of(entry: _Entry) -> Kind:
    """What the name says. A ratio called `r` may be one to drop or to keep."""
    kind = _NAMES.get(entry.name)
    if kind is None or (kind == "counts" and not all(isinstance(value, int) for value in entry.values)):
        raise UsageError(
            f"the kind of the numbers is unknown: {entry}",
            "Add --kind ratios (share to drop), --kind counts (tokens to merge) or --kind kept (tokens that remain).",
        )
    return kind


def _per_block(entry: _Entry, kind: Kind, blocks: int | None) -> list[int | float]:
    """The numbers, one per block, in their range."""
    for value in entry.values:
        if kind == "ratios" and not 0 <= value < 1:
            raise UsageError(f"invalid ratio {value} in {entry}: must be in [0, 1)")
        if kind != "ratios" and not (isinstance(value, int) and 0 <= value <= _MOST_TOKENS):
            raise UsageError(
                f"invalid number of tokens {value} in {entry}: must be an integer from 0 to {_MOST_TOKENS}"
            )
    if not entry.is_list:
        if blocks is None:
            raise UsageError(f"{entry} is for each block, and the number of blocks is unknown", "Add --blocks.")
        return entry.values * blocks
    given, most = len(entry.values), blocks or RANGES["blocks"][1]
    if given > most or (kind == "ratios" and blocks and given < blocks):
        raise UsageError(f"the schedule has {given} numbers, but the model has {blocks or f'at most {most}'} blocks")
    return entry.values


def _layers(
    entry: _Entry, kind: Kind, values: Sequence[int | float], tokens: int | None, prefix: int | None
) -> list[dict[str, int]]:
    """Entries of `layers` for counts and kept counts. As in DiffRate, a block never keeps more than reach it."""
    if tokens is None:
        raise UsageError("the number of patch tokens of the model is unknown", "Add --tokens, such as 196.")
    if kind == "kept" and prefix is None and entry.name not in _DIFFRATE:
        raise UsageError(
            f"unknown whether the class token is counted in {entry}",
            "Add --prefix 1 if it is, as in DiffRate's files, else --prefix 0.",
        )
    prefix = 1 if prefix is None else prefix
    layers, left = [], tokens
    for index, value in enumerate(map(int, values)):
        kept = left - min(value, left // 2) if kind == "counts" else min(left, value - prefix)
        if kept < 1 or (kind == "kept" and value > tokens + prefix):
            raise UsageError(
                f"block {index} cannot keep {value} of {tokens} patch tokens and {prefix} prefix tokens",
                "Check --tokens and --prefix.",
            )
        if kept < left:
            layers.append(
                {"layer": index, **({"drop_tokens": left - kept} if kind == "counts" else {"keep_tokens": kept})}
            )
        left = kept
    return layers
