"""Geometry of the plots, which the template draws as SVG. Lengths are those of the view box."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from repshift_cli.report.parts import Point, Search, Spread

WIDTH = 400.0
_LEFT, _RIGHT = 46.0, 12.0
_TOP, _HEIGHT = 22.0, 130.0
_LABEL = 27.0
"""Least distance of two labels."""

_TICKS = 4


@dataclass(frozen=True)
class Tick:
    """A label of an axis at a place on it."""

    at: float
    text: str


@dataclass(frozen=True)
class Bar:
    """The tokens that enter a block; `label` is left out where it would repeat or touch another."""

    x: float
    y: float
    width: float
    height: float
    block: int
    tokens: int
    label: str
    tick: str


@dataclass(frozen=True)
class Bars:
    """Tokens per block as a share of the dense model's; all bars stand on `bottom`."""

    bars: tuple[Bar, ...]
    top: float
    bottom: float
    ticks: tuple[Tick, ...]


def bar_plot(tokens: Mapping[int, int], dense: Mapping[int, int]) -> Bars:
    """The tokens that enter each block, by its index, of the compressed and of the dense model."""
    step = (WIDTH - _LEFT - _RIGHT) / len(tokens)
    bottom, bars = _TOP + _HEIGHT, []
    labelled, ticked, before = -_LABEL, -_LABEL, None
    for place, (block, count) in enumerate(tokens.items()):
        middle = _LEFT + (place + 0.5) * step
        new = count != before and middle - labelled >= _LABEL
        labelled = middle if new else labelled
        shown = middle - ticked >= _LABEL * 0.8
        ticked = middle if shown else ticked
        height = _HEIGHT * min(1.0, count / dense[block])
        texts = str(count) if new else "", str(block) if shown else ""
        bars.append(Bar(middle - 0.4 * step, bottom - height, 0.8 * step, height, block, count, *texts))
        before = count
    ticks = tuple(Tick(bottom - share * _HEIGHT / 100, f"{share}%") for share in (0, 50, 100))
    return Bars(tuple(bars), _TOP, bottom, ticks)


@dataclass(frozen=True)
class Interval:
    """From p10 to p90 with the median."""

    name: str
    low: float
    middle: float
    high: float
    label: str


def interval_plot(spreads: Mapping[str, Spread]) -> tuple[list[Interval], list[Tick]]:
    """Latencies in milliseconds on an axis that starts at 0."""
    left, high = 96.0, 1.05 * max(max(each.p90, each.median) for each in spreads.values())
    scale = (WIDTH - left - _RIGHT) / high

    def at(value: float) -> float:
        return left + value * scale

    rows = [
        Interval(name, at(each.p10), at(each.median), at(each.p90), f"{milliseconds(each.median)} ms")
        for name, each in spreads.items()
    ]
    return rows, [Tick(at(value), f"{value:g}") for value in nice_values(0.0, high)]


@dataclass(frozen=True)
class Mark:
    """A schedule with its name."""

    kind: str
    name: str
    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Scatter:
    """Quality against MACs. `front` are points of the half for selection, `marks` those of the held-out half."""

    label: str
    marks: tuple[Mark, ...]
    front: tuple[Mark, ...]
    line: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    top: float
    bottom: float
    left: float
    right: float


NAMES = {
    "dense": "dense",
    "paper": "the paper's schedule",
    "found": "found",
    "random": "found, dropped at random",
    "given": "layers of the recipe",
}
"""Labels of the named schedules."""


def scatter_plot(search: Search) -> Scatter | None:
    """The schedules of a search, each against the dense model on the same images; None without a dense model."""
    held_out = {name: search.points.get(name) for name in ("dense", "paper", "random", "found")}
    named = {name: point for name, point in held_out.items() if point is not None}
    if "dense" not in named:
        return None
    label, quality = _quality(search, named["dense"])
    found = {name: (point.macs, quality(point, named["dense"])) for name, point in named.items()}
    reference = search.selection.get("dense")
    front = [(point.macs, quality(point, reference)) for point in search.front] if reference else []
    values = [*found.values(), *front]
    low_x, low_y = min(x for x, _ in values), min(y for _, y in values)
    high_y = max(low_y + 1e-3, *(y for _, y in values))
    x_range = max(0.0, low_x - 0.08), max(1.04, *(x for x, _ in values))
    y_range = low_y - 0.08 * (high_y - low_y), high_y + 0.08 * (high_y - low_y)
    left, right, top, bottom = _LEFT + 8, WIDTH - _RIGHT, _TOP, _TOP + 1.6 * _HEIGHT

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x_range[0]) / (x_range[1] - x_range[0]), (y - y_range[0]) / (y_range[1] - y_range[0])
        return left + across * (right - left), bottom - up * (bottom - top)

    def mark(kind: str, name: str, value: tuple[float, float]) -> Mark:
        return Mark(kind, name, *place(*value), f"{name}: {value[0]:.3f} of the MACs, {value[1]:.2f} {label}")

    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*value) for value in front))
    return Scatter(
        label=label,
        marks=tuple(mark(name, NAMES[name], value) for name, value in found.items()),
        front=tuple(mark("front", "front", value) for value in front),
        line=line,
        x_ticks=tuple(Tick(place(value, low_y)[0], f"{value:g}") for value in nice_values(*x_range)),
        y_ticks=tuple(Tick(place(low_x, value)[1], f"{value:g}") for value in nice_values(*y_range)),
        top=top,
        bottom=bottom,
        left=left,
        right=right,
    )


def _quality(search: Search, dense: Point) -> tuple[str, Callable[[Point, Point], float]]:
    """The label of the quality, and its value for a point and the dense model on the same images."""
    if search.target.startswith("max-drop") and dense.top1 is not None:
        return "points of top-1 against dense", lambda point, own: (point.top1 or 0.0) - (own.top1 or 0.0)
    if dense.agreement is not None:
        return "% of predictions unchanged", lambda point, _: 100 * (point.agreement or 0.0)
    if search.target.startswith("recall"):
        return "% of nearest neighbours found", lambda point, _: 100 * (point.recall or 0.0)
    return "cosine of features to dense", lambda point, _: 1 - point.kl


def nice_values(low: float, high: float) -> list[float]:
    """A few round numbers from low to high."""
    raw = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def milliseconds(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"  # noqa: PLR2004
