"""The bench compares like with like and says so; how fast this machine is does not matter here."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from repshift_cli import benchmark
from repshift_cli.benchmark import (
    BenchReport,
    BenchSettings,
    Contender,
    Ratio,
    Run,
    attention_mode,
    contenders_of,
    run_bench,
)
from repshift_cli.checkpoint import LoadedModel, ModelDescription, Source
from repshift_cli.cli import bench
from repshift_cli.errors import RepshiftError, UsageError
from repshift_cli.measure import Speedup, Timing, speedup
from repshift_cli.preprocessing import Preprocessing
from repshift_cli.progress import Silent

SIZE = (3, 8, 8)
SETTINGS = BenchSettings(torch.device("cpu"), torch.float32, seconds=0, min_runs=2, threads=1)


class Switched(nn.Module):
    """Stands for a compressed model: half of the rows, unless it is dense."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.is_dense = False
        self.rows_seen: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        rows = images if self.is_dense else images[..., :4, :]
        self.rows_seen.append(rows.shape[-2])
        return rows * self.layer.weight[0]

    @contextmanager
    def dense(self) -> Iterator[nn.Module]:
        self.is_dense = True
        try:
            yield self
        finally:
            self.is_dense = False


@dataclass
class Opened:
    loaded: LoadedModel
    compressed: Switched | None
    module: nn.Module
    macs: int = 1000
    dense_macs: int = 2000


def opened(sha256: str | None = None, name: str = "toy") -> Opened:
    module = Switched()
    preprocessing = Preprocessing(SIZE, (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9)
    source = Source("file" if sha256 else "random", None, sha256)
    loaded = LoadedModel(module, ModelDescription(name, None, {}, preprocessing), source, module.state_dict())
    return Opened(loaded, module, module)


def report(*, dense: tuple[float, ...] = (2.0, 2.2), compressed: tuple[float, ...] = (1.0, 1.1)) -> BenchReport:
    runs = (
        Run("dense", 4, 2_000_000_000, Timing(dense), 8_000_000),
        Run("compressed", 4, 1_000_000_000, Timing(compressed), 6_000_000),
    )
    ratio = Ratio(4, "compressed", "dense", 2.0, speedup(runs[0].timing, runs[1].timing))
    return BenchReport("Some CPU", "float32", 1, "sdpa:flash", runs, (ratio,))


class TestContenders:
    def test_single(self) -> None:
        dense, compressed = contenders_of({"file": opened()})
        assert (dense.name, dense.macs, dense.against) == ("dense", 2000, None)
        assert (compressed.name, compressed.macs, compressed.against) == ("compressed", 1000, "dense")

    def test_same_weights_share_the_dense_side(self) -> None:
        found = contenders_of({"a": opened("1"), "b": opened("1"), "c": opened("2"), "d": opened()})
        assert [(each.name, each.against) for each in found] == [
            ("toy dense", None),
            ("toy dense 2", None),
            ("toy dense 3", None),
            ("a", "toy dense"),
            ("b", "toy dense"),
            ("c", "toy dense 2"),
            ("d", "toy dense 3"),
        ]

    def test_compressed_files_know_their_source(self) -> None:
        one, other = opened("file 1"), opened("file 2")
        for model in (one, other):
            model.loaded.document = {"source": {"sha256": "dense file"}}
        assert [each.name for each in contenders_of({"a": one, "b": other})] == ["toy dense", "a", "b"]

    def test_dense_model_alone(self) -> None:
        (only,) = contenders_of({"file": replace(opened(), compressed=None)})
        assert (only.name, only.against) == ("dense", None)


class TestRunBench:
    def test_both_sides(self) -> None:
        model = opened()
        found = run_bench(contenders_of({"file": model}), [1, 2], SETTINGS, Silent())
        assert [(run.name, run.batch) for run in found.runs] == [
            ("dense", 1),
            ("compressed", 1),
            ("dense", 2),
            ("compressed", 2),
        ]
        assert [ratio.batch for ratio in found.ratios] == [1, 2]
        assert {ratio.macs for ratio in found.ratios} == {2.0}
        assert set(model.module.rows_seen) == {4, 8}
        assert found.runs[0].peak_bytes == 2 * found.runs[1].peak_bytes == 3 * 8 * 8 * 4
        assert (found.dtype, found.threads, found.attention) == ("float32", 1, "none")

    def test_dtype_reaches_the_model(self) -> None:
        model = opened()
        settings = replace(SETTINGS, dtype=torch.bfloat16)
        found = run_bench(contenders_of({"file": model}), [1], settings, Silent())
        assert found.dtype == "bfloat16"
        assert model.module.layer.weight.dtype is torch.bfloat16

    def test_input_sizes_do_not_mix(self) -> None:
        small, large = (Contender(name, nn.Identity(), 1, (3, edge, edge)) for name, edge in (("s", 4), ("l", 8)))
        assert [run.name for run in run_bench([small, large], [1], SETTINGS, Silent()).runs] == ["s", "l"]

    def test_too_large_a_batch(self) -> None:
        class Hungry(nn.Module):
            def forward(self, images: Tensor) -> Tensor:
                raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes.")

        with pytest.raises(UsageError, match="batch size 512 does not fit"):
            run_bench([Contender("a", Hungry(), 1, (1, 1, 1))], [512], SETTINGS, Silent())


class TestAttentionMode:
    def test_switch_and_back(self) -> None:
        model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32)
        with attention_mode(model, "explicit"):
            assert not any(block.attn.fused_attn for block in model.blocks)
        assert all(block.attn.fused_attn for block in model.blocks)
        found = run_bench(
            [Contender("a", model, 1, (3, 32, 32))], [1], replace(SETTINGS, attention="explicit"), Silent()
        )
        assert found.attention == "explicit"

    def test_nothing_to_switch(self) -> None:
        with pytest.raises(UsageError, match="'explicit'"), attention_mode(nn.Identity(), "explicit"):
            pass


