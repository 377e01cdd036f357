"""`--budget`: valid limits, and the size of a miss."""

from __future__ import annotations

from dataclasses import replace

import pytest
from benches import SETTING, report, sweep_report

from repshift_cli.benchmark.limits import BenchLimit, LimitCheck, check_limits, require_met
from repshift_cli.errors import CheckFailed, UsageError


class TestParse:
    @pytest.mark.parametrize(
        ("text", "key", "value"),
        [
            ("latency<=0.7", "latency", 0.7),
            (" macs <= 0.66 ", "macs", 0.66),
            ("throughput>=1e2", "throughput", 100.0),
            ("latency_ms<=50", "latency_ms", 50.0),
            ("peak_memory_mb<=500", "peak_memory_mb", 500.0),
            ("speedup>=1.3", "speedup", 1.3),
            ("efficiency>=.9", "efficiency", 0.9),
        ],
    )
    def test_valid(self, text: str, key: str, value: float) -> None:
        limit = BenchLimit.parse(text)
        assert (limit.key, limit.value) == (key, value)
        assert BenchLimit.parse(str(limit)) == limit

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "latency",
            "latency<0.7",
            "latency>=0.7",
            "speedup<=2",
            "latency=0.7",
            "latency<=",
            "latency<=x",
            "latency<=-1",
            "latency<=0",
            "latency<=nan",
            "latency<=1e999",
            "accuracy>=0.9",
            "latency<=0.7 macs<=0.6",
        ],
    )
    def test_invalid(self, text: str) -> None:
        with pytest.raises(UsageError, match="invalid limit") as found:
            BenchLimit.parse(text)
        assert "latency<=0.7" in str(found.value.hint)


def checked(text: str) -> LimitCheck:
    """A limit on a report with twice the speed (2.1 to 1.05 s) and half of the MACs, at batch 4."""
    (found,) = check_limits([BenchLimit.parse(text)], report())
    return found


class TestCheck:
    @pytest.mark.parametrize(
        ("text", "value", "met"),
        [
            ("latency<=0.5", 0.5, True),
            ("latency<=0.49", 0.5, False),
            ("macs<=0.5", 0.5, True),
            ("speedup>=2.5", 2.0, False),
            ("efficiency>=1", 1.0, True),
            ("latency_ms<=1000", 1050.0, False),
            ("peak_memory_mb<=6", 6.0, True),
            ("throughput>=3.8", 4 / 1.05, True),
        ],
    )
    def test_values(self, text: str, value: float, met: bool) -> None:
        found = checked(text)
        assert found.value == pytest.approx(value)
        assert found.met is met
        assert found.to_dict()["met"] is met

    def test_every_setting_is_checked(self) -> None:
        slow = replace(SETTING, batch=1)
        found = check_limits(
            [BenchLimit.parse("latency<=0.7")], sweep_report({slow: ((1.0,), (0.9,)), SETTING: ((1.0,), (0.5,))})
        )
        assert [(each.setting.batch, each.met) for each in found] == [(1, False), (4, True)]
        assert str(found[0]) == "batch 1: latency<=0.7 missed: 0.9, 0.2 above"
        with pytest.raises(CheckFailed, match="1 of 2 budget checks") as missed:
            require_met(found)
        assert missed.value.exit_code == 5
        assert "batch 1: latency<=0.7 missed" in str(missed.value.hint)
        assert "batch 4" not in str(missed.value.hint)

    def test_a_miss_names_model_and_setting(self) -> None:
        other = replace(SETTING, dtype="bfloat16")
        found = check_limits(
            [BenchLimit.parse("speedup>=3")], sweep_report({SETTING: ((1.0,), (0.5,)), other: ((1.0,), (0.5,))})
        )
        with pytest.raises(CheckFailed) as missed:
            require_met(found)
        assert "batch 4: speedup>=3 missed: 2, 1 below (compressed, bfloat16, attention auto" in str(missed.value.hint)

    def test_an_interval_across_the_limit_is_not_separated(self) -> None:
        wide = report(dense=(1.0,) * 5, compressed=(0.5, 0.55, 0.6, 0.8, 0.9))
        (found,) = check_limits([BenchLimit.parse("latency<=0.7")], wide)
        assert found.met
        assert not found.separated
        assert "met: 0.6; not separated, p10-p90 0.519-0.857" in str(found)
        assert checked("latency<=0.7").separated

    def test_a_quantity_that_is_not_measured_is_not_met(self) -> None:
        hidden = report()
        runs = tuple(replace(run, peak_bytes=None) for run in hidden.runs)
        (found,) = check_limits([BenchLimit.parse("peak_memory_mb<=500")], replace(hidden, runs=runs))
        assert not found.met
        assert "cannot be measured" in str(found)
        assert found.to_dict()["value"] is None

    def test_baselines_are_not_checked(self) -> None:
        found = report()
        baseline = replace(found.ratios[0], role="peer")
        with pytest.raises(UsageError, match="no model is compressed"):
            check_limits([BenchLimit.parse("macs<=0.1")], replace(found, ratios=(baseline,)))

    def test_no_limits(self) -> None:
        assert check_limits([], replace(report(), ratios=())) == ()
        require_met([])
