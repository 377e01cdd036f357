"""Time compressed models against their dense selves, in turn, in every setting of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from repshift_cli.benchmark.end_to_end import Placement, Source, measure_end_to_end
from repshift_cli.benchmark.report import (
    BenchReport,
    BreakEven,
    Compilation,
    EndToEnd,
    MemoryFormat,
    Ratio,
    Role,
    Run,
    Setting,
)
from repshift_cli.checkpoints.exported import OpenedExport, Runtime
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import UsageError
from repshift_cli.measure.attention_kernel import observed_attention
from repshift_cli.measure.compiled import Compiled, CompileMode, fresh_graphs
from repshift_cli.measure.device import device_name, num_threads, out_of_memory, tiles_note, waking_note
from repshift_cli.measure.latency import Subject, Timing, compute_speedup, measure_latency
from repshift_cli.measure.memory import peak_memory
from repshift_cli.models.attention_mode import AttentionMode, attention_mode, auto_note
from repshift_cli.reduction.compressed_model import CompressedModel
from repshift_cli.utils.progress import Progress

if TYPE_CHECKING:
    from repshift_cli.checkpoints.artifact import Opened

__all__ = [
    "AttentionMode",
    "BenchReport",
    "BenchSettings",
    "BreakEven",
    "CompileMode",
    "Contender",
    "EndToEnd",
    "MemoryFormat",
    "Ratio",
    "Run",
    "Setting",
    "Source",
    "attention_mode",
    "contenders_of",
    "run_bench",
    "run_sweep",
]


_IMAGE_DIMS = 3
# Enough for caches and allocators on the CPU; a graphics card also raises its clock during the first runs.
_WARMUP_ROUNDS = {"cpu": 3, "cuda": 50}


@dataclass(frozen=True)
class Contender:
    """One model in the comparison.

    Attributes:
        name: unique among those of its input size.
        module: takes images `[B, C, H, W]`.
        macs: multiply-accumulates per image.
        input_size: of one input: `(C, H, W)`, or `(T, C, H, W)` for a clip.
        against: name of the dense contender that this one is compared with, if any.
        context: what must be entered for `module` to be this contender, such as the switch to its dense self.
        is_peer: whether it is another way to make the dense model faster, and not what the comparison is about.
        peers: names of others that it is compared with as well.
        preprocessing: from a picture to its input, where that is known.
    """

    name: str
    module: nn.Module
    macs: int
    input_size: tuple[int, ...]
    against: str | None = None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    is_peer: bool = False
    peers: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None

    @property
    def role(self) -> Role:
        """What it is in the comparison."""
        if self.is_peer:
            return "peer"
        return "dense" if self.against is None else "compressed"

    @property
    def opponents(self) -> tuple[str, ...]:
        """Names of all that it is compared with."""
        return (() if self.against is None else (self.against,)) + self.peers


@dataclass(frozen=True)
class BenchSettings:
    """How to measure: the same for both sides of every comparison.

    Attributes:
        seconds: time for each model at each batch size; more is taken where `min_runs` needs it.
        min_runs: least number of timed runs of each model.
        threads: CPU threads, None for torch's own choice.
        memory_format: of weights and images; convolutions of many libraries are made for channels_last.
        compile: how torch.compile compiles every contender, or `off`.
    """

    device: torch.device
    dtype: torch.dtype
    seconds: float = 10.0
    min_runs: int = 10
    threads: int | None = None
    attention: AttentionMode = "auto"
    memory_format: MemoryFormat = "contiguous"
    compile: CompileMode = "off"


def contenders_of(opened: Mapping[str, Opened]) -> list[Contender]:
    """Every opened model, and the dense self of every compressed one.

    A single model gives `compressed` and `dense`; of several, a compressed one keeps its label and a dense one is
    called after its architecture. Two that come from the same weights share one dense contender. Exported files keep
    their labels.

    Args:
        opened: by label, such as the stem of the file.
    """
    exported = {label: model for label, model in opened.items() if isinstance(model, OpenedExport)}
    single = len(opened) == 1
    dense: dict[Any, Contender] = {}
    compressed: list[Contender] = []
    for label, model in opened.items():
        if label in exported:
            continue
        description = model.loaded.description
        size = description.preprocessing.shape
        key = (_weights_identity(model), description.name, size)
        if key not in dense:
            taken = {contender.name for contender in dense.values()} | set(opened)
            name = "dense" if single else _unused(f"{description.name} dense", taken)
            context = nullcontext if model.compressed is None else model.compressed.dense
            how = description.preprocessing
            dense[key] = Contender(name, model.module, model.dense_macs, size, context=context, preprocessing=how)
        if model.compressed is not None:
            compressed.append(
                Contender(
                    "compressed" if single else label,
                    model.module,
                    model.macs,
                    size,
                    against=dense[key].name,
                    preprocessing=description.preprocessing,
                )
            )
    return [*dense.values(), *compressed, *_exported_contenders(exported)]


def _exported_contenders(exported: Mapping[str, OpenedExport]) -> Iterator[Contender]:
    """Exported files under their labels; a compressed one against the first dense one of its kind and weights."""
    keys = {
        label: (each.runtime.document.kind, each.weights, each.loaded.description.preprocessing.shape)
        for label, each in exported.items()
    }
    labels = sorted(exported, key=lambda label: exported[label].reduced)
    dense = {keys[label]: label for label in reversed(labels) if not exported[label].reduced}
    for label in labels:
        each = exported[label]
        against = dense.get(keys[label]) if each.reduced else None
        how = each.loaded.description.preprocessing
        yield Contender(label, each.module, each.macs, how.shape, against, preprocessing=how)


def _weights_identity(opened: Opened) -> str | int:
    """The hash of the dense weights: for a compressed file that of its source, without a file the object itself."""
    loaded = opened.loaded
    original: str | None = ((loaded.document or {}).get("source") or {}).get("sha256")
    return original or loaded.source.sha256 or id(opened)


def _unused(name: str, taken: set[str]) -> str:
    number = 1
    candidate = name
    while candidate in taken:
        number += 1
        candidate = f"{name} {number}"
    return candidate


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
    """Measure every contender at every batch size in every setting, those of one input size in turn with each other.

    The modules are moved to the device and the dtypes of the settings, and stay where the last one has them: weights
    that were rounded on the way stay rounded.

    Args:
        sweep: of one device, with one memory format and one number of threads.
        source: pictures for passes from files to results; None for none.

    Raises:
        UsageError: a batch does not fit into memory, a model has no attention that can be switched as asked, it
            cannot be compiled, or it is an exported file and anything of this is asked for.
        DataError: as `measure_end_to_end`.
        ValueError: a source, and contenders whose preprocessing is not known.
    """
    _check_exported(contenders, sweep)
    modules = _distinct([each.module for each in contenders if not isinstance(each.module, Runtime)])
    _check(contenders, modules, sweep, source)
    device, sizes = sweep[0].device, list(dict.fromkeys(contender.input_size for contender in contenders))
    found: list[_Found] = []
    with num_threads(sweep[0].threads) as threads:
        if note := waking_note(device, threads):
            progress.note(note)
        for note in dict.fromkeys(note for settings in sweep for note in _tiles_notes(contenders, settings)):
            progress.note(note)
        for settings in sweep:
            with _prepared(modules, settings, progress):
                for size in sizes:
                    group = [contender for contender in contenders if contender.input_size == size]
                    bench = _GroupBench(group, settings, progress, source)
                    found += [bench.run(batch) for batch in batches]
    return BenchReport(
        device=device_name(device),
        threads=threads,
        memory_format=sweep[0].memory_format,
        runs=tuple(run for each in found for run in each.runs),
        ratios=tuple(ratio for each in found for ratio in each.ratios),
        end_to_end=tuple(each.end_to_end for each in found if each.end_to_end),
    )


def _tiles_notes(contenders: Sequence[Contender], settings: BenchSettings) -> list[str]:
    """Remarks on the compressed models whose numbers of tokens do not suit the device."""
    models = (each.module for each in contenders if each.role == "compressed")
    plans = [model.plan for model in models if isinstance(model, CompressedModel)]
    counts = [[site.tokens_out for site in plan.sites if site.grid_out is None] for plan in plans]
    found = (tiles_note(settings.device, settings.dtype, each) for each in counts)
    return [note for note in found if note]


def _check_exported(contenders: Sequence[Contender], sweep: Sequence[BenchSettings]) -> None:
    """Refuse what exported files cannot do: their graphs are fixed."""
    for path in (each.module.path for each in contenders if isinstance(each.module, Runtime)):
        if any(settings.compile != "off" for settings in sweep):
            raise UsageError(f"--compile: {path} is an exported file, which is not compiled again", "Leave it out.")
        if any(settings.attention != "auto" for settings in sweep):
            raise UsageError(
                f"--attention: {path} is an exported file, whose attention cannot be switched", "Use --attention auto."
            )


def _check(
    contenders: Sequence[Contender],
    modules: Sequence[nn.Module],
    sweep: Sequence[BenchSettings],
    source: Source | None,
) -> None:
    """Refuse what cannot be measured before anything is."""
    clips = any(len(each.input_size) > _IMAGE_DIMS for each in contenders)
    if clips and any(settings.memory_format == "channels_last" for settings in sweep):
        raise UsageError("--memory-format channels_last is for images, and the model takes clips", "Leave it out.")
    if clips and source is not None:
        raise UsageError("--data: reading is measured for pictures, and the model takes clips", "Leave --data out.")
    if source is not None and any(contender.preprocessing is None for contender in contenders):
        raise ValueError("contenders without preprocessing cannot read pictures")
    # whether flash-attn can run is known only where the model lies on the device
    for mode in dict.fromkeys(settings.attention for settings in sweep if settings.attention != "flash"):
        for module in modules:
            with attention_mode(module, mode):
                pass


@contextmanager
def _prepared(modules: Sequence[nn.Module], settings: BenchSettings, progress: Progress) -> Iterator[None]:
    """The modules where and as the settings want them."""
    with ExitStack() as switched:
        for module in modules:
            module.to(settings.device, settings.dtype).to(memory_format=_memory_format(settings))
        for note in {note for module in modules if (note := auto_note(module, settings.attention))}:
            progress.note(note)
        for module in modules:
            switched.enter_context(attention_mode(module, settings.attention))
        yield


@dataclass(frozen=True)
class _Found:
    """What one group gave at one batch size."""

    runs: tuple[Run, ...]
    ratios: tuple[Ratio, ...]
    end_to_end: EndToEnd | None


@dataclass(frozen=True)
class _GroupBench:
    """Contenders of one input size in one setting."""

    group: Sequence[Contender]
    settings: BenchSettings
    progress: Progress
    source: Source | None

    def run(self, batch: int) -> _Found:
        """Measure all of them in turn.

        Raises:
            UsageError: the batch does not fit into memory, or a model cannot be compiled.
        """
        setting = self._setting(batch)
        inputs = _random_images(batch, self.group[0].input_size, self.settings)
        graphs = nullcontext() if self.settings.compile == "off" else fresh_graphs()
        with _explain_memory(batch, self.settings.device), graphs:
            attention = {contender.name: _observed(contender, inputs) for contender in self.group}
            subjects = [self._subject(contender, inputs) for contender in self.group]
            memory = {subject.name: self._peak(subject, inputs) for subject in subjects}
            timings = self._time(subjects, inputs)
            runs = tuple(
                Run(
                    name=contender.name,
                    setting=setting,
                    macs=contender.macs,
                    timing=timings[contender.name],
                    peak_bytes=memory[contender.name],
                    role=contender.role,
                    attention=attention[contender.name],
                    compilation=_compilation(subject.run),
                )
                for contender, subject in zip(self.group, subjects, strict=True)
            )
            end_to_end = self._from_files(subjects, setting) if self.source else None
        return _Found(runs, tuple(_ratios(self.group, runs)), end_to_end)

    def _setting(self, batch: int) -> Setting:
        height, width = self.group[0].input_size[-2:]
        dtype = str(self.settings.dtype).removeprefix("torch.")
        return Setting(batch, (height, width), dtype, self.settings.attention, self.settings.compile)

    def _subject(self, contender: Contender, inputs: Tensor) -> Subject:
        if self.settings.compile == "off":
            return Subject(contender.name, contender.module, contender.context)
        compiled = Compiled(contender.name, contender.module, self.settings.compile)
        with torch.inference_mode(), contender.context():
            compiled.first(inputs)
        return Subject(contender.name, compiled, contender.context)

    def _peak(self, subject: Subject, inputs: Tensor) -> int | None:
        # on the CPU the tensors inside a graph are not seen, and graphs of CUDA calls hold theirs between runs
        if self.settings.compile != "off" and (self.settings.device.type, self.settings.compile) != ("cuda", "default"):
            return None
        if isinstance(subject.run, Runtime) and subject.run.hides_memory:
            return None
        with subject.context():
            return peak_memory(subject.run, inputs)

    def _time(self, subjects: Sequence[Subject], inputs: Tensor) -> dict[str, Timing]:
        return measure_latency(
            subjects,
            inputs,
            max_seconds=self.settings.seconds * len(subjects),
            warmup=_WARMUP_ROUNDS[self.settings.device.type],
            progress=self.progress,
            min_runs=self.settings.min_runs,
        )

    def _from_files(self, subjects: Sequence[Subject], setting: Setting) -> EndToEnd:
        preprocessing = self.group[0].preprocessing
        assert self.source is not None
        assert preprocessing is not None
        return measure_end_to_end(
            subjects,
            {contender.name: contender.against for contender in self.group if contender.against is not None},
            preprocessing,
            self.source,
            setting,
            Placement(self.settings.device, self.settings.dtype, _memory_format(self.settings)),
            max_seconds=self.settings.seconds * len(subjects),
            progress=self.progress,
        )


def _compilation(run: Callable[[Tensor], Any]) -> Compilation | None:
    return Compilation(run.seconds, run.recompiles) if isinstance(run, Compiled) else None


def _observed(contender: Contender, inputs: Tensor) -> str:
    module = contender.module
    if isinstance(module, Runtime) and module.hides_memory:
        return f"{module.document.kind}'s own"  # its operations are not those of torch
    with contender.context():
        return observed_attention(contender.module, inputs[:1])


def _random_images(batch: int, size: tuple[int, ...], settings: BenchSettings) -> Tensor:
    images = torch.randn(batch, *size, generator=torch.Generator().manual_seed(0))
    return images.to(settings.device, settings.dtype, memory_format=_memory_format(settings))


def _memory_format(settings: BenchSettings) -> torch.memory_format:
    return torch.channels_last if settings.memory_format == "channels_last" else torch.contiguous_format


def _ratios(group: Sequence[Contender], runs: Sequence[Run]) -> Iterator[Ratio]:
    """Every contender against each of its opponents."""
    measured = {run.name: run for run in runs}
    for contender in group:
        run = measured[contender.name]
        for name in contender.opponents:
            other = measured[name]
            speedup = compute_speedup(other.timing, run.timing)
            yield Ratio(run.setting, run.name, name, other.macs / run.macs, speedup, contender.role)


def _distinct(modules: Sequence[nn.Module]) -> list[nn.Module]:
    return list({id(module): module for module in modules}.values())


@contextmanager
def _explain_memory(batch: int, device: torch.device) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise UsageError(
            f"batch size {batch} does not fit into the memory of {device}", "Take a smaller one with --batch-size."
        ) from error
