"""Plans of schedules, the metric of each layer, and the cost model: what schedules cost and how much they harm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from repshift_cli.calibration.calibrate import unfitted, with_weights
from repshift_cli.errors import RecipeError, UsageError
from repshift_cli.planning.layout import Layout
from repshift_cli.planning.plan import Plan
from repshift_cli.planning.recipe import ComponentSpec, Recipe
from repshift_cli.planning.resolve import resolve
from repshift_cli.reduction.metrics.base import build_metric
from repshift_cli.reduction.plans import acts_after, resolve_for, with_last_block
from repshift_cli.reduction.reducers.base import Merger, build_reducer
from repshift_cli.search.additive import Additive, Curve, Kept
from repshift_cli.search.evaluator import Candidate, Evaluator
from repshift_cli.search.schedule import Front, fit, on_tiles, solve, to_recipe
from repshift_cli.search.target import COST_TOLERANCE

_METRIC_SHARES = (0.5, 0.7, 0.9)
"""Shares of kept tokens at which the metric of a layer is chosen: the first that the model allows."""

_SENSITIVITY_SHARES = (0.9, 0.7, 0.5, 0.3)
"""Shares of kept tokens at which the harm of a layer is measured. Between them it grows like a power."""

_LATENCY_SHARES = (0.8, 0.6, 0.4, 0.2)
_LEAST_RATE, _LARGEST_RATE = 0.05, 2.0
"""Limits of the measured ratio of saved time to saved MACs, which is noisy if little is saved."""

_SITE_COST = 0.002
"""Cost of scoring and gathering at one site, as a fraction of a dense pass. A site that saves less is useless."""

_BUDGET_TRIES = 8


@dataclass(frozen=True)
class Method:
    """The metric of each layer, and the reducer."""

    metrics: Mapping[int, ComponentSpec]
    reducer: ComponentSpec

    def along(self, plan: Plan) -> Method:
        """The reducer and the metrics of a plan; its other layers keep the metrics of this method."""
        metrics = {site.layer: site.metric for site in plan.sites}
        return Method({**self.metrics, **metrics}, plan.reducer)


@dataclass(frozen=True)
class Planner:
    """Makes plans and candidates from schedules.

    Attributes:
        start: the start recipe.
        open_metrics: by layer, the metric of the start recipe; some of its fields may be open.
        layers: the layers at which a schedule can drop tokens, in order.
    """

    evaluator: Evaluator
    start: Recipe
    open_metrics: Mapping[int, ComponentSpec]
    layers: tuple[int, ...]

    @property
    def layout(self) -> Layout:
        return self.evaluator.layout

    @property
    def tokens(self) -> int:
        """Patch tokens of the dense model."""
        return self.layout.patch_tokens

    @property
    def multiple(self) -> int:
        """The multiple to which all token counts are rounded down. A feature map is cut by lines instead."""
        return 1 if self.layout.map_size is not None else self.start.round_tokens or 1

    def candidate(self, kept: Kept, method: Method, name: str) -> Candidate | None:
        """The candidate of a schedule; None if it does not fit the model."""
        kept = on_tiles(kept, self.tokens, self.layout.prefix_tokens, self.multiple)
        plan = self._plan(kept, self.layers, method)
        if plan is None:
            return None
        try:
            return Candidate(kept, plan, self.evaluator.macs(plan), name)
        except RecipeError:
            return None

    def single_site(self, layer: int, kept: int, method: Method) -> Plan | None:
        """The plan that drops tokens at one layer only; None if it does not fit the model."""
        return self._plan((kept,), [layer], method)

    def single_site_counts(self, layer: int, kept: int) -> Plan | None:
        """As `single_site` for MACs: without the limit of a reducer, which several sites can exceed together."""
        prune = ComponentSpec(kind="prune")
        try:
            recipe = to_recipe(
                (kept,),
                self.layout,
                [layer],
                metrics=self.open_metrics,
                reducer=prune,
                restore=self.start.restore,
                last_block=self.start.last_block,
            )
            plan = resolve(recipe, self.layout, acts_after(self.start.reducer))
            return with_last_block(plan, recipe, self.evaluator.family, self.evaluator.model)
        except UsageError:
            return None

    def fewest_tokens(self, layer: int) -> int:
        """The fewest tokens of a feature map that a layer may keep, so that the following layers still fit."""
        low, high = 1, self.tokens
        while self.layout.map_size is not None and low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self.single_site_counts(layer, middle) is None else (low, middle)
        return low

    def _plan(self, kept: Kept, layers: Sequence[int], method: Method) -> Plan | None:
        try:
            recipe = to_recipe(
                kept,
                self.layout,
                layers,
                metrics=method.metrics,
                reducer=method.reducer,
                restore=self.start.restore,
                last_block=self.start.last_block,
            )
            return resolve_for(self.evaluator.model, recipe)
        except UsageError:
            return None


def choose_layer_metrics(start: Recipe, evaluator: Evaluator) -> tuple[Planner, Method]:
    """Choose the metric of each layer with that layer as the only site.

    Returns:
        the planner for the layers that can run their metric, and the chosen metrics with the reducer of the recipe.

    Raises:
        RecipeError: no layer can.
    """
    given = {drop.layer: drop.metric for drop in start.layers if drop.metric is not None}
    sites = evaluator.layout.sites
    open_metrics = {site.layer: given.get(site.layer) or given.get(site.name) or start.metric for site in sites}
    # metrics without weights are fitted, for all layers at once
    if layers := [layer for layer, metric in open_metrics.items() if unfitted(build_metric(metric))]:
        fitted = evaluator.fit_metrics(layers, acts_after(start.reducer))
        open_metrics |= {layer: with_weights(open_metrics[layer], found) for layer, found in fitted.items()}
    planner = Planner(evaluator, start, open_metrics, tuple(open_metrics))
    method = Method(open_metrics, start.reducer)
    counts = [max(1, round(share * planner.tokens)) for share in _METRIC_SHARES]
    plans = []
    for layer in open_metrics:
        possible = (planner.single_site(layer, count, method) for count in counts)
        plans += [plan for plan in possible if plan is not None][:1]
    chosen: dict[int, ComponentSpec] = {}
    for metrics in choose_metrics(planner, plans):
        chosen |= metrics or {}
    if not chosen:
        raise RecipeError(f"{start.metric.kind} and {start.reducer.kind} can reduce tokens at no layer of this model")
    return replace(planner, layers=tuple(sorted(chosen))), replace(method, metrics={**open_metrics, **chosen})


def choose_metrics(planner: Planner, plans: Sequence[Plan]) -> list[dict[int, ComponentSpec] | None]:
    """For each plan the metrics of its layers, chosen in order; None if a site can run no variant."""
    evaluator = planner.evaluator
    open_plans = [plan.with_metrics([planner.open_metrics[site.layer] for site in plan.sites]) for plan in plans]
    with evaluator.progress.task("choosing metrics", len(plans)) as task:
        chosen = evaluator.cached("choose", open_plans, evaluator.choose_metrics, task)
    return [
        None
        if metrics is None
        else {
            site.layer: ComponentSpec.model_validate(metric) for site, metric in zip(plan.sites, metrics, strict=True)
        }
        for plan, metrics in zip(plans, chosen, strict=True)
    ]


@dataclass(frozen=True)
class CostModel:
    """Predicts cost and harm of schedules, and fits schedules to a budget.

    Attributes:
        macs: the additive model of MACs, without the limit of a reducer.
        rate: saved time per saved MACs as a function of the kept tokens; None if the target is not a latency.
        factor: correction of the predicted savings in time by measured latencies.
    """

    planner: Planner
    macs: Additive
    rate: Callable[[int], float] | None
    factor: float = 1.0

    def by_macs(self, reducer: ComponentSpec) -> Additive:
        """The additive model of MACs, within the limit of a reducer."""
        built, tokens = build_reducer(reducer), self.planner.tokens
        most = built.most(tokens) if isinstance(built, Merger) else tokens - 1
        return replace(self.macs, most=lambda arriving: max(1, arriving * most // tokens))

    def by_target(self, reducer: ComponentSpec) -> Additive:
        """The additive model of what the target limits: latency, or else MACs."""
        base = self.by_macs(reducer)
        if self.rate is None:
            return base
        rate, factor = self.rate, self.factor
        return replace(base, gain=lambda site, kept: base.gain(site, kept) * rate(kept) * factor)

    def front(self, reducer: ComponentSpec) -> Front:
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
    return CostModel(planner, macs, _measure_rate(planner, method) if latency else None)


def _measure_curves(planner: Planner, method: Method) -> list[Curve]:
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
            rate = (1.0 - planner.evaluator.cached_latency(plan)) / saved
            rates.append((count, min(max(rate, _LEAST_RATE), _LARGEST_RATE)))
    if not rates:
        return None
    counts, values = zip(*sorted(rates), strict=True)
    return lambda kept: float(np.interp(kept, counts, values))
