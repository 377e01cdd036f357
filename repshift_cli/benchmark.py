"""Time compressed models against their dense selves, and show what came out: numbers, words, CSV, a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from repshift_cli import measure
from repshift_cli.errors import UsageError
from repshift_cli.measure import Speedup, Spread, Subject, Timing
from repshift_cli.progress import Progress
from repshift_cli.runtimes import OpenedExport, Runtime

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from repshift_cli.artifact import Opened

__all__ = [
    "PLOT_FORMATS",
    "AttentionMode",
    "BenchReport",
    "BenchSettings",
    "Contender",
    "MemoryFormat",
    "Ratio",
    "Run",
    "attention_mode",
    "contenders_of",
    "plot",
    "run_bench",
]

PLOT_FORMATS = ("png", "svg", "pdf")
AttentionMode = Literal["auto", "sdpa", "explicit"]
MemoryFormat = Literal["contiguous", "channels_last"]

_IMAGE_DIMS = 3
# Enough for caches and allocators on the CPU; a graphics card also raises its clock during the first runs.
_WARMUP_ROUNDS = {"cpu": 3, "cuda": 50}


@dataclass(frozen=True)
class Contender:
    """One model in the comparison.

    Attributes:
        name: unique in the comparison.
        module: takes images `[B, C, H, W]`.
        macs: multiply-accumulates per image.
        input_size: of one input: `(C, H, W)`, or `(T, C, H, W)` for a clip.
        against: name of the dense contender that this one is compared with, if any.
        context: what must be entered for `module` to be this contender, such as the switch to its dense self.
    """

    name: str
    module: nn.Module
    macs: int
    input_size: tuple[int, ...]
    against: str | None = None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class BenchSettings:
    """How to measure: the same for both sides of every comparison.

    Attributes:
        seconds: time for each model at each batch size; more is taken where `min_runs` needs it.
        min_runs: least number of timed runs of each model.
        threads: CPU threads, None for torch's own choice.
        memory_format: of weights and images; convolutions of many libraries are made for channels_last.
    """

    device: torch.device
    dtype: torch.dtype
    seconds: float = 10.0
    min_runs: int = 10
    threads: int | None = None
    attention: AttentionMode = "auto"
    memory_format: MemoryFormat = "contiguous"


@dataclass(frozen=True)
class Run:
    """What was measured of one contender at one batch size; `macs` is per image, `timing` and memory per batch.

    `peak_bytes` is None where a runtime allocates by itself.
    """

    name: str
    batch: int
    macs: int
    timing: Timing
    peak_bytes: int | None

    @property
    def latency(self) -> Spread:
        """Milliseconds per batch."""
        return self.timing.spread

    @property
    def throughput(self) -> float:
        """Images per second at the median latency."""
        return self.batch * 1e3 / self.latency.median

    def to_dict(self) -> dict[str, Any]:
        """An entry of `runs` in the JSON document."""
        return {
            "name": self.name,
            "batch": self.batch,
            "gmacs": self.macs / 1e9,
            "latency_ms": self.latency.to_dict(),
            "throughput": _significant(self.throughput),
            "peak_memory_mb": None if self.peak_bytes is None else round(self.peak_bytes / 1e6, 3),
        }


@dataclass(frozen=True)
class Ratio:
    """A contender against its dense self at one batch size: dense / compressed, so larger is better."""

    batch: int
    name: str
    against: str
    macs: float
    speedup: Speedup

    @property
    def efficiency(self) -> float:
        """The part of the saved work that became speed: latency ratio / MAC ratio."""
        return self.speedup.ratio / self.macs

    def to_dict(self) -> dict[str, Any]:
        """An entry of `ratios` in the JSON document."""
        return {
            "batch": self.batch,
            "name": self.name,
            "against": self.against,
            "macs": _significant(self.macs),
            "latency": _significant(self.speedup.ratio),
            "latency_p10": _significant(self.speedup.p10),
            "latency_p90": _significant(self.speedup.p90),
            "efficiency": _significant(self.efficiency),
            "clear": self.speedup.clear,
        }

    def __str__(self) -> str:
        return f"{self.speedup} (MAC ratio {self.macs:.2f}x, efficiency {self.efficiency:.2f})"


@dataclass(frozen=True)
class BenchReport:
    """All runs, batch by batch, and all ratios between them."""

    device: str
    dtype: str
    threads: int
    attention: str
    runs: tuple[Run, ...]
    ratios: tuple[Ratio, ...]
    memory_format: MemoryFormat = "contiguous"

    @property
    def machine(self) -> str:
        """Device, dtype and threads in words."""
        return f"{self.device}, {self.dtype}, {self.threads} thread{'s' if self.threads > 1 else ''}"

    def to_dict(self) -> dict[str, Any]:
        """The JSON document of `repshift bench`."""
        return {
            "device": self.device,
            "dtype": self.dtype,
            "threads": self.threads,
            "attention": self.attention,
            "memory_format": self.memory_format,
            "torch": torch.__version__,
            "runs": [run.to_dict() for run in self.runs],
            "ratios": [ratio.to_dict() for ratio in self.ratios],
        }

    def to_csv(self) -> str:
        """One line per run, under a line of names."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        latency = [f"latency_ms_{part}" for part in ("median", "p10", "p90")]
        columns = ["name", "batch", "gmacs", *latency, "throughput", "peak_memory_mb"]
        writer.writerow([*columns, "device", "dtype", "threads", "attention"])
        for run in self.runs:
            values = run.to_dict()
            values.update(zip(latency, values.pop("latency_ms").values(), strict=True))
            settings = [self.device, self.dtype, self.threads, self.attention]
            writer.writerow([*(values[column] for column in columns), *settings])
        return text.getvalue()


