"""The cost model of a search: what schedules cost in MACs or latency, and how much they harm, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from repshift_cli.planning.recipe import Part
from repshift_cli.search.additive import Additive, Curve, Kept
from repshift_cli.search.candidates import Method, Planner
from repshift_cli.search.evaluator import Candidate
from repshift_cli.search.schedule import Front, fit, solve
from repshift_cli.search.target import COST_TOLERANCE

__all__ = ["CostModel", "measure_cost_model"]

_SENSITIVITY_SHARES = (0.9, 0.7, 0.5, 0.3)
"""Shares of kept tokens at which the harm of a layer is measured. Between them it grows like a power."""

_LATENCY_SHARES = (0.8, 0.6, 0.4, 0.2)
_LEAST_RATE, _LARGEST_RATE = 0.05, 2.0
"""Limits of the measured ratio of saved time to saved MACs, which is noisy where little is saved."""

_SITE_COST = 0.002
"""Cost of scoring and gathering at one site, as a fraction of a dense pass. A site that saves less is useless."""

_BUDGET_TRIES = 8

Limit = Callable[[int], int]
"""How many of the arriving tokens a reducer can take at one site."""


@dataclass(frozen=True)
class CostModel:
    """Predicts cost and harm of schedules, and fits schedules to a budget.

    Attributes:
        macs: the additive model of MACs, without the limit of a reducer.
        limit: the limit of each reducer.
        rate: saved time per saved MACs as a function of the kept tokens; None if the target is not a latency.
        factor: correction of the predicted savings in time by measured latencies.
    """

    planner: Planner
    macs: Additive
    limit: Callable[[Part], Limit]
    rate: Callable[[int], float] | None
    factor: float = 1.0

    def by_macs(self, reducer: Part) -> Additive:
        """The additive model of MACs, within the limit of a reducer."""
        return replace(self.macs, most=self.limit(reducer))

    def by_target(self, reducer: Part) -> Additive:
        """The additive model of what the target limits: latency, or else MACs."""
        base = self.by_macs(reducer)
        if self.rate is None:
            return base
        rate, factor = self.rate, self.factor
        return replace(base, gain=lambda site, kept: base.gain(site, kept) * rate(kept) * factor)

    def front(self, reducer: Part) -> Front:
        """The best schedules for every cost."""
        return solve(replace(self.by_target(reducer), site_cost=_SITE_COST))

    def corrected(self, candidate: Candidate, latency: float) -> CostModel:
        """The model scaled so that it predicts the measured latency of a candidate."""
        predicted = self.by_target(candidate.plan.reducer).cost(candidate.kept)
        if latency >= 1.0 or predicted >= 1.0:
            return self
        return replace(self, factor=self.factor * (1.0 - latency) / (1.0 - predicted))

    def on_budget(
        self, kept: Kept, budget: float, method: Method, name: str, *, by_macs: bool = False
    ) -> Candidate | None:
        """The schedule scaled to a budget; None if that is impossible.

        Args:
            by_macs: the budget is in MACs, whatever the target is. The MACs of metric and reducer count.
        """
        model = self.by_macs(method.reducer) if by_macs else self.by_target(method.reducer)
        aim = budget
        for attempt in range(_BUDGET_TRIES):
            fitted = fit(kept, model, aim)
            candidate = None if fitted is None else self.planner.candidate(fitted, method, name)
            if candidate is None or not (by_macs or self.rate is None) or candidate.macs <= budget + COST_TOLERANCE:
                return candidate
            # token counts are integers, so a step as small as the excess may change nothing
            aim -= (candidate.macs - budget) * 2**attempt
        return None

    def cheapest(self, method: Method) -> Candidate | None:
        """The schedule with the lowest predicted cost that fits the model."""
        solutions = reversed(self.front(method.reducer).pareto())
        found = (self.planner.candidate(solution.kept, method, "cheapest") for solution in solutions)
        return next((candidate for candidate in found if candidate is not None), None)


def measure_cost_model(planner: Planner, method: Method, *, latency: bool) -> CostModel:
    """Measure the harm of dropping at each layer; compute the saved MACs, or measure the saved time."""
    curves = _measure_curves(planner, method)
    macs = Additive(
        tokens=planner.tokens,
        sites=len(planner.layers),
        gain=_macs_gain(planner),
        harm=lambda site, kept: curves[site](kept),
    )
    rate = _measure_rate(planner, method) if latency else None
    return CostModel(planner, macs, _limits(planner, method), rate)


def _measure_curves(planner: Planner, method: Method) -> list[Curve]:
    """The harm of each layer by the kept tokens."""
    tokens = planner.tokens
    counts = sorted({round(share * tokens) for share in _SENSITIVITY_SHARES} - {0, tokens}, reverse=True)
    plans = {
        (layer, count): plan
        for layer in planner.layers
        for count in counts
        if (plan := planner.single_site(layer, count, method)) is not None
    }
    with planner.evaluator.progress.task("measuring layers", len(plans)) as task:
        qualities = planner.evaluator.cached_quality(list(plans.values()), "sensitivity", task)
    points: dict[int, list[tuple[int, float]]] = {layer: [] for layer in planner.layers}
    for (layer, count), values in zip(plans, qualities, strict=True):
        if values is not None:
            points[layer].append((count, values["distance"]))
    return [Curve(tokens, tuple(found)) for found in points.values()]


def _macs_gain(planner: Planner) -> Callable[[int, int], float]:
    """What is saved between a site and the next one when so many tokens are kept, in MACs."""
    evaluator, layers = planner.evaluator, planner.layers
    fewest = [planner.fewest_tokens(layer) for layer in layers]

    @cache
    def cost_from(site: int, kept: int) -> float:
        if site >= len(layers) or kept >= planner.tokens:
            return 1.0
        plan = planner.single_site_counts(layers[site], max(kept, fewest[site]))
        return 1.0 if plan is None else evaluator.family.macs(evaluator.model, plan) / evaluator.dense_macs

    @cache
    def gain(site: int, kept: int) -> float:
        return max(0.0, cost_from(site + 1, kept) - cost_from(site, kept))

    return gain


def _measure_rate(planner: Planner, method: Method) -> Callable[[int], float] | None:
    """Saved time per saved MACs, by the tokens kept after the first site; None if nothing is saved."""
    rates: list[tuple[int, float]] = []
    for share in _LATENCY_SHARES:
        count = max(1, round(share * planner.tokens))
        plan = planner.single_site(planner.layers[0], count, method)
        saved = 0.0 if plan is None else 1.0 - planner.evaluator.macs(plan)
        if plan is not None and saved > 0:  # a costly metric may take more than a few tokens save
            rates.append(
                (count, min(max((1.0 - planner.evaluator.cached_latency(plan)) / saved, _LEAST_RATE), _LARGEST_RATE))
            )
    if not rates:
        return None
    counts, values = zip(*sorted(rates), strict=True)
    return lambda kept: float(np.interp(kept, counts, values))


def _limits(planner: Planner, method: Method) -> Callable[[Part], Limit]:
    """The limit of each reducer, found by bisection and cached."""

    @cache
    def most_at_once(reducer: str) -> int:
        tried = replace(method, reducer=Part.model_validate_json(reducer))
        low, high = 1, planner.tokens - 1
        while low < high:
            middle = (low + high + 1) // 2
            plans = (planner.single_site(layer, planner.tokens - middle, tried) for layer in planner.layers)
            low, high = (middle, high) if any(plan is not None for plan in plans) else (low, middle - 1)
        return low

    def limit(reducer: Part) -> Limit:
        most = most_at_once(reducer.model_dump_json())
        return lambda arriving: max(1, arriving * most // planner.tokens)

    return limit
