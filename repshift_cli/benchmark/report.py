"""What a benchmark found: runs, ratios, the batch from which on it pays, and the same as JSON and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

import torch

from repshift_cli.measure.latency import Speedup, Spread, Timing, compute_speedup

__all__ = [
    "BenchReport",
    "BreakEven",
    "Compilation",
    "EndToEnd",
    "MemoryFormat",
    "Passes",
    "Ratio",
    "Role",
    "Run",
    "Setting",
    "break_even",
]

MemoryFormat = Literal["contiguous", "channels_last"]

Role = Literal["dense", "compressed", "peer"]
"""The original, what it was compressed to, or another way to make it faster."""

_BOUND_BY_READING = 0.5
"""Share of the time spent waiting for data from which on the readers, and not the model, set the speed."""


@dataclass(frozen=True)
class Setting:
    """What all runs of a group have in common, and so both sides of each comparison.

    Attributes:
        batch: images at a time.
        image_size: height and width.
        dtype: `float32`, ...
        attention: as it was asked for: `auto`, `explicit`, ...
        compile: the mode of torch.compile, or `off`.
    """

    batch: int
    image_size: tuple[int, int]
    dtype: str = "float32"
    attention: str = "auto"
    compile: str = "off"

    @property
    def apart_from_batch(self) -> str:
        """What stays the same in a sweep over batch sizes, in words."""
        compiled = "" if self.compile == "off" else f", compile {self.compile}"
        return f"{self.dtype}, attention {self.attention}{compiled}, {'x'.join(map(str, self.image_size))}"

    def to_dict(self) -> dict[str, Any]:
        """The keys that every row of the JSON document has. A square image is one number."""
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
    """What torch.compile took.

    Attributes:
        seconds: of the first run, which compiles.
        recompiles: graphs that were compiled after it; there should be none.
    """

    seconds: float
    recompiles: int


@dataclass(frozen=True)
class Run:
    """What was measured of one contender in one group.

    Attributes:
        macs: multiply-accumulates of one image.
        timing: of a batch.
        peak_bytes: of a batch; None where it cannot be seen, inside a compiled graph or another runtime.
        attention: the attention that really ran, see `measure.observed_attention`.
        compilation: None for a model that was not compiled.
    """

    name: str
    setting: Setting
    macs: int
    timing: Timing
    peak_bytes: int | None
    role: Role = "dense"
    attention: str = "none"
    compilation: Compilation | None = None

    @property
    def batch(self) -> int:
        """Images at a time."""
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
        """An entry of `runs` in the JSON document."""
        return {
            "name": self.name,
            "role": self.role,
            **self.setting.to_dict(),
            "attention": self.attention,
            "gmacs": self.macs / 1e9,
            "latency_ms": {**self.latency.to_dict(), "p99": _significant(self.timing.p99_ms)},
            "throughput": _significant(self.throughput),
            "peak_memory_mb": None if self.peak_bytes is None else round(self.peak_bytes / 1e6, 3),
            "compile_s": self.compilation and round(self.compilation.seconds, 3),
            "recompiles": self.compilation and self.compilation.recompiles,
        }


@dataclass(frozen=True)
class Ratio:
    """A contender against another in one group: other / this one, so larger is better.

    Attributes:
        role: of the contender `name`.
        macs: ratio of the multiply-accumulates.
    """

    setting: Setting
    name: str
    against: str
    macs: float
    speedup: Speedup
    role: Role = "compressed"

    @property
    def batch(self) -> int:
        """Images at a time."""
        return self.setting.batch

    @property
    def efficiency(self) -> float:
        """The part of the saved work that became speed: latency ratio / MAC ratio."""
        return self.speedup.ratio / self.macs

    def to_dict(self) -> dict[str, Any]:
        """An entry of `ratios` in the JSON document."""
        return {
            **self.setting.to_dict(),
            "name": self.name,
            "role": self.role,
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


# ---------------------------------------------------------------------------------------------------------------------
# From which batch on it pays


@dataclass(frozen=True)
class BreakEven:
    """From which batch on one contender is faster than another.

    Attributes:
        setting: of the group with the smallest batch.
        batch: the smallest at which the speed-up is clear; None where it is at none.
        tried: all batches, ascending.
        not_above: larger batches at which it is not clear all the same.
    """

    name: str
    against: str
    setting: Setting
    batch: int | None
    tried: tuple[int, ...]
    not_above: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """An entry of `break_even` in the JSON document."""
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
    """From which batch on it pays, for each comparison at each setting, in the order of the ratios."""
    series: dict[tuple[Any, ...], list[Ratio]] = {}
    for ratio in ratios:
        series.setdefault((ratio.name, ratio.against, ratio.setting.apart_from_batch), []).append(ratio)
    return tuple(_break_even(sorted(found, key=lambda ratio: ratio.batch)) for found in series.values())


def _break_even(ratios: Sequence[Ratio]) -> BreakEven:
    """Of one comparison at one setting, batches ascending."""
    first, tried = ratios[0], tuple(ratio.batch for ratio in ratios)
    batch = next((ratio.batch for ratio in ratios if ratio.speedup.clear), None)
    not_above = [
        ratio.batch for ratio in ratios if batch is not None and ratio.batch > batch and not ratio.speedup.clear
    ]
    return BreakEven(first.name, first.against, first.setting, batch, tried, tuple(not_above))


# ---------------------------------------------------------------------------------------------------------------------
# From files to results


@dataclass(frozen=True)
class Passes:
    """Passes over the same pictures, each from the first request to the last result.

    Attributes:
        images: pictures of one pass.
        seconds: of each pass.
        waiting_s: of these, how long the model waited for pictures.
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
        """Share of the time, 0 to 1, that was spent waiting for pictures."""
        return median(wait / whole for wait, whole in zip(self.waiting_s, self.seconds, strict=True))

    @property
    def bottleneck(self) -> Literal["reading", "model"]:
        """What sets the speed."""
        return "reading" if self.waiting > _BOUND_BY_READING else "model"

    def to_dict(self) -> dict[str, Any]:
        """Images per second, the share of waiting, and what sets the speed."""
        return {
            "images_per_s": self.throughput.to_dict(),
            "waiting": round(self.waiting, 4),
            "bottleneck": self.bottleneck,
        }