def contenders_of(opened: Mapping[str, Opened]) -> list[Contender]:
    """Every opened model, and the dense self of every compressed one.

    A single model gives `compressed` and `dense`; of several, a compressed one keeps its label and a dense one is
    called after its architecture. Two that come from the same weights share one dense contender.

    Args:
        opened: by label, such as the stem of the file.
    """
    exported = {label: model for label, model in opened.items() if isinstance(model, OpenedExport)}
    opened = {label: model for label, model in opened.items() if label not in exported}
    single = len(opened) + len(exported) == 1
    dense: dict[Any, Contender] = {}
    compressed: list[Contender] = []
    for label, model in opened.items():
        description = model.loaded.description
        size = description.preprocessing.shape
        key = (_weights_identity(model), description.name, size)
        if key not in dense:
            taken = {contender.name for contender in dense.values()} | set(opened)
            name = "dense" if single else _unused(f"{description.name} dense", taken)
            context = nullcontext if model.compressed is None else model.compressed.dense
            dense[key] = Contender(name, model.module, model.dense_macs, size, context=context)
        if model.compressed is not None:
            name = "compressed" if single else label
            compressed.append(Contender(name, model.module, model.macs, size, against=dense[key].name))
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
        yield Contender(label, each.module, each.macs, each.loaded.description.preprocessing.shape, against)


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
    """Measure every contender at every batch size, those of one input size in turn with each other.

    The modules are moved to the device and dtype of the settings and stay there.

    Raises:
        UsageError: a batch does not fit into memory, or a model has no attention that can be switched as asked.
    """
    modules = _distinct([contender.module for contender in contenders])
    if settings.memory_format == "channels_last" and any(len(each.input_size) > _IMAGE_DIMS for each in contenders):
        raise UsageError("--memory-format channels_last is for images, and the model takes clips", "Leave it out.")
    for module in modules:
        module.to(settings.device, settings.dtype).to(memory_format=_memory_format(settings))
    runs: list[Run] = []
    attention: set[str] = set()
    with measure.threads(settings.threads) as threads, ExitStack() as switched:
        for module in modules:
            switched.enter_context(attention_mode(module, settings.attention))
        for batch in batches:
            for size in dict.fromkeys(contender.input_size for contender in contenders):
                group = [contender for contender in contenders if contender.input_size == size]
                inputs = _random_images(batch, size, settings)
                with _explain_memory(batch, settings.device):
                    attention.update(_observed(contender, inputs) for contender in group)
                    runs.extend(_measure_group(group, inputs, settings, progress))
    return BenchReport(
        device=measure.device_name(settings.device),
        dtype=str(settings.dtype).removeprefix("torch."),
        threads=threads,
        attention=", ".join(sorted(attention)),
        memory_format=settings.memory_format,
        runs=tuple(runs),
        ratios=tuple(_ratios(contenders, runs)),
    )


def _measure_group(
    group: Sequence[Contender], inputs: Tensor, settings: BenchSettings, progress: Progress
) -> Iterator[Run]:
    memory = {contender.name: _peak(contender, inputs) for contender in group}
    timings = measure.measure_latency(
        [Subject(contender.name, contender.module, contender.context) for contender in group],
        inputs,
        max_seconds=settings.seconds * len(group),
        warmup=_WARMUP_ROUNDS[settings.device.type],
        progress=progress,
        min_runs=settings.min_runs,
    )
    for contender in group:
        timing = timings[contender.name]
        yield Run(contender.name, len(inputs), contender.macs, timing, memory[contender.name])


def _peak(contender: Contender, inputs: Tensor) -> int | None:
    if isinstance(contender.module, Runtime) and contender.module.hides_memory:
        return None
    with contender.context():
        return measure.peak_memory(contender.module, inputs)


def _observed(contender: Contender, inputs: Tensor) -> str:
    if isinstance(contender.module, Runtime) and contender.module.hides_memory:
        return f"{contender.module.document.kind}'s own"  # its operations are not those of torch
    with contender.context():
        return measure.observed_attention(contender.module, inputs[:1])


