"""`repshift bench`: time compressed models against their dense models and against baselines."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar, get_args

import typer

from repshift_cli.benchmark.limits import BenchLimit, check_limits, require_met
from repshift_cli.checkpoints.options import ImageSize, LoadOptions
from repshift_cli.cli import guard, options, ui
from repshift_cli.cli.show.bench import show, why_nothing
from repshift_cli.errors import UsageError
from repshift_cli.utils.figures import check_figure_path, figure_format
from repshift_cli.utils.ranges import RANGES
from repshift_cli.utils.suggest import nearest

if TYPE_CHECKING:
    from repshift_cli.benchmark.report import BenchReport
    from repshift_cli.checkpoints.artifact import Opened

DEFAULT_MODEL = "deit_small_patch16_224"
DEFAULT_RECIPE = "deit_small_paper"
DEFAULT_BATCHES = ["1,8"]

_Value = TypeVar("_Value")


class MemoryFormat(str, Enum):
    """Values of `--memory-format`."""

    CONTIGUOUS = "contiguous"
    CHANNELS_LAST = "channels_last"


@options.takes_model
def command(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="Compressed checkpoints, exported files, or dense checkpoints with --recipe. Default: "
            f"{DEFAULT_MODEL} with random weights and the recipe {DEFAULT_RECIPE}.",
            show_default=False,
        ),
    ] = None,
    *,
    batch_size: Annotated[
        list[str] | None,
        typer.Option("--batch-size", "-b", metavar="N[,N]", help="Batch sizes, may be repeated (default: 1,8)."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="Compress dense models by this recipe first.")
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[,NAME]",
            help="Also time these baselines, on the same weights and at the same cost: explicit, class-attention, "
            "class-attention-row, bipartite, tome, fuse, random; and other ways to run the model: int8, bfloat16, "
            "compile, smaller-input, smaller-model=NAME. The dense model is always timed.",
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Images for static --against int8; without them int8 is dynamic."),
    ] = None,
    load: LoadOptions,
    trust: options.Trust = False,
    img_size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N[,HxW]", help="Image size, N x N or height x width: any for a CNN, else what the weights allow."
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(metavar="TYPE[,TYPE]", help="float32 (default), bfloat16, float16.")
    ] = None,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    attention: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND[,KIND]",
            help="Attention implementation of all models: auto (default), flash, sdpa, sdpa:flash, sdpa:efficient, "
            "sdpa:cudnn, sdpa:math, explicit.",
        ),
    ] = None,
    compile: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODE[,MODE]",
            help="torch.compile mode of all models: off (default), default, frozen, reduce-overhead, max-autotune.",
        ),
    ] = None,
    memory_format: Annotated[
        MemoryFormat, typer.Option(help="Memory format of weights and images; channels_last suits convolutions.")
    ] = MemoryFormat.CONTIGUOUS,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Also time end to end, from image files to results: a folder of images, or a dataset.",
        ),
    ] = None,
    images: Annotated[int, options.number("images", help="Images per pass over --data.")] = 256,
    workers: Annotated[
        int, options.number("workers", help="Worker processes that read them; 0 reads in the main process.")
    ] = 0,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LIMIT",
            help="Exit with code 5 if it is missed: latency<=0.7 or macs<=0.66 (fractions of dense), latency_ms<=50, "
            "throughput>=100, peak_memory_mb<=500, speedup>=1.3, efficiency>=0.9. May be repeated.",
        ),
    ] = None,
    seconds: Annotated[
        float, options.number("seconds", metavar="S", help="Duration of the measurement per model and setting.")
    ] = 10.0,
    min_runs: Annotated[int, options.number("min_runs", help="Minimum number of runs per model.")] = 10,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write one line per run to this file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Plot images per second (.png, .svg or .pdf).")
    ] = None,
    json: options.AsJson = False,
    force: options.Overwrite = False,
) -> None:
    """Time compressed models against the dense model and baselines.

    All models share the same weights and are timed in turn. Several values of --batch-size, --img-size, --dtype,
    --attention and --compile are measured in all combinations.
    """
    from repshift_cli.utils.files import check_outputs

    batches = _batch_sizes(batch_size or DEFAULT_BATCHES)
    sizes: list[ImageSize | None] = [ImageSize.parse(text) for text in options.split_values(img_size or [])]
    limits = [BenchLimit.parse(text) for text in budget or []]
    if plot is not None:
        check_figure_path("--plot", plot)
    check_outputs({"--csv": csv, "--plot": plot}, force)

    from repshift_cli.benchmark.baselines import check_names, contenders_against
    from repshift_cli.benchmark.end_to_end import Source
    from repshift_cli.benchmark.run import BenchSettings, run_sweep
    from repshift_cli.benchmark.way_contenders import check_ways, split_ways, with_ways
    from repshift_cli.data.inputs import open_images
    from repshift_cli.export.ways import exported_ways
    from repshift_cli.measure.compiled import CompileMode
    from repshift_cli.measure.device import resolve_device, resolve_dtype
    from repshift_cli.models.attention_mode import AttentionMode

    baselines, ways = split_ways(options.split_values(against or []))
    check_names(baselines)
    sweep = [
        BenchSettings(
            device=resolve_device(device),
            dtype=resolve_dtype(kind),
            seconds=seconds,
            min_runs=min_runs,
            threads=threads,
            attention=how,
            memory_format=memory_format.value,
            compile=mode,
        )
        for kind, how, mode in product(
            options.split_values(dtype or ["float32"]),
            _choices("--attention", attention or ["auto"], get_args(AttentionMode)),
            _choices("--compile", compile or ["off"], get_args(CompileMode)),
        )
    ]
    check_ways(ways, sweep, data)
    screen = ui.Screen()
    opened = [_open_all(models or [], recipe, replace(load, img_size=size), trust) for size in sizes or [None]]
    for note in dict.fromkeys(note for each in opened for model in each.values() for note in model.loaded.notes):
        screen.note(note)
    contenders = [contender for each in opened for contender in contenders_against(each, baselines)]
    if limits and not any(contender.role == "compressed" for contender in contenders):
        reason, hint = why_nothing(opened)
        raise UsageError(f"--budget: {reason}", hint)
    units = {model.loaded.description.preprocessing.unit for each in opened for model in each.values()} - {"image"}
    if data is not None and units:
        raise UsageError(f"--data is for images, and the model takes {min(units)}s", "Leave --data out.")
    source = Source(open_images(data, images), images, workers) if data is not None else None
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="repshift-") as folder:
        if ways:
            exported = partial(
                exported_ways, folder=Path(folder), calibration=calibration, progress=screen, targets=("onnx",)
            )
            contenders, missing = with_ways(contenders, opened, ways, exported)
        report = run_sweep(contenders, batches, sweep, screen, source)
        report = replace(report, missing={**missing, **report.missing})
    checks = check_limits(limits, report)

    def print_report() -> None:
        if json:
            ui.result.keep({**report.to_dict(), "budget": [verdict.to_dict() for verdict in checks]})
        else:
            show(report, opened[0], checks)

    guard.run_all(partial(_write_csv, report, csv, force), partial(_write_plot, report, plot, force), print_report)
    require_met(checks)


def _choices(option: str, values: Sequence[str], allowed: Sequence[_Value]) -> list[_Value]:
    """The allowed values that are named in comma-separated lists."""
    by_name = {str(value): value for value in allowed}
    for text in options.split_values(values):
        if text not in by_name:
            raise UsageError(f"unknown {option} {text!r}: allowed: {', '.join(by_name)}", nearest(text, by_name))
    return [by_name[text] for text in options.split_values(values)]


def _batch_sizes(values: Sequence[str]) -> list[int]:
    """The batch sizes in comma-separated lists, without repetitions."""
    low, high = RANGES["batch_size"]
    for text in options.split_values(values):
        if not text.isascii() or not text.isdigit() or len(text) > len(str(high)) or not low <= int(text) <= high:
            raise UsageError(
                f"invalid --batch-size {text!r}: must be an integer >= {low} and <= {high}, or several (1,8)"
            )
    return list(dict.fromkeys(int(text) for text in options.split_values(values)))


def _open_all(names: Sequence[str], recipe: str | None, load: LoadOptions, trust: bool) -> dict[str, Opened]:
    from repshift_cli.checkpoints.exported import open_any
    from repshift_cli.compression.api import compress_dense

    if not names:
        name = load.model_name or DEFAULT_MODEL
        opened = compress_dense(name, recipe or DEFAULT_RECIPE, replace(load, model_name=None))
        return {opened.loaded.description.name: opened}
    if recipe is None:
        return {label: open_any(name, load, trust) for label, name in options.label_models(names).items()}
    return {label: compress_dense(name, recipe, load) for label, name in options.label_models(names).items()}


def _write_csv(report: BenchReport, path: Path | None, force: bool) -> None:
    from repshift_cli.utils.files import write_text

    if path is not None:
        write_text(path, report.to_csv(), force)
        ui.remark(f"wrote {path} (one line per run)")


def _write_plot(report: BenchReport, path: Path | None, force: bool) -> None:
    from repshift_cli.benchmark.plot import plot_report
    from repshift_cli.utils.files import atomic_output

    if path is not None:
        with atomic_output(path, force) as temporary:
            plot_report(report, temporary, figure_format(path))
        ui.remark(f"wrote {path} (plot)")