class TestReport:
    def test_keys(self) -> None:
        found = report().to_dict()
        assert set(found) == {"device", "dtype", "threads", "attention", "memory_format", "torch", "runs", "ratios"}
        assert found["runs"][1] == {
            "name": "compressed",
            "batch": 4,
            "gmacs": 1.0,
            "latency_ms": {"median": 1050.0, "p10": 1010.0, "p90": 1090.0},
            "throughput": 3.81,
            "peak_memory_mb": 6.0,
        }
        assert found["ratios"][0] == {
            "batch": 4,
            "name": "compressed",
            "against": "dense",
            "macs": 2.0,
            "latency": 2.0,
            "latency_p10": 2.0,
            "latency_p90": 2.0,
            "efficiency": 1.0,
            "clear": True,
        }

    def test_words(self) -> None:
        assert str(report().ratios[0]) == "2.00x faster (MAC ratio 2.00x, efficiency 1.00)"
        noise = report(dense=(1.0, 1.3, 0.9), compressed=(1.1, 0.9, 1.2)).ratios[0]
        assert str(noise).startswith("no speed-up: the intervals overlap (MAC ratio 2.00x")

    def test_csv(self) -> None:
        first, second = csv.DictReader(report().to_csv().splitlines())
        assert (first["name"], first["batch"], first["latency_ms_median"]) == ("dense", "4", "2100.0")
        assert (second["gmacs"], second["peak_memory_mb"], second["device"]) == ("1.0", "6.0", "Some CPU")

    @pytest.mark.parametrize(("file_format", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
    def test_plot(self, tmp_path: Path, file_format: str, start: bytes) -> None:
        path = tmp_path / "without_ending"
        benchmark.plot(report(), path, file_format)
        assert path.read_bytes().startswith(start)


class TestCommand:
    """The command itself, with a model that needs no weights."""

    @pytest.fixture(autouse=True)
    def _toy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bench, "_open_all", lambda names, *options: {"toy": opened()})

    @staticmethod
    def run(**kwargs: object) -> None:
        bench.command([], seconds=0.0, min_runs=2, batch_size=["2"], threads=1, **kwargs)

    def test_table(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.run()
        shown = capsys.readouterr().out
        assert "random weights" in shown
        assert "batch 2: " in shown
        assert max(len(line) for line in shown.splitlines()) <= 80

    def test_json_alone(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.run(json=True)
        assert json.loads(capsys.readouterr().out)["runs"][0]["name"] == "dense"

    def test_outputs(self, tmp_path: Path) -> None:
        self.run(csv=tmp_path / "a.csv", plot=tmp_path / "a.PNG")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.PNG", "a.csv"]
        assert all(path.stat().st_size for path in tmp_path.iterdir())

    @pytest.mark.parametrize("option", ["csv", "plot"])
    def test_existing_output_is_refused_first(
        self, tmp_path: Path, option: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "a.svg"
        path.write_text("mine")
        with pytest.raises(UsageError, match="already exists"), monkeypatch.context() as patch:
            patch.setattr(benchmark, "run_bench", lambda *_: pytest.fail("measured before the check"))
            self.run(**{option: path})
        assert path.read_text() == "mine"
        self.run(**{option: path}, force=True)
        assert path.read_text() != "mine"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"plot": Path("a.jpg")}, "a.jpg"),
            ({"plot": Path("a.svg"), "csv": Path("a.svg")}, "both name"),
            ({"csv": Path("missing/a.csv")}, "does not exist"),
            ({"dtype": "int8"}, "'int8'"),
            ({"device": "tpu"}, "'tpu'"),
        ],
    )
    def test_refused(self, options: dict[str, object], message: str) -> None:
        with pytest.raises(RepshiftError, match=message):
            self.run(**options)

    def test_failed_plot_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(report: BenchReport, path: Path, file_format: str) -> None:
            path.write_text("half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(benchmark, "plot", fail)
        with pytest.raises(RepshiftError, match="No space left"):
            self.run(plot=tmp_path / "a.png")
        assert list(tmp_path.iterdir()) == []


class TestParsing:
    def test_batches(self) -> None:
        assert bench._parse_batches(["1, 8", "4", "8"]) == [1, 8, 4]

    @pytest.mark.parametrize("text", ["0", "-1", "x", "1,", "1.5", "²"])
    def test_wrong_batches(self, text: str) -> None:
        with pytest.raises(UsageError, match="--batch-size"):
            bench._parse_batches([text])

    def test_labels(self) -> None:
        assert bench._labels(["x/a.safetensors", "y/b.pth", "vit.v2"]) == {
            "a": "x/a.safetensors",
            "b": "y/b.pth",
            "vit.v2": "vit.v2",
        }
        assert list(bench._labels(["x/a.pt", "y/a.pt"])) == ["x/a.pt", "y/a.pt"]
        with pytest.raises(UsageError, match="given twice"):
            bench._labels(["a.pt", "a.pt"])


@pytest.fixture(name="results")
def fixture_results(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import _results

    yield _results
    del sys.modules["_results"]


class TestResults:
    def test_sections(self, tmp_path: Path, results: object) -> None:
        path = tmp_path / "docs" / "results.md"
        results.write_section("one", "first", path)
        results.write_section("two", r"second \1", path)
        results.write_section("one", "renewed", path)
        text = path.read_text()
        assert "<!-- begin one -->\nrenewed\n<!-- end one -->" in text
        assert text.index("end one") < text.index("begin two")
        assert r"second \1" in text
        assert "first" not in text

    def test_broken_marks(self, tmp_path: Path, results: object) -> None:
        path = tmp_path / "results.md"
        path.write_text("<!-- begin one -->")
        with pytest.raises(ValueError, match="end one"):
            results.write_section("one", "text", path)
        assert path.read_text() == "<!-- begin one -->"


def test_ratio_of_a_slower_model() -> None:
    assert str(Ratio(1, "a", "b", 1.5, Speedup(0.8, 0.7, 0.9, overlap=True))).startswith("no speed-up: 1.25x slower")
