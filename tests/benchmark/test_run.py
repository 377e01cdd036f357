"""The benchmark measures both sides in the same way; the measured times are not tested here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from paths import ROOT
from tiny import DROPS, compressed, make_recipe, tiny_vit
from torch import Tensor, nn

from repshift_cli.benchmark.end_to_end import Source
from repshift_cli.benchmark.run import BenchSettings, Contender, contenders_of, run_bench, run_sweep
from repshift_cli.checkpoints.loaded import LoadedModel, ModelDescription
from repshift_cli.checkpoints.weights import Source as Origin
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import CheckFailed, UsageError
from repshift_cli.models.attention_mode import attention_mode
from repshift_cli.utils.progress import Silent

SIZE = (3, 8, 8)
SETTINGS = BenchSettings(torch.device("cpu"), torch.float32, seconds=0, min_runs=2, threads=1)


class Switched(nn.Module):
    """A stand-in for a compressed model: half of the rows, unless it is dense."""

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
    source = Origin("file" if sha256 else "random", None, sha256)
    loaded = LoadedModel(module, ModelDescription(name, None, {}, preprocessing), source, module.state_dict())
    return Opened(loaded, module, module)


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

    def test_compressed_files_of_one_source_share_the_dense_model(self) -> None:
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

    def test_input_sizes_are_measured_separately(self) -> None:
        small, large = (Contender(name, nn.Identity(), 1, (3, edge, edge)) for name, edge in (("s", 4), ("l", 8)))
        assert [run.name for run in run_bench([small, large], [1], SETTINGS, Silent()).runs] == ["s", "l"]

    def test_batch_does_not_fit_into_memory(self) -> None:
        class Hungry(nn.Module):
            def forward(self, images: Tensor) -> Tensor:
                raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes.")

        with pytest.raises(UsageError, match="batch size 512 does not fit"):
            run_bench([Contender("a", Hungry(), 1, (1, 1, 1))], [512], SETTINGS, Silent())


class TestSweep:
    def test_every_combination_is_one_group(self) -> None:
        sweep = [replace(SETTINGS, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
        found = run_sweep(contenders_of({"file": opened()}), [1, 2], sweep, Silent())
        found_runs = [(run.name, run.setting.dtype, run.batch) for run in found.runs]
        assert found_runs == [
            (name, dtype, batch)
            for dtype in ("float32", "bfloat16")
            for batch in (1, 2)
            for name in ("dense", "compressed")
        ]
        assert [(ratio.setting.dtype, ratio.batch) for ratio in found.ratios] == [
            ("float32", 1),
            ("float32", 2),
            ("bfloat16", 1),
            ("bfloat16", 2),
        ]
        assert found.to_dict()["dtype"] == ["float32", "bfloat16"]

    def test_sizes_are_measured_separately_under_the_same_names(self) -> None:
        sizes = [
            Contender(name, nn.Identity(), macs, (3, edge, edge), against)
            for edge in (4, 8)
            for name, macs, against in (("dense", 2, None), ("compressed", 1, "dense"))
        ]
        found = run_sweep(sizes, [1], [SETTINGS], Silent())
        assert [(run.name, run.setting.image_size) for run in found.runs] == [
            ("dense", (4, 4)),
            ("compressed", (4, 4)),
            ("dense", (8, 8)),
            ("compressed", (8, 8)),
        ]
        assert [ratio.to_dict()["image_size"] for ratio in found.ratios] == [4, 8]
        assert len({run.setting for run in found.runs}) == 2

    def test_attention_is_refused_before_anything_runs(self) -> None:
        model = opened()
        sweep = [SETTINGS, replace(SETTINGS, attention="explicit")]
        with pytest.raises(UsageError, match="'explicit'"):
            run_sweep(contenders_of({"file": model}), [1], sweep, Silent())
        assert model.module.rows_seen == []

    def test_one_against_several(self) -> None:
        baseline = Contender("tome", nn.Identity(), 1000, SIZE, against="dense", is_baseline=True)
        dense, compressed = contenders_of({"file": opened()})
        found = run_bench([dense, replace(compressed, baselines=("tome",)), baseline], [1], SETTINGS, Silent())
        assert [(ratio.name, ratio.against, ratio.role) for ratio in found.ratios] == [
            ("compressed", "dense", "compressed"),
            ("compressed", "tome", "compressed"),
            ("tome", "dense", "peer"),
        ]
        assert [run.role for run in found.runs] == ["dense", "compressed", "peer"]

    def test_clips_cannot_be_read_from_files(self) -> None:
        clips = Contender("a", nn.Identity(), 1, (2, 3, 4, 4))
        source = Source(dataset=None, images=4, workers=0)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="takes clips"):
            run_sweep([clips], [1], [SETTINGS], Silent(), source)

    def test_reading_needs_preprocessing(self) -> None:
        source = Source(dataset=None, images=4, workers=0)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="without preprocessing"):
            run_sweep([Contender("a", nn.Identity(), 1, SIZE)], [1], [SETTINGS], Silent(), source)


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


class Notes(Silent):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class TestTilesNote:
    """13 and 6 tokens are not multiples of the tile of the matrix unit."""

    def notes(self, dtype: torch.dtype, recipe: str = DROPS) -> list[str]:
        model = compressed(recipe=make_recipe(recipe))
        sides = [
            Contender("dense", model, 2, (3, 32, 32), context=model.dense),
            Contender("compressed", model, 1, (3, 32, 32), against="dense"),
        ]
        progress = Notes()
        run_sweep(
            sides, [1], [replace(SETTINGS, dtype=dtype, attention=mode) for mode in ("auto", "explicit")], progress
        )
        return progress.notes

    def test_with_a_matrix_unit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_tile": True}, raising=False)
        (note,) = self.notes(torch.bfloat16)
        assert "(13, 6) are not multiples of 16" in note
        assert "in bfloat16: `round_tokens: 16`" in note
        assert not self.notes(torch.float32)
        assert not self.notes(torch.bfloat16, "[{layer: 0, keep_tokens: 15}]")

    def test_without_a_matrix_unit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_tile": False}, raising=False)
        assert not self.notes(torch.bfloat16)
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)  # missing in older versions
        assert not self.notes(torch.bfloat16)


@pytest.fixture(name="results")
def fixture_results(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import _results

    yield _results
    del sys.modules["_results"]


class TestResults:
    def test_a_run_replaces_its_page(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, results: ModuleType
    ) -> None:
        monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
        monkeypatch.setattr(sys, "argv", ["somewhere/vit_cpu.py", "--batch-sizes", "1"])
        name = results.page_name("vit_cpu", ("bfloat16", "float32"), ("off", "off"))
        body = [results.table(["a", "b"], [["1", "2"]]), "A note."]
        results.publish(name, "A title", "a machine", ["first"], dry_run=False)
        results.publish(name, "A title", "a machine", body, dry_run=False)
        (path,) = (tmp_path / "results").iterdir()
        assert path.name == "vit_cpu_bfloat16.md"
        text = path.read_text()
        assert text.startswith("# A title\n\n- Command: `")
        assert "python benchmarks/vit_cpu.py --batch-sizes 1`\n- Machine: a machine\n- Versions: Python " in text
        assert text.endswith("| a | b |\n| --- | --: |\n| 1 | 2 |\n\nA note.\n")
        assert "first" not in text

    def test_dry_run_writes_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, results: ModuleType) -> None:
        monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
        results.publish("one", "A title", "a machine", [], dry_run=True)
        assert not (tmp_path / "results").exists()


def test_weights_that_are_not_finite() -> None:
    model = tiny_vit()
    model.head.bias.data.fill_(float("nan"))
    contender = Contender("broken", model, 1, (3, 32, 32))
    with pytest.raises(CheckFailed, match="broken returns values that are not finite"):
        run_bench([contender], [1], BenchSettings(torch.device("cpu"), torch.float32, seconds=0.0), Silent())