@dataclass(frozen=True)
class EndToEnd:
    """One group with pictures that are read, decoded and preprocessed for every pass.

    Attributes:
        data: what was read, in words.
        workers: processes that read; 0 where the process of the model did so itself.
        reading: passes that read only.
        sides: by the name of the contender.
        against: by the name of a contender, the one that it is compared with.
    """

    setting: Setting
    data: str
    workers: int
    reading: Passes
    sides: Mapping[str, Passes]
    against: Mapping[str, str] = field(default_factory=dict)

    @property
    def speedups(self) -> dict[str, Speedup]:
        """By the name of a contender, how many times faster it is than the one that it is compared with."""
        return {
            name: compute_speedup(Timing(self.sides[other].seconds), Timing(self.sides[name].seconds))
            for name, other in self.against.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """An entry of `end_to_end` in the JSON document."""
        return {
            **self.setting.to_dict(),
            "data": self.data,
            "images": self.reading.images,
            "workers": self.workers,
            "reading_images_per_s": self.reading.throughput.to_dict(),
            "runs": [{"name": name, **passes.to_dict()} for name, passes in self.sides.items()],
            "ratios": [
                {
                    "name": name,
                    "against": self.against[name],
                    "latency": _significant(found.ratio),
                    "latency_p10": _significant(found.p10),
                    "latency_p90": _significant(found.p90),
                    "clear": found.clear,
                }
                for name, found in self.speedups.items()
            ],
        }


# ---------------------------------------------------------------------------------------------------------------------
# All of it


@dataclass(frozen=True)
class BenchReport:
    """All runs, group by group, and all ratios between them.

    Attributes:
        device: as its maker calls it.
        threads: of the CPU.
        end_to_end: empty where no pictures were named.
    """

    device: str
    threads: int
    runs: tuple[Run, ...]
    ratios: tuple[Ratio, ...]
    memory_format: MemoryFormat = "contiguous"
    end_to_end: tuple[EndToEnd, ...] = ()

    @property
    def dtype(self) -> str:
        """What the models ran in."""
        return ", ".join(self._dtypes)

    @property
    def attention(self) -> str:
        """What attention really ran."""
        return ", ".join(self._attentions)

    @property
    def machine(self) -> str:
        """Device, dtype and threads in words."""
        return f"{self.device}, {self.dtype}, {self.threads} thread{'s' if self.threads > 1 else ''}"

    @property
    def settings(self) -> tuple[Setting, ...]:
        """One for each group, in the order in which they were measured."""
        return tuple(dict.fromkeys(run.setting for run in self.runs))

    @property
    def break_even(self) -> tuple[BreakEven, ...]:
        """From which batch on compressed models are faster than what they are compared with."""
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
        }

    def to_csv(self) -> str:
        """One line per run, under a line of names; what was not measured is empty."""
        text = io.StringIO()
        rows = list(self._rows())
        writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    @property
    def _dtypes(self) -> list[str]:
        return list(dict.fromkeys(run.setting.dtype for run in self.runs))

    @property
    def _attentions(self) -> list[str]:
        return sorted({run.attention for run in self.runs})

    def _rows(self) -> Iterator[dict[str, Any]]:
        over_dense = {(ratio.setting, ratio.name): ratio for ratio in self.ratios if self._is_dense(ratio)}
        over_peer = {(ratio.setting, ratio.against): ratio for ratio in self.ratios if not self._is_dense(ratio)}
        passes = {(found.setting, name): each for found in self.end_to_end for name, each in found.sides.items()}
        for run in self.runs:
            values = run.to_dict()
            latency = {f"latency_ms_{part}": value for part, value in values.pop("latency_ms").items()}
            key = run.setting, run.name
            yield {
                **_columns(values, ("name", "batch", "gmacs")),
                **latency,
                **_columns(values, ("throughput", "peak_memory_mb")),
                "device": self.device,
                "dtype": values["dtype"],
                "threads": self.threads,
                **_columns(values, ("attention", "attention_mode", "compile", "image_size", "role")),
                **_columns(values, ("compile_s", "recompiles")),
                **_ratio_columns("over_dense", over_dense.get(key)),
                "efficiency": over_dense[key].to_dict()["efficiency"] if key in over_dense else None,
                **_ratio_columns("ours_over_it", over_peer.get(key)),
                **_passes_columns(passes.get(key)),
            }

    def _is_dense(self, ratio: Ratio) -> bool:
        return any(run.name == ratio.against and run.role == "dense" for run in self.runs)


def _columns(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: values[name] for name in names}


def _ratio_columns(name: str, ratio: Ratio | None) -> dict[str, Any]:
    found = ratio.to_dict() if ratio else {}
    parts = {"": "latency", "_p10": "latency_p10", "_p90": "latency_p90", "_clear": "clear"}
    return {f"{name}{suffix}": found.get(key) for suffix, key in parts.items()}


def _passes_columns(passes: Passes | None) -> dict[str, Any]:
    found = passes.to_dict() if passes else {"images_per_s": {}}
    return {
        **{f"end_to_end_per_s_{part}": found["images_per_s"].get(part) for part in ("median", "p10", "p90")},
        "waiting": found.get("waiting"),
        "bottleneck": found.get("bottleneck"),
    }


def _plain(values: Sequence[str]) -> str | list[str]:
    """One value by itself, several as a list."""
    return values[0] if len(values) == 1 else list(values)


def _significant(value: float) -> float:
    return float(f"{value:.4g}")
