"""The search on small models: its result, interruption and resumption."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import DEPTH, PATCHES, images, tiny_vit
from tiny_cnn import photos, tiny_cnn
from tiny_umt import tiny_umt, umt_clips
from tiny_vim import tiny_vim, vim_images
from torch import nn

from repshift_cli.calibration.outputs import agreement, distance, divergence
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.data.inputs import load_inputs
from repshift_cli.errors import CheckFailed, DataError, RecipeError, UsageError
from repshift_cli.ops.neighbours import recall_at
from repshift_cli.planning.plan import Plan
from repshift_cli.planning.recipe import ComponentSpec, Recipe, scaled_recipe
from repshift_cli.reduction.compressed_model import attach
from repshift_cli.reduction.families.base import match
from repshift_cli.reduction.plans import resolve_for
from repshift_cli.search.evaluator import Evaluator
from repshift_cli.search.result import SearchResult, SearchSettings
from repshift_cli.search.search import search
from repshift_cli.search.state import keep_outputs, kept_outputs
from repshift_cli.search.target import SearchTarget, lower_agreement
from repshift_cli.utils.progress import Progress, Silent

COUNT = 48
HELD = COUNT // 2

FIXED = (
    "version: 1\nmetric: {kind: representation_shift, operation: block, distance: l2, reading: update}\n"
    "last_block: full\n"
)
"""A start recipe whose only open field is the polarity, for fast searches."""


def wanted(target: str, **options: Any) -> SearchSettings:
    usual: dict[str, Any] = {
        "images": images(COUNT),
        "identity": {"where": "noise"},
        "start": Recipe.parse(FIXED + "layers: [{layer: 1, drop_ratio: 0.5}]\n"),
        "evaluations": 8,
        "seconds": 0.0,
        "batch_size": 16,
    }
    return SearchSettings(SearchTarget.parse(target), **{**usual, **options})


def run(target: str, model: nn.Module | None = None, progress: Progress | None = None, **options: Any) -> SearchResult:
    model = model if model is not None else tiny_vit()
    return search(model, match(model), wanted(target, **options), progress or Silent())


def document(result: SearchResult) -> dict[str, Any]:
    """A result without its run time."""
    found = result.to_dict()
    del found["seconds"]
    return json.loads(json.dumps(found))


class Stopping:
    """Raises KeyboardInterrupt at step `after` of the tasks called `label`."""

    def __init__(self, label: str, after: int) -> None:
        self.label = label
        self.left = after
        self.here = False
        self.seen: list[str] = []

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Stopping]:
        outer, self.here = self.here, label == self.label
        self.seen.append(label)
        yield self
        self.here = outer

    def advance(self, steps: int = 1) -> None:
        if self.here:
            self.left -= steps
            if self.left < 0:
                raise KeyboardInterrupt

    def note(self, text: str) -> None:
        raise AssertionError(text)

    def warn(self, text: str) -> None:
        raise AssertionError(text)


class Counting(Silent):
    """Records the announced and the made steps of each task, and the warnings."""

    def __init__(self) -> None:
        self.tasks: list[tuple[str, int, int]] = []
        self.warned: list[str] = []

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Any]:
        made = [0]

        class Task:
            def advance(self, steps: int = 1) -> None:
                made[0] += steps

        yield Task()
        self.tasks.append((label, total, made[0]))

    def warn(self, text: str) -> None:
        self.warned.append(text)


class TestCost:
    @pytest.mark.slow
    def test_the_result_describes_the_found_schedule(self) -> None:
        model, result = tiny_vit(), run("macs=0.65")
        assert result.met
        assert not result.interrupted
        plan = resolve_for(model, Recipe.parse(result.recipe.to_yaml()))
        assert plan == result.plan
        compressed = attach(model, plan)
        assert compressed.macs() / compressed.dense_macs() == pytest.approx(result.found.macs) == result.nearest
        assert 0.6 < result.found.macs <= 0.65
        # the values are those of the held-out images
        held = images(COUNT)[HELD:]
        with torch.inference_mode():
            given = compressed(held)
            with compressed.dense() as dense:
                reference = dense(held)
        assert result.found.distance == pytest.approx(float(distance(reference, given, True).mean()), abs=1e-6)
        assert result.found.kl == pytest.approx(float(divergence(reference, given, True).mean()), abs=1e-6)
        assert result.found.agreement == pytest.approx(float(agreement(reference, given).mean()), abs=1e-6)
        assert result.found.images == HELD

    @pytest.mark.slow
    def test_does_not_change_the_model(self) -> None:
        model = tiny_vit()
        with torch.inference_mode():
            before = model(images(4))
            run("macs=0.65", model)
            assert torch.equal(model(images(4)), before)

    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_is_never_worse_than_the_papers_schedule(self, seed: int) -> None:
        result = run("macs=0.6", tiny_vit(seed=seed), seed=seed)
        assert result.paper is not None
        assert result.found.distance <= result.paper.distance
        assert result.paper.macs <= 0.6
        # one of so few tokens is a few percent of the MACs
        assert abs(result.paper.macs - result.found.macs) < 0.05

    @pytest.mark.slow
    def test_is_the_best_that_was_tried(self) -> None:
        result = run("macs=0.6", evaluations=16)
        fitting = [point for point in result.tried if point.macs <= 0.6]
        tokens = tuple((site.layer, site.tokens_out) for site in result.plan.sites)
        best = min(fitting, key=lambda point: point.distance)
        assert result.paper_is_found or best.tokens == tokens
        assert result.evaluations == len(result.tried) > 8
        assert len({point.name for point in result.tried} & {"additive model", "paper", "neighbour"}) == 3

    @pytest.mark.slow
    def test_drops_tokens_where_they_do_not_matter(self) -> None:
        """Block 1 reads all tokens and the other blocks are the identity, so dropping after block 1 changes little."""
        model = tiny_vit()
        with torch.no_grad():
            for index, block in enumerate(model.blocks):
                for part in (block.attn.proj, block.mlp.fc2):
                    if index != 1:
                        part.weight.zero_()
                        part.bias.zero_()
        result = run("macs=0.8", model)
        assert [site.layer for site in result.plan.sites if site.layer < 1] == []
        assert result.found.distance < 1e-6
        assert result.paper is not None
        assert result.paper.distance > 1e-4

    @pytest.mark.slow
    def test_compares_with_the_given_schedule(self) -> None:
        result = run("macs=0.65")
        assert result.given is not None
        assert result.given.tokens == ((1, 1 + PATCHES // 2),)
        assert run("macs=0.65", start=Recipe.parse(FIXED + "budget: {macs: 0.65}\n")).given is None

    @pytest.mark.slow
    def test_warns_if_the_target_is_out_of_reach(self) -> None:
        listener = Counting()
        result = run("macs=0.05", progress=listener)
        assert not result.met
        assert result.nearest == result.found.macs > 0.3
        assert all("out of reach" in text for text in listener.warned) and listener.warned
        with pytest.raises(CheckFailed, match=f"{result.nearest:.4g}"):
            result.check_met(False, Silent().warn)
        run("macs=0.65").check_met(False, Silent().warn)

    @pytest.mark.slow
    def test_progress_makes_the_announced_steps(self) -> None:
        listener = Counting()
        run("macs=0.65", progress=listener)
        assert {"choosing metrics", "measuring layers", "trying neighbours"} <= {
            label for label, _, _ in listener.tasks
        }
        assert all(total == made for _, total, made in listener.tasks)

    @pytest.mark.slow
    def test_a_layer_keeps_the_metric_that_the_recipe_gives_it(self) -> None:
        layers = "layers: [{layer: 0, drop_ratio: 0.2, metric: {kind: token_norm}}]\n"
        result = run("macs=0.5", start=Recipe.parse(FIXED + layers))
        kinds = {site.layer: site.metric.kind for site in result.plan.sites}
        assert kinds.pop(0) == "token_norm"
        assert set(kinds.values()) == {"representation_shift"}

    @pytest.mark.slow
    @pytest.mark.parametrize("parts", ["metric: {kind: class_attention}", "reducer: {kind: bipartite}"])
    def test_the_budget_includes_metrics_and_reducers(self, parts: str) -> None:
        start = Recipe.parse(f"version: 1\nlast_block: full\n{parts}\nbudget: {{macs: 0.7}}\n")
        result = run("macs=0.7", tiny_vit(img_size=96), images=images(16, 96), start=start)
        assert result.met
        assert sum(point.name == "neighbour" for point in result.tried) == 8
        assert all(point.macs <= 0.7 + 1e-9 for point in result.tried if point.name != "other cost")

    def test_a_metric_without_its_tensors_is_refused(self) -> None:
        start = Recipe.parse("version: 1\nmetric: {kind: class_attention}\nbudget: {macs: 0.5}\n")
        with pytest.raises(RecipeError, match="class_attention"):
            run("macs=0.65", tiny_vit(attn_layer="diff"), start=start)

    @pytest.mark.slow
    def test_other_reducers_are_tried(self) -> None:
        result = run("macs=0.65", reducers=(ComponentSpec(kind="prune"), ComponentSpec(kind="bipartite")))
        assert "reducer bipartite" in {point.name for point in result.tried}
        assert "reducer prune" not in {point.name for point in result.tried}
        assert all(point.macs <= 0.65 + 1e-9 for point in result.tried if point.name != "other cost")

    @pytest.mark.slow
    def test_a_reducer_stays_within_its_limit(self) -> None:
        start = Recipe.parse(FIXED + "reducer: {kind: bipartite}\nbudget: {macs: 0.6}\n")
        result = run("macs=0.6", start=start)
        assert result.met
        assert result.plan.reducer.kind == "bipartite"
        before = PATCHES
        for site in result.plan.sites:
            assert before - (site.tokens_out - 1) <= before // 2
            before = site.tokens_out - 1


class TestQuality:
    def test_agreement_is_met_on_the_selection_images(self) -> None:
        result = run("agreement=0.8", evaluations=12)
        assert result.met
        assert result.nearest >= 0.8
        holding = [point for point in result.tried if lower_agreement(point.agreement or 0.0, HELD) >= 0.8]
        assert result.found.macs <= min(point.macs for point in holding) * 1.01

    @pytest.mark.slow
    def test_more_agreement_costs_more(self) -> None:
        strict, loose = run("agreement=0.95"), run("agreement=0.6")
        assert strict.met and loose.met
        assert loose.found.macs < strict.found.macs < 1

    @pytest.mark.slow
    def test_top1_of_labelled_images(self) -> None:
        model = tiny_vit()
        with torch.inference_mode():
            labels = model(images(COUNT)).argmax(-1)
        result = run("max-drop=20", model, labels=labels)
        assert result.met
        assert result.nearest <= 20
        assert result.dense.top1 == 100.0
        # the labels are the dense predictions, so lost points are changed predictions
        assert result.found.top1 == pytest.approx(100 * (result.found.agreement or 0.0), abs=1e-4)

    @pytest.mark.slow
    def test_reports_whether_it_is_met_on_heldout_images(self) -> None:
        result = run("agreement=0.8", evaluations=4)
        assert result.held_back_met == ((result.found.agreement or 0.0) >= 0.8)
        assert result.to_dict()["held_back_met"] is result.held_back_met
        assert run("macs=0.6", evaluations=1).held_back_met is None
        lost = replace(result, found=replace(result.found, agreement=0.79))
        assert lost.held_back_met is False
        assert replace(lost, target=SearchTarget("max-drop", 1.0)).held_back_met is None

    @pytest.mark.slow
    def test_warns_if_the_images_are_too_few(self) -> None:
        listener = Counting()
        run("agreement=0.99", progress=listener, evaluations=4)
        assert any("too few" in text for text in listener.warned)

    def test_a_loss_of_less_than_one_image_is_refused(self) -> None:
        with pytest.raises(
            DataError, match=r"48 images cannot decide max-drop=4: .* one of 24 is 4\.2 points"
        ) as caught:
            run("max-drop=4", labels=torch.zeros(COUNT, dtype=torch.int64))
        assert "at least 50 images (--images)" in str(caught.value)

    def test_is_compared_with_random_dropping(self) -> None:
        result, said = run("macs=0.6", evaluations=2), list[str]()
        assert result.random_sigmas is not None
        assert result.to_dict()["random_sigmas"] == round(result.random_sigmas, 2)
        replace(result, random_sigmas=3.0).check_met(False, said.append)
        assert said == []
        replace(result, random_sigmas=0.5).check_met(False, said.append)
        assert said.pop().startswith(
            "the found schedule is not clearly better than random dropping (0.5 standard errors"
        )
        worse = replace(result, random_sigmas=-2.5)
        with pytest.raises(CheckFailed, match="random dropping is better than the found schedule"):
            worse.check_met(False, said.append)
        worse.check_met(True, said.append)
        assert said.pop().startswith("random dropping is better")

    def test_the_plot_shows_one_half(self) -> None:
        result = run("macs=0.6", evaluations=2)
        assert set(result.selection) == {"dense", "paper", "found"}
        assert {point.images for point in (*result.selection.values(), *result.tried)} == {HELD}
        assert any(point.tokens == result.selection["found"].tokens for point in result.tried)

    def test_is_missed_if_all_tokens_are_needed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        quality = Evaluator.quality

        def never(self: Evaluator, plan: Plan, part: str) -> dict[str, Any] | None:
            found = quality(self, plan, part)
            return found and {**found, "agreement": min(found["agreement"], 0.5)}

        monkeypatch.setattr(Evaluator, "quality", never)
        result = run("agreement=0.9", evaluations=4)
        assert not result.met
        assert result.nearest <= 0.5
        with pytest.raises(CheckFailed):
            result.check_met(False, Silent().warn)


class TestLatency:
    @pytest.mark.slow
    @pytest.mark.parametrize("target", [0.6, 0.75])
    def test_is_met_within_three_percent(self, monkeypatch: pytest.MonkeyPatch, target: float) -> None:
        """With a time that depends on a part of the MACs and on the number of sites."""
        asked: list[Plan] = []

        def clock(self: Evaluator, plan: Plan, remeasure: bool = False) -> float:
            asked.append(plan)
            return round(0.1 + 0.8 * self.macs(plan) ** 1.6 + 0.03 * len(plan.sites), 5)

        monkeypatch.setattr(Evaluator, "latency", clock)
        model = tiny_vit(img_size=96)
        result = run(f"latency={target}", model, images=images(COUNT, 96), seconds=0.1)
        assert result.met
        assert 0.97 * target <= result.nearest <= target
        assert result.found.latency == result.nearest
        assert result.plan in asked
        assert len(asked) < 20

    def test_one_disturbed_time_does_not_rule_the_target_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: dict[str, float] = {}

        def clock(self: Evaluator, plan: Plan, remeasure: bool = False) -> float:
            time = 0.1 + 0.8 * self.macs(plan)
            # the first four are those of the cost model
            return asked.setdefault(plan.model_dump_json(), 0.98 if len(asked) == 4 else round(time, 5))

        monkeypatch.setattr(Evaluator, "latency", clock)
        listener = Counting()
        result = run(
            "latency=0.6", tiny_vit(img_size=96), images=images(16, 96), seconds=0.1, evaluations=2, progress=listener
        )
        assert listener.warned == []
        assert result.met

    @pytest.mark.slow
    @pytest.mark.parametrize("seed", range(4))
    def test_is_met_with_noisy_times(self, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
        """And with times that the cost model predicts badly: the last step lies between a slow and a fast size."""
        chance = random.Random(seed)
        asked: dict[str, float] = {}

        def clock(self: Evaluator, plan: Plan, remeasure: bool = False) -> float:
            far = 0.002 if remeasure else 0.015
            time = 0.05 + 0.8 * self.macs(plan) ** 3 + 0.02 * len(plan.sites)
            return asked.setdefault(plan.model_dump_json(), round(time * (1 + chance.uniform(-far, far)), 5))

        monkeypatch.setattr(Evaluator, "latency", clock)
        result = run("latency=0.5", tiny_vit(img_size=160), images=images(16, 160), seconds=0.1, evaluations=2)
        assert result.met
        assert 0.97 * 0.5 <= result.nearest <= 0.5
        assert len(asked) < 24

    @pytest.mark.slow
    def test_is_measured_in_turn_with_the_dense_model(self) -> None:
        model = tiny_vit(img_size=96, embed_dim=64)
        family = match(model)
        evaluator = Evaluator(model, family, wanted("macs=0.5", images=images(COUNT, 96), seconds=0.3), Silent())
        layers = "layers: [{layer: 0, keep_tokens: 2}]\n"
        few = evaluator.latency(resolve_for(model, Recipe.parse(FIXED + layers)))
        assert 0.1 < few < 0.9

    @pytest.mark.slow
    def test_is_reported_if_seconds_are_given(self) -> None:
        result = run("macs=0.65", seconds=0.05, evaluations=4)
        assert result.found.latency is not None and result.found.latency > 0
        assert run("macs=0.65", evaluations=4).found.latency is None


class TestRepeating:
    @pytest.mark.slow
    def test_results_are_repeatable(self) -> None:
        assert document(run("macs=0.6")) == document(run("macs=0.6"))

    def test_resumes_where_it_stopped(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        state = tmp_path / "state.json"
        whole = run("macs=0.6")
        with pytest.raises(KeyboardInterrupt):
            run("macs=0.6", state=state, progress=Stopping("measuring layers", 5))
        before = json.loads(state.read_text())["known"]
        assert sum(key.startswith("sense ") for key in before) == 6  # the interrupted step was finished
        interrupted = run("macs=0.6", state=state, progress=Stopping("trying neighbours", 2))
        assert interrupted.interrupted
        known = set(json.loads(state.read_text())["known"])
        quality, evaluated = Evaluator.quality, []
        monkeypatch.setattr(
            Evaluator, "quality", lambda self, plan, part: evaluated.append(part) or quality(self, plan, part)
        )
        assert document(run("macs=0.6", state=state)) == document(whole)
        after = set(json.loads(state.read_text())["known"])
        assert len(evaluated) == sum(not key.startswith("choose ") for key in after - known)
        assert "sensitivity" not in evaluated
        evaluated.clear()
        assert document(run("macs=0.6", state=state)) == document(whole)
        assert evaluated == []

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"seed": 1}, "seed"),
            ({"images": images(COUNT, seed=5)}, "images"),
            ({"batch_size": 8}, "batch_size"),
            ({"start": Recipe.parse("version: 1\nbudget: {macs: 0.6}\n")}, "start"),
        ],
    )
    def test_refuses_the_state_of_another_search(self, tmp_path: Path, change: dict[str, Any], named: str) -> None:
        state = tmp_path / "state.json"
        with pytest.raises(KeyboardInterrupt):
            run("macs=0.6", state=state, progress=Stopping("choosing metrics", 1))
        with pytest.raises(UsageError, match=f"another search.*{named}"):
            run("macs=0.6", **{"state": state, **change})

    def test_refuses_the_state_of_another_model_and_target(self, tmp_path: Path) -> None:
        state = tmp_path / "state.json"
        with pytest.raises(KeyboardInterrupt):
            run("macs=0.6", state=state, progress=Stopping("choosing metrics", 1))
        with pytest.raises(UsageError, match="model"):
            run("macs=0.6", tiny_vit(seed=1), state=state)
        with pytest.raises(UsageError, match="target"):
            run("macs=0.7", state=state)

    @pytest.mark.parametrize("key", ["judge ", "choose ", "fit", "latency here: ", "what"])
    @pytest.mark.parametrize("value", [1, "1", [1], {"distance": "near"}, True])
    def test_refuses_values_of_a_wrong_form(self, tmp_path: Path, key: str, value: object) -> None:
        if key.startswith("latency") and value == 1 and value is not True:
            return
        state = tmp_path / "state.json"
        with pytest.raises(KeyboardInterrupt):
            run("macs=0.6", state=state, progress=Stopping("choosing metrics", 1))
        known = json.loads(state.read_text())
        known["known"][key] = value
        state.write_text(json.dumps(known))
        with pytest.raises(UsageError, match="not the state of"):
            run("macs=0.6", state=state)

    def test_another_version_starts_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        state = tmp_path / "state.json"
        with pytest.raises(KeyboardInterrupt):
            run("macs=0.6", state=state, progress=Stopping("choosing metrics", 1))
        monkeypatch.setattr("repshift_cli.search.state.__version__", "99")
        with pytest.raises(UsageError, match="differs in repshift"):
            run("macs=0.6", state=state)

    @pytest.mark.slow
    def test_a_latency_holds_where_it_was_measured(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        state, asked = tmp_path / "state.json", []
        monkeypatch.setattr(Evaluator, "latency", lambda self, plan, *_: asked.append(plan) or 0.5)
        run("macs=0.6", state=state, seconds=0.1, evaluations=1)
        run("macs=0.6", state=state, seconds=0.1, evaluations=1)
        assert len(asked) == 1
        monkeypatch.setattr("repshift_cli.search.evaluator.device_name", lambda _: "another machine")
        run("macs=0.6", state=state, seconds=0.1, evaluations=1)
        assert len(asked) == 2

    def test_a_state_lists_the_files_of_an_interruption(self, tmp_path: Path) -> None:
        state = tmp_path / "state.json"
        with pytest.raises(KeyboardInterrupt):
            run("macs=0.6", state=state, progress=Stopping("choosing metrics", 1))
        assert kept_outputs(state) == {}
        keep_outputs(state, {"/r.yaml": "00"})
        run("macs=0.6", state=state, evaluations=1)
        assert kept_outputs(state) == {"/r.yaml": "00"}
        state.write_text('{"outputs": [1]}')
        assert kept_outputs(state) == {}

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"known": 1}', "\x00", "[" * 100_000, '{"known":' * 100_000])
    def test_refuses_a_file_that_is_not_a_state(self, tmp_path: Path, text: str) -> None:
        state = tmp_path / "state.json"
        state.write_text(text)
        with pytest.raises(UsageError, match="state of"):
            run("macs=0.6", state=state)
        assert state.read_text() == text

    def test_refuses_a_state_that_was_changed(self, tmp_path: Path) -> None:
        state = tmp_path / "state.json"
        run("macs=0.6", state=state, evaluations=1)
        stored = json.loads(state.read_text())
        key = next(key for key, value in stored["known"].items() if key.startswith("judge") and value)
        stored["known"][key]["distance"] /= 2
        state.write_text(json.dumps(stored))
        with pytest.raises(UsageError, match="was changed after the search wrote it"):
            run("macs=0.6", state=state)

    def test_refuses_a_pipe_as_state(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "state.json")
        with pytest.raises(UsageError, match="is not the state of a search"):
            run("macs=0.6", state=tmp_path / "state.json")

    @pytest.mark.slow
    def test_more_evaluations_continue_a_search(self, tmp_path: Path) -> None:
        state = tmp_path / "state.json"
        first = run("macs=0.6", state=state, evaluations=4)
        more = run("macs=0.6", state=state, evaluations=12)
        assert more.evaluations > first.evaluations


class TestInterrupted:
    @pytest.mark.parametrize("after", [0, 3])
    def test_returns_the_best_so_far(self, after: int) -> None:
        model = tiny_vit()
        result = run("macs=0.6", model, progress=Stopping("trying neighbours", after))
        assert result.interrupted
        assert result.met
        assert result.found.macs <= 0.6
        assert result.paper is not None
        assert result.found.distance <= result.paper.distance
        assert not any(module._forward_hooks for module in model.modules())

    def test_stops_before_the_first_schedule(self) -> None:
        model = tiny_vit()
        with pytest.raises(KeyboardInterrupt):
            run("macs=0.6", model, progress=Stopping("first schedules", 0))
        assert not any(module._forward_hooks for module in model.modules())


class TestRefusals:
    def test_too_few_images(self) -> None:
        with pytest.raises(DataError, match="at least 16"):
            run("macs=0.6", images=images(15))

    def test_labels_that_do_not_fit(self) -> None:
        with pytest.raises(DataError, match="3 labels"):
            run("macs=0.6", labels=torch.zeros(3, dtype=torch.int64))

    def test_points_of_top1_without_labels(self) -> None:
        with pytest.raises(UsageError, match="labels"):
            run("max-drop=0.5")

    def test_agreement_without_a_head(self) -> None:
        with pytest.raises(UsageError, match="no head") as caught:
            run("agreement=0.9", tiny_vit(num_classes=0))
        assert "recall@10=0.99 or cosine=0.98" in str(caught.value)

    def test_recall_with_a_head(self) -> None:
        with pytest.raises(UsageError, match="not embeddings") as caught:
            run("recall@3=0.9")
        assert "agreement=0.99" in str(caught.value)

    def test_fewer_images_than_neighbours(self) -> None:
        with pytest.raises(DataError, match=f"{COUNT} images cannot decide recall@{COUNT}=0.9") as caught:
            run(f"recall@{COUNT}=0.9", tiny_vit(num_classes=0))
        assert f"at least {4 * COUNT} images" in str(caught.value)

    def test_latency_without_time(self) -> None:
        with pytest.raises(UsageError, match="time"):
            run("latency=0.9")

    def test_a_model_that_returns_nan(self) -> None:
        model = tiny_vit()
        with torch.no_grad():
            model.head.bias[0] = float("nan")
        with pytest.raises(CheckFailed, match="not finite"):
            run("macs=0.6", model)


class TestEmbeddings:
    def test_recall_is_that_of_the_held_out_embeddings(self) -> None:
        model = tiny_vit(num_classes=0)
        result = run("recall@3=0.6", model, evaluations=4)
        assert result.met
        assert result.dense.recall == 1.0
        heldout = images(COUNT)[COUNT // 2 :]
        dense, given = model(heldout), attach(model, result.plan)(heldout)
        own = torch.arange(len(heldout))
        wanted = recall_at(dense, {"": given}, dense, [3], own)[""][3]
        assert result.found.recall == pytest.approx(float(wanted.mean()), abs=1e-6)
        assert result.held_back_met == (float(wanted.mean()) >= 0.6)
        assert min(one.macs for one in result.tried if (one.recall or 0.0) > 0.9) >= result.found.macs

    def test_cosine(self) -> None:
        result = run("cosine=0.9", tiny_vit(num_classes=0), evaluations=4)
        assert result.met
        assert result.nearest == pytest.approx(1 - result.selection["found"].kl)
        assert result.held_back_met == (result.found.kl <= 0.1)


class TestFamilies:
    def test_features_without_a_head(self) -> None:
        result = run("macs=0.65", tiny_vit(num_classes=0))
        assert result.met
        assert result.found.agreement is None

    def test_vision_mamba(self) -> None:
        model = tiny_vim()
        result = run("macs=0.7", model, images=vim_images(model, 16), evaluations=4)
        assert result.met
        assert result.found.macs > 0.6

    def test_video(self) -> None:
        model = tiny_umt()
        result = run("macs=0.7", model, images=umt_clips(model, 16), evaluations=4)
        assert result.met
        assert result.found.macs > 0.6

    @pytest.mark.slow
    def test_a_feature_map_loses_whole_lines(self) -> None:
        model = tiny_cnn("basic")
        result = run("macs=0.96", model, images=photos(16), evaluations=4)
        assert result.met
        assert all(drop.keep_grid is not None for drop in result.recipe.layers)
        assert resolve_for(model, result.recipe) == result.plan


@pytest.mark.slow
def test_the_built_in_model_beats_chance_and_the_paper() -> None:
    loaded = load_checkpoint("builtin:vit-digits-small")
    batch = load_inputs(None, 48, loaded.description.preprocessing, 0)
    start = replace_metric(scaled_recipe("paper", 12))
    settings = replace(
        wanted("macs=0.55", start=start), images=batch.tensor, identity=batch.identity, evaluations=4, batch_size=24
    )
    result = search(loaded.model, match(loaded.model), settings, Silent())
    assert result.met
    assert result.found.macs > 0.54
    assert result.paper is not None and result.random is not None
    assert abs(result.paper.macs - result.found.macs) < 0.01
    assert result.found.distance <= result.paper.distance
    assert result.found.distance < 0.5 * result.random.distance
    # the polarity differs from layer to layer, as in calibration
    assert {site.metric.options["polarity"] for site in result.plan.sites} == {"largest", "smallest"}


def replace_metric(recipe: Recipe) -> Recipe:
    """The recipe with all fields fixed except the polarity, so that there are fewer variants."""
    part = ComponentSpec.model_validate(
        {"kind": "representation_shift", "operation": "mlp", "distance": "l2", "reading": "update"}
    )
    return recipe.model_copy(update={"metric": part})


def test_depth_of_the_tiny_model() -> None:
    """The tests above use its layers by number."""
    assert [site.layer for site in match(tiny_vit()).layout(tiny_vit()).sites] == list(range(DEPTH))
