"""`repshift bench`: options, output, files and exit codes."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from outcome import Command, Outcome

from repshift_cli.benchmark import run as benchmark
from repshift_cli.benchmark.report import BenchReport
from repshift_cli.cli import bench, options
from repshift_cli.errors import UsageError

QUICK = ("--seconds", "0", "--min-runs", "2", "--threads", "1")


@pytest.fixture(name="run")
def fixture_run(cli: Command, dense: Path, recipe: Path) -> Callable[..., Outcome]:
    """The command on a tiny model that drops tokens at two sites."""

    def run(*options: object) -> Outcome:
        return cli("bench", dense, "--recipe", recipe, *QUICK, *options)

    return run


def refused(outcome: Outcome, rc: int, *words: str) -> None:
    """The command printed no result and no traceback, and named all this on stderr."""
    assert outcome.rc == rc, outcome.stderr
    assert outcome.stdout == ""
    assert "Traceback" not in outcome.stderr
    said = " ".join(outcome.stderr.split())
    for word in words:
        assert word in said


class TestTable:
    def test_fits_80_columns(self, run: Callable[..., Outcome]) -> None:
        outcome = run("-b", "1,2", "--against", "explicit,class-attention-row,tome,fuse")
        assert outcome.rc == 0, outcome.stderr
        assert all(len(line) <= 80 for line in outcome.stdout.splitlines())
        for word in (
            "extra MACs",
            "vs dense",
            "efficiency",
            "compressed is",
            "class-attention-row",
            "1, 2)",  # however the batches fared, that they were tried
            "batch 2: ",
        ):
            assert word in outcome.stdout

    def test_without_baselines(self, run: Callable[..., Outcome]) -> None:
        outcome = run("-b", "2")
        assert "compressed is" not in outcome.stdout
        assert "Only 2 runs of each" in outcome.stdout
        assert "batch 2: " in outcome.stdout

    def test_sweep_and_files(self, run: Callable[..., Outcome], photos: Path) -> None:
        outcome = run("-b", "2", "--attention", "auto,explicit", "--data", photos, "--images", "4")
        assert outcome.rc == 0, outcome.stderr
        assert all(len(line) <= 80 for line in outcome.stdout.splitlines())
        for word in ("--- float32, attention explicit, 32x32", "From files, batch 2", "bound by", "reading alone"):
            assert word in outcome.stdout

    def test_nothing_to_compare(self, cli: Command, dense: Path) -> None:
        outcome = cli("bench", dense, *QUICK, "-b", "1")
        assert outcome.rc == 0
        assert "Nothing to compare" in outcome.stdout

    @pytest.mark.slow
    def test_other_ways_to_run(self, run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("repshift_cli.measure.cpu.cpu_features", lambda: frozenset({"avx2"}))
        ways = "int8,smaller-input,smaller-model=vit_tiny_patch16_224"
        outcome = run("-b", "1", "--against", ways, "--calibration", "builtin:digits")
        assert outcome.rc == 0, outcome.stderr
        assert all(len(line) <= 80 for line in outcome.stdout.splitlines())
        words = " ".join(outcome.stdout.split())
        for word in (
            *("file MB", "images ", "vit_tiny_patch16_224", "repshift advise"),
            "batch 1, compressed, int8, ONNX Runtime against dense, int8, ONNX Runtime: ",
            "batch 1, compressed, ONNX Runtime against dense, ONNX Runtime: ",
        ):
            assert word in words
        notes = outcome.stderr.splitlines()
        assert outcome.stderr.count("this CPU has no VNNI") == 1  # though two files are quantised and timed
        assert len(set(notes)) == len(notes)


class TestJson:
    @pytest.mark.slow
    def test_every_combination(self, run: Callable[..., Outcome]) -> None:
        outcome = run(
            "-b", "1,2", "--dtype", "float32,bfloat16", "--attention", "sdpa", "--attention", "explicit", "--json"
        )
        assert outcome.rc == 0, outcome.stderr
        document = json.loads(outcome.stdout)
        settings = {(row["name"], row["dtype"], row["attention_mode"], row["batch"]) for row in document["runs"]}
        assert len(settings) == len(document["runs"]) == 2 * 2 * 2 * 2
        assert document["dtype"] == ["float32", "bfloat16"]
        assert document["attention"] == ["explicit", "sdpa:flash"]
        assert {row["image_size"] for row in document["runs"]} == {32}
        assert len(document["ratios"]) == 8
        assert len(document["break_even"]) == 4
        assert document["break_even"][0]["tried"] == [1, 2]
        for row in document["runs"]:
            assert row["latency_ms"].keys() == {"median", "p10", "p90", "p99"}
            assert row["attention"] == {"sdpa": "sdpa:flash", "explicit": "explicit"}[row["attention_mode"]]

    def test_a_single_value_is_not_a_list(self, run: Callable[..., Outcome]) -> None:
        document = json.loads(run("-b", "1", "--json").stdout)
        assert (document["dtype"], document["attention"]) == ("float32", "sdpa:flash")
        assert (document["budget"], document["end_to_end"]) == ([], [])

    def test_baselines(self, run: Callable[..., Outcome]) -> None:
        document = json.loads(run("-b", "1", "--against", "dense,tome", "--against", "explicit", "--json").stdout)
        assert [run["name"] for run in document["runs"]] == ["dense", "compressed", "tome", "explicit"]
        assert [(ratio["name"], ratio["against"]) for ratio in document["ratios"]] == [
            ("compressed", "dense"),
            ("compressed", "tome"),
            ("compressed", "explicit"),
            ("tome", "dense"),
            ("explicit", "dense"),
        ]

    def test_several_image_sizes(self, cli: Command, tmp_path: Path) -> None:
        (tmp_path / "r.yaml").write_text("version: 1\nlayers: [{layer: 0, drop_ratio: 0.5}]\n")
        outcome = cli("bench", "resnet18", "--recipe", "r.yaml", *QUICK, "--img-size", "64,96", "-b", "1", "--json")
        assert outcome.rc == 0, outcome.stderr
        runs = json.loads(outcome.stdout)["runs"]
        assert [(run["name"], run["image_size"]) for run in runs] == [
            ("dense", 64),
            ("compressed", 64),
            ("dense", 96),
            ("compressed", 96),
        ]
        assert 2 < runs[2]["gmacs"] / runs[0]["gmacs"] < 2.4

    def test_from_files(self, run: Callable[..., Outcome], photos: Path) -> None:
        outcome = run("-b", "4", "--data", photos, "--images", "9", "--workers", "1", "--json")
        assert outcome.rc == 0, outcome.stderr
        (found,) = json.loads(outcome.stdout)["end_to_end"]
        assert (found["images"], found["workers"], found["batch"]) == (8, 1, 4)
        assert [side["name"] for side in found["runs"]] == ["dense", "compressed"]
        assert all(0 < side["waiting"] < 1 for side in found["runs"])
        assert found["ratios"][0]["against"] == "dense"


class TestFiles:
    def test_outputs(self, run: Callable[..., Outcome], tmp_path: Path) -> None:
        before = set(tmp_path.iterdir())
        assert run("-b", "1", "--csv", "a.csv", "--plot", "a.PNG").rc == 0
        assert {path.name for path in set(tmp_path.iterdir()) - before} == {"a.PNG", "a.csv"}
        dense, compressed = csv.DictReader((tmp_path / "a.csv").read_text().splitlines())
        assert (dense["name"], compressed["role"], compressed["compile"]) == ("dense", "compressed", "off")
        assert float(compressed["over_dense"]) > 0

    @pytest.mark.parametrize("option", ["csv", "plot"])
    def test_existing_output_is_checked_first(
        self, run: Callable[..., Outcome], tmp_path: Path, option: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "a.svg"
        path.write_text("mine")
        with monkeypatch.context() as patch:
            patch.setattr(benchmark, "run_sweep", lambda *_: pytest.fail("measured before the check"))
            refused(run(f"--{option}", path), 2, "already exists")
        assert path.read_text() == "mine"
        assert run("-b", "1", f"--{option}", path, "--force").rc == 0
        assert path.read_text() != "mine"

    def test_failed_plot_leaves_no_file_and_loses_no_numbers(
        self, run: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(report: BenchReport, path: Path, file_format: str) -> None:
            path.write_text("half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("repshift_cli.benchmark.plot.plot_report", fail)
        before = set(tmp_path.iterdir())
        outcome = run("-b", "1", "--plot", "a.png", "--csv", "a.csv")
        assert outcome.rc == 1
        assert "No space left" in outcome.stderr
        assert "wrote a.csv" in outcome.stderr
        assert "compressed" in outcome.stdout
        assert set(tmp_path.iterdir()) - before == {tmp_path / "a.csv"}


class TestBudget:
    def test_met(self, run: Callable[..., Outcome]) -> None:
        outcome = run("-b", "1", "--budget", "macs<=0.99", "--budget", "latency<=1000")
        assert outcome.rc == 0, outcome.stderr
        assert "budget, batch 1: macs<=0.99 met: " in outcome.stdout

    def test_an_error_leaves_the_runs_before_it(
        self, run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = benchmark._bench_group

        def failing(group: Any, batch: int, *others: Any) -> Any:
            if batch > 1:
                raise UsageError("batch 2 does not fit into memory")
            return whole(group, batch, *others)

        monkeypatch.setattr(benchmark, "_bench_group", failing)
        outcome = run("-b", "1,2", "--json")
        assert outcome.rc == 2
        document = json.loads(outcome.stdout)
        assert document["error"]["message"] == "batch 2 does not fit into memory"
        assert {each["batch"] for each in document["runs"]} == {1}

    def test_missed_after_the_report(self, run: Callable[..., Outcome], tmp_path: Path) -> None:
        outcome = run("-b", "1,2", "--budget", "macs<=0.1", "--budget", "latency<=1000", "--json", "--csv", "a.csv")
        assert outcome.rc == 5
        document = json.loads(outcome.stdout)
        assert document["error"] == document["failed"]
        checks = document["budget"]
        assert [(check["budget"], check["batch"], check["met"]) for check in checks] == [
            ("macs<=0.1", 1, False),
            ("latency<=1000", 1, True),
            ("macs<=0.1", 2, False),
            ("latency<=1000", 2, True),
        ]
        assert (tmp_path / "a.csv").is_file()
        said = " ".join(outcome.stderr.split())
        assert "2 of 4 budget checks were missed" in said
        assert "batch 2: macs<=0.1 missed: 0." in said
        assert "above" in said

    @pytest.mark.slow
    def test_exit_code_of_the_process(self, shell: Command, dense: Path, recipe: Path) -> None:
        outcome = shell("bench", dense, "--recipe", recipe, *QUICK, "-b", "1", "--budget", "speedup>=1e6")
        assert outcome.rc == 5
        assert "speedup>=1e+06 missed" in outcome.stdout

    def test_without_a_compressed_model(self, cli: Command, dense: Path) -> None:
        refused(cli("bench", dense, *QUICK, "--budget", "macs<=0.5"), 2, "--budget: no model is compressed")


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "rc", "words"),
        [
            (["--plot", "a.jpg"], 2, ["a.jpg", "must end in .png, .svg or .pdf"]),
            (["--plot", "a.svg", "--csv", "a.svg"], 2, ["both name"]),
            (["--csv", "missing/a.csv"], 1, ["does not exist"]),
            (["--dtype", "int8"], 2, ["'int8'", "float32"]),
            (["--dtype", "float32,"], 2, ["unknown dtype ''"]),
            (["--device", "tpu"], 2, ["'tpu'"]),
            (
                ["--attention", "explict"],
                2,
                ["unknown --attention 'explict': allowed: auto, flash", "Did you mean explicit?"],
            ),
            (
                ["--compile", "fast"],
                2,
                ["unknown --compile 'fast': allowed: off, default, frozen, reduce-overhead, max-autotune"],
            ),
            (["--against", "evit"], 2, ["unknown baseline 'evit'", "class-attention"]),
            (["--budget", "latency<0.7"], 2, ["invalid limit 'latency<0.7'", "latency<=0.7"]),
            (["--batch-size", "0"], 2, ["invalid --batch-size '0': must be an integer >= 1"]),
            (["--img-size", "big"], 2, ["invalid --img-size big: must be N or HEIGHTxWIDTH"]),
            (["--img-size", "32,64"], 2, ["--img-size 64", "takes images of 32x32"]),
            (["--data", "nowhere"], 4, ["there is no dataset 'nowhere', and no folder of that name"]),
        ],
    )
    def test_options(self, options: list[str], rc: int, words: list[str], run: Callable[..., Outcome]) -> None:
        refused(run(*options), rc, *words)

    def test_too_few_images(self, run: Callable[..., Outcome], photos: Path) -> None:
        refused(run("-b", "32", "--data", photos), 4, "20 images, which do not fill a batch of 32")

    def test_a_baseline_that_the_model_does_not_support(self, cli: Command, tmp_path: Path) -> None:
        (tmp_path / "r.yaml").write_text("version: 1\nlayers: [{layer: 0, drop_ratio: 0.5}]\n")
        outcome = cli("bench", "resnet18", "--recipe", "r.yaml", *QUICK, "--img-size", "64", "--against", "tome")
        refused(outcome, 2, "--against tome: unsupported for compressed (resnet)", "Supported", "dense")


class TestParsing:
    def test_integers(self) -> None:
        assert bench._batch_sizes(["1, 8", "4", "8"]) == [1, 8, 4]

    @pytest.mark.parametrize("text", ["0", "-1", "x", "1,", "1.5", "\u00b2"])
    def test_invalid_integers(self, text: str) -> None:
        with pytest.raises(UsageError, match="--batch-size"):
            bench._batch_sizes([text])

    def test_labels(self) -> None:
        assert options.label_models(["x/a.safetensors", "y/b.pth", "vit.v2"]) == {
            "a": "x/a.safetensors",
            "b": "y/b.pth",
            "vit.v2": "vit.v2",
        }
        assert list(options.label_models(["x/a.pt", "y/a.pt"])) == ["x/a.pt", "y/a.pt"]
        with pytest.raises(UsageError, match="a model is given twice"):
            options.label_models(["a.pt", "a.pt"])


class TestCompile:
    @pytest.mark.slow
    @pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
    def test_both_sides(self, run: Callable[..., Outcome]) -> None:
        outcome = run("-b", "1", "--compile", "default", "--json")
        assert outcome.rc == 0, outcome.stderr
        document = json.loads(outcome.stdout)
        for row in document["runs"]:
            assert (row["compile"], row["recompiles"], row["peak_memory_mb"]) == ("default", 0, None)
            assert row["compile_s"] > 0

    @pytest.mark.slow
    def test_no_compiler(
        self, shell: Command, dense: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("CXX", "no-such-compiler")
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
        outcome = shell("bench", dense, "--recipe", recipe, *QUICK, "-b", "1", "--compile", "default")
        refused(outcome, 2, "--compile default: torch.compile cannot compile dense here", "It needs a C++ compiler")
