"""Turns schedules into plans of the model, and chooses the metric of each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from repshift_cli.calibration.calibrate import unfitted
from repshift_cli.errors import RecipeError, UsageError
from repshift_cli.planning.layout import After, Layout
from repshift_cli.planning.plan import Plan, resolve
from repshift_cli.planning.recipe import Part, Recipe
from repshift_cli.reduction.checks import acts_after, resolve_for
from repshift_cli.reduction.metrics.base import build_metric
from repshift_cli.search.additive import Kept
from repshift_cli.search.evaluator import Candidate, Evaluator
from repshift_cli.search.schedule import on_tiles, to_recipe

__all__ = ["Method", "Planner", "choose_layer_metrics", "choose_metrics"]

_METRIC_SHARES = (0.5, 0.7, 0.9)
"""Shares of kept tokens at which the metric of a layer is chosen: the first that the model allows."""


@dataclass(frozen=True)
class Method:
    """The metric of each layer, and the reducer."""

    metrics: Mapping[int, Part]
    reducer: Part

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
    open_metrics: Mapping[int, Part]
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

    @property
    def after(self) -> After:
        """Where in a block the reducer acts."""
        return acts_after(self.start.reducer)

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
        return self._plan(self._step(layer, kept), self._all_layers, method)

    def single_site_counts(self, layer: int, kept: int) -> Plan | None:
        """As `single_site` for MACs: without the limit of a reducer, which several sites can exceed together."""
        prune = Part(kind="prune")
        try:
            recipe = to_recipe(
                self._step(layer, kept), self.layout, self._all_layers, metrics=self.open_metrics, reducer=prune
            )
            return resolve(recipe, self.layout, self.after)
        except UsageError:
            return None

    def fewest_tokens(self, layer: int) -> int:
        """The fewest tokens of a feature map that a layer may keep, so that the following layers still fit."""
        low, high = 1, self.tokens
        while self.layout.map_size is not None and low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self.single_site_counts(layer, middle) is None else (low, middle)
        return low

    @property
    def _all_layers(self) -> list[int]:
        return [site.layer for site in self.layout.sites]

    def _step(self, layer: int, kept: int) -> Kept:
        return tuple(kept if other >= layer else self.tokens for other in self._all_layers)

    def _plan(self, kept: Kept, layers: Sequence[int], method: Method) -> Plan | None:
        try:
            recipe = to_recipe(kept, self.layout, layers, metrics=method.metrics, reducer=method.reducer)
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
        open_metrics |= evaluator.fit_metrics(layers, acts_after(start.reducer))
    planner = Planner(evaluator, start, open_metrics, tuple(open_metrics))
    method = Method(open_metrics, start.reducer)
    counts = [max(1, round(share * planner.tokens)) for share in _METRIC_SHARES]
    plans = []
    for layer in open_metrics:
        possible = (planner.single_site(layer, count, method) for count in counts)
        plans += [plan for plan in possible if plan is not None][:1]
    chosen: dict[int, Part] = {}
    for metrics in choose_metrics(planner, plans):
        chosen |= metrics or {}
    if not chosen:
        raise RecipeError(f"{start.metric.kind} and {start.reducer.kind} can reduce tokens at no layer of this model")
    return replace(planner, layers=tuple(sorted(chosen))), replace(method, metrics={**open_metrics, **chosen})


def choose_metrics(planner: Planner, plans: Sequence[Plan]) -> list[dict[int, Part] | None]:
    """For each plan the metrics of its layers, chosen in order; None if a site can run no variant."""
    evaluator = planner.evaluator
    asked = [plan.with_metrics([planner.open_metrics[site.layer] for site in plan.sites]) for plan in plans]
    with evaluator.progress.task("choosing metrics", len(plans)) as task:
        chosen = evaluator.cached("choose", asked, evaluator.choose_metrics, task)
    return [
        None
        if metrics is None
        else {site.layer: Part.model_validate(metric) for site, metric in zip(plan.sites, metrics, strict=True)}
        for plan, metrics in zip(plans, chosen, strict=True)
    ]
