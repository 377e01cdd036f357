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
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from repshift_cli.errors import CheckFailed, DataError, UsageError
from repshift_cli.planning.recipe import ComponentSpec
from repshift_cli.reduction.families.base import Family
from repshift_cli.reduction.metrics.base import build_metric
from repshift_cli.search.additive import Additive, Kept
from repshift_cli.search.candidates import Method, choose_layer_metrics, choose_metrics
from repshift_cli.search.cost_model import CostModel, measure_cost_model
from repshift_cli.search.evaluator import Candidate, Evaluated, Evaluator, Trials
from repshift_cli.search.latency_target import LatencyTarget
from repshift_cli.search.outcome import Outcome, paper_candidate
from repshift_cli.search.result import SearchResult, SearchSettings
from repshift_cli.search.schedule import fit, neighbours, solve
from repshift_cli.search.state import EvaluationCache, search_identity
from repshift_cli.search.target import COST_TOLERANCE, lower_agreement
from repshift_cli.utils.progress import Progress

__all__ = ["search"]

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
        identity = {} if settings.state is None else search_identity(model, settings)
        trials = Trials(evaluator, EvaluationCache(settings.state, identity), progress)
        if not evaluator.has_head and settings.target.kind in ("agreement", "max-drop"):
            raise UsageError(f"the model has no head, so {settings.target.kind} is undefined", "Ask for macs=0.65.")
        planner, method = choose_layer_metrics(settings.start, trials)
        costs = measure_cost_model(planner, trials, method, latency=settings.target.kind == "latency")
        return _Search(settings, trials, costs, method).run().result(begin)


def _check(settings: SearchSettings) -> None:
    count, target = len(settings.images), settings.target
    if count < _MIN_IMAGES:
        raise DataError(f"a search needs at least {_MIN_IMAGES} images, there are {count}")
    if settings.labels is not None and len(settings.labels) != count:
        raise DataError(f"there are {len(settings.labels)} labels for {count} images")
    if target.kind == "max-drop" and settings.labels is None:
        raise UsageError("the target max-drop needs labels", "Give labelled images, or ask for agreement=0.99.")
    if target.kind == "latency" and settings.seconds <= 0:
        raise UsageError("the target latency needs time to measure", "Set seconds above 0.")


