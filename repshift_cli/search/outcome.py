"""The end of a search: comparison with the paper's schedule, evaluation on held-out images, and the result."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from repshift_cli.calibration.calibrate import paired_sigmas
from repshift_cli.errors import CheckFailed, RecipeError
from repshift_cli.planning.plan import Plan
from repshift_cli.planning.recipe import PAPER_DROP_RATIO, ComponentSpec, Recipe, scaled_recipe
from repshift_cli.reduction.plans import resolve_for
from repshift_cli.reduction.reducers.base import build_reducer
from repshift_cli.search.cost_model import CostModel, Method, Planner, choose_metrics
from repshift_cli.search.evaluator import Candidate, Evaluated, Evaluator
from repshift_cli.search.latency_target import meet_latency
from repshift_cli.search.result import MeasuredSchedule, SearchResult, SearchSettings
from repshift_cli.search.schedule import paper_schedule, to_recipe
from repshift_cli.search.target import COST_TOLERANCE, SearchTarget
from repshift_cli.utils.progress import SilentTask


@dataclass
class SearchState:
    """The state of a running search. After an interruption the result is made from it.

    Attributes:
        method: the metrics and the reducer of the last step.
        best: the best schedule on the selection images; None before the first one.
        reachable: whether the target can be met; if not, `best` is the nearest schedule.
    """

    settings: SearchSettings
    costs: CostModel
    method: Method
    best: Evaluated | None = None
    reachable: bool = True
    interrupted: bool = False

    @property
    def target(self) -> SearchTarget:
        return self.settings.target

    @property
    def planner(self) -> Planner:
        return self.costs.planner

    @property
    def evaluator(self) -> Evaluator:
        return self.costs.planner.evaluator

    @property
    def found(self) -> Evaluated:
        """`best`, which must not be None."""
        assert self.best is not None
        return self.best

    def keep(self, results: Sequence[Evaluated]) -> None:
        """Update the best schedule: the nearest to the dense model at the budget, or the cheapest with the quality."""

        def rank(result: Evaluated) -> tuple[Any, ...]:
            return result.order if self.target.limits_cost else (result.candidate.macs, *result.order)

        for result in results:
            if not self.target.limits_cost and not self.target.holds(result.values):
                continue
            if self.best is None or rank(result) < rank(self.best):
                self.best = result


def paper_candidate(state: SearchState, budget: float, *, by_macs: bool) -> Candidate | None:
    """The paper's schedule, scaled to the budget by one factor, with the reducer of the start recipe.

    Its metrics are chosen along it, except after an interruption. None if the model lacks its sites, or nothing fits.
    """
    planner = state.planner
    layers = [site.layer for site in planner.layout.sites]
    dropping = {drop.layer for drop in scaled_recipe("paper", len(layers), layers).layers}
    ratios = {index: PAPER_DROP_RATIO for index, layer in enumerate(planner.layers) if layer in dropping}
    if not ratios:
        return None
    kept = paper_schedule(len(planner.layers), planner.tokens, ratios)
    method = replace(state.method, reducer=planner.start.reducer)
    candidate = state.costs.on_budget(kept, budget, method, "paper", by_macs=by_macs)
    if candidate is None or state.interrupted:
        return candidate
    metrics = choose_metrics(planner, [candidate.plan])[0]
    if metrics is None:
        return candidate
    return planner.candidate(candidate.kept, replace(method, metrics=metrics), "paper") or candidate


def paper_at_best(state: SearchState) -> Evaluated | None:
    """The paper's schedule at the MACs of the best one; None if it cannot be evaluated."""
    at_target = state.target.kind == "macs" and state.reachable
    budget = state.target.value if at_target else state.found.candidate.macs
    results = state.evaluator.try_candidates([paper_candidate(state, budget, by_macs=True)])
    return results[0] if results else None


def make_result(state: SearchState, begin: float) -> SearchResult:
    """Choose between the best schedule and the paper's, evaluate both on the held-out images, and describe them.

    Args:
        begin: start of the search, by `time.monotonic`.

    Raises:
        CheckFailed: the found schedule returns values that are not finite on the held-out images.
    """
    settings, target, evaluator = state.settings, state.target, state.evaluator
    paper = paper_at_best(state)
    best, paper_is_found, heldout_decided = _better(state, paper)
    if paper_is_found and target.kind == "latency" and not state.interrupted:
        # at equal MACs it may be faster than the target
        best = paper = meet_latency(state.costs, target, best.candidate, state.method)[1] or best
    plan = best.candidate.plan
    latency = evaluator.cached_latency(plan) if settings.seconds > 0 else None
    given = _given(state)
    random = plan.with_metric(ComponentSpec.model_validate({"kind": "random", "seed": settings.seed}))
    heldout = _heldout(evaluator, [plan, random, *([paper.candidate.plan] if paper else [])])
    if heldout[0] is None:
        raise CheckFailed("the found schedule returns values that are not finite on the held-out images")
    met, nearest = _met(target, best, latency)
    sigmas = None
    if heldout[1] is not None and build_reducer(plan.reducer).scored and not state.interrupted:
        sigmas = paired_sigmas(heldout[1]["distances"], heldout[0]["distances"])
    paper_point = None
    if paper and heldout[2]:
        measure = evaluator.known_latency if latency is None or state.interrupted else evaluator.cached_latency
        paper_point = _measured("paper", paper.candidate, measure(paper.candidate.plan), heldout[2])
    dense_quality, dense_latency = evaluator.dense_quality("heldout"), None if latency is None else 1.0
    tried = tuple(
        _measured(one.candidate.name, one.candidate, evaluator.known_latency(one.candidate.plan), one.values)
        for one in evaluator.tried.values()
    )
    return SearchResult(
        recipe=_recipe(state, best.candidate),
        plan=plan,
        target=target,
        met=met,
        nearest=nearest,
        dense=MeasuredSchedule.of("dense", None, 1.0, dense_latency, dense_quality),
        paper=paper_point,
        found=_measured("found", best.candidate, latency, heldout[0]),
        random=_measured("random", best.candidate, None, heldout[1]) if heldout[1] else None,
        given=given,
        random_sigmas=sigmas,
        selection=_on_selection(evaluator, best, paper),
        paper_is_found=paper_is_found,
        held_back_decided=heldout_decided,
        tried=tried,
        evaluations=len(tried),
        seconds=time.monotonic() - begin,
        interrupted=state.interrupted,
        identity=settings.identity,
        seed=settings.seed,
    )


