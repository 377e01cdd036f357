"""Results of a benchmark: runs, ratios, break-even batch sizes, as JSON and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

import torch

from repshift_cli.measure.latency import Speedup, Spread, Timing, compute_speedup
from repshift_cli.utils.stats import significant

MemoryFormat = Literal["contiguous", "channels_last"]

Role = Literal["dense", "compressed", "peer"]
"""The dense model, the compressed model, or a baseline or another way to run the model (`peer`)."""

_BOUND_BY_READING = 0.5
"""Share of time spent waiting for data above which reading limits the speed, not the model."""

_CSV_COLUMNS = (
    *("name", "batch", "gmacs", "latency_ms_median", "latency_ms_p10", "latency_ms_p90", "latency_ms_p99"),
    *("throughput", "peak_memory_mb", "device", "dtype", "threads", "attention", "attention_mode", "compile"),
    *("image_size", "role", "compile_s", "recompiles", "bytes"),
    *("over_dense", "over_dense_p10", "over_dense_p90", "over_dense_clear", "efficiency"),
    *("ours_over_it", "ours_over_it_p10", "ours_over_it_p90", "ours_over_it_clear"),
    *("end_to_end_per_s_median", "end_to_end_per_s_p10", "end_to_end_per_s_p90", "waiting", "bottleneck"),
)


@dataclass(frozen=True)
class Setting:
    """Setting of a group of runs that are compared with each other.

    Attributes:
        batch: images at a time.
        image_size: height and width.
        attention: as requested.
        compile: mode of torch.compile, or `off`.
    """

    batch: int
    image_size: tuple[int, int]
    dtype: str = "float32"
    attention: str = "auto"
    compile: str = "off"

    @property
    def without_batch(self) -> str:
        """All but the batch size, as text."""
        compiled = "" if self.compile == "off" else f", compile {self.compile}"
        return f"{self.dtype}, attention {self.attention}{compiled}, {'x'.join(map(str, self.image_size))}"

    def to_dict(self) -> dict[str, Any]:
        """Keys of every row of the JSON document. The size of a square image is one number."""
        height, width = self.image_size
        return {
            "batch": self.batch,
            "image_size": height if height == width else [height, width],
            "dtype": self.dtype,
            "attention_mode": self.attention,
            "compile": self.compile,
        }


@dataclass(frozen=True)
class Compilation:
    """Seconds of the first run, in which torch.compile works, and graphs that are compiled after it (should be 0)."""

    seconds: float
    recompiles: int


@dataclass(frozen=True)
class Run:
    """Measurements of one contender in one setting.

    Attributes:
        macs: multiply-accumulates of one image.
        peak_bytes: of a batch; None if it cannot be measured, inside a compiled graph or another runtime.
        attention: the attention kernel in use, see `observed_attention`.
        bytes: of the file or the weights; None if other ways to run the model are not measured.
    """

    name: str
    setting: Setting
    macs: int
    timing: Timing
    peak_bytes: int | None
    role: Role = "dense"
    attention: str = "none"
    compilation: Compilation | None = None
    bytes: int | None = None

    @property
    def batch(self) -> int:
        return self.setting.batch

    @property
    def latency(self) -> Spread:
        """Milliseconds per batch."""
        return self.timing.spread

    @property
    def throughput(self) -> float:
        """Images per second at the median latency."""
        return self.batch * 1e3 / self.latency.median

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "role": self.role,
            **self.setting.to_dict(),
            "attention": self.attention,
            "gmacs": self.macs / 1e9,
            "latency_ms": {**self.latency.to_dict(), "p99": significant(self.timing.p99_ms)},
            "throughput": significant(self.throughput),
            "peak_memory_mb": None if self.peak_bytes is None else round(self.peak_bytes / 1e6, 3),
            "compile_s": self.compilation and round(self.compilation.seconds, 3),
            "recompiles": self.compilation and self.compilation.recompiles,
            "bytes": self.bytes,
        }


@dataclass(frozen=True)
class Ratio:
    """MACs and latency of a contender compared with another in one setting: other / this one, so larger is better."""

    setting: Setting
    name: str
    against: str
    macs: float
    speedup: Speedup
    role: Role = "compressed"

    @property
    def batch(self) -> int:
        return self.setting.batch

    @property
    def efficiency(self) -> float:
        """Latency ratio / MAC ratio: the share of the saved MACs that became speed."""
        return self.speedup.ratio / self.macs

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.setting.to_dict(),
            "name": self.name,
            "role": self.role,
            "against": self.against,
            "macs": significant(self.macs),
            **_latency_ratio(self.speedup),
            "efficiency": significant(self.efficiency),
            "clear": self.speedup.clear,
        }

    def __str__(self) -> str:
        return f"{self.speedup} (MAC ratio {self.macs:.2f}x, efficiency {self.efficiency:.2f})"


@dataclass(frozen=True)
class BreakEven:
    """Smallest batch size from which one contender is faster than another.

    Attributes:
        setting: that of the smallest batch.
        batch: the smallest with a clear speed-up; None if there is none.
        not_above: larger batch sizes without a clear speed-up.
    """

    name: str
    against: str
    setting: Setting
    batch: int | None
    tried: tuple[int, ...]
    not_above: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.setting.to_dict(),
            "name": self.name,
            "against": self.against,
            "batch": self.batch,
            "tried": list(self.tried),
            "not_above": list(self.not_above),
        }

    def __str__(self) -> str:
        tried = ", ".join(map(str, self.tried))
        if self.batch is None:
            return f"no speed-up at any batch size ({tried})"
        if self.batch == self.tried[0] and not self.not_above:
            return f"faster at every batch size that was tried ({tried})"
        but = f", but not at {', '.join(map(str, self.not_above))}" if self.not_above else ""
        return f"faster from batch {self.batch} on{but} (tried: {tried})"


def break_even(ratios: Sequence[Ratio]) -> tuple[BreakEven, ...]:
    """Break-even batch size of each comparison in each setting, in the order of the ratios."""
    series: dict[tuple[Any, ...], list[Ratio]] = {}
    for ratio in ratios:
        series.setdefault((ratio.name, ratio.against, ratio.setting.without_batch), []).append(ratio)
    found = []
    for same in series.values():
        by_batch = sorted(same, key=lambda ratio: ratio.batch)
        first, clear = by_batch[0], [ratio.batch for ratio in by_batch if ratio.speedup.clear]
        tried = tuple(ratio.batch for ratio in by_batch)
        not_above = tuple(batch for batch in tried if clear and batch > clear[0] and batch not in clear)
        found.append(BreakEven(first.name, first.against, first.setting, clear[0] if clear else None, tried, not_above))
    return tuple(found)


@dataclass(frozen=True)
class Passes:
    """Passes over the same images, each from the first request to the last result.

    Attributes:
        images, seconds: of one pass, and of each pass.
        waiting_s: seconds of each pass in which the model waited for images.
    """

    images: int
    seconds: tuple[float, ...]
    waiting_s: tuple[float, ...]

    @property
    def throughput(self) -> Spread:
        """Images per second."""
        return Spread.of([self.images / seconds for seconds in self.seconds])

    @property
    def waiting(self) -> float:
        """Share of time (0 to 1) spent waiting for images."""
        return median(wait / seconds for wait, seconds in zip(self.waiting_s, self.seconds, strict=True))

    @property
    def bottleneck(self) -> Literal["reading", "model"]:
        """What limits the speed."""
        return "reading" if self.waiting > _BOUND_BY_READING else "model"

    def to_dict(self) -> dict[str, Any]:
        return {
            "images_per_s": self.throughput.to_dict(),
            "waiting": round(self.waiting, 4),
            "bottleneck": self.bottleneck,
        }


@dataclass(frozen=True)
class EndToEnd:
    """One setting with images that are read, decoded and preprocessed in every pass.

    Attributes:
        workers: reading processes; 0 reads in the process of the model.
        reading: passes without a model.
        sides: by name of the contender.
        against: name of the contender that each is compared with.
    """

    setting: Setting
    data: str
    workers: int
    reading: Passes
    sides: Mapping[str, Passes]
    against: Mapping[str, str] = field(default_factory=dict)

    @property
    def speedups(self) -> dict[str, Speedup]:
        """By name of the contender: how many times faster it is than the one it is compared with."""
        return {
            name: compute_speedup(Timing(self.sides[other].seconds), Timing(self.sides[name].seconds))
            for name, other in self.against.items()
        }

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.setting.to_dict(),
            "data": self.data,
            "images": self.reading.images,
            "workers": self.workers,
            "reading_images_per_s": self.reading.throughput.to_dict(),
            "runs": [{"name": name, **passes.to_dict()} for name, passes in self.sides.items()],
            "ratios": [
                {"name": name, "against": self.against[name], **_latency_ratio(found), "clear": found.clear}
                for name, found in self.speedups.items()
            ],
        }


@dataclass(frozen=True)
class BenchReport:
    """All runs and ratios, setting by setting.

    Attributes:
        device: product name of the CPU or GPU.
        end_to_end: empty without images to read.
        missing: reasons by the names of ways to run the model that do not exist here.
    """

    device: str
    threads: int
    runs: tuple[Run, ...]
    ratios: tuple[Ratio, ...]
    memory_format: MemoryFormat = "contiguous"
    end_to_end: tuple[EndToEnd, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        """The dtypes of the models, as text."""
        return ", ".join(self._dtypes)

    @property
    def attention(self) -> str:
        """The attention kernels in use, as text."""
        return ", ".join(self._attentions)

    @property
    def machine(self) -> str:
        """Device, dtype and threads as text."""
        return f"{self.device}, {self.dtype}, {self.threads} thread{'s' if self.threads > 1 else ''}"

    @property
    def break_even(self) -> tuple[BreakEven, ...]:
        """Break-even batch sizes of the compressed models."""
        return break_even([ratio for ratio in self.ratios if ratio.role == "compressed"])

    def to_dict(self) -> dict[str, Any]:
        """The JSON document of `repshift bench`."""
        return {
            "device": self.device,
            "dtype": _plain(self._dtypes),
            "threads": self.threads,
            "attention": _plain(self._attentions),
            "memory_format": self.memory_format,
            "torch": torch.__version__,
            "runs": [run.to_dict() for run in self.runs],
            "ratios": [ratio.to_dict() for ratio in self.ratios],
            "break_even": [found.to_dict() for found in self.break_even],
            "end_to_end": [found.to_dict() for found in self.end_to_end],
            "missing": [{"name": name, "reason": reason} for name, reason in self.missing.items()],
        }

    def to_csv(self) -> str:
        """A header and one line per run; what was not measured is empty."""
        text = io.StringIO()
        writer = csv.DictWriter(text, _CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows())
        return text.getvalue()

    @property
    def _dtypes(self) -> list[str]:
        return list(dict.fromkeys(run.setting.dtype for run in self.runs))

    @property
    def _attentions(self) -> list[str]:
        return sorted({run.attention for run in self.runs})

    def _rows(self) -> Iterator[dict[str, Any]]:
        over_dense = {(ratio.setting, ratio.name): ratio for ratio in self.ratios if self._is_dense(ratio)}
        ours = (ratio for ratio in self.ratios if ratio.role == "compressed")
        over_baseline = {(ratio.setting, ratio.against): ratio for ratio in ours if not self._is_dense(ratio)}
        passes = {(found.setting, name): each for found in self.end_to_end for name, each in found.sides.items()}
        for run in self.runs:
            row, key = run.to_dict(), (run.setting, run.name)
            row |= {f"latency_ms_{part}": value for part, value in row["latency_ms"].items()}
            if ratio := over_dense.get(key):
                row |= _ratio_columns("over_dense", ratio) | {"efficiency": significant(ratio.efficiency)}
            if ratio := over_baseline.get(key):
                row |= _ratio_columns("ours_over_it", ratio)
            if read := passes.get(key):
                rates = {f"end_to_end_per_s_{part}": rate for part, rate in read.throughput.to_dict().items()}
                row |= read.to_dict() | rates
            yield row | {"device": self.device, "threads": self.threads}

    def _is_dense(self, ratio: Ratio) -> bool:
        return any(run.name == ratio.against and run.role == "dense" for run in self.runs)


def _ratio_columns(name: str, ratio: Ratio) -> dict[str, Any]:
    parts = {key.replace("latency", name): value for key, value in _latency_ratio(ratio.speedup).items()}
    return {**parts, f"{name}_clear": ratio.speedup.clear}


def _plain(values: Sequence[str]) -> str | list[str]:
    """A single value, or a list of several."""
    return values[0] if len(values) == 1 else list(values)


def _latency_ratio(speedup: Speedup) -> dict[str, float]:
    names = {"latency": speedup.ratio, "latency_p10": speedup.p10, "latency_p90": speedup.p90}
    return {name: significant(value) for name, value in names.items()}
