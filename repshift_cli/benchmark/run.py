"""Time compressed models, their dense models and baselines in turn, in every setting of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from repshift_cli.benchmark.end_to_end import Placement, Source, measure_end_to_end
from repshift_cli.benchmark.report import BenchReport, Compilation, EndToEnd, MemoryFormat, Ratio, Role, Run, Setting
from repshift_cli.checkpoints.exported import OpenedExport, Runtime
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import CheckFailed, RepshiftError, UsageError
from repshift_cli.measure.attention_kernel import observed_attention
from repshift_cli.measure.compiled import Compiled, CompileMode, fresh_graphs
from repshift_cli.measure.cpu import int8_note
from repshift_cli.measure.device import device_name, num_threads, out_of_memory, tiles_note, waking_note
from repshift_cli.measure.latency import Subject, compute_speedup, measure_latency
from repshift_cli.measure.memory import peak_memory
from repshift_cli.models.attention_mode import AttentionMode, attention_mode, auto_note
from repshift_cli.reduction.compressed_model import CompressedModel
from repshift_cli.utils.progress import Progress
from repshift_cli.utils.ranges import check_ranges

if TYPE_CHECKING:
    from repshift_cli.checkpoints.artifact import Opened

_IMAGE_DIMS, _CLIP_DIMS = 3, 4
# Enough for caches and allocators on the CPU; a GPU also raises its clock during the first runs.
_WARMUP_ROUNDS = {"cpu": 3, "cuda": 50}


@dataclass(frozen=True)
class Contender:
    """A model in the comparison.

    Attributes:
        name: unique among those of its input size.
        macs: multiply-accumulates per image.
        input_size: of one input: `(C, H, W)`, `(T, C, H, W)` for a clip, `(time, frequency)` for a spectrogram.
        against: name of the dense contender that it is compared with, if any.
        context: to be entered for each run of `module`, such as the switch to the dense model.
        baselines: names of the baselines that it is compared with.
        preprocessing: of images from files, if known.
        takes: size of its inputs, if it is timed with contenders of another `input_size`.
        compile: mode of torch.compile, if not that of the setting.
        bytes: of the file or the weights, if they are to be compared.
    """

    name: str
    module: nn.Module
    macs: int
    input_size: tuple[int, ...]
    against: str | None = None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    is_baseline: bool = False
    baselines: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None
    takes: tuple[int, ...] | None = None
    compile: CompileMode | None = None
    bytes: int | None = None

    @property
    def role(self) -> Role:
        if self.is_baseline:
            return "peer"
        return "dense" if self.against is None else "compressed"


@dataclass(frozen=True)
class BenchSettings:
    """How to measure; the same for both sides of every comparison.

    Attributes:
        seconds: time for each model at each batch size; more if `min_runs` takes longer.
        threads: CPU threads, None for torch's default.
        memory_format: of weights and images.
        compile: mode of torch.compile, or `off`.
    """

    device: torch.device
    dtype: torch.dtype
    seconds: float = 10.0
    min_runs: int = 10
    threads: int | None = None
    attention: AttentionMode = "auto"
    memory_format: MemoryFormat = "contiguous"
    compile: CompileMode = "off"

    def __post_init__(self) -> None:
        check_ranges(seconds=self.seconds, min_runs=self.min_runs, threads=self.threads)

    @property
    def placement(self) -> Placement:
        channels_last = self.memory_format == "channels_last"
        return Placement(self.device, self.dtype, torch.channels_last if channels_last else torch.contiguous_format)


def contenders_of(opened: Mapping[str, Opened]) -> list[Contender]:
    """Every opened model, by label such as the stem of its file, and the dense model of every compressed one.

    A single model gives `dense` and `compressed`. Of several, a compressed one keeps its label and a dense one is
    named after its architecture; models from the same weights share one dense contender. Exported files keep their
    labels.
    """
    exported = {label: model for label, model in opened.items() if isinstance(model, OpenedExport)}
    single = len(opened) == 1
    dense: dict[Any, Contender] = {}
    compressed: list[Contender] = []
    for label, model in opened.items():
        if label in exported:
            continue
        description, preprocessing = model.loaded.description, model.loaded.description.preprocessing
        size = preprocessing.shape
        key = (_weights_identity(model), description.name, size)
        if key not in dense:
            taken = {contender.name for contender in dense.values()} | set(opened)
            name = "dense" if single else unused(f"{description.name} dense", taken)
            context = nullcontext if model.compressed is None else model.compressed.dense
            dense[key] = Contender(
                name, model.module, model.dense_macs, size, context=context, preprocessing=preprocessing
            )
        if model.compressed is not None:
            name = "compressed" if single else label
            against = dense[key].name
            compressed.append(
                Contender(name, model.module, model.macs, size, against=against, preprocessing=preprocessing)
            )
    return [*dense.values(), *compressed, *_exported_contenders(exported)]


def _exported_contenders(exported: Mapping[str, OpenedExport]) -> Iterator[Contender]:
    """Exported files, dense ones first; others are compared with a dense float file of the same kind and weights."""
    keys = {
        label: (each.runtime.document.kind, each.weights_id, each.loaded.description.preprocessing.shape)
        for label, each in exported.items()
    }
    plain = {label for label, each in exported.items() if not (each.reduced or each.runtime.document.quantized)}
    labels = sorted(exported, key=lambda label: (exported[label].reduced, label not in plain))
    dense = {keys[label]: label for label in reversed(labels) if label in plain}
    for label in labels:
        each = exported[label]
        preprocessing = each.loaded.description.preprocessing
        against = None if label in plain else dense.get(keys[label])
        yield Contender(label, each.module, each.macs, preprocessing.shape, against, preprocessing=preprocessing)


def _weights_identity(opened: Opened) -> str | int:
    """SHA-256 of the dense weights: of a compressed file that of its source; without a file the object itself."""
    loaded = opened.loaded
    source: str | None = ((loaded.document or {}).get("source") or {}).get("sha256")
    return source or loaded.source.sha256 or id(opened)


def unused(name: str, taken: set[str]) -> str:
    """The name, with a number if it is taken."""
    if name not in taken:
        return name
    return next(each for number in count(2) if (each := f"{name} {number}") not in taken)


def run_bench(
    contenders: Sequence[Contender], batches: Sequence[int], settings: BenchSettings, progress: Progress
) -> BenchReport:
    """`run_sweep` with one setting."""
    return run_sweep(contenders, batches, [settings], progress)


def run_sweep(
    contenders: Sequence[Contender],
    batches: Sequence[int],
    sweep: Sequence[BenchSettings],
    progress: Progress,
    source: Source | None = None,
) -> BenchReport:
    """Measure all contenders at every batch size in every setting; those of one input size are timed in turn.

    The modules are moved to the device and dtype of each setting and stay in the last one: weights that were rounded
    on the way stay rounded.

    Args:
        sweep: settings with the same device, memory format and number of threads.
        source: images to read for passes from files to results; None for none.

    Raises:
        UsageError: a batch does not fit into memory; attention mode, compilation or the memory format is unsupported
            by a model.
        DataError: as `measure_end_to_end`.
        ValueError: a source, but a contender without preprocessing.
    """
    modules = {id(each.module): each.module for each in contenders if not isinstance(each.module, Runtime)}
    _check(contenders, list(modules.values()), sweep, source)
    sizes = list(dict.fromkeys(contender.input_size for contender in contenders))
    runs: list[Run] = []
    ratios: list[Ratio] = []
    end_to_end: list[EndToEnd] = []
    missing: dict[str, str] = {}

    def report() -> BenchReport:
        return BenchReport(
            device=device_name(sweep[0].device),
            threads=threads,
            memory_format=sweep[0].memory_format,
            runs=tuple(runs),
            ratios=tuple(ratios),
            end_to_end=tuple(end_to_end),
            missing=missing,
        )

    with num_threads(sweep[0].threads) as threads:
        notes = [waking_note(sweep[0].device, threads)]
        notes += [note for settings in sweep for note in _tiles_notes(contenders, settings)]
        if any(isinstance(each.module, Runtime) and each.module.document.quantized for each in contenders):
            notes.append(int8_note())
        for note in dict.fromkeys(note for note in notes if note):
            progress.note(note)
        for settings in sweep:
            with _prepared(list(modules.values()), settings, progress):
                for size in sizes:
                    group = [contender for contender in contenders if contender.input_size == size]
                    for batch in batches:
                        try:
                            measured, read, failed = _bench_group(group, batch, settings, progress, source)
                        except RepshiftError as error:
                            error.document = report().to_dict() if runs else {}
                            raise
                        missing |= failed
                        runs += measured
                        ratios += _ratios(group, measured)
                        end_to_end += [read] if read else []
    return report()


def _check(
    contenders: Sequence[Contender],
    modules: Sequence[nn.Module],
    sweep: Sequence[BenchSettings],
    source: Source | None,
) -> None:
    for path in (each.module.path for each in contenders if isinstance(each.module, Runtime)):
        if any(settings.compile != "off" for settings in sweep):
            raise UsageError(f"--compile: {path} is an exported file, which cannot be compiled", "Leave it out.")
        if any(settings.attention != "auto" for settings in sweep):
            raise UsageError(
                f"--attention: {path} is an exported file, whose attention cannot be switched", "Use --attention auto."
            )
    others = {len(each.input_size) for each in contenders} - {_IMAGE_DIMS}
    taken = "clips" if _CLIP_DIMS in others else "spectrograms"
    if others and any(settings.memory_format == "channels_last" for settings in sweep):
        raise UsageError(f"--memory-format channels_last is for images, and the model takes {taken}", "Leave it out.")
    if others and source is not None:
        raise UsageError(f"--data is for images, and the model takes {taken}", "Leave --data out.")
    if source is not None and any(contender.preprocessing is None for contender in contenders):
        raise ValueError("contenders without preprocessing cannot read images")
    # flash-attn needs the model on the device, so it is checked later
    for mode in dict.fromkeys(settings.attention for settings in sweep if settings.attention != "flash"):
        for module in modules:
            with attention_mode(module, mode):
                pass


def _tiles_notes(contenders: Sequence[Contender], settings: BenchSettings) -> Iterator[str | None]:
    """Notes on compressed models whose numbers of tokens are slow on the device."""
    for each in contenders:
        if each.role == "compressed" and isinstance(each.module, CompressedModel):
            counts = [site.tokens_out for site in each.module.plan.sites if site.grid_out is None]
            yield tiles_note(settings.device, settings.dtype, counts)


@contextmanager
def _prepared(modules: Sequence[nn.Module], settings: BenchSettings, progress: Progress) -> Iterator[None]:
    for module in modules:
        module.to(settings.device, settings.dtype).to(memory_format=settings.placement.memory_format)
    for note in {note for module in modules if (note := auto_note(module, settings.attention))}:
        progress.note(note)
    with ExitStack() as switched:
        for module in modules:
            switched.enter_context(attention_mode(module, settings.attention))
        yield


def _bench_group(
    group: Sequence[Contender], batch: int, settings: BenchSettings, progress: Progress, source: Source | None
) -> tuple[list[Run], EndToEnd | None, dict[str, str]]:
    """Runs, passes from files, and why contenders cannot be compiled."""
    height, width = group[0].input_size[-2:]
    dtype = str(settings.dtype).removeprefix("torch.")
    setting = Setting(batch, (height, width), dtype, settings.attention, settings.compile)
    place = settings.placement
    sizes = {each.name: each.takes or each.input_size for each in group}
    random = {size: torch.randn(batch, *size, generator=torch.Generator().manual_seed(0)) for size in sizes.values()}
    placed = {
        size: each.to(place.device, place.dtype, memory_format=place.memory_format) for size, each in random.items()
    }
    inputs = {name: placed[size] for name, size in sizes.items()}
    compiling = settings.compile != "off" or any(each.compile for each in group)
    graphs = fresh_graphs() if compiling else nullcontext()
    with _explain_memory(batch, settings.device), graphs:
        subjects, missing = _subjects(group, inputs, settings)
        group = [each for each in group if each.name not in missing]
        attention = [_observed(each, inputs[each.name]) for each in group]
        memory = [_peak(each, inputs[each.name], settings.device) for each in subjects]
        max_seconds = settings.seconds * len(group)
        timings = measure_latency(
            [
                replace(each, run=partial(lambda run, own, _: run(own), each.run, inputs[each.name]))
                for each in subjects
            ],
            inputs[group[0].name],
            max_seconds=max_seconds,
            warmup=_WARMUP_ROUNDS[settings.device.type],
            progress=progress,
            min_runs=settings.min_runs,
        )
        runs = [
            Run(
                name=contender.name,
                setting=setting,
                macs=contender.macs,
                timing=timings[contender.name],
                peak_bytes=peak,
                role=contender.role,
                attention=kernel,
                compilation=_compilation(subject.run),
                bytes=contender.bytes,
            )
            for contender, subject, peak, kernel in zip(group, subjects, memory, attention, strict=True)
        ]
        if source is None:
            return runs, None, missing
        assert group[0].preprocessing is not None
        end_to_end = measure_end_to_end(
            subjects,
            {contender.name: contender.against for contender in group if contender.against is not None},
            group[0].preprocessing,
            source,
            setting,
            place,
            max_seconds=max_seconds,
            progress=progress,
        )
    return runs, end_to_end, missing


def _subjects(
    group: Sequence[Contender], inputs: Mapping[str, Tensor], settings: BenchSettings
) -> tuple[list[Subject], dict[str, str]]:
    """What is timed, and why contenders cannot be compiled; an error if the others are no comparison."""
    found: list[Subject] = []
    missing: dict[str, str] = {}
    for contender in group:
        own = inputs[contender.name]
        _check_finite(contender, own)
        try:
            found.append(_subject(contender, own, contender.compile or settings.compile))
        except UsageError as error:
            missing[contender.name] = error.message
            if contender.compile is None or not any(each.is_baseline and each.name not in missing for each in group):
                raise
    return found, missing


def _subject(contender: Contender, inputs: Tensor, mode: CompileMode) -> Subject:
    if mode == "off":
        return Subject(contender.name, contender.module, contender.context)
    compiled = Compiled(contender.name, contender.module, mode)
    with torch.inference_mode(), contender.context():
        compiled.first(inputs)
    return Subject(contender.name, compiled, contender.context)


def _compilation(run: Callable[[Tensor], Any]) -> Compilation | None:
    return Compilation(run.seconds, run.recompiles) if isinstance(run, Compiled) else None


def _peak(subject: Subject, inputs: Tensor, device: torch.device) -> int | None:
    # On the CPU tensors inside a graph are not visible, and CUDA graphs keep their memory between runs.
    if isinstance(subject.run, Compiled) and (device.type, subject.run.mode) != ("cuda", "default"):
        return None
    if isinstance(subject.run, Runtime) and subject.run.hides_memory:
        return None
    with subject.context():
        return peak_memory(subject.run, inputs)


def _check_finite(contender: Contender, inputs: Tensor) -> None:
    with torch.inference_mode(), contender.context():
        output = contender.module(inputs)
    if isinstance(output, Tensor) and not bool(output.isfinite().all()):
        raise CheckFailed(f"{contender.name} returns values that are not finite", "Check its weights, or use float32.")


def _observed(contender: Contender, inputs: Tensor) -> str:
    module = contender.module
    if isinstance(module, Runtime) and module.hides_memory:
        return f"{module.document.kind}'s own"  # its operations are not those of torch
    with contender.context():
        return observed_attention(module, inputs[:1])


def _ratios(group: Sequence[Contender], runs: Sequence[Run]) -> Iterator[Ratio]:
    measured = {run.name: run for run in runs}
    for contender in group:
        for name in (*([contender.against] if contender.against else []), *contender.baselines):
            if not measured.keys() >= {contender.name, name}:  # one could not be compiled
                continue
            run, other = measured[contender.name], measured[name]
            speedup = compute_speedup(other.timing, run.timing)
            yield Ratio(run.setting, run.name, name, other.macs / run.macs, speedup, contender.role)


@contextmanager
def _explain_memory(batch: int, device: torch.device) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise UsageError(
            f"batch size {batch} does not fit into the memory of {device}", "Use a smaller --batch-size."
        ) from error
