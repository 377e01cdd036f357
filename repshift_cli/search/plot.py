"""The picture of a search: quality against cost, with the dense model, the paper's schedule and the found one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from repshift_cli.utils.files import atomic_output

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["MARKS", "Chart", "Limit", "Mark", "Point", "Style", "figure", "front", "save"]

Axis = Literal["macs", "latency"]


@dataclass(frozen=True)
class Point:
    """One schedule: what it costs and what it keeps.

    Attributes:
        macs: multiply-accumulates, as a fraction of the dense model's.
        latency: time for a batch, as a fraction of the dense model's; None where it was not measured.
        quality: what the vertical axis shows, larger is better.
    """

    macs: float
    latency: float | None
    quality: float


@dataclass(frozen=True)
class Mark:
    """A schedule with a name of its own: one of `MARKS`."""

    role: str
    label: str
    point: Point


@dataclass(frozen=True)
class Limit:
    """The target, on the axis that it is on."""

    axis: Literal["macs", "latency", "quality"]
    value: float


@dataclass(frozen=True)
class Style:
    """How a mark is drawn; shapes differ as well, since colours alone do not tell everyone.

    Attributes:
        size: in points; the paper's is larger, so that it shows where the found schedule is the same.
    """

    color: str
    shape: str
    size: float = 8.0


MARKS = {
    "dense": Style("#4d4d4d", "s"),
    "paper": Style("#d55e00", "^", 11.0),
    "found": Style("#0072b2", "o"),
}
"""By role."""

_TRIED, _FRONT, _LIMIT = "#b3b3b3", "#56b4e9", "#009e73"
_PANEL_INCHES, _HEIGHT_INCHES = 4.6, 4.0
_DPI = 150
_AXES: dict[Axis, str] = {"macs": "MACs, fraction of dense", "latency": "latency, fraction of dense"}


@dataclass(frozen=True)
class Chart:
    """What is drawn.

    Attributes:
        title: one line.
        quality: what the vertical axis says, with its unit.
        marks: the schedules that have names.
        tried: all schedules that the search looked at.
        limit: the target; None for no line.
    """

    title: str
    quality: str
    marks: tuple[Mark, ...]
    tried: tuple[Point, ...]
    limit: Limit | None = None


def front(points: Sequence[Point], axis: Axis = "macs") -> list[Point]:
    """The points that no other beats in both, the cheapest first; those without that cost are left out."""
    cost = _cost(axis)
    best: list[Point] = []
    for point in sorted((p for p in points if cost(p) is not None), key=lambda p: (cost(p), -p.quality)):
        if not best or point.quality > best[-1].quality:
            best.append(point)
    return best


def figure(chart: Chart) -> Figure:
    """Draw quality against MACs, and against latency beside it where more than the dense model was timed."""
    from matplotlib.figure import Figure

    timed = [p for p in (*chart.tried, *_named(chart)) if p.latency is not None]
    axes: list[Axis] = ["macs", "latency"] if len(timed) > 1 else ["macs"]
    page = Figure(figsize=(_PANEL_INCHES * len(axes), _HEIGHT_INCHES), layout="constrained", dpi=_DPI)
    panels = page.subplots(1, len(axes), sharey=True, squeeze=False)[0]
    for panel, axis in zip(panels, axes, strict=True):
        _draw(panel, chart, axis)
    panels[0].set_ylabel(chart.quality)
    legend = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    page.legend(
        legend.values(), legend.keys(), loc="outside lower center", ncols=len(legend), frameon=False, fontsize=8
    )
    page.suptitle(chart.title, fontsize=9)
    return page


def save(chart: Chart, path: Path, force: bool) -> None:
    """Draw into a file, in the format that its ending tells; errors as `files.atomic_output`."""
    with atomic_output(path, force) as temporary:
        figure(chart).savefig(temporary, format=path.suffix.lower().removeprefix("."), dpi=_DPI)


def _named(chart: Chart) -> list[Point]:
    return [mark.point for mark in chart.marks]


def _cost(axis: Axis) -> Callable[[Point], float | None]:
    def of(point: Point) -> float | None:
        return point.macs if axis == "macs" else point.latency

    return of


def _draw(panel: Axes, chart: Chart, axis: Axis) -> None:
    """One panel: everything that was tried, the front of it, then the named schedules on top."""
    cost = _cost(axis)
    tried = [(x, point.quality) for point in chart.tried if (x := cost(point)) is not None]
    if tried:
        label = "tried, on the half that chose"
        panel.scatter(*_columns(tried), s=12, color=_TRIED, linewidths=0, label=label, zorder=2)
    edge = [(x, point.quality) for point in front(chart.tried, axis) if (x := cost(point)) is not None]
    if len(edge) > 1:
        panel.step(*_columns(edge), where="post", color=_FRONT, linewidth=1.2, zorder=1, label="front of these")
    for mark in chart.marks:
        if (x := cost(mark.point)) is not None:
            style = MARKS[mark.role]
            panel.plot(
                [x],
                [mark.point.quality],
                style.shape,
                color=style.color,
                markersize=style.size,
                label=mark.label,
                zorder=3,
            )
    _draw_limit(panel, chart, axis)
    panel.set_xlabel(_AXES[axis])
    costs = [x for point in (*chart.tried, *_named(chart)) if (x := cost(point)) is not None]
    panel.set_xlim(max(0.0, min(costs) - 0.1), max(1.05, max(costs) * 1.05))
    panel.grid(color="#e6e6e6", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _columns(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in pairs], [y for _, y in pairs]


def _draw_limit(panel: Axes, chart: Chart, axis: Axis) -> None:
    """The target as a dashed line, in the panel whose axis it is on."""
    if chart.limit is None:
        return
    style: dict[str, Any] = {"color": _LIMIT, "linestyle": "--", "linewidth": 1, "label": "target", "zorder": 1}
    if chart.limit.axis == axis:
        panel.axvline(chart.limit.value, **style)
    elif chart.limit.axis == "quality":
        panel.axhline(chart.limit.value, **style)
