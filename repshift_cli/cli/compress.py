"""`repshift compress`: a checkpoint and a recipe in, a faster checkpoint out, with a table that says by how much."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from repshift_cli.cli import options
from repshift_cli.cli.export import Target, check_all, export_all
from repshift_cli.cli.export import show as show_export

if TYPE_CHECKING:
    from collections.abc import Sequence

    from repshift_cli.calibrate import Calibration
    from repshift_cli.compression import CompressReport, Measured
    from repshift_cli.plan import Plan

__all__ = ["command", "describe_metric", "describe_tokens", "show", "show_sites"]

_LONGEST_OPTION = 24
"""Longer ones are weights, which only a machine reads."""


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
    from repshift_cli import ui
    from repshift_cli.compression import Settings, compress_checkpoint
    from repshift_cli.identify import Clips
    from repshift_cli.measure import threads as using_threads

    settings = Settings(
        recipe=recipe,
        target=target,
        model_name=model,
        heads=heads,
        img_size=img_size,
        clips=Clips(frames, checkpoint_frames),
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
            show(report)  # before the exports, of which one may fail
        exported = export_all(report.output, targets, force) if report.output else []
    if json:
        told = {"exports": [each.to_dict() for each in exported]} if exported else {}
        ui.print_json(report.to_dict() | told)
    else:
        for each in exported:
            show_export(each)


def default_output(checkpoint: str) -> Path:
    """`<name>_repshift.safetensors` in the current folder."""
    from repshift_cli.files import weight_stem

    name = checkpoint.rstrip("/").rsplit("/", 1)[-1].removeprefix("builtin:")
    return Path(f"{weight_stem(name)}_repshift.safetensors")


def show(report: CompressReport) -> None:
    """Print the report for people, in 80 columns."""
    from repshift_cli import ui

    plan, unit = report.plan, report.loaded.description.preprocessing.unit
    params = sum(parameter.numel() for parameter in report.loaded.model.parameters())
    ui.print_text(
        f"model   {report.loaded.description.name} ({report.family}), {params:,} parameters, kept as they are"
    )
    ui.print_text(f"recipe  {report.recipe.place.name}")
    ui.print_text(f"reducer {plan.reducer.kind}")
    ui.print_text("")
    if report.calibration:
        _show_calibration(report.calibration, unit)
    if report.found:
        from repshift_cli.cli.search import show_found

        show_found(report.found)
    show_sites(plan, "Plan: tokens through each site")
    if report.measured:
        _show_measured(report.measured, unit)
    else:
        ratio = report.dense_macs / report.macs
        ui.print_text(f"{report.dense_macs / 1e9:.2f} -> {report.macs / 1e9:.2f} GMACs per {unit} ({ratio:.2f}x less)")
        ui.print_text("Dry run: nothing was run, measured or written.")
    if report.output:
        size = report.output.stat().st_size / 1e6
        ui.print_text(f"wrote   {report.output} ({size:.1f} MB; tokens go, weights stay, so the size is the same)")


def show_sites(plan: Plan, title: str) -> None:
    """Print what goes where, and by which score."""
    from repshift_cli import ui

    rows = [
        [
            site.site,
            describe_metric(site.metric.model_dump()),
            describe_tokens(site.tokens_in, site.grid_in),
            describe_tokens(site.tokens_out, site.grid_out),
        ]
        for site in plan.sites
    ]
    ui.print_table(title, ["after", "kept by", "tokens in", "tokens out"], rows, left=2)


def describe_tokens(tokens: int, grid: Sequence[int] | None) -> str:
    """How many tokens there are, and for a feature map how they lie: `3136 (56x56)`."""
    return f"{tokens} ({grid[0]}x{grid[1]})" if grid else str(tokens)


def _show_measured(measured: Measured, unit: str) -> None:
    from repshift_cli import ui

    before, after = measured.dense, measured.compressed
    rows = [
        [
            f"GMACs per {unit}",
            f"{before.macs / 1e9:.3f}",
            f"{after.macs / 1e9:.3f}",
            f"{before.macs / after.macs:.2f}x",
        ],
        [
            "latency, median ms",
            _milliseconds(before.latency.median),
            _milliseconds(after.latency.median),
            f"{measured.speedup.ratio:.2f}x",
        ],
        [
            "  p10 - p90",
            f"{_milliseconds(before.latency.p10)} - {_milliseconds(before.latency.p90)}",
            f"{_milliseconds(after.latency.p10)} - {_milliseconds(after.latency.p90)}",
            "",
        ],
        [
            f"{unit}s per second",
            f"{before.throughput:.1f}",
            f"{after.throughput:.1f}",
            f"{after.throughput / before.throughput:.2f}x",
        ],
        [
            "peak memory, MB",
            f"{before.peak_bytes / 1e6:.0f}",
            f"{after.peak_bytes / 1e6:.0f}",
            f"{before.peak_bytes / after.peak_bytes:.2f}x",
        ],
    ]
    attention = "" if measured.attention == "none" else f", {measured.attention}"
    title = f"Measured: batch {measured.batch_size}, {measured.dtype}, {measured.threads} threads{attention}"
    ui.print_table(title, ["", "dense", "compressed", "ratio"], rows)
    ui.print_text(f"speed   {measured.speedup}")
    if measured.agreement is not None and unit == "clip":
        told = (
            f"{measured.agreement:.1%} are still most like themselves among all "
            f"(mean KL of that {measured.divergence:.4f} nats)"
        )
    elif measured.agreement is not None:
        told = f"{measured.agreement:.1%} of predictions unchanged (mean KL {measured.divergence:.4f} nats)"
    else:
        told = f"features differ by {measured.divergence:.4f} (one minus cosine; the model has no head)"
    ui.print_text(f"quality {told} on {measured.images.description}")


def _show_calibration(calibration: Calibration, unit: str) -> None:
    from repshift_cli import ui

    rows = [["chosen, site by site", *_cells(calibration.result.numbers())]]
    rows.append(["without calibration", *_cells(calibration.default.numbers())])
    rows.append(["dropped at random", *_cells(calibration.random.numbers())])
    tried = sum(len(choice.candidates) for choice in calibration.sites)
    title = f"Calibration: {tried} candidates on {calibration.images} unlabelled {unit}s, {calibration.seconds:.0f} s"
    ui.print_table(title, ["on the half that took no part in choosing", f"{unit}s", "change", "unchanged"], rows)
    verdict = "NOT clearly better than random"
    if calibration.clear:
        verdict = "clearly better than random"
    elif calibration.mild:
        verdict = "so little goes that random hardly harms either"
    ui.print_text(f"        {verdict} ({calibration.sigmas:.1f} standard errors)")
    ui.print_text("")


def _cells(result: dict[str, object]) -> list[str]:
    agreement = result["agreement"]
    same = f"{agreement:.1%}" if isinstance(agreement, float) else "-"
    far = result["distance"]
    return [str(result["images"]), f"{far:.4f}" if isinstance(far, float) else "-", same]


def describe_metric(metric: dict[str, object]) -> str:
    """`mlp, l2, update, largest` for a shift, the kind and its options for other scores."""
    options = [str(value) for key, value in metric.items() if key != "kind"]
    values = ", ".join(option for option in options if len(option) <= _LONGEST_OPTION)
    return values if metric["kind"] == "representation_shift" else f"{metric['kind']} ({values})"


def _milliseconds(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"  # noqa: PLR2004 (a second)
