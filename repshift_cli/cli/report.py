"""`repshift report`: one HTML page about a compressed checkpoint, to send to somebody."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from repshift_cli.cli import options, ui
from repshift_cli.cli.show.provenance import describe
from repshift_cli.errors import UsageError

if TYPE_CHECKING:
    from repshift_cli.checkpoints.artifact import Opened
    from repshift_cli.visualize.view import Visualization

_SCENES = "builtin:digits"
_IMAGES = 6
_SUFFIX = ".html"


def command(
    checkpoint: Annotated[str, typer.Argument(metavar="FILE", help="A compressed checkpoint, a file or a folder.")],
    *,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="A folder of images, or a dataset: shows their kept tokens. Default for a built-in model: "
            "built-in scenes; else no images.",
            show_default=False,
        ),
    ] = None,
    class_order: options.ClassOrder = None,
    count: Annotated[int, typer.Option(min=1, max=16, metavar="N", help="Number of images.")] = _IMAGES,
    bench: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Add a result of `repshift bench FILE --json`.")
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option("--eval", metavar="FILE", help="Add a result of `repshift eval FILE --compare-dense --json`."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="PAGE", help="Output file. [default: (<checkpoint>_report.html)]"),
    ] = None,
    seed: options.Seed = 0,
    force: options.Overwrite = False,
    json: options.AsJson = False,
) -> None:
    """Write one HTML page about a compressed checkpoint.

    It shows speed, quality, kept tokens, calibration, search and origin.
    """
    from repshift_cli.utils.files import check_output, default_output, size_of, write_text

    output = output or default_output(checkpoint, f"_report{_SUFFIX}")
    if output.suffix.lower() != _SUFFIX:
        raise UsageError(f"invalid --output {output}: must end in {_SUFFIX}")
    check_output(output, force)

    from repshift_cli.checkpoints.artifact import open_model
    from repshift_cli.report.page import Added, render
    from repshift_cli.report.parts import BenchDocument, EvalDocument, check_same, read_document

    evaluating = f"repshift eval {checkpoint} --dataset FOLDER --compare-dense --json"
    timed = read_document(BenchDocument, bench, "--bench", f"repshift bench {checkpoint} --json") if bench else None
    scored = read_document(EvalDocument, evaluation, "--eval", evaluating) if evaluation else None
    opened = open_model(checkpoint)
    if opened.compressed is None:
        raise UsageError(
            f"{checkpoint} is a dense model: there is nothing to report", f"Run: repshift compress {checkpoint}"
        )
    for note in opened.loaded.notes:
        ui.remark(note)
    if bench and timed:
        check_same("--bench", bench, [run.gmacs for run in timed.runs], opened.macs / 1e9)
    if evaluation and scored:
        check_same("--eval", evaluation, [scored.gmacs], opened.macs / 1e9)
    shown, why = None, _no_images(opened, checkpoint, data)
    if not why:
        shown = _visualize(opened, data or _SCENES, count, seed, class_order)
    text = render(opened, checkpoint, describe(opened.loaded.document or {}), Added(shown, why, timed, scored))
    write_text(output, text, force)
    size = size_of(output)
    if json:
        skipped = list(shown.samples.skipped) if shown else []
        ui.result.keep({"model": checkpoint, "output": str(output), "bytes": size, "skipped": skipped})
        return
    ui.print_text(f"images  {shown.samples.description if shown else why}")
    ui.print_text(f"wrote   {output} ({size / 1e3:.0f} kB; open it in a browser)")


def _no_images(opened: Opened, checkpoint: str, data: str | None) -> str:
    """Why the page has no images; empty if it has."""
    unit = opened.loaded.description.preprocessing.unit
    if unit == "clip":
        return f"Clips are not shown on this page. To see their kept tokens, run: repshift visualize {checkpoint}"
    if unit != "image":
        return f"{unit.capitalize()}s are not shown on this page."
    if data is None and not opened.loaded.is_builtin:
        return f"No images were given. To see the kept tokens of yours, run: repshift report {checkpoint} --data FOLDER"
    return ""


def _visualize(opened: Opened, data: str, count: int, seed: int, class_order: str | None) -> Visualization:
    from repshift_cli.visualize.view import visualize

    shown = visualize(opened, data, count, seed, class_order)
    shown.samples.info.report(ui.Screen())
    for reason in shown.samples.skipped:
        ui.warn(f"skipped: {reason}")
    return shown
