"""The plot of a search: quality against cost, with the dense model, the paper's schedule and the found one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from repshift_cli.search.result import MeasuredSchedule, pareto_front
from repshift_cli.utils.figures import figure_format, write_figure
from repshift_cli.utils.files import atomic_output

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# shapes differ too, for readers who cannot distinguish the colors
MARKS: dict[str, dict[str, Any]] = {
    "dense": {"label": "dense", "color": "#4d4d4d", "marker": "s", "markersize": 8},
    # larger, so that it shows behind the found schedule if both are the same
    "paper": {"label": "the paper's schedule", "color": "#d55e00", "marker": "^", "markersize": 11},
    "found": {"label": "found", "color": "#0072b2", "marker": "o", "markersize": 8},
}
"""How a named schedule is drawn."""

_TRIED, _FRONT, _LIMIT = "#b3b3b3", "#56b4e9", "#009e73"
_PANEL_INCHES, _HEIGHT_INCHES = 4.6, 4.0
_DPI = 150


@dataclass(frozen=True)
class Chart:
    """What is drawn.

    Attributes:
        quality: value of a schedule on the vertical axis; larger is better.
        tried: all schedules that the search evaluated, on the same images as `named`.
        limit: axis and value of the target; None for no line.
    """

    title: str
    label: str
    quality: Callable[[MeasuredSchedule], float]
    named: Mapping[str, MeasuredSchedule]
    tried: Sequence[MeasuredSchedule] = ()
    limit: tuple[Literal["macs", "latency", "quality"], float] | None = None


def figure(chart: Chart) -> Figure:
    """Draw quality against MACs, and against latency if more than the dense model was timed."""
    from matplotlib.figure import Figure

    timed = [one for one in (*chart.tried, *chart.named.values()) if one.latency is not None]
    costs = {"macs": "MACs, fraction of dense", "latency": "latency, fraction of dense"}
    if len(timed) <= 1:
        del costs["latency"]
    page = Figure(figsize=(_PANEL_INCHES * len(costs), _HEIGHT_INCHES), layout="constrained", dpi=_DPI)
    panels = page.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    handles: dict[str, Any] = {}
    for panel, (cost, label) in zip(panels, costs.items(), strict=True):
        _draw(panel, chart, cost)
        panel.set_xlabel(label)
        handles |= {handle.get_label(): handle for handle in panel.get_legend_handles_labels()[0]}
    panels[0].set_ylabel(chart.label)
    page.legend(handles=handles.values(), loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
    page.suptitle(chart.title, fontsize=9)
    return page


def save(chart: Chart, path: Path, force: bool) -> None:
    """Write the figure in the format of the file name; errors as `files.atomic_output`."""
    with atomic_output(path, force) as temporary:
        write_figure(figure(chart), temporary, figure_format(path), dpi=_DPI)


def _draw(panel: Axes, chart: Chart, cost: str) -> None:
    tried = [one for one in chart.tried if getattr(one, cost) is not None]
    if tried:
        xs, ys = [getattr(one, cost) for one in tried], [chart.quality(one) for one in tried]
        panel.scatter(xs, ys, s=12, color=_TRIED, linewidths=0, label="tried", zorder=2)
    front = pareto_front(tried, chart.quality, cost)
    if len(front) > 1:
        xs, ys = [getattr(one, cost) for one in front], [chart.quality(one) for one in front]
        panel.step(xs, ys, where="post", color=_FRONT, linewidth=1.2, zorder=1, label="front of these")
    named = {name: one for name, one in chart.named.items() if getattr(one, cost) is not None}
    for name, one in named.items():
        panel.plot(getattr(one, cost), chart.quality(one), linestyle="", zorder=3, **MARKS[name])
    if chart.limit is not None and chart.limit[0] in (cost, "quality"):
        line = panel.axhline if chart.limit[0] == "quality" else panel.axvline
        line(chart.limit[1], color=_LIMIT, linestyle="--", linewidth=1, label="target", zorder=1)
    costs = [getattr(one, cost) for one in (*tried, *named.values())]
    panel.set_xlim(max(0.0, min(costs) - 0.1), max(1.05, max(costs) * 1.05))
    panel.grid(color="#e6e6e6", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
