"""Finds the schedule that meets a target with the least change of the predictions.

1. Choose the metric of each layer, with that layer as the only site.
2. Measure the harm of dropping at each layer, and compute (MACs) or measure (latency) what it saves.
3. Find the best schedules of this additive model by dynamic programming.
4. Evaluate these on the model. Choose the metrics again along the best, try its neighbours, then other reducers.
5. Compare with the paper's schedule at the same MACs, on the selection images and on the held-out images.

Every evaluation is a pure function of a plan and some images, and is cached by its key. A search resumes by running
again with the cached evaluations.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import nn

from repshift_cli.errors import CheckFailed, DataError, UsageError
from repshift_cli.reduction.families.base import Family
from repshift_cli.reduction.metrics.base import build_metric
from repshift_cli.search.additive import Additive
from repshift_cli.search.cost_model import Method, choose_layer_metrics, choose_metrics, measure_cost_model
from repshift_cli.search.evaluator import Candidate, Evaluated, Evaluator
from repshift_cli.search.latency_target import corrected_by_latency, meet_latency
from repshift_cli.search.outcome import SearchState, make_result, paper_at_best, paper_candidate
from repshift_cli.search.result import SearchResult, SearchSettings
from repshift_cli.search.schedule import fit, neighbours, solve
from repshift_cli.search.target import COST_TOLERANCE, SearchTarget
from repshift_cli.utils.progress import Progress

_MIN_IMAGES = 16

_SITE_LIMITS = (2, 3, 4, 6)
"""Numbers of sites of the first schedules, besides one without a limit: the additive model uses too many sites."""

_BATCH = 4
"""Neighbours per step. The last one is drawn at random."""

_SECTIONS, _START_ROUNDS, _CHEAPER_ROUNDS = 4, 3, 2
"""Budgets per round, and rounds, of the search for the lowest cost at which a quality holds."""

_CHEAPER_SPAN = 0.15
_SWEEP = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
_SWEEP_APART = 0.04
"""MACs at which the best schedule is evaluated to show the trade-off, unless its own are as near as this."""


@torch.inference_mode()
def search(model: nn.Module, family: Family, settings: SearchSettings, progress: Progress) -> SearchResult:
    """Search for a schedule.

    Args:
        model: dense, in eval mode, on the device and in the dtype to search in.
        family: the family of the model.

    Raises:
        DataError: there are too few images.
        UsageError: the target needs labels or a head; or the state file is that of another search.
        RecipeError: the metric or the reducer can run at no site of this model.
        CheckFailed: the dense model returns values that are not finite.
        KeyboardInterrupt: before the first schedule was found. Later interruptions return the best one so far.
    """
    _check(settings)
    begin = time.monotonic()
    with ExitStack() as stack:
        stack.callback(family.adapt(model))  # the dense model is compared under the same conditions as a reduced one
        evaluator = Evaluator(model, family, settings, progress)
        check_head(settings.target, evaluator.subsets["selection"].dense.are_logits)
        planner, method = choose_layer_metrics(settings.start, evaluator)
        costs = measure_cost_model(planner, method, latency=settings.target.kind == "latency")
        state = SearchState(settings, costs, method)
        try:
            if settings.target.limits_cost:
                _start_at_cost(state)
            else:
                _start_at_quality(state)
            _improve(state)
        except KeyboardInterrupt:
            if state.best is None:
                raise
            state.interrupted = True
        return make_result(state, begin)


def _check(settings: SearchSettings) -> None:
    count, target = len(settings.images), settings.target
    if count < _MIN_IMAGES:
        raise DataError(f"a search needs at least {_MIN_IMAGES} images, there are {count}")
    if settings.labels is not None and len(settings.labels) != count:
        raise DataError(f"there are {len(settings.labels)} labels for {count} images")
    if target.kind == "max-drop" and settings.labels is None:
        raise UsageError("the target max-drop needs labels", "Give labelled images, or ask for agreement=0.99.")
    if target.kind == "max-drop" and count // 2 < target.images_needed:
        raise DataError(
            f"{count} images cannot decide {target}: half of them select schedules, and one of {count // 2} is "
            f"{100 / (count // 2):.2g} points",
            f"Give at least {2 * target.images_needed} images (--images), or allow a larger loss.",
        )
    if target.k and count // 2 < target.images_needed:
        raise DataError(
            f"{count} images cannot decide {target}: each half needs {target.images_needed} images, two per neighbour",
            f"Give at least {2 * target.images_needed} images (--images), or fewer neighbours.",
        )
    if target.kind == "latency" and settings.seconds <= 0:
        raise UsageError("the target latency needs time to measure", "Set seconds above 0.")


def check_head(target: SearchTarget, has_head: bool) -> None:
    """Raise UsageError if a target is not defined for a model with, or without, a head of classes."""
    if target.is_of_classes is True and not has_head:
        raise UsageError(
            f"the model has no head, so {target.kind} is undefined",
            "Ask for recall@10=0.99 or cosine=0.98 (of the embeddings), macs=0.65 or latency=0.6.",
        )
    if target.is_of_classes is False and has_head:
        raise UsageError(
            f"the outputs of the model are not embeddings, so {target.kind} is undefined",
            "Ask for agreement=0.99, macs=0.65 or latency=0.6, or give an encoder without a head.",
        )


def _start_at_cost(state: SearchState) -> None:
    """Evaluate the paper's schedule and the best ones of the additive model at the budget, with few or many sites."""
    target, method, budget = state.target, state.method, state.target.budget
    if state.costs.rate is not None:
        state.costs = corrected_by_latency(state.costs, target, method)
    costs = state.costs
    limited = solve(costs.by_target(method.reducer), max_sites=max(_SITE_LIMITS))
    solutions = [costs.front(method.reducer).best(budget), *(limited.best(budget, limit) for limit in _SITE_LIMITS)]
    candidates = [
        costs.on_budget(solution.kept, budget, method, "additive model")
        for solution in solutions
        if solution is not None
    ]
    if all(candidate is None for candidate in candidates):
        state.reachable = False
        candidates = [costs.cheapest(method)]
        state.evaluator.progress.warn(f"the target {target} is out of reach; searching for the nearest schedule")
    else:
        candidates.append(paper_candidate(state, budget, by_macs=False))
    with state.evaluator.progress.task("first schedules", len({one.key for one in candidates if one})) as task:
        state.keep(state.evaluator.try_candidates(candidates, task))
    if state.best is None:
        raise _no_schedule()


