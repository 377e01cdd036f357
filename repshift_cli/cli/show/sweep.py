"""Print the result of `repshift sweep`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from repshift_cli.cli import ui

if TYPE_CHECKING:
    from repshift_cli.sweep.report import SweepReport


def show_sweep(report: SweepReport) -> None:
    """Print the means in 80 columns; the tables in files have the seeds, too."""
    from repshift_cli.sweep.report import LABELS, value_text

    quality, *others = report.measures
    cells = []
    for row in [report.rows[0], *(row for group in report.groups for row in group)]:
        cost, macs, *names, _ = row.cells()
        values = [value_text(measure, row.values[measure], 1).partition(" ")[0] for measure in others]
        shown = value_text(quality, row.quality, 1)
        cells.append([*names, cost, macs, shown, "*" if row.best else "", *values])
    columns = ("metric", "reducer", "drop", "MACs %", LABELS[quality], "", *(LABELS[measure] for measure in others))
    ui.print_table(None, columns, cells, left=2)
    ui.print_text(report.title)
    for text in report.notes:
        ui.print_text(text.replace("Bold:", "*"))
