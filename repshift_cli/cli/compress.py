"""`repshift compress`: a checkpoint and a recipe in, a faster checkpoint out, with a table that says by how much."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.cli import options
from repshift_cli.cli.export import Target, check_all, export_all
from repshift_cli.cli.export import show as show_export
from repshift_cli.cli.show.compress import show_compression

__all__ = [
    "command",
]


def command(
    checkpoint: Annotated[
        str,
        typer.Argument(help="A .safetensors, .pth or .pt file, a folder with config.json, a timm name, builtin:..."),
    ],
    *,
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="A YAML file or a shipped recipe (repshift recipes list).")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            "-t",
            metavar="KIND=VALUE",
            help="Search for the layers first, those of the recipe are not used: macs=0.65, latency=0.6, "
            "agreement=0.99 or max-drop=0.5 (see repshift search).",
            show_default=False,
        ),
    ] = None,
    model: options.ModelName = None,
    heads: options.Heads = None,
    img_size: options.ImgSize = None,
    frames: options.Frames = None,
    checkpoint_frames: options.CheckpointFrames = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where the result goes.", show_default="<checkpoint>_repshift.safetensors"),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Pictures or videos to compare predictions on: a folder or a dataset.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration", help="Unlabelled pictures or videos of the model's own kind, to choose the score."
        ),
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate/--no-calibrate", help="Choose what the recipe leaves open on pictures.")
    ] = True,
    calibration_images: Annotated[
        int | None,
        typer.Option(
            min=8, help="How many pictures calibration uses (default: 128; 32 clips for a large video model)."
        ),
    ] = None,
    device: options.Device = "cpu",
    dtype: options.MeasureDtype = "float32",
    batch_size: options.InputsAtATime = None,
    threads: options.Threads = None,
    attention: options.Attention = options.AttentionKind.AUTO,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time for the latency measurement.")] = 10.0,
    seed: options.Seed = 0,
    export: Annotated[
        list[Target] | None,
        typer.Option("--export", help="Export the result too, beside it; may be repeated (see repshift export)."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan; run, measure and write nothing.")] = False,
    json: options.AsJson = False,
    force: options.Force = False,
) -> None:
    """Make a checkpoint faster by letting unimportant tokens go, and measure it."""
    from repshift_cli.cli import ui
    from repshift_cli.compression.run import compress_checkpoint
    from repshift_cli.compression.settings import Settings
    from repshift_cli.measure.device import num_threads as using_threads

    settings = Settings(
        recipe=recipe,
        target=target,
        load=LoadOptions(model, heads, img_size, frames, checkpoint_frames),
        output=output or default_output(checkpoint),
        data=data,
        calibration=calibration,
        calibrate=calibrate,
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
    check_all(output or default_output(checkpoint), targets, force)
    with using_threads(threads):
        report = compress_checkpoint(checkpoint, settings, ui.Screen(), dry_run)
        if not json:
            show_compression(report)  # before the exports, of which one may fail
        exported = export_all(report.output, targets, force) if report.output else []
    if json:
        told = {"exports": [each.to_dict() for each in exported]} if exported else {}
        ui.print_json(report.to_dict() | told)
    else:
        for each in exported:
            show_export(each)


def default_output(checkpoint: str) -> Path:
    """`<name>_repshift.safetensors` in the current folder."""
    from repshift_cli.utils.files import weight_stem

    name = checkpoint.rstrip("/").rsplit("/", 1)[-1].removeprefix("builtin:")
    return Path(f"{weight_stem(name)}_repshift.safetensors")