def _random_images(batch: int, size: tuple[int, ...], settings: BenchSettings) -> Tensor:
    images = torch.randn(batch, *size, generator=torch.Generator().manual_seed(0))
    return images.to(settings.device, settings.dtype, memory_format=_memory_format(settings))


def _memory_format(settings: BenchSettings) -> torch.memory_format:
    return torch.channels_last if settings.memory_format == "channels_last" else torch.contiguous_format


def _ratios(contenders: Sequence[Contender], runs: Sequence[Run]) -> Iterator[Ratio]:
    measured = {(run.batch, run.name): run for run in runs}
    against = {contender.name: contender.against for contender in contenders}
    for run in runs:
        name = against[run.name]
        if name is not None:
            dense = measured[run.batch, name]
            speedup = measure.speedup(dense.timing, run.timing)
            yield Ratio(run.batch, run.name, name, dense.macs / run.macs, speedup)


def _distinct(modules: Sequence[nn.Module]) -> list[nn.Module]:
    return list({id(module): module for module in modules}.values())


def _significant(value: float) -> float:
    return float(f"{value:.4g}")


@contextmanager
def _explain_memory(batch: int, device: torch.device) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # The CPU allocator has no exception type of its own.
        if isinstance(error, torch.cuda.OutOfMemoryError) or "not enough memory" in str(error):
            raise UsageError(
                f"batch size {batch} does not fit into the memory of {device}", "Take a smaller one with --batch-size."
            ) from error
        raise


@contextmanager
def attention_mode(module: nn.Module, mode: AttentionMode) -> Iterator[None]:
    """Switch all attention in a model between fused and explicit, and back afterwards.

    Args:
        mode: `auto` leaves the model as it is, `sdpa` asks for torch's scaled dot-product attention, `explicit` for
            a product, a softmax and a product.

    Raises:
        UsageError: nothing in the model has the switch (`fused_attn`, as timm's attention modules do).
    """
    if mode == "auto":
        yield
        return
    switches: list[Any] = [part for part in module.modules() if hasattr(part, "fused_attn")]
    if not switches:
        raise UsageError(
            f"no attention in {type(module).__name__} can be switched to {mode!r}", "Use --attention auto for it."
        )
    before = [part.fused_attn for part in switches]
    for part in switches:
        part.fused_attn = mode == "sdpa"
    try:
        yield
    finally:
        for part, value in zip(switches, before, strict=True):
            part.fused_attn = value


# ---------------------------------------------------------------------------------------------------------------------
# Picture

_DENSE_COLORS = ("#8c8c8c", "#bdbdbd", "#5f5f5f")
_COMPRESSED_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by every eye


def plot(report: BenchReport, path: Path, file_format: str) -> None:
    """Draw images per second for every batch size, with whiskers from p10 to p90, into a file.

    Args:
        file_format: one of `PLOT_FORMATS`; the name of the file need not say it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.add_subplot()
    _draw_bars(axes, report)
    axes.set_xlabel("batch size")
    axes.set_ylabel("images per second (p10 to p90)")
    axes.set_title(f"{report.machine}, attention {report.attention}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, format=file_format, dpi=150)


def _draw_bars(axes: Axes, report: BenchReport) -> None:
    names = list(dict.fromkeys(run.name for run in report.runs))
    batches = list(dict.fromkeys(run.batch for run in report.runs))
    ratios = {(ratio.batch, ratio.name): ratio.speedup for ratio in report.ratios}
    measured = {(run.batch, run.name): run for run in report.runs}
    colors = _colors(names, {ratio.name for ratio in report.ratios})
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        runs = [measured[batch, name] for batch in batches]
        places = [place + (index - (len(names) - 1) / 2) * width for place in range(len(batches))]
        heights = [run.throughput for run in runs]
        # The slow end of the latency is the low end of the throughput; the median lies between them.
        low = [run.throughput - run.batch * 1e3 / run.latency.p90 for run in runs]
        high = [run.batch * 1e3 / run.latency.p10 - run.throughput for run in runs]
        bars = axes.bar(places, heights, width * 0.94, yerr=(low, high), capsize=3, color=colors[name], label=name)
        texts = [f"{ratios[batch, name].ratio:.2f}x" if (batch, name) in ratios else "" for batch in batches]
        axes.bar_label(bars, texts, padding=2, fontsize=8)
    axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])


def _colors(names: Sequence[str], compressed: set[str]) -> dict[str, str]:
    groups = ([name for name in names if name not in compressed], [name for name in names if name in compressed])
    palettes = (_DENSE_COLORS, _COMPRESSED_COLORS)
    return {
        name: palette[index % len(palette)]
        for group, palette in zip(groups, palettes, strict=True)
        for index, name in enumerate(group)
    }