def _better(state: SearchState, paper: Evaluated | None) -> tuple[Evaluated, bool, bool]:
    """The best schedule or the paper's, whether it is the paper's, and whether the held-out images decided that.

    The best of many schedules may be the best on the selection images by chance. So it must also be at least as good
    as the paper's on the held-out images. They decide nothing else.
    """
    best = state.found
    if paper is None:
        return best, False, False
    latency = state.evaluator.cached_latency(paper.candidate.plan) if state.target.kind == "latency" else None
    met = _met(state.target, paper, latency)[0]
    if not met and (state.reachable or latency is not None):
        return best, False, False
    if best.candidate.key == paper.candidate.key or paper.order < best.order:
        return paper, True, False
    ours, theirs = _heldout(state.evaluator, [best.candidate.plan, paper.candidate.plan])
    worse = theirs is not None and (ours is None or ours["distance"] > theirs["distance"])
    return (paper, True, True) if worse else (best, False, False)


def _heldout(evaluator: Evaluator, plans: Sequence[Plan]) -> list[dict[str, Any] | None]:
    with evaluator.progress.task("evaluating on held-out images", len(plans)) as task:
        return evaluator.cached_quality(plans, "heldout", task)


def _on_selection(evaluator: Evaluator, best: Evaluated, paper: Evaluated | None) -> dict[str, MeasuredSchedule]:
    named = {**({"paper": paper} if paper else {}), "found": best}
    latencies = {name: evaluator.known_latency(one.candidate.plan) for name, one in named.items()}
    dense = None if latencies["found"] is None else 1.0
    return {
        "dense": MeasuredSchedule.of("dense", None, 1.0, dense, evaluator.dense_quality("selection")),
        **{name: _measured(name, one.candidate, latencies[name], one.values) for name, one in named.items()},
    }


def _met(target: SearchTarget, result: Evaluated, latency: float | None) -> tuple[bool, float]:
    """Whether a schedule meets the target, and what it reaches."""
    if target.kind == "macs":
        return result.candidate.macs <= target.value + COST_TOLERANCE, result.candidate.macs
    if target.kind == "latency":
        assert latency is not None
        return latency <= target.value, latency
    quality = target.quality(result.values)
    return target.holds(result.values), -quality if target.kind == "max-drop" else quality


def _given(state: SearchState) -> MeasuredSchedule | None:
    start, evaluator = state.settings.start, state.evaluator
    if not start.layers or state.interrupted:
        return None
    try:
        plan = resolve_for(evaluator.model, start)
    except RecipeError:
        return None
    metrics = choose_metrics(state.planner, [plan])[0]
    if metrics is None:
        return None
    plan = plan.with_metrics([metrics[site.layer] for site in plan.sites])
    values = evaluator.cached_quality([plan], "selection", SilentTask())[0]
    return None if values is None else MeasuredSchedule.of("given", plan, evaluator.macs(plan), None, values)


def _recipe(state: SearchState, candidate: Candidate) -> Recipe:
    planner = state.planner
    rounded = f"token counts in multiples of {planner.multiple}, " if planner.multiple > 1 else ""
    recipe = to_recipe(
        candidate.kept,
        planner.layout,
        planner.layers,
        metrics=state.method.along(candidate.plan).metrics,
        reducer=candidate.plan.reducer,
        model=state.settings.start.model,
        restore=state.settings.start.restore,
        last_block=state.settings.start.last_block,
        description=f"Found by a search for {state.target}: {candidate.macs:.3f} of the dense MACs, {rounded}"
        f"seed {state.settings.seed}",
    )
    return Recipe.parse(recipe.to_yaml(), "the recipe that the search found")


def _measured(name: str, candidate: Candidate, latency: float | None, values: Any) -> MeasuredSchedule:
    return MeasuredSchedule.of(name, candidate.plan, candidate.macs, latency, values)
