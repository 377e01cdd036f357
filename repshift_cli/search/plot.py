"""The plot of a search: quality against cost, with the dense model, the paper's schedule and the found one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from repshift_cli.utils.files import atomic_output

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from repshift_cli.search.result import Point

__all__ = ["MARKS", "Chart", "Mark", "figure", "front", "save"]

Axis = Literal["macs", "latency"]


class Mark(NamedTuple):
    """How a named schedule is drawn. Shapes differ too, for readers who cannot distinguish the colors."""

    label: str
    color: str
    shape: str
    size: float = 8.0


MARKS = {
    "dense": Mark("dense", "#4d4d4d", "s"),
    # larger, so that it shows behind the found schedule if both are the same
    "paper": Mark("the paper's schedule", "#d55e00", "^", 11.0),
    "found": Mark("found", "#0072b2", "o"),
}
"""By name of the schedule."""

_TRIED, _FRONT, _LIMIT = "#b3b3b3", "#56b4e9", "#009e73"
_PANEL_INCHES, _HEIGHT_INCHES = 4.6, 4.0
_DPI = 150
_AXES: dict[Axis, str] = {"macs": "MACs, fraction of dense", "latency": "latency, fraction of dense"}


@dataclass(frozen=True)
class Chart:
    """What is drawn.

    Attributes:
        label: of the vertical axis, with its unit.
        quality: value of a point on the vertical axis; larger is better.
        named: the schedules of `MARKS`.
        tried: all schedules that the search evaluated.
        limit: axis and value of the target; None for no line.
    """

    title: str
    label: str
    quality: Callable[[Point], float]
    named: Mapping[str, Point]
    tried: Sequence[Point] = ()
    limit: tuple[Literal["macs", "latency", "quality"], float] | None = None


def front(points: Sequence[Point], quality: Callable[[Point], float], axis: Axis = "macs") -> list[Point]:
    """The Pareto front, the cheapest first; points without that cost are left out."""
    best: list[Point] = []
    timed = [point for point in points if getattr(point, axis) is not None]
    for point in sorted(timed, key=lambda point: (getattr(point, axis), -quality(point))):
        if not best or quality(point) > quality(best[-1]):
            best.append(point)
    return best


def figure(chart: Chart) -> Figure:
    """Draw quality against MACs, and against latency if more than the dense model was timed."""
    from matplotlib.figure import Figure

    timed = [point for point in (*chart.tried, *chart.named.values()) if point.latency is not None]
    axes: list[Axis] = ["macs", "latency"] if len(timed) > 1 else ["macs"]
    page = Figure(figsize=(_PANEL_INCHES * len(axes), _HEIGHT_INCHES), layout="constrained", dpi=_DPI)
    panels = page.subplots(1, len(axes), sharey=True, squeeze=False)[0]
    for panel, axis in zip(panels, axes, strict=True):
        _draw(panel, chart, axis)
    panels[0].set_ylabel(chart.label)
    legend = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    page.legend(
        legend.values(), legend.keys(), loc="outside lower center", ncols=len(legend), frameon=False, fontsize=8
    )
    page.suptitle(chart.title, fontsize=9)
    return page


def save(chart: Chart, path: Path, force: bool) -> None:
    """Write the figure in the format of the file name; errors as `files.atomic_output`."""
    with atomic_output(path, force) as temporary:
        figure(chart).savefig(temporary, format=path.suffix.lower().removeprefix("."), dpi=_DPI)


def _draw(panel: Axes, chart: Chart, axis: Axis) -> None:
    """One panel: all tried schedules, their front, the named schedules and the target."""

    def columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
        return [getattr(point, axis) for point in points], [chart.quality(point) for point in points]

    tried = [point for point in chart.tried if getattr(point, axis) is not None]
    if tried:
        label = "tried, on the selection images"
        panel.scatter(*columns(tried), s=12, color=_TRIED, linewidths=0, label=label, zorder=2)
    edge = front(tried, chart.quality, axis)
    if len(edge) > 1:
        panel.step(*columns(edge), where="post", color=_FRONT, linewidth=1.2, zorder=1, label="front of these")
    named = {name: point for name, point in chart.named.items() if getattr(point, axis) is not None}
    for name, point in named.items():
        label, color, shape, size = MARKS[name]
        panel.plot(*columns([point]), shape, color=color, markersize=size, label=label, zorder=3)
    if chart.limit is not None and chart.limit[0] in (axis, "quality"):
        line = panel.axhline if chart.limit[0] == "quality" else panel.axvline
        style: dict[str, Any] = {"color": _LIMIT, "linestyle": "--", "linewidth": 1, "label": "target", "zorder": 1}
        line(chart.limit[1], **style)
    panel.set_xlabel(_AXES[axis])
    costs = columns([*tried, *named.values()])[0]
    panel.set_xlim(max(0.0, min(costs) - 0.1), max(1.05, max(costs) * 1.05))
    panel.grid(color="#e6e6e6", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
