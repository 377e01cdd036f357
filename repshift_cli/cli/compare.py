"""`repshift compare`: compare the saved predictions of two evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from repshift_cli.cli import options, ui

if TYPE_CHECKING:
    from repshift_cli.evaluation.classification.comparison import ComparedRun, Comparison

_SMALL_P = 1e-4


def command(
    first: Annotated[Path, typer.Argument(metavar="A", help="Predictions from `repshift eval --save-predictions`.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Predictions of another run on the same images.")],
    *,
    classes: Annotated[int, typer.Option(min=0, metavar="N", help="Show the N classes that changed most.")] = 10,
    json: options.AsJson = False,
) -> None:
    """Compare the saved predictions of two evaluations.

    Shows the agreement, the images that only one of them classifies correctly, by class, and McNemar's test.
    """
    from repshift_cli.evaluation.classification.comparison import compare_predictions
    from repshift_cli.evaluation.classification.predictions import load_predictions

    found = compare_predictions(load_predictions(first), load_predictions(second))
    if json:
        ui.result.keep({"a": str(first), "b": str(second), **found.to_dict()})
    else:
        _show(found, classes)


def _show(found: Comparison, classes: int) -> None:
    from repshift_cli.utils.stats import percent_interval

    rows = [_row(name, side) for name, side in (("A", found.first), ("B", found.second))]
    ui.print_table(f"{found.images} images", ("", "model", "top-1 %", "95%", "top-5 %", "95%"), rows, left=2)
    for name, count in (("A", found.only_first), ("B", found.only_second)):
        if count:
            ui.print_text(f"{count} images are only in {name} and are ignored")
    low, high = percent_interval(found.same, found.images)
    ui.print_text(f"same prediction: {100 * found.same / found.images:.2f}% (95%: {low:.2f}-{high:.2f})")
    ui.print_text(f"correct only in A: {found.lost}; only in B: {found.won}; wrong in both, differently: {found.other}")
    low, high = found.difference_interval
    ui.print_text(f"top-1 of B - A: {found.difference:+.2f} points (95%: {low:+.2f} to {high:+.2f})")
    p = f"{found.p_value:.4f}" if found.p_value >= _SMALL_P else f"{found.p_value:.1e}"
    ui.print_text(f"McNemar's exact test: p = {p}", "")
    if classes and found.classes:
        shown = [(each.name, str(each.images), str(each.lost), str(each.won)) for each in found.classes[:classes]]
        ui.print_text(f"{len(found.classes)} classes changed; most changed:")
        ui.print_table(None, ("class", "images", "only A", "only B"), shown)


def _row(name: str, side: ComparedRun) -> tuple[str, ...]:
    numbers = side.to_dict()
    cells = [
        text
        for key in ("top1", "top5")
        for text in (f"{numbers[key]:.2f}", "{:.2f}-{:.2f}".format(*numbers[f"{key}_interval"]))
    ]
    return (name, side.model, *cells)
