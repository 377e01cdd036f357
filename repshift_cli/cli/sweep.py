"""`repshift sweep`: compare scores and reducers over drop ratios and seeds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.cli import options, ui
from repshift_cli.cli.show.sweep import show_sweep
from repshift_cli.cli.torchrun import Interrupted, own_device, rank_zero_errors, screen_of_first
from repshift_cli.errors import INTERRUPTED, UsageError

if TYPE_CHECKING:
    from repshift_cli.sweep.report import SweepReport

_Value = TypeVar("_Value")

_SHORT = {"shift": "representation_shift"}


@options.takes_model
def command(
    checkpoint: options.Checkpoint,
    *,
    data: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Images of all combinations, with or without labels: a folder or dataset."),
    ] = None,
    ratios: Annotated[
        str | None,
        typer.Option(metavar="X,...", help="Drop ratios per layer, such as 0.2,0.3.", show_default=False),
    ] = None,
    macs: Annotated[
        str | None,
        typer.Option(
            metavar="X,...",
            help="Shares of the dense MACs, such as 0.8,0.65: the drop ratio, equal at each layer, follows.",
            show_default=False,
        ),
    ] = None,
    metrics: Annotated[
        str,
        typer.Option(
            metavar="KIND,...",
            help="Scores: shift (representation_shift), fitted, random, token_norm, class_attention, "
            "attention_entropy.",
        ),
    ] = "shift,fitted,random",
    reducers: Annotated[
        str, typer.Option(metavar="KIND,...", help="Reducers: prune, merge, fuse, bipartite, vid_tldr.")
    ] = "prune",
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="N,...",
            help="Drop after these layers, by index or name (default: the first, at a quarter and at half).",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[
        str, typer.Option(metavar="N,...", help="Seeds of the calibration images and of random.")
    ] = "0,1,2",
    images: Annotated[int, options.number("images", help="Number of images.")] = 256,
    class_order: options.ClassOrder = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Calibration images: a folder or dataset. Default: other images of --data than the evaluated ones.",
        ),
    ] = None,
    calibration_images: Annotated[
        int, options.number("calibration_images", help="Number of calibration images per seed.")
    ] = 128,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder of the tables, the plot and the results. With the results of an interrupted or smaller sweep, "
            "only what is missing runs.",
            show_default="<checkpoint>_sweep",
        ),
    ] = None,
    load: LoadOptions,
    device: options.Device = "cpu",
    dtype: options.MeasureDtype = "float32",
    batch_size: Annotated[int, options.number("batch_size", "--batch-size", "-b", help="Batch size.")] = 8,
    threads: options.Threads = None,
    json: options.AsJson = False,
) -> None:
    """Compare scores and reducers over MACs: tables and a plot."""
    with rank_zero_errors():
        from repshift_cli.planning.recipe import ComponentSpec
        from repshift_cli.sweep.results import check_folder
        from repshift_cli.utils.files import default_output

        def kind(text: str) -> ComponentSpec:
            return ComponentSpec(kind=_SHORT.get(text, text.replace("-", "_")))

        grid: dict[str, Any] = {
            "ratios": _values("--ratios", ratios, float),
            "macs": _values("--macs", macs, float),
            "metrics": _values("--metrics", metrics, kind),
            "reducers": _values("--reducers", reducers, kind),
            "layers": _values("--layers", layers, lambda text: int(text) if text.isdecimal() else text),
            "seeds": _values("--seeds", seeds, int),
        }
        if not grid["ratios"] and not grid["macs"]:
            raise UsageError("no drop ratio is given", "Add --ratios 0.2,0.3 or --macs 0.8,0.65.")
        folder = output or default_output(checkpoint, "_sweep")
        check_folder(folder)

        from repshift_cli.compression.job import load_dense
        from repshift_cli.compression.notes import Notes
        from repshift_cli.measure.device import num_threads, resolve_device, resolve_dtype
        from repshift_cli.sweep.combinations import combinations_of
        from repshift_cli.sweep.run import calibration_images as drawn_from
        from repshift_cli.sweep.run import load_images, sweep
        from repshift_cli.utils.distributed import together

        place, kept = resolve_device(own_device(device)), resolve_dtype(dtype)
        notes = Notes(screen_of_first())
        with num_threads(threads), together(place) as group:
            loaded = group.agreed(lambda: load_dense(checkpoint, load, None, notes, force=True))
            if data is None and not loaded.is_builtin:
                raise UsageError("no images are given", "Add --data FOLDER.")
            combinations = combinations_of(loaded, **grid)
            loaded.model.to(device=place, dtype=kept)
            batch = group.agreed(lambda: load_images(loaded, data, images, notes, class_order))
            report = sweep(
                loaded,
                batch,
                combinations,
                calibration=drawn_from(loaded, calibration, data, calibration_images, images=batch, notes=notes),
                folder=folder,
                batch_size=batch_size,
                progress=notes.progress,
                group=group,
            )
            if group.is_first:
                _finish(report, folder, len(combinations), json)
        if report.interrupted:
            raise Interrupted(INTERRUPTED)


def _finish(report: SweepReport, folder: Path, total: int, json: bool) -> None:
    """Write all outputs and print the result."""
    from repshift_cli.sweep.plot import save
    from repshift_cli.sweep.results import TABLES
    from repshift_cli.utils.files import write_text

    texts = (report.to_csv(), report.to_markdown(), report.to_latex())
    for name, text in zip(TABLES, texts, strict=False):
        write_text(folder / name, text, force=True)
    save(report, folder / TABLES[-1])
    if json:
        ui.result.keep(report.to_dict() | {"outputs": [str(folder / name) for name in TABLES]})
    else:
        show_sweep(report)
        ui.print_text(f"wrote {folder}: {', '.join(TABLES)}")
    if report.interrupted:
        done = f"{len(report.results)} of {total} combinations are in {folder}"
        ui.warn(f"interrupted: {done}. The same command continues")


def _values(option: str, text: str | None, parse: Callable[[str], _Value]) -> list[_Value]:
    """The parts of a comma-separated list, each once."""
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    try:
        if not all(parts):
            raise ValueError  # noqa: TRY301
        return [parse(part) for part in dict.fromkeys(parts)]
    except ValueError:
        raise UsageError(f"invalid {option} {text!r}", "Give values with commas between them.") from None
