"""Print the result of `repshift sweep`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from repshift_cli.cli import ui

if TYPE_CHECKING:
    from repshift_cli.sweep.report import SweepReport


def show_sweep(report: SweepReport) -> None:
    """Print the means in 80 columns; the tables in files have the seeds, too."""
    rows = [report.rows[0], *(row for group in report.groups for row in group)]
    cells = [report.cells(row) for row in rows]
    place = report.columns.index("seed")
    for row, texts in zip(rows, cells, strict=True):
        texts[place + 1] += " *" if row.best else "  "
        texts[place + 2 :] = [text.partition(" ")[0] for text in texts[place + 2 :]]
        del texts[place]
    columns = [name for name in report.columns if name != "seed"]
    columns[1] = "MACs"
    ui.print_table(None, columns, cells, left=4)
    ui.print_text(report.title)
    for text in report.notes:
        ui.print_text(text.replace("Bold:", "*"))
