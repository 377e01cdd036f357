"""A report as JSON, CSV and text: no speed-up is claimed unless the intervals separate."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest
from benches import SETTING, report, sweep_report

from repshift_cli.benchmark.report import BenchReport, Compilation, EndToEnd, Passes, Ratio, Run, Setting, break_even
from repshift_cli.measure.latency import Speedup, Timing

FASTER, SLOWER = Speedup(1.5, 1.4, 1.6, overlap=False), Speedup(0.8, 0.7, 0.9, overlap=True)
UNCLEAR = Speedup(1.2, 0.9, 1.4, overlap=True)


def ratios(gains: dict[int, Speedup], **setting: str) -> list[Ratio]:
    """One comparison at several batch sizes."""
    return [Ratio(Setting(batch, (8, 8), **setting), "a", "dense", 2.0, gain) for batch, gain in gains.items()]


class TestJson:
    def test_keys(self) -> None:
        found = report().to_dict()
        assert set(found) == {
            "device",
            "dtype",
            "threads",
            "attention",
            "memory_format",
            "torch",
            "runs",
            "ratios",
            "break_even",
            "end_to_end",
            "missing",
        }
        setting = {"batch": 4, "image_size": 224, "dtype": "float32", "attention_mode": "auto", "compile": "off"}
        assert found["runs"][1] == {
            "name": "compressed",
            "role": "compressed",
            **setting,
            "attention": "sdpa:flash",
            "gmacs": 1.0,
            "latency_ms": {"median": 1050.0, "p10": 1010.0, "p90": 1090.0, "p99": 1099.0},
            "throughput": 3.81,
            "peak_memory_mb": 6.0,
            "compile_s": None,
            "recompiles": None,
            "bytes": None,
        }
        assert found["ratios"][0] == {
            **setting,
            "name": "compressed",
            "role": "compressed",
            "against": "dense",
            "macs": 2.0,
            "latency": 2.0,
            "latency_p10": 2.0,
            "latency_p90": 2.0,
            "efficiency": 1.0,
            "clear": True,
        }
        assert (found["dtype"], found["attention"]) == ("float32", "sdpa:flash")

    def test_several_values_are_a_list(self) -> None:
        other = replace(SETTING, dtype="bfloat16")
        found = sweep_report({SETTING: ((2.0,), (1.0,)), other: ((2.0,), (1.0,))})
        assert found.to_dict()["dtype"] == ["float32", "bfloat16"]
        assert "float32, bfloat16" in found.machine

    def test_an_image_that_is_not_square(self) -> None:
        assert Setting(1, (224, 160)).to_dict()["image_size"] == [224, 160]

    def test_compilation(self) -> None:
        run = replace(report().runs[0], compilation=Compilation(12.3456, 0), peak_bytes=None)
        document = run.to_dict()
        assert (document["compile_s"], document["recompiles"]) == (12.346, 0)
        assert document["peak_memory_mb"] is None


class TestText:
    def test_of_a_ratio(self) -> None:
        assert str(report().ratios[0]) == "2.00x faster (MAC ratio 2.00x, efficiency 1.00)"
        noise = report(dense=(1.0, 1.3, 0.9), compressed=(1.1, 0.9, 1.2)).ratios[0]
        assert str(noise).startswith("no speed-up: the intervals overlap (MAC ratio 2.00x")
        assert str(replace(noise, speedup=SLOWER)).startswith("no speed-up: 1.25x slower")


class TestBreakEven:
    @pytest.mark.parametrize(
        ("gains", "batch", "not_above", "words"),
        [
            ({1: FASTER, 8: FASTER}, 1, (), "faster at every batch size that was tried (1, 8)"),
            ({8: FASTER, 1: SLOWER, 4: UNCLEAR}, 8, (), "faster from batch 8 on (tried: 1, 4, 8)"),
            ({1: FASTER, 4: UNCLEAR, 8: FASTER}, 1, (4,), "faster from batch 1 on, but not at 4 (tried: 1, 4, 8)"),
            ({1: SLOWER, 8: UNCLEAR}, None, (), "no speed-up at any batch size (1, 8)"),
        ],
    )
    def test_smallest_clear_batch(
        self, gains: dict[int, Speedup], batch: int | None, not_above: tuple[int, ...], words: str
    ) -> None:
        (found,) = break_even(ratios(gains))
        assert (found.batch, found.not_above, found.tried) == (batch, not_above, tuple(sorted(gains)))
        assert str(found) == words
        assert found.to_dict()["batch"] == batch

    def test_each_setting_separately(self) -> None:
        both = [*ratios({1: FASTER}), *ratios({1: UNCLEAR, 8: FASTER}, dtype="bfloat16")]
        assert [(found.setting.dtype, found.batch) for found in break_even(both)] == [("float32", 1), ("bfloat16", 8)]

    def test_baselines_are_left_out(self) -> None:
        found = report()
        baseline = replace(found.ratios[0], name="peer", role="peer")
        assert len(replace(found, ratios=(*found.ratios, baseline)).break_even) == 1


class TestCsv:
    def test_one_line_per_run(self) -> None:
        first, second = csv.DictReader(report().to_csv().splitlines())
        assert (first["name"], first["batch"], first["latency_ms_median"]) == ("dense", "4", "2100.0")
        assert (second["gmacs"], second["peak_memory_mb"], second["device"]) == ("1.0", "6.0", "Some CPU")
        assert (second["latency_ms_p99"], second["image_size"], second["compile"]) == ("1099.0", "224", "off")
        assert (second["over_dense"], second["over_dense_clear"], second["efficiency"]) == ("2.0", "True", "1.0")
        assert (first["over_dense"], first["efficiency"]) == ("", "")

    def test_baselines_and_passes(self) -> None:
        found = report()
        baseline = Run("peer", SETTING, 1_000_000_000, Timing((1.5, 1.6)), 0, "peer")
        against_baseline = Ratio(SETTING, "compressed", "peer", 1.0, FASTER)
        passes = Passes(8, (2.0, 2.0), (0.5, 0.5))
        read = EndToEnd(SETTING, "photos", 2, passes, {"dense": passes})
        found = replace(
            found, runs=(*found.runs, baseline), ratios=(*found.ratios, against_baseline), end_to_end=(read,)
        )
        dense, compressed, last = csv.DictReader(found.to_csv().splitlines())
        assert (last["name"], last["role"], last["ours_over_it"], last["over_dense"]) == ("peer", "peer", "1.5", "")
        assert (compressed["ours_over_it"], compressed["over_dense"]) == ("", "2.0")
        assert (dense["end_to_end_per_s_median"], dense["waiting"], dense["bottleneck"]) == ("4.0", "0.25", "model")
        assert compressed["waiting"] == ""

    def test_all_lines_have_the_same_columns(self) -> None:
        lines = report().to_csv().splitlines()
        assert {line.count(",") for line in lines} == {lines[0].count(",")}


class TestPasses:
    def test_bottleneck(self) -> None:
        assert Passes(10, (2.0, 4.0), (0.2, 0.4)).bottleneck == "model"
        slow = Passes(10, (2.0, 4.0, 5.0), (1.9, 3.6, 2.0))
        assert (slow.bottleneck, slow.waiting, slow.throughput.median) == ("reading", 0.9, 2.5)

    def test_report(self) -> None:
        sides = {"dense": Passes(4, (2.0, 2.2), (0.1, 0.1)), "compressed": Passes(4, (1.0, 1.1), (0.8, 0.9))}
        read = EndToEnd(SETTING, "photos", 2, Passes(4, (0.5, 0.5), (0.5, 0.5)), sides, {"compressed": "dense"})
        document = read.to_dict()
        assert (document["batch"], document["data"], document["workers"], document["images"]) == (4, "photos", 2, 4)
        assert document["reading_images_per_s"]["median"] == 8.0
        assert [(run["name"], run["bottleneck"]) for run in document["runs"]] == [
            ("dense", "model"),
            ("compressed", "reading"),
        ]
        assert document["ratios"] == [
            {
                "name": "compressed",
                "against": "dense",
                "latency": 2.0,
                "latency_p10": 2.0,
                "latency_p90": 2.0,
                "clear": True,
            }
        ]


def test_an_empty_report() -> None:
    assert BenchReport("Some CPU", 1, (), ()).break_even == ()
