"""Made-up runs and reports of a benchmark."""

from __future__ import annotations

from repshift_cli.benchmark.report import BenchReport, Ratio, Run, Setting
from repshift_cli.measure.latency import Timing, compute_speedup

__all__ = ["SETTING", "report", "sweep_report"]

SETTING = Setting(4, (224, 224))


def report(*, dense: tuple[float, ...] = (2.0, 2.2), compressed: tuple[float, ...] = (1.0, 1.1)) -> BenchReport:
    """Dense and compressed at batch 4, each with the seconds that its runs took."""
    return sweep_report({SETTING: (dense, compressed)})


def sweep_report(times: dict[Setting, tuple[tuple[float, ...], tuple[float, ...]]]) -> BenchReport:
    """Dense and compressed in several settings, with the seconds of their runs."""
    runs: list[Run] = []
    ratios: list[Ratio] = []
    for setting, (dense, compressed) in times.items():
        before = Run("dense", setting, 2_000_000_000, Timing(dense), 8_000_000, attention="sdpa:flash")
        after = Run("compressed", setting, 1_000_000_000, Timing(compressed), 6_000_000, "compressed", "sdpa:flash")
        runs += [before, after]
        ratios.append(Ratio(setting, "compressed", "dense", 2.0, compute_speedup(before.timing, after.timing)))
    return BenchReport("Some CPU", 1, tuple(runs), tuple(ratios))
