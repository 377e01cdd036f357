"""`repshift bench`: time compressed models against their dense selves."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from repshift_cli.cli import options
from repshift_cli.errors import UsageError

if TYPE_CHECKING:
    from repshift_cli.artifact import Opened
    from repshift_cli.benchmark import BenchReport
    from repshift_cli.measure import Spread

__all__ = ["check_picture_format", "command", "show"]

DEFAULT_MODEL = "deit_small_patch16_224"
DEFAULT_RECIPE = "deit_small_paper"
DEFAULT_BATCHES = ["1,8"]
_DECIMALS = ((0.1, 4), (1, 3), (10, 2), (100, 1))  # below this limit, so many places after the point


class Attention(str, Enum):
    """What `--attention` takes."""

    AUTO = "auto"
    SDPA = "sdpa"
    EXPLICIT = "explicit"


class MemoryFormat(str, Enum):
    """What `--memory-format` takes."""

    CONTIGUOUS = "contiguous"
    CHANNELS_LAST = "channels_last"


def command(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="Compressed checkpoints, or dense ones with --recipe; exported files. "
            f"None: {DEFAULT_MODEL} with random weights and the recipe {DEFAULT_RECIPE}.",
            show_default=False,
        ),
    ] = None,
    *,
    batch_size: Annotated[
        list[str] | None,
        typer.Option("--batch-size", "-b", metavar="N[,N]", help="Images at a time; may be repeated. Default: 1,8."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", metavar="RECIPE", help="Compress dense models by this recipe first.")
    ] = None,
    model: options.ModelName = None,
    heads: options.Heads = None,
    img_size: options.ImgSize = None,
    frames: options.Frames = None,
    checkpoint_frames: options.CheckpointFrames = None,
    dtype: options.Dtype = "float32",
    device: options.Device = "cpu",
    threads: options.Threads = None,
    attention: Annotated[
        Attention,
        typer.Option("--attention", help="Fused or explicit attention, on both sides (auto: as the model has it)."),
    ] = Attention.AUTO,
    memory_format: Annotated[
        MemoryFormat,
        typer.Option("--memory-format", help="How weights and images lie in memory; convolutions like channels_last."),
    ] = MemoryFormat.CONTIGUOUS,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.0, help="Time for each model at each batch size.")
    ] = 10.0,
    min_runs: Annotated[int, typer.Option("--min-runs", min=1, help="Least number of runs, whatever they take.")] = 10,
    csv: Annotated[Path | None, typer.Option("--csv", help="Write one line per run to this file.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw images per second (.png, .svg or .pdf).")] = None,
    json: options.AsJson = False,
    force: options.Force = False,
) -> None:
    """Time compressed models against their dense selves, in turn and on the same weights."""
    batches = _parse_batches(batch_size or DEFAULT_BATCHES)
    _check_outputs(csv, plot, force)

    from repshift_cli import measure, ui
    from repshift_cli.benchmark import BenchSettings, contenders_of, run_bench
    from repshift_cli.identify import Clips

    settings = BenchSettings(
        device=measure.resolve_device(device),
        dtype=measure.resolve_dtype(dtype),
        seconds=seconds,
        min_runs=min_runs,
        threads=threads,
        attention=attention.value,
        memory_format=memory_format.value,
    )
    screen = ui.Screen()
    told = {"model_name": model, "heads": heads, "img_size": img_size, "clips": Clips(frames, checkpoint_frames)}
    opened = _open_all(models or [], recipe, told)
    for note in (note for each in opened.values() for note in each.loaded.notes):
        screen.note(note)
    report = run_bench(contenders_of(opened), batches, settings, screen)
    _write_outputs(report, csv, plot, force)
    if json:
        ui.print_json(report.to_dict())
    else:
        show(report, opened)


def _parse_batches(values: Sequence[str]) -> list[int]:
    """Batch sizes in the order given, each once.

    Raises:
        UsageError: one is not a whole number from 1 on.
    """
    sizes: dict[int, None] = {}
    for text in (part.strip() for value in values for part in value.split(",")):
        if not text.isascii() or not text.isdigit() or int(text) < 1:
            raise UsageError(f"--batch-size: {text!r} is not a number from 1 on", "For example: -b 1,8 or -b 1 -b 8.")
        sizes[int(text)] = None
    return list(sizes)


def _check_outputs(csv: Path | None, plot: Path | None, force: bool) -> None:
    """Refuse what could not be written before time is spent on measuring.

    Raises:
        UsageError, OutputError: as `files.check_output`; or the ending of the plot is none that can be drawn, or both
            go to the same file.
    """
    from repshift_cli.files import check_outputs

    if plot is not None:
        check_picture_format("--plot", plot)
    check_outputs({"--csv": csv, "--plot": plot}, force)


def check_picture_format(option: str, path: Path) -> None:
    """Refuse a file whose ending tells no format that can be drawn, before anything heavy is imported.

    Raises:
        UsageError: naming the option.
    """
    if _plot_format(path) not in ("png", "svg", "pdf"):
        raise UsageError(
            f"{option}: {path} has no ending that tells a picture format", "Allowed are .png, .svg and .pdf."
        )


def _plot_format(path: Path) -> str:
    return path.suffix.lower().removeprefix(".")


def _open_all(names: Sequence[str], recipe: str | None, told: dict[str, Any]) -> dict[str, Opened]:
    """Open the models, by label; without names, the default one. `told` is what the options say of them."""
    from repshift_cli.compression import compress_dense
    from repshift_cli.runtimes import open_any

    if not names:
        name = told.pop("model_name") or DEFAULT_MODEL
        opened = compress_dense(name, recipe_name=recipe or DEFAULT_RECIPE, **told)
        return {opened.loaded.description.name: opened}
    if recipe is None:
        return {label: open_any(name, **told) for label, name in _labels(names).items()}
    return {label: compress_dense(name, recipe_name=recipe, **told) for label, name in _labels(names).items()}


def _labels(names: Sequence[str]) -> dict[str, str]:
    """A short label for each model: the stem of its file, or all of its name where two stems are the same.

    Raises:
        UsageError: one model is named twice.
    """
    from repshift_cli.files import weight_stem

    stems = [weight_stem(name) for name in names]
    labels = {name if stems.count(stem) > 1 else stem: name for name, stem in zip(names, stems, strict=True)}
    if len(labels) < len(names):
        raise UsageError("one model is given twice", f"Given were: {', '.join(names)}.")
    return labels


def _write_outputs(report: BenchReport, csv: Path | None, plot: Path | None, force: bool) -> None:
    from repshift_cli import benchmark
    from repshift_cli.files import atomic_output, write_text

    if csv is not None:
        write_text(csv, report.to_csv(), force)
    if plot is not None:
        with atomic_output(plot, force) as temporary:
            benchmark.plot(report, temporary, _plot_format(plot))


def show(report: BenchReport, opened: dict[str, Opened]) -> None:
    """Print the report for people, in 80 columns."""
    import torch

    from repshift_cli import ui

    ui.print_text(", ".join(opened))
    if random := [label for label, model in opened.items() if model.loaded.source.origin == "random"]:
        ui.print_text(f"random weights, which do not change the speed: {', '.join(random)}")
    ui.print_text(report.machine)
    layout = "" if report.memory_format == "contiguous" else f", {report.memory_format} in memory"
    attention = "no attention" if report.attention == "none" else f"attention {report.attention}"
    ui.print_text(f"{attention}{layout} on both sides, torch {torch.__version__}\n")
    units = {model.loaded.description.preprocessing.unit for model in opened.values()}
    speed = f"{units.pop()}s/s" if len(units) == 1 else "inputs/s"
    columns = ["batch", "model", "GMACs", "ms [p10-p90]", speed, "peak MB"]
    rows = [
        [
            str(run.batch),
            run.name,
            _number(run.macs / 1e9),
            _latency(run.latency),
            _number(run.throughput),
            "-" if run.peak_bytes is None else _number(run.peak_bytes / 1e6),
        ]
        for run in report.runs
    ]
    ui.print_table(None, columns, rows, left=2)
    several = len({ratio.name for ratio in report.ratios}) > 1
    for ratio in report.ratios:
        ui.print_text(f"batch {ratio.batch}{f', {ratio.name}' if several else ''}: {ratio}")
    if not report.ratios:
        ui.print_text(_why_nothing(opened))


def _why_nothing(opened: dict[str, Opened]) -> str:
    """Why there is no ratio."""
    if any(model.reduced for model in opened.values()):
        return "Nothing to compare: an exported file has no dense self. Export that too, with --dense, and name both."
    return "Nothing to compare: no model is compressed. Add --recipe to compress it for the run."


def _latency(spread: Spread) -> str:
    return f"{_number(spread.median)} [{_number(spread.p10)}-{_number(spread.p90)}]"


def _number(value: float) -> str:
    """Three significant digits, and all digits before the point."""
    return next((f"{value:.{places}f}" for limit, places in _DECIMALS if abs(value) < limit), f"{value:.0f}")
