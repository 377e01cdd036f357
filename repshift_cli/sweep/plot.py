"""The plot of a sweep: quality over MACs, one line per metric and reducer, with 95% intervals."""

from __future__ import annotations

from pathlib import Path

from repshift_cli.sweep.report import LABELS, Row, SweepReport, label
from repshift_cli.utils.figures import figure_format, write_figure
from repshift_cli.utils.files import atomic_output

# shapes differ too, for readers who cannot distinguish the colors
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKERS = "o^sDvPX"
_DENSE = "#4d4d4d"
_DPI = 150


def save(report: SweepReport, path: Path) -> None:
    """Write the plot in the format of the file name; errors as `files.atomic_output`."""
    from matplotlib.figure import Figure

    page = Figure(figsize=(6.4, 4.2), layout="constrained", dpi=_DPI)
    axes = page.subplots()
    scale = 1 if report.measures[0] == "cosine" else 100
    lines: dict[str, list[Row]] = {}
    for row in (row for group in report.groups for row in group):
        assert row.combination is not None
        parts = [part for part in (row.combination.metric, row.combination.reducer) if part is not None]
        lines.setdefault(", ".join(map(label, parts)), []).append(row)
    for index, (name, rows) in enumerate(sorted(lines.items())):
        rows.sort(key=lambda row: row.macs)
        values = [row.quality for row in rows]
        below = [scale * (each.mean - each.low) for each in values]
        above = [scale * (each.high - each.mean) for each in values]
        axes.errorbar(
            [100 * row.macs for row in rows],
            [scale * each.mean for each in values],
            yerr=(below, above),
            label=name,
            color=_COLORS[index % len(_COLORS)],
            marker=_MARKERS[(index + index // len(_COLORS)) % len(_MARKERS)],
            markersize=4,
            linewidth=1.2,
            capsize=2,
        )
    if report.measures[0] == "correct":
        dense = report.rows[0].quality
        axes.axhline(scale * dense.mean, color=_DENSE, linestyle="--", linewidth=1, label="dense")
    axes.set_xlabel("MACs, % of dense")
    axes.set_ylabel(LABELS[report.measures[0]])
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    page.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    page.suptitle(report.title, fontsize=9)
    with atomic_output(path, force=True) as temporary:
        write_figure(page, temporary, figure_format(path), dpi=_DPI)