def _start_at_quality(state: SearchState) -> None:
    """Look for the lowest cost at which a schedule of the additive model has the quality."""
    target, costs, evaluator = state.target, state.costs, state.evaluator
    front, count = costs.front(state.method.reducer), len(evaluator.subsets["selection"].images)
    if count < target.images_needed:
        needed = 2 * target.images_needed
        evaluator.progress.warn(
            f"{count} selection images are too few to confirm {target}; use {needed} images (--images)"
        )

    def at(budget: float) -> Candidate | None:
        solution = front.best(budget)
        return None if solution is None else costs.on_budget(solution.kept, budget, state.method, "additive model")

    _find_lowest_budget(state, at, front.pareto()[-1].cost, 1.0, label="first schedules", rounds=_START_ROUNDS)
    if state.best is None:
        mildest = [one.kept for one in front.pareto()[:2] if min(one.kept) > 0]
        candidates = [state.planner.candidate(kept, state.method, "mildest") for kept in mildest]
        state.keep(evaluator.try_candidates(candidates))
    if state.best is None:
        state.reachable = False
        if not evaluator.tried:
            raise _no_schedule()
        state.best = min(evaluator.tried.values(), key=lambda tried: (-target.quality(tried.values), tried.order))


def _find_lowest_budget(
    state: SearchState, at: Callable[[float], Candidate | None], low: float, high: float, *, label: str, rounds: int
) -> None:
    """Look for the lowest budget between `low` and `high` at which the quality holds, several at a time."""
    with state.evaluator.progress.task(label, rounds * _SECTIONS) as task:
        for _ in range(rounds):
            step = (high - low) / (_SECTIONS + 1)
            budgets = [low + step * (index + 1) for index in range(_SECTIONS)]
            candidates = [at(budget) for budget in budgets]
            results = state.evaluator.try_candidates(candidates, task)
            state.keep(results)
            holding = {result.candidate.key for result in results if state.target.holds(result.values)}
            pairs = zip(budgets, candidates, strict=True)
            high = min((budget for budget, one in pairs if one is not None and one.key in holding), default=high)
            low = max((budget for budget in (low, *budgets) if budget < high), default=low)


def _no_schedule() -> CheckFailed:
    return CheckFailed("no schedule for the target fits the model", "Allow other reducers.")


def _improve(state: SearchState) -> None:
    """Choose the metrics again, try neighbours and reducers, and compare with the paper's schedule."""
    _choose_metrics_again(state)
    if not state.reachable:
        return
    half = state.settings.evaluations // 2
    generator = random.Random(state.settings.seed)  # noqa: S311 (a search, not a secret)
    _compare_with_paper(state)
    _refine(state, half, generator)
    _try_reducers(state)
    _refine(state, state.settings.evaluations - half, generator)
    _choose_metrics_again(state)
    _compare_with_paper(state)
    if state.target.kind == "latency":
        state.costs, met = meet_latency(state.costs, state.target, state.found.candidate, state.method)
        state.best = met or state.best
    # evaluated at other costs to show the trade-off; they are never the result
    best = state.found.candidate
    method = state.method.along(best.plan)
    others = [cost for cost in _SWEEP if abs(cost - best.macs) > _SWEEP_APART]
    state.evaluator.try_candidates(
        [state.costs.on_budget(best.kept, cost, method, "other cost", by_macs=True) for cost in others]
    )