class _Search:
    """The steps on the real model. They keep the best schedule so far, for the case of an interruption."""

    def __init__(self, settings: SearchSettings, trials: Trials, costs: CostModel, method: Method) -> None:
        self.settings = settings
        self.target = settings.target
        self.trials = trials
        self.costs = costs
        self.method = method
        self.best: Evaluated | None = None
        self.reachable = True
        self.random = random.Random(settings.seed)  # noqa: S311 (a search, not a secret)

    def run(self) -> Outcome:
        """All steps, or those before an interruption."""
        interrupted = False
        try:
            if self.target.limits_cost:
                self._start_at_cost()
            else:
                self._start_at_quality()
            self._improve()
        except KeyboardInterrupt:
            if self.best is None:
                raise
            interrupted = True
        return self._outcome(interrupted)

    def _outcome(self, interrupted: bool = False) -> Outcome:
        return Outcome(
            self.settings, self.trials, self.costs, self.method, self._found, self.reachable, interrupted=interrupted
        )

    @property
    def _found(self) -> Evaluated:
        assert self.best is not None
        return self.best

    # -- first schedules

    def _start_at_cost(self) -> None:
        """Evaluate the best schedules of the additive model at the budget, and the paper's."""
        budget = self.target.budget
        if self.costs.rate is not None:
            self.costs = LatencyTarget(self.target, self.trials).corrected(self.costs, self.method)
        candidates = [
            self.costs.on_budget(kept, budget, self.method, "additive model") for kept in self._first_schedules(budget)
        ]
        if all(candidate is None for candidate in candidates):
            self.reachable = False
            candidates = [self.costs.cheapest(self.method)]
            self.trials.progress.warn(f"the target {self.target} is out of reach; searching for the nearest schedule")
        else:
            candidates.append(paper_candidate(self.costs, self.trials, self.method, budget, by_macs=False))
        with self.trials.progress.task("first schedules", len({one.key for one in candidates if one})) as task:
            self._keep(self.trials.evaluate(candidates, task))
        if self.best is None:
            raise _no_schedule()

    def _first_schedules(self, budget: float) -> list[Kept]:
        """The best schedules of the additive model, with few sites and with any number."""
        limited = solve(self.costs.by_target(self.method.reducer), max_sites=max(_SITE_LIMITS))
        solutions = [
            self.costs.front(self.method.reducer).best(budget),
            *(limited.best(budget, limit) for limit in _SITE_LIMITS),
        ]
        return [solution.kept for solution in solutions if solution is not None]

    def _start_at_quality(self) -> None:
        """Look for the lowest cost at which a schedule of the additive model has the quality."""
        front, selection = self.costs.front(self.method.reducer), self.trials.evaluator.parts["selection"]
        count = len(selection.images)
        if self.target.kind == "agreement" and lower_agreement(1.0, count) < self.target.value:
            self.trials.progress.warn(f"{count} images are too few to confirm {self.target}; use more")

        def at(budget: float) -> Candidate | None:
            solution = front.best(budget)
            if solution is None:
                return None
            return self.costs.on_budget(solution.kept, budget, self.method, "additive model")

        self._sections(at, front.cheapest().cost, 1.0, "first schedules", _START_ROUNDS)
        if self.best is None:
            mildest = [one.kept for one in front.pareto()[:2] if min(one.kept) > 0]
            candidates = [self.costs.planner.candidate(kept, self.method, "mildest") for kept in mildest]
            self._keep(self.trials.evaluate(candidates))
        if self.best is None:
            self.reachable = False
            if not self.trials.tried:
                raise _no_schedule()
            self.best = min(
                self.trials.tried.values(), key=lambda tried: (-self.target.quality(tried.values), tried.order)
            )

    def _sections(
        self, at: Callable[[float], Candidate | None], low: float, high: float, label: str, rounds: int
    ) -> None:
        """Look for the lowest budget between `low` and `high` at which the quality holds, several at a time."""
        with self.trials.progress.task(label, rounds * _SECTIONS) as task:
            for _ in range(rounds):
                step = (high - low) / (_SECTIONS + 1)
                budgets = [low + step * (index + 1) for index in range(_SECTIONS)]
                candidates = [at(budget) for budget in budgets]
                results = self.trials.evaluate(candidates, task)
                self._keep(results)
                holding = {result.candidate.key for result in results if self.target.holds(result.values)}
                pairs = zip(budgets, candidates, strict=True)
                high = min((budget for budget, one in pairs if one is not None and one.key in holding), default=high)
                low = max((budget for budget in (low, *budgets) if budget < high), default=low)

    # -- improvements

    def _improve(self) -> None:
        """Choose the metrics again, try neighbours and reducers, and compare with the paper's schedule."""
        self._choose_metrics_again()
        if not self.reachable:
            return
        half = self.settings.evaluations // 2
        self._compare_with_paper()
        self._refine(half)
        self._try_reducers()
        self._refine(self.settings.evaluations - half)
        self._choose_metrics_again()
        self._compare_with_paper()
        if self.target.kind == "latency":
            latency_target = LatencyTarget(self.target, self.trials)
            self.costs, met = latency_target.meet(self.costs, self._found.candidate, self.method)
            self.best = met or self.best
        self._sweep()

    def _choose_metrics_again(self) -> None:
        """Choose the metrics along the best schedule; they are used from now on if they are better there."""
        best, planner = self._found.candidate, self.costs.planner
        if not any(build_metric(planner.open_metrics[site.layer]).open for site in best.plan.sites):
            return
        metrics = choose_metrics(planner, self.trials, [best.plan])[0]
        if metrics is None:
            return
        method = Method({**self.method.metrics, **metrics}, best.plan.reducer)
        changed = planner.candidate(best.kept, method, "scores chosen again")
        self._keep(self.trials.evaluate([changed]))
        if self._found.candidate is not best or (changed is not None and changed.key == best.key):
            self.method = replace(self.method, metrics=method.metrics)

    def _compare_with_paper(self) -> None:
        """Keep the paper's schedule at the MACs of the best one, if it is better."""
        paper = self._outcome().paper()
        if paper is not None and (
            self.target.kind != "macs" or paper.candidate.macs <= self.target.value + COST_TOLERANCE
        ):
            self._keep([paper])

    def _refine(self, evaluations: int) -> None:
        """Evaluate neighbours at the cost of the best schedule; then reduce the cost if the target is a quality."""
        current, model = self._found, self.costs.by_target(self._found.candidate.plan.reducer)
        budget = self.target.budget if self.target.limits_cost else current.candidate.macs
        spent, step = 0, max(model.tokens // 8, model.least_drop)
        with self.trials.progress.task("trying neighbours", evaluations) as task:
            while spent < evaluations:
                batch = self._new_neighbours(current.candidate, model, budget, step)[: evaluations - spent]
                results = self.trials.evaluate(batch, task)
                spent += len(batch)
                self._keep(results)
                better = min(results, key=lambda tried: tried.order, default=current)
                if better.order < current.order:
                    current = better
                elif step > 1:
                    step //= 2
                elif not batch:
                    break
            task.advance(evaluations - spent)
        if not self.target.limits_cost:
            self._reduce_cost(current)

    def _new_neighbours(self, current: Candidate, model: Additive, budget: float, step: int) -> list[Candidate]:
        """Neighbours that were not tried: the best by prediction, and one at random."""
        method, exact = self.method.along(current.plan), self.costs.rate is None
        # the additive model leaves out the MACs of metrics and reducers
        overhead = max(current.macs - model.cost(current.kept), 0.0) if exact else 0.0
        left = neighbours(current.kept, model, budget - overhead, step)
        found: list[Candidate] = []
        while left and len(found) < _BATCH:
            at_random = len(found) == _BATCH - 1
            kept = left.pop(self.random.randrange(len(left)) if at_random else 0)
            candidate = self.costs.planner.candidate(kept, method, "neighbour")
            if candidate is None or candidate.key in self.trials.tried:
                continue
            if not exact or candidate.macs <= budget + COST_TOLERANCE:
                found.append(candidate)
        return found

    def _reduce_cost(self, current: Evaluated) -> None:
        """Reduce the cost of a schedule as far as the quality holds."""
        if not self.target.holds(current.values):
            return
        candidate = current.candidate
        method = self.method.along(candidate.plan)

        def at(budget: float) -> Candidate | None:
            fitted = fit(candidate.kept, self.costs.by_macs(method.reducer), budget)
            return None if fitted is None else self.costs.planner.candidate(fitted, method, "cheaper")

        low = max(candidate.macs - _CHEAPER_SPAN, 0.0)
        self._sections(at, low, candidate.macs, "reducing the cost", _CHEAPER_ROUNDS)

    def _try_reducers(self) -> None:
        """Evaluate the best schedule with the other reducers."""
        best = self._found.candidate
        budget = self.target.budget if self.target.limits_cost else best.macs
        others = [reducer for reducer in self.settings.reducers if reducer != best.plan.reducer]
        results = self.trials.evaluate([one for reducer in others for one in self._with_reducer(best, budget, reducer)])
        self._keep(results)
        if not self.target.limits_cost:  # a reducer that is nearer at the same cost may allow a lower cost
            self._reduce_cost(min((*results, self._found), key=lambda tried: tried.order))
        self.method = replace(self.method, reducer=self._found.candidate.plan.reducer)

    def _with_reducer(self, best: Candidate, budget: float, reducer: ComponentSpec) -> list[Candidate | None]:
        """The schedule with another reducer; and the best schedule of that reducer if it cannot take as many tokens."""
        schedules = [best.kept]
        if not self.costs.by_target(reducer).possible(best.kept):
            own = self.costs.front(reducer).best(budget)
            schedules += [] if own is None else [own.kept]
        method = replace(self.method.along(best.plan), reducer=reducer)
        return [self.costs.on_budget(kept, budget, method, f"reducer {reducer.kind}") for kept in schedules]

    def _sweep(self) -> None:
        """Evaluate the best schedule at other costs, to show the trade-off. They are never the result."""
        best = self._found.candidate
        method = self.method.along(best.plan)
        costs = [cost for cost in _SWEEP if abs(cost - best.macs) > _SWEEP_APART]
        self.trials.evaluate(
            [self.costs.on_budget(best.kept, cost, method, "other cost", by_macs=True) for cost in costs]
        )

    def _keep(self, results: Sequence[Evaluated]) -> None:
        """Update the best schedule: the nearest to the dense model at the budget, or the cheapest with the quality."""

        def rank(tried: Evaluated) -> tuple[Any, ...]:
            return tried.order if self.target.limits_cost else (tried.candidate.macs, *tried.order)

        for result in results:
            if not self.target.limits_cost and not self.target.holds(result.values):
                continue
            if self.best is None or rank(result) < rank(self.best):
                self.best = result


def _no_schedule() -> CheckFailed:
    return CheckFailed("no schedule for the target fits the model", "Allow other reducers.")
