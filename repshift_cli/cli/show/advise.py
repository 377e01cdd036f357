"""Print the table of `repshift advise`, in 80 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from repshift_cli.cli import ui

if TYPE_CHECKING:
    from repshift_cli.benchmark.advice import Advice, Row


def show(found: Advice) -> None:
    """Print the table, what is missing from it, and the fastest way."""
    threads = f"{found.threads} thread{'s' if found.threads > 1 else ''}"
    ui.print_text(f"{found.device}, {threads}, batch {found.question.batch}", "")
    of_classes = found.measure == "predictions"
    with_top1 = any(row.top1 is not None for row in found.rows)
    columns = ["", "ms", "speed-up", *["unchanged" if of_classes else "cosine"] * (found.images is not None)]
    columns += ["top-1"] * with_top1 + ["GMACs", "MB"]
    rows = []
    for row in found.rows:
        gain = f"{row.speedup.ratio:.2f}x" + ("" if row.speedup.clear or row.speedup.clearly_slower else " ?")
        cells = [row.way.name, f"{row.latency.median:.1f}", "" if row is found.rows[0] else gain]
        if found.images is not None:
            cells.append(_unchanged(row, of_classes))
        if with_top1:
            cells.append("-" if row.top1 is None else f"{row.top1:.1%}")
        rows.append([*cells, f"{row.way.macs / 1e9:.2f}", f"{row.way.bytes / 1e6:.1f}"])
    ui.print_table(None, columns, rows)
    if any("?" in cell for row in rows for cell in row):
        ui.print_text("?: not a clear difference, the intervals overlap.")
    for each in found.missing:
        ui.print_text(f"left out: {each.name}: {each.reason}")
    if found.images is not None:
        ui.print_text(f"compared on {found.images.description}")
    ui.print_text("", _sentence(found))


def _unchanged(row: Row, of_classes: bool) -> str:
    if row.unchanged is None:
        return "-"
    return f"{row.unchanged:.1%}" if of_classes else f"{row.unchanged:.4f}"


def _sentence(found: Advice) -> str:
    best, limit = found.best, f"{found.question.agreement:.0%}"
    of_classes = found.measure == "predictions"
    wanted = f"at least {limit} of predictions unchanged" if of_classes else f"a mean cosine of {limit}"
    if found.images is None:
        if best is None:
            return "Nothing is clearly faster than the dense model."
        gain = f"{best.speedup.ratio:.2f}x"
        return f"Fastest: {best.way.name}, {gain} faster. Quality was not measured: give --data FOLDER."
    if best is None:
        return f"Nothing is clearly faster than the dense model with {wanted}."
    return (
        f"Fastest with {wanted}: {best.way.name}, {best.speedup.ratio:.2f}x faster, "
        f"{_unchanged(best, of_classes)} {'unchanged' if of_classes else 'cosine'}."
    )