def _choose_metrics_again(state: SearchState) -> None:
    """Choose the metrics along the best schedule; they are used from now on if they are better there."""
    best, planner = state.found.candidate, state.planner
    if not any(build_metric(planner.open_metrics[site.layer]).open for site in best.plan.sites):
        return
    chosen = choose_metrics(planner, [best.plan])[0]
    if chosen is None:
        return
    metrics = {**state.method.metrics, **chosen}
    changed = planner.candidate(best.kept, Method(metrics, best.plan.reducer), "metrics chosen again")
    state.keep(state.evaluator.try_candidates([changed]))
    if state.found.candidate is not best or (changed is not None and changed.key == best.key):
        state.method = replace(state.method, metrics=metrics)


def _compare_with_paper(state: SearchState) -> None:
    paper = paper_at_best(state)
    if paper is not None and (
        state.target.kind != "macs" or paper.candidate.macs <= state.target.value + COST_TOLERANCE
    ):
        state.keep([paper])


def _refine(state: SearchState, evaluations: int, generator: random.Random) -> None:
    """Evaluate neighbours at the cost of the best schedule; then reduce the cost if the target is a quality."""
    current = state.found
    model = state.costs.by_target(current.candidate.plan.reducer)
    budget = state.target.budget if state.target.limits_cost else current.candidate.macs
    spent, step = 0, max(model.tokens // 8, model.least_drop)
    with state.evaluator.progress.task("trying neighbours", evaluations) as task:
        while spent < evaluations:
            batch = _new_neighbours(state, current.candidate, model, budget, step=step, generator=generator)
            batch = batch[: evaluations - spent]
            results = state.evaluator.try_candidates(batch, task)
            spent += len(batch)
            state.keep(results)
            better = min(results, key=lambda tried: tried.order, default=current)
            if better.order < current.order:
                current = better
            elif step > 1:
                step //= 2
            elif not batch:
                break
        task.advance(evaluations - spent)
    if not state.target.limits_cost:
        _reduce_cost(state, current)


def _new_neighbours(
    state: SearchState, current: Candidate, model: Additive, budget: float, *, step: int, generator: random.Random
) -> list[Candidate]:
    """Neighbours that were not tried: the best by prediction, and one at random."""
    method, exact = state.method.along(current.plan), state.costs.rate is None
    # the additive model leaves out the MACs of metrics and reducers
    overhead = max(current.macs - model.cost(current.kept), 0.0) if exact else 0.0
    left = neighbours(current.kept, model, budget - overhead, step)
    chosen: list[Candidate] = []
    while left and len(chosen) < _BATCH:
        at_random = len(chosen) == _BATCH - 1
        kept = left.pop(generator.randrange(len(left)) if at_random else 0)
        candidate = state.planner.candidate(kept, method, "neighbour")
        if candidate is None or candidate.key in state.evaluator.tried:
            continue
        if not exact or candidate.macs <= budget + COST_TOLERANCE:
            chosen.append(candidate)
    return chosen


def _reduce_cost(state: SearchState, current: Evaluated) -> None:
    if not state.target.holds(current.values):
        return
    candidate = current.candidate
    method = state.method.along(candidate.plan)

    def at(budget: float) -> Candidate | None:
        fitted = fit(candidate.kept, state.costs.by_macs(method.reducer), budget)
        return None if fitted is None else state.planner.candidate(fitted, method, "cheaper")

    low = max(candidate.macs - _CHEAPER_SPAN, 0.0)
    _find_lowest_budget(state, at, low, candidate.macs, label="reducing the cost", rounds=_CHEAPER_ROUNDS)


def _try_reducers(state: SearchState) -> None:
    best = state.found.candidate
    budget = state.target.budget if state.target.limits_cost else best.macs
    candidates: list[Candidate | None] = []
    for reducer in state.settings.reducers:
        if reducer == best.plan.reducer:
            continue
        schedules = [best.kept]
        # a reducer that cannot take as many tokens at one site gets its own best schedule too
        if not state.costs.by_target(reducer).possible(best.kept):
            own = state.costs.front(reducer).best(budget)
            schedules += [] if own is None else [own.kept]
        method = replace(state.method.along(best.plan), reducer=reducer)
        name = f"reducer {reducer.kind}"
        candidates += [state.costs.on_budget(kept, budget, method, name) for kept in schedules]
    results = state.evaluator.try_candidates(candidates)
    state.keep(results)
    if not state.target.limits_cost:  # a reducer that is nearer at the same cost may allow a lower cost
        _reduce_cost(state, min((*results, state.found), key=lambda tried: tried.order))
    state.method = replace(state.method, reducer=state.found.candidate.plan.reducer)
