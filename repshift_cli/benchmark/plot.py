"""Plot of a benchmark: images per second over the batch size, one panel per setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repshift_cli.benchmark.report import BenchReport, Ratio, Run
from repshift_cli.utils.figures import write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.container import BarContainer

_PALETTES: dict[str, tuple[str, ...]] = {  # colour-blind safe for compressed models and baselines
    "dense": ("#8c8c8c", "#bdbdbd", "#5f5f5f"),
    "compressed": ("#0072b2", "#56b4e9", "#003f63"),
    "peer": ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#f0e442", "#7a4b2a"),
}

_FROM_FILES = "from image files"
_PANELS_ACROSS = 2
_PANEL_INCHES = (5.4, 3.4)
_BARS_INCHES = 0.36  # per bar, so that the numbers above do not overlap
_DPI = 150


def plot_report(report: BenchReport, path: Path, file_format: str) -> None:
    """Draw images per second for every batch size, with whiskers from p10 to p90, into a file.

    The number above a bar is its speed-up over the dense model, if it is clear. Diamonds are passes from image files to
    results.

    Args:
        file_format: one of `PLOT_FORMATS`; the suffix of the file is not used.
    """
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(run.setting.without_batch for run in report.runs))
    across = min(_PANELS_ACROSS, len(panels))
    down = -(-len(panels) // across)
    width = max(_PANEL_INCHES[0], _BARS_INCHES * _most_bars(report))
    figure = Figure(figsize=(width * across, _PANEL_INCHES[1] * down + 0.9), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False).ravel()
    colors = _colors(report.runs)
    handles: dict[str, Any] = {}
    for axes, panel in zip(grid, panels, strict=False):
        handles.update(_draw(axes, report, panel, colors))
        if len(panels) > 1:
            axes.set_title(panel, fontsize=9)
    if _FROM_FILES in handles:
        handles[_FROM_FILES] = handles.pop(_FROM_FILES)  # after the names
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for row in range(down):
        grid[row * across].set_ylabel("images per second (p10 to p90)", fontsize=9)
    figure.suptitle(f"{report.machine}, attention {report.attention}", fontsize=9)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(4, len(handles)),
        frameon=False,
        fontsize=8,
    )
    write_figure(figure, path, file_format, dpi=_DPI)


def _most_bars(report: BenchReport) -> int:
    runs = [run.setting.without_batch for run in report.runs]
    batches = len({run.batch for run in report.runs})
    return max(runs.count(panel) for panel in runs) + batches


def _draw(axes: Axes, report: BenchReport, panel: str, colors: Mapping[str, str]) -> dict[str, Any]:
    """Draw one panel; returns the legend entries."""
    runs = [run for run in report.runs if run.setting.without_batch == panel]
    names = list(dict.fromkeys(run.name for run in runs))
    batches = list(dict.fromkeys(run.batch for run in runs))
    dense = {run.name for run in runs if run.role == "dense"}
    gains = {(ratio.setting, ratio.name): ratio for ratio in report.ratios if ratio.against in dense}
    passes = {(found.setting, name): each for found in report.end_to_end for name, each in found.sides.items()}
    width = 0.8 / len(names)
    handles: dict[str, Any] = {}
    for index, name in enumerate(names):
        own = [run for run in runs if run.name == name]
        places = [batches.index(run.batch) + (index - (len(names) - 1) / 2) * width for run in own]
        bars = handles[name] = _draw_bars(axes, own, places, width, colors[name])
        labels = [_gain(gains.get((run.setting, name))) for run in own]
        axes.bar_label(bars, labels, padding=2, fontsize=7)
        read = [(place, passes.get((run.setting, name))) for run, place in zip(own, places, strict=True)]
        points = [(place, found.throughput.median) for place, found in read if found is not None]
        if points:
            at, rates = zip(*points, strict=True)
            handles[_FROM_FILES] = axes.scatter(
                at, rates, marker="D", s=22, color="white", edgecolors="black", zorder=3
            )
    axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    axes.set_xlabel("batch size", fontsize=9)
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    return handles


def _draw_bars(axes: Axes, runs: Sequence[Run], places: Sequence[float], width: float, color: str) -> BarContainer:
    heights = [run.throughput for run in runs]
    # p90 of the latency is p10 of the throughput.
    low = [run.throughput - run.batch * 1e3 / run.latency.p90 for run in runs]
    high = [run.batch * 1e3 / run.latency.p10 - run.throughput for run in runs]
    errors = {"elinewidth": 0.8, "capthick": 0.8}
    return axes.bar(places, heights, width * 0.94, yerr=(low, high), capsize=2, color=color, error_kw=errors)


def _gain(ratio: Ratio | None) -> str:
    """The speed-up over dense; empty if it is not clear."""
    if ratio is None or not (ratio.speedup.clear or ratio.speedup.clearly_slower):
        return ""
    return f"{ratio.speedup.ratio:.2f}x"


def _colors(runs: Sequence[Run]) -> dict[str, str]:
    roles = {run.name: run.role for run in runs}
    found: dict[str, str] = {}
    for role, palette in _PALETTES.items():
        names = [name for name, own in roles.items() if own == role]
        found |= {name: palette[index % len(palette)] for index, name in enumerate(names)}
    return found
