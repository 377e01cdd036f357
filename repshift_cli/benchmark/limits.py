"""Limits of a benchmark (`--budget latency<=0.7`) and whether they are met. Plain numbers, no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from repshift_cli.errors import CheckFailed, UsageError
from repshift_cli.utils.stats import significant

if TYPE_CHECKING:
    from repshift_cli.benchmark.report import BenchReport, Ratio, Run, Setting

Sense = Literal["<=", ">="]

_EXPRESSION = re.compile(r"\s*([a-z_]+)\s*(<=|>=)\s*([0-9.eE+-]+)\s*")
_ALLOWED = (
    "Allowed are macs<=0.66 and latency<=0.7 (fractions of dense), latency_ms<=50, peak_memory_mb<=500, "
    "throughput>=100, speedup>=1.3 and efficiency>=0.9."
)
_SENSES: dict[str, Sense] = {
    "macs": "<=",
    "latency": "<=",
    "latency_ms": "<=",
    "peak_memory_mb": "<=",
    "throughput": ">=",
    "speedup": ">=",
    "efficiency": ">=",
}

_Interval = tuple[float, float]


def _measured(ratio: Ratio, run: Run) -> dict[str, tuple[float | None, _Interval | None]]:
    """Median, and p10 and p90 if it varies, of each quantity that can be limited."""
    gain, latency = ratio.speedup, run.latency
    return {
        "macs": (1 / ratio.macs, None),
        "latency": (1 / gain.ratio, (1 / gain.p90, 1 / gain.p10)),
        "latency_ms": (latency.median, (latency.p10, latency.p90)),
        "peak_memory_mb": (None if run.peak_bytes is None else run.peak_bytes / 1e6, None),
        "throughput": (run.throughput, (run.batch * 1e3 / latency.p90, run.batch * 1e3 / latency.p10)),
        "speedup": (gain.ratio, (gain.p10, gain.p90)),
        "efficiency": (ratio.efficiency, (gain.p10 / ratio.macs, gain.p90 / ratio.macs)),
    }


@dataclass(frozen=True)
class BenchLimit:
    """A limit that every compressed model must meet in every setting.

    Attributes:
        key: `macs` and `latency` are fractions of dense, `latency_ms` is per batch, `throughput` images per second.
    """

    key: str
    sense: Sense
    value: float

    @classmethod
    def parse(cls, text: str) -> BenchLimit:
        """Parse text such as `latency<=0.7`; raises a UsageError for invalid text."""
        found = _EXPRESSION.fullmatch(text)
        key, sense, number = found.groups() if found else ("", "", "")
        try:
            value = float(number)
        except ValueError:
            value = 0.0
        if _SENSES.get(key) != sense or not 0 < value < math.inf:
            raise UsageError(f"--budget: invalid limit {text!r}", _ALLOWED)
        return cls(key, _SENSES[key], value)

    def holds(self, value: float) -> bool:
        return value <= self.value if self.sense == "<=" else value >= self.value

    def __str__(self) -> str:
        return f"{self.key}{self.sense}{self.value:g}"


@dataclass(frozen=True)
class LimitCheck:
    """A limit, and the measured median with p10 and p90 of one compressed model; None if it is not measured."""

    limit: BenchLimit
    name: str
    setting: Setting
    value: float | None
    interval: _Interval | None = None

    @property
    def met(self) -> bool:
        """Whether the median meets the limit."""
        return self.value is not None and self.limit.holds(self.value)

    @property
    def separated(self) -> bool:
        """Whether p10 and p90 lie on the same side of the limit as the median."""
        ends = self.interval or ()
        return self.value is not None and all(self.limit.holds(end) == self.met for end in ends)

    def to_dict(self) -> dict[str, Any]:
        low, high = self.interval or (None, None)
        values = {"value": self.value, "p10": low, "p90": high}
        return {
            "budget": str(self.limit),
            "name": self.name,
            **self.setting.to_dict(),
            **{name: value and significant(value) for name, value in values.items()},
            "met": self.met,
            "separated": self.separated,
        }

    def __str__(self) -> str:
        where = f"batch {self.setting.batch}: {self.limit}"
        if self.value is None:
            return f"{where} not met: it cannot be measured inside a compiled graph or another runtime"
        note = ""
        if self.interval is not None and not self.separated:
            note = "; not separated, p10-p90 {:.3g}-{:.3g}".format(*self.interval)
        if self.met:
            return f"{where} met: {self.value:.4g}{note}"
        distance = f"{abs(self.value - self.limit.value):.3g} {'above' if self.limit.sense == '<=' else 'below'}"
        return f"{where} missed: {self.value:.4g}, {distance}{note}"


def check_limits(limits: Sequence[BenchLimit], report: BenchReport) -> tuple[LimitCheck, ...]:
    """Check every compressed model of a report against every limit, in every setting.

    Raises:
        UsageError: there are limits, but no compressed model.
    """
    runs = {(run.setting, run.name): run for run in report.runs}
    compressed = (ratio for ratio in report.ratios if ratio.role == "compressed")
    ratios = [ratio for ratio in compressed if runs[ratio.setting, ratio.against].role == "dense"]
    if limits and not ratios:
        raise UsageError("--budget: no model is compressed", "Add --recipe to compress it for the run.")
    return tuple(
        LimitCheck(limit, ratio.name, ratio.setting, *_measured(ratio, runs[ratio.setting, ratio.name])[limit.key])
        for ratio in ratios
        for limit in limits
    )


def require_met(checks: Sequence[LimitCheck]) -> None:
    """Raise CheckFailed if a limit is not met, with each miss and its size."""
    missed = [each for each in checks if not each.met]
    if missed:
        several = len({(each.name, each.setting.without_batch) for each in checks}) > 1
        lines = (f"{each}{f' ({each.name}, {each.setting.without_batch})' if several else ''}" for each in missed)
        raise CheckFailed(f"{len(missed)} of {len(checks)} budget checks were missed", "; ".join(lines))
