"""`repshift compress`: compress a checkpoint by a recipe and measure the result."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.cli import guard, options, ui
from repshift_cli.cli.export import Target, export_all, requests_for
from repshift_cli.cli.export import show as show_export
from repshift_cli.cli.show.compress import show_compression
from repshift_cli.export.formats import FORMATS

if TYPE_CHECKING:
    from repshift_cli.export.job import Exported


@options.takes_model
def command(
    checkpoint: options.Checkpoint,
    *,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", "-r", metavar="RECIPE", help="A YAML file or a shipped recipe (repshift recipes list)."
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="The score of tokens in place of the recipe's, such as fitted or coverage."),
    ] = None,
    reducer: Annotated[
        str | None,
        typer.Option(
            metavar="KIND", help="What happens to dropped tokens, in place of the recipe's: prune, merge, ..."
        ),
    ] = None,
    target: options.Targets = None,
    speedup: Annotated[
        str | None,
        typer.Option(metavar="X", help="How many times as fast the model must be, such as 1.5: --target speedup=X."),
    ] = None,
    max_drop: Annotated[
        str | None,
        typer.Option(
            metavar="POINTS",
            help="Largest loss of top-1 in points on held-out images, such as 1: --target max-drop=POINTS. Without "
            "labels, the largest share of changed predictions in percent.",
        ),
    ] = None,
    load: LoadOptions,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="Output file; a name without .safetensors is a folder in the form of the model's library.",
            show_default="<checkpoint>_repshift.safetensors",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Images or videos to compare predictions on: a folder or a dataset."),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="Unlabelled images or videos to choose the metric on: a folder or a dataset."
        ),
    ] = None,
    class_order: options.ClassOrder = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate/--no-calibrate", help="Choose on images what the recipe leaves open.")
    ] = True,
    recover: Annotated[
        int | None,
        options.number(
            "recover",
            help="Train norms, biases and the last layer on the outputs of the dense model, without labels: number of "
            "passes over half of the calibration images, such as 10. Kept if clearly better on the other half.",
            show_default="off",
        ),
    ] = None,
    calibration_images: Annotated[
        int | None,
        options.number(
            "calibration_images", help="Number of calibration images (default: 128; 32 clips for large video models)."
        ),
    ] = None,
    device: options.Device = "cpu",
    dtype: options.MeasureDtype = "float32",
    batch_size: options.BatchSize = None,
    threads: options.Threads = None,
    attention: options.Attention = options.AttentionKind.AUTO,
    seconds: Annotated[
        float, options.number("seconds", metavar="S", help="Duration of the latency measurement.")
    ] = 10.0,
    seed: options.Seed = 0,
    export: Annotated[
        list[Target] | None,
        typer.Option(metavar="FORMAT", help=f"Also export to {', '.join(FORMATS)}; may be repeated."),
    ] = None,
    quantize: options.Quantize = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan only: do not run, measure or write.")
    ] = False,
    json: options.AsJson = False,
    force: options.Force = False,
) -> None:
    """Write a faster checkpoint and measure speed-up and quality."""
    from repshift_cli.compression.run import compress_checkpoint
    from repshift_cli.compression.settings import Settings
    from repshift_cli.measure.device import num_threads as using_threads
    from repshift_cli.search.target import split_goals
    from repshift_cli.utils.files import default_output

    named = {"speedup": speedup, "max-drop": max_drop}
    goals = [*(target or []), *(f"{kind}={value}" for kind, value in named.items() if value is not None)]
    search_target, limit = split_goals(goals)
    output = output or default_output(checkpoint, "_repshift.safetensors")
    settings = Settings(
        recipe=recipe,
        metric=metric,
        reducer=reducer,
        target=search_target,
        limit=limit,
        load=load,
        output=output,
        data=data,
        calibration=calibration,
        class_order=class_order,
        calibrate=calibrate,
        recover=recover,
        calibration_images=calibration_images,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        seconds=seconds,
        attention=attention.value,
        seed=seed,
        force=force,
    )
    targets = [] if dry_run else (export or [])
    quantize = None if dry_run else quantize
    requests = requests_for(
        output, targets, force, quantize=quantize, calibration=calibration or data, images=calibration_images
    )
    with using_threads(threads):
        report = compress_checkpoint(checkpoint, settings, ui.Screen(), dry_run)
        exported: list[Exported] = []

        def export_now() -> None:
            if report.output:
                exported.extend(export_all(report.output, requests))

        def print_last() -> None:
            if json:
                exports = {"exports": [each.to_dict() for each in exported]} if exported else {}
                ui.result.keep(report.to_dict() | exports)
            for each in [] if json else exported:
                show_export(each)

        # an export that fails must not lose the report
        guard.run_all(*([] if json else [partial(show_compression, report)]), export_now, print_last)
