"""What a benchmark must reach, as `--budget` says it, and whether it did. Plain numbers; nothing here needs torch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from repshift_cli.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    from repshift_cli.benchmark.report import BenchReport, Ratio, Run, Setting

__all__ = ["Limit", "Verdict", "check", "require_met"]

Sense = Literal["<=", ">="]

_EXPRESSION = re.compile(r"\s*([a-z_]+)\s*(<=|>=)\s*([0-9.eE+-]+)\s*")
_ALLOWED = (
    "Allowed are macs<=0.66 and latency<=0.7 (fractions of dense), latency_ms<=50, peak_memory_mb<=500, "
    "throughput>=100, speedup>=1.3 and efficiency>=0.9."
)


class _Measured(NamedTuple):
    """What a limit is about: its median, None where it cannot be seen, and p10 and p90 of it where it varies."""

    value: float | None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class _Quantity:
    """Something that can be limited: from which side, and what was measured of it."""

    sense: Sense
    of: Callable[[Ratio, Run], _Measured]


def _latency(ratio: Ratio, run: Run) -> _Measured:
    gain = ratio.speedup
    return _Measured(1 / gain.ratio, (1 / gain.p90, 1 / gain.p10))


def _latency_ms(ratio: Ratio, run: Run) -> _Measured:
    return _Measured(run.latency.median, (run.latency.p10, run.latency.p90))


def _memory(ratio: Ratio, run: Run) -> _Measured:
    return _Measured(None if run.peak_bytes is None else run.peak_bytes / 1e6)


def _throughput(ratio: Ratio, run: Run) -> _Measured:
    return _Measured(run.throughput, (run.batch * 1e3 / run.latency.p90, run.batch * 1e3 / run.latency.p10))


def _speedup(ratio: Ratio, run: Run) -> _Measured:
    return _Measured(ratio.speedup.ratio, (ratio.speedup.p10, ratio.speedup.p90))


def _efficiency(ratio: Ratio, run: Run) -> _Measured:
    return _Measured(ratio.efficiency, (ratio.speedup.p10 / ratio.macs, ratio.speedup.p90 / ratio.macs))


_QUANTITIES: dict[str, _Quantity] = {
    "macs": _Quantity("<=", lambda ratio, run: _Measured(1 / ratio.macs)),
    "latency": _Quantity("<=", _latency),
    "latency_ms": _Quantity("<=", _latency_ms),
    "peak_memory_mb": _Quantity("<=", _memory),
    "throughput": _Quantity(">=", _throughput),
    "speedup": _Quantity(">=", _speedup),
    "efficiency": _Quantity(">=", _efficiency),
}


@dataclass(frozen=True)
class Limit:
    """One thing that every compressed model must reach at every setting.

    Attributes:
        key: `macs` and `latency` are fractions of dense, `latency_ms` is of a batch, `throughput` images per second.
    """

    key: str
    sense: Sense
    value: float

    @classmethod
    def parse(cls, text: str) -> Limit:
        """Read `latency<=0.7`.

        Raises:
            UsageError: it is none, with what is allowed.
        """
        found = _EXPRESSION.fullmatch(text)
        key, sense, number = found.groups() if found else ("", "", "")
        value = _number(number)
        quantity = _QUANTITIES.get(key)
        if quantity is None or sense != quantity.sense or value is None:
            raise UsageError(f"--budget: {text!r} cannot be understood", _ALLOWED)
        return cls(key, quantity.sense, value)

    def holds(self, value: float) -> bool:
        """Whether a value is within the limit."""
        return value <= self.value if self.sense == "<=" else value >= self.value

    def __str__(self) -> str:
        return f"{self.key}{self.sense}{self.value:g}"


@dataclass(frozen=True)
class Verdict:
    """Whether one compressed model reaches one limit at one setting.

    Attributes:
        value: what was measured, the median; None where it cannot be.
        interval: p10 and p90 of it; None for what does not vary.
    """

    limit: Limit
    name: str
    setting: Setting
    value: float | None
    interval: tuple[float, float] | None = None

    @property
    def met(self) -> bool:
        """Whether the median is within the limit."""
        return self.value is not None and self.limit.holds(self.value)

    @property
    def separated(self) -> bool:
        """Whether the whole interval lies on the side of the limit on which the median lies."""
        ends = self.interval or ()
        return self.value is not None and all(self.limit.holds(end) == self.met for end in ends)

    def to_dict(self) -> dict[str, Any]:
        """An entry of `budget` in the JSON document."""
        low, high = self.interval or (None, None)
        return {
            "budget": str(self.limit),
            "name": self.name,
            **self.setting.to_dict(),
            "value": _rounded(self.value),
            "p10": _rounded(low),
            "p90": _rounded(high),
            "met": self.met,
            "separated": self.separated,
        }

    def __str__(self) -> str:
        where = f"batch {self.setting.batch}: {self.limit}"
        if self.value is None:
            return f"{where} not met: it cannot be measured inside a compiled graph or another runtime"
        note = "" if self.separated or self.interval is None else f"; not separated, p10-p90 {_range(self.interval)}"
        if self.met:
            return f"{where} met: {self.value:.4g}{note}"
        distance = f"{abs(self.value - self.limit.value):.3g} {'above' if self.limit.sense == '<=' else 'below'}"
        return f"{where} missed: {self.value:.4g}, {distance}{note}"


def check(limits: Sequence[Limit], report: BenchReport) -> tuple[Verdict, ...]:
    """Hold every compressed model of a report to every limit, at every setting.

    Raises:
        UsageError: there are limits, but nothing is compressed.
    """
    runs = {(run.setting, run.name): run for run in report.runs}
    ratios = [
        ratio
        for ratio in report.ratios
        if ratio.role == "compressed" and runs[ratio.setting, ratio.against].role == "dense"
    ]
    if limits and not ratios:
        raise UsageError("--budget: no model is compressed", "Add --recipe to compress it for the run.")
    return tuple(_verdicts(limits, ratios, [runs[ratio.setting, ratio.name] for ratio in ratios]))


def require_met(verdicts: Sequence[Verdict]) -> None:
    """Do nothing where all limits are reached.

    Raises:
        CheckFailed: some are not, with those that were missed and by how much.
    """
    missed = [verdict for verdict in verdicts if not verdict.met]
    if missed:
        several = len({(verdict.name, verdict.setting.apart_from_batch) for verdict in verdicts}) > 1
        told = (
            f"{verdict}{f' ({verdict.name}, {verdict.setting.apart_from_batch})' if several else ''}"
            for verdict in missed
        )
        raise CheckFailed(f"{len(missed)} of {len(verdicts)} budget checks were missed", "\n".join(told))


def _verdicts(limits: Sequence[Limit], ratios: Sequence[Ratio], runs: Sequence[Run]) -> Iterator[Verdict]:
    for ratio, run in zip(ratios, runs, strict=True):
        for limit in limits:
            yield Verdict(limit, ratio.name, ratio.setting, *_QUANTITIES[limit.key].of(ratio, run))


def _number(text: str) -> float | None:
    """A positive number, None for anything else."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def _range(ends: tuple[float, float]) -> str:
    return f"{ends[0]:.3g}-{ends[1]:.3g}"


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
