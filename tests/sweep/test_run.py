"""Sweeps on a small model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import images, tiny_vit

from repshift_cli.checkpoints.loaded import LoadedModel
from repshift_cli.compression.job import wrap_module
from repshift_cli.data.inputs import ImageBatch
from repshift_cli.errors import RecipeError, UsageError
from repshift_cli.planning.recipe import ComponentSpec
from repshift_cli.sweep import run
from repshift_cli.sweep.combinations import Combination, combinations_of, job_of
from repshift_cli.sweep.report import SweepReport
from repshift_cli.sweep.run import sweep


def parts(*kinds: str) -> list[ComponentSpec]:
    return [ComponentSpec(kind=kind) for kind in kinds]


def batch(seed: int = 1, count: int = 12, **options: Any) -> ImageBatch:
    identity = {"where": "noise", "count": count, "seed": seed, "sha256": f"{seed:064d}"}
    return ImageBatch(images(count, seed=seed), identity, f"{count} images", False, **options)


@pytest.fixture
def loaded() -> LoadedModel:
    return wrap_module(tiny_vit(), None)


def grid(loaded: LoadedModel, **options: Any) -> list[Combination]:
    chosen: dict[str, Any] = {"ratios": [0.25], "metrics": parts("token_norm"), "reducers": parts("prune"), **options}
    return combinations_of(loaded, **chosen)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Combination]:
    """The combinations that run."""
    seen: list[Combination] = []
    measure = run._Run.measure

    def count(self: run._Run, combination: Combination) -> Any:
        seen.append(combination)
        return measure(self, combination)

    monkeypatch.setattr(run._Run, "measure", count)
    return seen


def run_sweep(loaded: LoadedModel, combinations: Sequence[Combination], **options: Any) -> SweepReport:
    given = options.pop("images", batch())
    return sweep(loaded, given, combinations, calibration=lambda seed: batch(100 + seed), **options)


class TestCombinations:
    def test_seeds_are_left_out_where_they_do_not_matter(self, loaded: LoadedModel) -> None:
        found = grid(
            loaded, metrics=parts("token_norm", "random", "fitted"), reducers=parts("prune", "bipartite"), seeds=[0, 1]
        )
        shown = [(one.metric and one.metric.kind, one.reducer.kind, one.seed) for one in found]
        assert shown == [
            ("token_norm", "prune", None),
            (None, "bipartite", None),
            *(("random", "prune", seed) for seed in (0, 1)),
            *(("fitted", "prune", seed) for seed in (0, 1)),
        ]

    def test_layers_are_those_of_the_default_recipe(self, loaded: LoadedModel) -> None:
        assert grid(loaded)[0].layers == (0, 1, 2)
        assert grid(loaded, layers=[1, "blocks.2"])[0].layers == (1, "blocks.2")

    @pytest.mark.parametrize("ratio", [0.0, 1.0, float("nan")])
    def test_invalid_ratios(self, loaded: LoadedModel, ratio: float) -> None:
        with pytest.raises(UsageError, match="invalid ratio"):
            grid(loaded, ratios=[ratio])

    def test_the_smallest_ratio_for_a_share_of_the_macs(self, loaded: LoadedModel) -> None:
        (one,) = grid(loaded, ratios=[], macs=[0.6])
        job, ratio = job_of(loaded, one)
        assert 0.25 < ratio < 0.6
        with_less = one.model_copy(update={"cost": "ratio", "amount": ratio - 1e-4})
        dense = job.family.macs(loaded.model, None)
        assert job.family.macs(loaded.model, job.plan) <= 0.6 * dense
        assert job.family.macs(loaded.model, job_of(loaded, with_less)[0].plan) > 0.6 * dense

    def test_a_share_that_is_out_of_reach(self, loaded: LoadedModel) -> None:
        (one,) = grid(loaded, ratios=[], macs=[0.1], layers=[2])
        with pytest.raises(RecipeError, match=r"0\.1 of the MACs is not reached"):
            job_of(loaded, one)


class TestSweep:
    def test_it_measures_what_compress_would(self, loaded: LoadedModel) -> None:
        """Predictions of the last row are compared with the plan attached by hand."""
        from repshift_cli.reduction.compressed_model import attach

        labels = torch.arange(12) % 10
        (one,) = grid(loaded)
        report = run_sweep(loaded, [one], images=batch(labels=labels))
        with torch.inference_mode():
            dense = loaded.model(batch().tensor).argmax(-1)
            compressed = attach(loaded.model, job_of(loaded, one)[0].default_plan())
            outputs = compressed(batch().tensor).argmax(-1)
            macs = compressed.macs()
            compressed.detach()
        row = report.rows[1].to_dict()
        assert row["top1"] == pytest.approx(100 * float((outputs == labels).float().mean()))
        assert row["agreement"] == pytest.approx(float((outputs == dense).float().mean()))
        assert row["gmacs"] == macs / 1e9
        assert report.rows[0].to_dict()["agreement"] == 1.0

    def test_the_seed_draws_calibration_images_and_random_tokens(self, loaded: LoadedModel) -> None:
        drawn: list[int] = []

        def calibration(seed: int) -> ImageBatch:
            drawn.append(seed)
            return batch(100 + seed)

        combinations = grid(loaded, ratios=[0.5], metrics=parts("fitted", "random"), seeds=[0, 1])
        report = sweep(loaded, batch(), combinations, calibration=calibration)
        assert drawn == [0, 1]
        assert [each.calibration for each in report.results] == [f"{100:064d}", f"{101:064d}", None, None]
        first, second = (each.same for each in report.results[2:])
        assert first != second
        with pytest.raises(UsageError, match="no images for calibration"):
            sweep(loaded, batch(), combinations)

    def test_an_encoder_without_a_head(self) -> None:
        encoder = wrap_module(tiny_vit(num_classes=0), None)
        report = run_sweep(encoder, grid(encoder))
        assert report.measures == ("cosine",)
        assert 0.0 < report.rows[1].quality.mean < 1.0

    def test_unsupported_combinations_are_listed(self, loaded: LoadedModel) -> None:
        report = run_sweep(loaded, grid(loaded, ratios=[0.25, 0.5], reducers=parts("prune", "vid_tldr")))
        assert len(report.results) == 2
        (listed,) = report.unsupported
        assert (listed.metric, listed.reducer, listed.amounts) == ("token_norm", "vid_tldr", (0.25, 0.5))
        assert listed.reason.startswith("vid_tldr acts after attention")

    def test_the_error_if_nothing_is_supported(self, loaded: LoadedModel) -> None:
        with pytest.raises(RecipeError, match=r"^vid_tldr acts after attention"):
            run_sweep(loaded, grid(loaded, reducers=parts("vid_tldr")))


class TestFolder:
    def test_finished_combinations_are_not_run_again(
        self, loaded: LoadedModel, tmp_path: Path, counted: list[Combination]
    ) -> None:
        metrics = parts("token_norm", "fitted")
        first = run_sweep(loaded, grid(loaded, metrics=metrics), folder=tmp_path / "s")
        assert len(counted) == 2
        again = run_sweep(loaded, grid(loaded, metrics=metrics), folder=tmp_path / "s")
        assert len(counted) == 2
        assert again.to_dict() == first.to_dict()
        more = run_sweep(loaded, grid(loaded, metrics=metrics, ratios=[0.25, 0.5]), folder=tmp_path / "s")
        assert len(counted) == 4
        assert len(more.results) == 4
        assert len((tmp_path / "s" / "sweep.jsonl").read_text().splitlines()) == 6

    def test_an_interrupted_sweep_continues(
        self, loaded: LoadedModel, tmp_path: Path, counted: list[Combination], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        combinations = grid(loaded, ratios=[0.25, 0.5, 0.6])
        measure = run._Run.measure

        def stop(self: run._Run, combination: Combination) -> Any:
            if combination == combinations[1]:
                raise KeyboardInterrupt
            return measure(self, combination)

        monkeypatch.setattr(run._Run, "measure", stop)
        report = run_sweep(loaded, combinations, folder=tmp_path)
        assert report.interrupted
        assert len(report.results) == 1
        monkeypatch.setattr(run._Run, "measure", measure)
        counted.clear()
        report = run_sweep(loaded, combinations, folder=tmp_path)
        assert counted == combinations[1:]
        assert len(report.results) == 3

    def test_parts_of_processes_are_joined(
        self, loaded: LoadedModel, tmp_path: Path, counted: list[Combination]
    ) -> None:
        run_sweep(loaded, grid(loaded), folder=tmp_path)
        (tmp_path / "sweep.jsonl").rename(tmp_path / "sweep.1.jsonl")
        counted.clear()
        run_sweep(loaded, grid(loaded), folder=tmp_path)
        assert counted == []
        assert [path.name for path in tmp_path.iterdir()] == ["sweep.jsonl"]

    def test_another_sweep_is_refused(self, loaded: LoadedModel, tmp_path: Path) -> None:
        run_sweep(loaded, grid(loaded), folder=tmp_path)
        before = (tmp_path / "sweep.jsonl").read_text()
        with pytest.raises(UsageError, match=r"is of another sweep: it differs in images, data\n"):
            run_sweep(loaded, grid(loaded), folder=tmp_path, images=batch(2, count=13))
        with pytest.raises(UsageError, match=r"it differs in model\n"):
            run_sweep(wrap_module(tiny_vit(seed=1), None), grid(loaded), folder=tmp_path)
        assert (tmp_path / "sweep.jsonl").read_text() == before

    @pytest.mark.parametrize("change", ["", "{}\nx\n", "[1]\n", "short"])
    def test_damaged_files(self, loaded: LoadedModel, tmp_path: Path, change: str) -> None:
        run_sweep(loaded, grid(loaded), folder=tmp_path)
        path = tmp_path / "sweep.jsonl"
        header, dense, *_ = path.read_text().splitlines()
        path.write_text(
            f"{header}\n{json.dumps({**json.loads(dense), 'same': '00'})}\n" if change == "short" else change
        )
        with pytest.raises(UsageError, match="is not the file of a sweep"):
            run_sweep(loaded, grid(loaded), folder=tmp_path)

    def test_a_folder_of_something_else(self, loaded: LoadedModel, tmp_path: Path) -> None:
        (tmp_path / "mine.txt").write_text("mine")
        with pytest.raises(UsageError, match="has files and no sweep"):
            run_sweep(loaded, grid(loaded), folder=tmp_path)
