"""`repshift bench`: time compressed models against their dense selves, and against other ways to be faster."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args

import typer

from repshift_cli.benchmark.limits import Limit, check, require_met
from repshift_cli.cli import options
from repshift_cli.cli.show.bench import show, why_nothing
from repshift_cli.errors import UsageError
from repshift_cli.utils.suggest import nearest

if TYPE_CHECKING:
    from repshift_cli.benchmark.end_to_end import Source
    from repshift_cli.benchmark.report import BenchReport
    from repshift_cli.benchmark.run import Contender
    from repshift_cli.checkpoints.artifact import Opened

__all__ = ["check_picture_format", "command", "show"]

DEFAULT_MODEL = "deit_small_patch16_224"
DEFAULT_RECIPE = "deit_small_paper"
DEFAULT_BATCHES = ["1,8"]
_IMAGES = 256

_Value = TypeVar("_Value")


class MemoryFormat(str, Enum):
    """What `--memory-format` takes."""

    CONTIGUOUS = "contiguous"
    CHANNELS_LAST = "channels_last"


@dataclass(frozen=True)
class _Reading:
    """What `--data` and its companions say."""

    where: str
    images: int
    workers: int


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
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            metavar="PEER[,PEER]",
            help="Time these beside it, on the same weights and at the same cost: explicit, class-attention, "
            "class-attention-row, bipartite, tome, fuse. The dense model takes part in any case.",
        ),
    ] = None,
    model: options.ModelName = None,
    heads: options.Heads = None,
    img_size: Annotated[
        list[str] | None,
        typer.Option("--img-size", metavar="N[,N]", help="Images of N x N: any for a CNN, else as the weights allow."),
    ] = None,
    frames: options.Frames = None,
    checkpoint_frames: options.CheckpointFrames = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option("--dtype", metavar="TYPE[,TYPE]", help="float32 (default), bfloat16, float16."),
    ] = None,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    attention: Annotated[
        list[str] | None,
        typer.Option(
            "--attention",
            metavar="KIND[,KIND]",
            help="What computes attention, on both sides: auto (default), flash, sdpa or one of its kernels "
            "(sdpa:flash, sdpa:efficient, sdpa:cudnn, sdpa:math), explicit.",
        ),
    ] = None,
    compile: Annotated[
        list[str] | None,
        typer.Option(
            "--compile",
            metavar="MODE[,MODE]",
            help="torch.compile on all sides, as one graph: off (default), default, frozen, reduce-overhead, "
            "max-autotune.",
        ),
    ] = None,
    memory_format: Annotated[
        MemoryFormat,
        typer.Option("--memory-format", help="How weights and images lie in memory; convolutions like channels_last."),
    ] = MemoryFormat.CONTIGUOUS,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="FOLDER",
            help="Measure from picture files to results as well: a folder with pictures, or a dataset.",
        ),
    ] = None,
    images: Annotated[
        int, typer.Option("--images", min=1, metavar="N", help="Pictures of one pass over --data.")
    ] = _IMAGES,
    workers: Annotated[
        int, typer.Option("--workers", min=0, help="Processes that read them (0: read in this one).")
    ] = 0,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            "--budget",
            metavar="LIMIT",
            help="Exit with code 5 where it is missed: latency<=0.7 or macs<=0.66 (of dense), latency_ms<=50, "
            "throughput>=100, peak_memory_mb<=500, speedup>=1.3, efficiency>=0.9. May be repeated.",
        ),
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", min=0.0, help="Time for each model in each setting.")] = 10.0,
    min_runs: Annotated[int, typer.Option("--min-runs", min=1, help="Least number of runs, whatever they take.")] = 10,
    csv: Annotated[Path | None, typer.Option("--csv", help="Write one line per run to this file.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw images per second (.png, .svg or .pdf).")] = None,
    json: options.AsJson = False,
    force: options.Force = False,
) -> None:
    """Time compressed models against their dense selves and other ways, in turn and on the same weights.

    Several values of --batch-size, --img-size, --dtype, --attention and --compile are measured in all combinations.
    """
    batches = _parse_numbers("--batch-size", batch_size or DEFAULT_BATCHES, "-b 1,8 or -b 1 -b 8")
    sizes: list[int | None] = [*_parse_numbers("--img-size", img_size or [], "--img-size 224,288")]
    limits = [Limit.parse(text) for text in budget or []]
    reading = None if data is None else _Reading(data, images, workers)
    _check_outputs(csv, plot, force)

    from repshift_cli.benchmark.baselines import check_names
    from repshift_cli.benchmark.run import BenchSettings, run_sweep
    from repshift_cli.checkpoints.identify import Clips
    from repshift_cli.cli import ui
    from repshift_cli.measure.compiled import CompileMode
    from repshift_cli.measure.device import resolve_device, resolve_dtype
    from repshift_cli.models.attention_mode import AttentionMode

    peers = _split(against or [])
    check_names(peers)
    place = resolve_device(device)
    sweep = [
        BenchSettings(
            device=place,
            dtype=kind,
            seconds=seconds,
            min_runs=min_runs,
            threads=threads,
            attention=how,
            memory_format=memory_format.value,
            compile=mode,
        )
        for kind, how, mode in product(
            _each(dtype or ["float32"], resolve_dtype),
            _each(attention or ["auto"], _one_of("--attention", get_args(AttentionMode))),
            _each(compile or ["off"], _one_of("--compile", get_args(CompileMode))),
        )
    ]
    screen = ui.Screen()
    told = {"model_name": model, "heads": heads, "clips": Clips(frames, checkpoint_frames)}
    opened = [_open_all(models or [], recipe, {**told, "img_size": size}) for size in sizes or [None]]
    for note in dict.fromkeys(note for each in opened for model in each.values() for note in model.loaded.notes):
        screen.note(note)
    contenders = _contenders(opened, peers, limits)
    report = run_sweep(contenders, batches, sweep, screen, _source(reading))
    verdicts = check(limits, report)
    _write_outputs(report, csv, plot, force)
    if json:
        ui.print_json({**report.to_dict(), "budget": [verdict.to_dict() for verdict in verdicts]})
    else:
        show(report, opened[0], verdicts)
    require_met(verdicts)


def _split(values: Sequence[str]) -> list[str]:
    """The parts of comma lists, each once, in the order given."""
    return list(dict.fromkeys(part.strip() for value in values for part in value.split(",")))


def _each(values: Sequence[str], parse: Callable[[str], _Value]) -> list[_Value]:
    return [parse(text) for text in _split(values)]


def _one_of(option: str, allowed: Sequence[_Value]) -> Callable[[str], _Value]:
    """Finds a text among what an option may be; raises UsageError for others."""
    named = {str(value): value for value in allowed}

    def find(text: str) -> _Value:
        if text not in named:
            raise UsageError(
                f"{option}: unknown mode {text!r}", f"{nearest(text, named)}Allowed are {', '.join(named)}."
            )
        return named[text]

    return find


def _parse_numbers(option: str, values: Sequence[str], example: str) -> list[int]:
    """Whole numbers in the order given, each once.

    Raises:
        UsageError: one is not a whole number from 1 on.
    """
    for text in _split(values):
        if not text.isascii() or not text.isdigit() or int(text) < 1:
            raise UsageError(f"{option}: {text!r} is not a number from 1 on", f"For example: {example}.")
    return list(dict.fromkeys(int(text) for text in _split(values)))


def _check_outputs(csv: Path | None, plot: Path | None, force: bool) -> None:
    """Refuse what could not be written before time is spent on measuring.

    Raises:
        UsageError, OutputError: as `files.check_output`; or the ending of the plot is none that can be drawn, or both
            go to the same file.
    """
    from repshift_cli.utils.files import check_outputs

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


def _open_all(names: Sequence[str], recipe: str | None, told: Mapping[str, Any]) -> dict[str, Opened]:
    """Open the models, by label; without names, the default one. `told` is what the options say of them."""
    from repshift_cli.checkpoints.exported import open_any
    from repshift_cli.compression.api import compress_dense

    if not names:
        name = told["model_name"] or DEFAULT_MODEL
        opened = compress_dense(name, recipe_name=recipe or DEFAULT_RECIPE, **{**told, "model_name": None})
        return {opened.loaded.description.name: opened}
    if recipe is None:
        return {label: open_any(name, **told) for label, name in _labels(names).items()}
    return {label: compress_dense(name, recipe_name=recipe, **told) for label, name in _labels(names).items()}


def _labels(names: Sequence[str]) -> dict[str, str]:
    """A short label for each model: the stem of its file, or all of its name where two stems are the same.

    Raises:
        UsageError: one model is named twice.
    """
    from repshift_cli.utils.files import weight_stem

    stems = [weight_stem(name) for name in names]
    labels = {name if stems.count(stem) > 1 else stem: name for name, stem in zip(names, stems, strict=True)}
    if len(labels) < len(names):
        raise UsageError("one model is given twice", f"Given were: {', '.join(names)}.")
    return labels


def _contenders(
    opened: Sequence[Mapping[str, Opened]], peers: Sequence[str], limits: Sequence[Limit]
) -> list[Contender]:
    """All that is timed, size by size.

    Raises:
        UsageError: a budget, and nothing is compared with its dense self; or as `contenders_against`.
    """
    from repshift_cli.benchmark.baselines import contenders_against

    found = [contender for each in opened for contender in contenders_against(each, peers)]
    if limits and not any(contender.role == "compressed" for contender in found):
        reason, hint = why_nothing(opened)
        raise UsageError(f"--budget: {reason}", hint)
    return found


def _source(reading: _Reading | None) -> Source | None:
    """The images that are read in each pass, None where none were named; errors as `open_images`."""
    from repshift_cli.benchmark.end_to_end import Source
    from repshift_cli.data.inputs import open_images

    if reading is None:
        return None
    return Source(open_images(reading.where, reading.images), reading.images, reading.workers)


def _write_outputs(report: BenchReport, csv: Path | None, plot: Path | None, force: bool) -> None:
    from repshift_cli.benchmark.plot import plot_report
    from repshift_cli.utils.files import atomic_output, write_text

    if csv is not None:
        write_text(csv, report.to_csv(), force)
    if plot is not None:
        with atomic_output(plot, force) as temporary:
            plot_report(report, temporary, _plot_format(plot))
