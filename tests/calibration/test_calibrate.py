"""Calibration finds the best metric of a model, and reports if none is clearly better than random."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from tiny import PATCHES, VARIANTS, images, make_plan, make_recipe, tiny_vit
from torch import Tensor, nn

from repshift_cli.calibration.calibrate import (
    Calibration,
    CandidateResult,
    _rounds,
    _steps,
    calibrate,
    choose_metric,
    paired_sigmas,
)
from repshift_cli.calibration.outputs import agreement, distance, divergence
from repshift_cli.errors import DataError, RecipeError
from repshift_cli.planning.plan import Plan
from repshift_cli.planning.recipe import ComponentSpec
from repshift_cli.reduction.checks import feeds
from repshift_cli.reduction.compressed_model import attach
from repshift_cli.reduction.families.base import match
from repshift_cli.reduction.metrics.base import build_metric
from repshift_cli.utils.progress import Silent

OPEN_POLARITY = {"operation": "block", "distance": "l2", "reading": "update"}
LAYERS = "[{layer: 0, keep_tokens: 8}]"


class Counting:
    """Counts announced and made steps."""

    def __init__(self) -> None:
        self.announced = 0
        self.made = 0

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Counting]:
        self.announced += total
        yield self

    def advance(self, steps: int = 1) -> None:
        self.made += steps

    def note(self, text: str) -> None:
        raise AssertionError(text)

    def warn(self, text: str) -> None:
        raise AssertionError(text)


def planted(side: str) -> tuple[nn.Module, Tensor]:
    """A model whose first block changes half of the patches much, and whose head reads only one half.

    Patches are bright or dark. The MLP of block 0 adds a large constant to the bright ones. All
    classes depend only on the bright (`largest`) or the dark patches (`smallest`), by the mean over patches.
    """
    width, classes = 32, 5
    model = tiny_vit(class_token=False, global_pool="avg", embed_dim=width, depth=1, num_classes=classes, fc_norm=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.norm, model.blocks[0].norm1, model.blocks[0].norm2 = nn.Identity(), nn.Identity(), nn.Identity()
        # channel 0: brightness; channels 1 to 15: content of bright patches; channels 16 to 30: content of dark ones
        kernel = torch.zeros(width, 3, 8, 8)
        kernel[0, 0] = 1 / 64
        kernel[1:16, 1] = torch.randn(15, 8, 8, generator=generator) / 8
        kernel[16:31, 2] = torch.randn(15, 8, 8, generator=generator) / 8
        model.patch_embed.proj.weight.copy_(kernel)
        model.blocks[0].mlp.fc1.weight[0, 0] = 1.0
        model.blocks[0].mlp.fc2.weight[31, 0] = 9.0
        channels = slice(1, 16) if side == "largest" else slice(16, 31)
        model.head.weight[:, channels] = 8 * torch.randn(classes, 15, generator=generator)
    batch = torch.zeros(48, 3, 32, 32)
    for image in batch:
        bright = torch.randperm(PATCHES, generator=generator)[: PATCHES // 2]
        for place in range(PATCHES):
            row, column = 8 * (place // 4), 8 * (place % 4)
            shown = 1 if place in bright else 2
            image[0, row : row + 8, column : column + 8] = 3.0 if place in bright else 0.0
            image[shown, row : row + 8, column : column + 8] = torch.randn(8, 8, generator=generator)
    return model.eval(), batch


def run(
    model: nn.Module, batch: Tensor, metric: dict[str, object] | None = None, layers: str = LAYERS, **options: Any
) -> Calibration:
    plan = open_plan(model, metric or {}, layers)
    settings: dict[str, Any] = {"identity": {"where": "here"}, "batch_size": 16, "progress": Silent(), **options}
    return calibrate(model, match(model), plan, images=batch, **settings)


def open_plan(model: nn.Module, metric: dict[str, object], layers: str = LAYERS) -> Plan:
    """The plan of a recipe whose metric has only these fields filled."""
    part = ComponentSpec(kind="representation_shift", **metric)
    return make_plan(model, make_recipe(layers)).with_metric(part)


class TestChoice:
    @pytest.mark.parametrize("side", ["largest", "smallest"])
    def test_the_planted_polarity_is_found(self, side: str) -> None:
        found = run(*planted(side), OPEN_POLARITY)
        (choice,) = found.sites
        assert choice.chosen.polarity == side
        assert found.clear
        assert found.result.distance < 0.5 * found.random.distance
        assert found.result.agreement == 1.0
        assert choice.candidates[1].agreement < 0.6

    @pytest.mark.parametrize("side", ["largest", "smallest"])
    def test_the_planted_metric_is_found_among_thirty(self, side: str) -> None:
        found = run(*planted(side))
        (choice,) = found.sites
        assert len(choice.candidates) == 30
        assert choice.chosen.polarity == side
        assert found.clear

    def test_equal_tokens_give_no_clear_choice(self) -> None:
        model, _ = planted("largest")
        found = run(model, images(48), {**OPEN_POLARITY, "polarity": "largest"})
        assert not found.clear

    def test_results_do_not_depend_on_the_batch_size(self) -> None:
        model, batch = tiny_vit(), images(24)
        first, again, other = run(model, batch), run(model, batch), run(model, batch, batch_size=5)
        assert first.to_dict() == again.to_dict()
        assert first.specs == other.specs
        assert first.result.distance == pytest.approx(other.result.distance, rel=1e-3)

    def test_the_model_is_not_changed(self) -> None:
        model = tiny_vit()
        with torch.no_grad():
            wanted = model(images())
        run(model, images(8), OPEN_POLARITY)
        assert not any(part._forward_hooks for part in model.modules())
        assert torch.equal(model(images()), wanted)


USUAL = build_metric(ComponentSpec.model_validate({"kind": "representation_shift"})).with_defaults()


class TestRounds:
    @pytest.mark.parametrize(
        ("count", "seen", "checked"),
        [(128, [8, 24, 64], 64), (24, [2, 5, 12], 12), (8, [1, 2, 4], 4), (9, [1, 2, 5], 4)],
    )
    def test_later_rounds_have_fewer_candidates(self, count: int, seen: list[int], checked: int) -> None:
        found = run(tiny_vit(), images(count), layers="[{layer: 0, keep_tokens: 12}, {layer: 2, keep_tokens: 9}]")
        for choice in found.sites:
            numbers = [len(candidate.distances) for candidate in choice.candidates]
            assert numbers == [seen[2]] * 2 + [seen[1]] * 3 + [seen[0]] * 25
            assert all(len(result.agreeing) == len(result.distances) for result in choice.candidates)
        assert [len(each.distances) for each in (found.result, found.random, found.default)] == [checked] * 3

    def test_the_best_of_the_last_round_is_chosen(self) -> None:
        (choice,) = run(tiny_vit(), images(32)).sites
        assert choice.chosen == choice.candidates[0].metric
        usual = next(result for result in choice.candidates if result.metric == USUAL)
        best = min((result for result in choice.candidates if len(result.distances) == 16), key=lambda r: r.distance)
        clearly = paired_sigmas(usual.distances, best.distances) >= 1
        assert choice.chosen == (best.metric if clearly else USUAL)
        assert len(usual.distances) == 16, "the paper's choice runs to the end"

    @pytest.mark.parametrize(("noise", "stays"), [(0.5, True), (0.01, False)])
    def test_the_papers_choice_is_kept_unless_another_is_clearly_better(self, noise: float, stays: bool) -> None:
        model = tiny_vit()
        plan = open_plan(model, {"operation": "mlp", "distance": "l2", "reading": "update"})
        usual, other = build_metric(plan.sites[0].metric).variants()
        swing = [0.05 + noise * (-1) ** index for index in range(32)]

        class Draws:
            def compare(self, _: Plan, candidates: list[CandidateResult], start: int, stop: int) -> None:
                for candidate in candidates:
                    candidate.distances += [1.0] * (stop - start)
                    if candidate.metric == other:
                        candidate.distances[start:stop] = [1.0 - gap for gap in swing[start:stop]]

        choice = choose_metric(cast(Any, Draws()), plan, [usual, other], 32)
        assert choice.chosen == (usual if stays else other)

    def test_one_changed_prediction_does_not_outweigh_all_others(self) -> None:
        sure, other = torch.tensor([[40.0, 0.0]]), torch.tensor([[0.0, 40.0]])
        assert float(divergence(sure, other, has_head=True)) > 39
        assert float(distance(sure, other, has_head=True)) == pytest.approx(1.0, abs=1e-6)
        assert float(distance(sure, sure, has_head=True)) == pytest.approx(0.0, abs=1e-6)

    def test_a_candidate_in_a_branch_equals_the_candidate_alone(self) -> None:
        """Branches share the layers before the site; each must equal the model with that metric alone."""
        model, batch = tiny_vit(), images(16)
        layers = "[{layer: 0, keep_tokens: 12}, {layer: 2, keep_tokens: 7}]"
        found = run(model, batch, layers=layers)
        plan = make_plan(model, make_recipe(layers))
        with torch.no_grad():
            reference = model(batch)
        for candidate in found.sites[1].candidates:
            compressed = attach(model, plan.with_metrics([found.specs[0], candidate.metric.spec()]))
            with torch.no_grad():
                alone = distance(reference, compressed(batch), has_head=True)
            compressed.detach()
            assert candidate.distances == pytest.approx(alone[: len(candidate.distances)].tolist(), abs=1e-5)

    def test_the_result_is_measured_on_heldout_images(self) -> None:
        model, batch = tiny_vit(), images(16)
        found = run(model, batch)
        compressed = attach(model, make_plan(model, make_recipe(LAYERS)).with_metrics(found.specs))
        with torch.no_grad():
            output = compressed(batch[8:])
            with compressed.dense():
                wanted = distance(compressed(batch[8:]), output, has_head=True)
        assert found.result.distances == pytest.approx(wanted.tolist(), abs=1e-5)

    @pytest.mark.parametrize("count", [8, 11, 40])
    @pytest.mark.parametrize("metric", [{}, OPEN_POLARITY, {"operation": "mlp", "distance": "l2"}])
    def test_announced_steps_are_made(self, metric: dict[str, object], count: int) -> None:
        model, progress = tiny_vit(), Counting()
        plan = open_plan(model, metric)
        site = match(model).sites(model)[0]
        candidates = sum(feeds(variant, site) for variant in build_metric(plan.sites[0].metric).variants())
        calibrate(model, match(model), plan, images=images(count), identity={}, batch_size=7, progress=progress)
        expected = _steps([candidates], count)
        assert progress.made == progress.announced == expected

    def test_rounds_never_shrink(self) -> None:
        for count in range(4, 200):
            seen = [until for until, _ in _rounds(count)]
            assert seen == sorted(seen)
            assert seen[0] >= 1
            assert seen[-1] == count

    def test_fused_blocks_have_only_the_operation_block(self) -> None:
        found = run(tiny_vit(**VARIANTS["parallel_things_block"]), images(8))
        (choice,) = found.sites
        assert {candidate.metric.spec().options["operation"] for candidate in choice.candidates} == {"block"}
        assert len(choice.candidates) == 6
        assert math.isfinite(found.default.distance)  # the paper's choice needs the MLP, so another is used


class TestCoverage:
    def test_coverage_is_tried_where_no_metric_is_named(self) -> None:
        model, batch, progress = tiny_vit(), images(16), Counting()
        plan = open_plan(model, OPEN_POLARITY, "[{layer: 0, keep_tokens: 8}, {layer: 2, keep_tokens: 4}]")
        found = calibrate(
            model, match(model), plan, images=batch, identity={}, batch_size=7, progress=progress, cover=True
        )
        assert progress.made == progress.announced
        for choice in found.sites:
            kinds = {candidate.metric.kind for candidate in choice.candidates}
            assert kinds == {"representation_shift", "coverage", "random", "grid"}
        compressed = attach(model, plan.with_metrics(found.specs))
        with torch.no_grad():
            assert compressed(batch).isfinite().all()

    def test_better_coverage_replaces_the_choice_at_all_sites(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("repshift_cli.calibration.calibrate.paired_sigmas", lambda *_: 2.0)
        found = run(tiny_vit(), images(16), OPEN_POLARITY, cover=True)
        assert [spec.kind for spec in found.specs] == ["grid"]
        assert "At blocks.0 tokens are dropped by their position alone" in found.coverage_note()

    @pytest.mark.parametrize(
        ("sigmas", "covers", "accepted"), [(-0.9, True, True), (-1.1, True, False), (2, False, False)]
    )
    def test_what_is_not_worse_is_accepted(self, sigmas: float, covers: bool, accepted: bool) -> None:
        found = run(tiny_vit(), images(8), {**OPEN_POLARITY, "polarity": "largest"})
        assert replace(found, clear=False, sigmas=sigmas, covers=covers).accepted == accepted


class TestRefusals:
    @pytest.mark.parametrize("count", [0, 1, 7])
    def test_too_few_images(self, count: int) -> None:
        with pytest.raises(DataError, match=f"at least 8 images, there are {count}") as caught:
            run(tiny_vit(), images(count))
        assert caught.value.exit_code == 4

    def test_no_variant_can_run(self) -> None:
        with pytest.raises(RecipeError, match=r"no variant of representation_shift can run at blocks\.0"):
            run(tiny_vit(**VARIANTS["parallel_things_block"]), images(8), {"operation": "mlp"})


class TestMeasures:
    def test_divergence_is_kullback_leibler_in_nats(self) -> None:
        reference, output = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[1.0, 1.0, 0.0]])
        p, q = reference.double().softmax(-1), output.double().softmax(-1)
        assert float(divergence(reference, output, has_head=True)) == pytest.approx(float((p * (p / q).log()).sum()))
        assert divergence(reference, reference, has_head=True).tolist() == [0.0]

    def test_divergence_of_features_is_one_minus_cosine(self) -> None:
        one, other = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 2.0], [3.0, 0.0]])
        assert divergence(one, other, has_head=False).tolist() == pytest.approx([1.0, 0.0])

    def test_agreement(self) -> None:
        assert agreement(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 9.0]])).tolist() == [
            1,
            0,
        ]

    def test_a_model_without_a_head_has_no_agreement(self) -> None:
        found = run(tiny_vit(num_classes=0), images(8), OPEN_POLARITY)
        assert found.result.agreement is None
        assert math.isfinite(found.result.distance)

    def test_sigmas(self) -> None:
        assert paired_sigmas([2.0, 4.0], [1.0, 1.0]) == pytest.approx(2.0)
        assert paired_sigmas([1.0, 1.0], [1.0, 1.0]) == 0.0
        assert paired_sigmas([2.0, 2.0], [1.0, 1.0]) == 99.0
        assert paired_sigmas([1.0, 1.0], [2.0, 2.0]) == -99.0


def test_the_document_has_the_measured_values() -> None:
    record = run(tiny_vit(), images(16), OPEN_POLARITY).to_dict()
    assert record.keys() == {"clear", "mild", "sigmas", "images", "data", "checked", "sites"}
    assert record["data"] == {"where": "here"}
    assert record["checked"].keys() == {"chosen", "random", "default"}
    assert record["checked"]["chosen"].keys() == {"images", "distance", "agreement"}
    (site,) = record["sites"]
    assert site.keys() == {"site", "chosen", "candidates"}
    assert site["chosen"]["kind"] == "representation_shift"
    assert site["candidates"][0].keys() == {"metric", "images", "distance", "agreement"}
