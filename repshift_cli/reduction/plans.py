"""Make the plan of a model from a recipe, and fill its open fields."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from repshift_cli.planning.layout import After
from repshift_cli.planning.plan import Plan
from repshift_cli.planning.recipe import ComponentSpec, Recipe
from repshift_cli.planning.resolve import resolve
from repshift_cli.reduction.checks import (
    check_exact,
    check_reducer,
    check_reducer_taps,
    check_restore,
    exact_refusal,
    feeds,
)
from repshift_cli.reduction.families.base import Family, Site, match
from repshift_cli.reduction.metrics.base import build_metric
from repshift_cli.reduction.reducers.base import Merger, build_reducer


def resolve_for(model: nn.Module, recipe: Recipe) -> Plan:
    """Resolve a recipe for a dense model.

    Raises ModelError if the model is not supported, RecipeError if the recipe does not fit it.
    """
    family, reducer = match(model), build_reducer(recipe.reducer, recipe.place)
    check_restore(recipe.restore, family, model, recipe.place)
    check_reducer(reducer, family, model, recipe.place, restore=recipe.restore)
    plan = resolve(recipe, family.layout(model), reducer.after, reducer.most if isinstance(reducer, Merger) else None)
    sites = {site.name: site for site in family.sites(model)}
    for planned in plan.sites:
        check_reducer_taps(reducer, sites[planned.site], recipe.place)
    return with_last_block(plan, recipe, family, model)


def with_last_block(plan: Plan, recipe: Recipe, family: Family, model: nn.Module) -> Plan:
    """The plan with an `exact` last block if the recipe asks for it, or leaves it open where tokens are dropped.

    Raises a RecipeError if the recipe asks for it and it is not possible.
    """
    if recipe.last_block == "exact":
        check_exact(family, model, recipe.place, plan)
    if recipe.last_block is not None:
        return plan
    drops = any(planned.tokens_out < planned.tokens_in for planned in plan.sites)
    exact = drops and exact_refusal(family, model, plan) is None
    return plan.model_copy(update={"last_block": "exact" if exact else "full"})


def acts_after(reducer: ComponentSpec) -> After:
    """The part of a block after which a reducer acts."""
    return build_reducer(reducer).after


def has_open_fields(plan: Plan) -> bool:
    """Whether calibration has something to choose in the plan."""
    return build_reducer(plan.reducer).scored and any(build_metric(planned.metric).open for planned in plan.sites)


def with_defaults(plan: Plan, sites: Mapping[str, Site]) -> Plan:
    """The plan with the open fields of its metrics set as in the paper, or to the first variant that a site allows."""
    chosen = []
    for planned in plan.sites:
        metric = build_metric(planned.metric)
        choices = [metric.with_defaults(), *metric.variants()]
        fitting = (choice for choice in choices if feeds(choice, sites[planned.site], planned.after))
        chosen.append(next(fitting, choices[0]).spec())
    return plan.with_metrics(chosen)
