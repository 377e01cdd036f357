"""Check a recipe and a plan against a model's family."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from repshift_cli.errors import RecipeError
from repshift_cli.planning.layout import After
from repshift_cli.planning.plan import Plan, resolve
from repshift_cli.planning.recipe import ComponentSpec, Place, Recipe
from repshift_cli.reduction.families.base import Family, Site, match
from repshift_cli.reduction.metrics.base import Metric, build_metric
from repshift_cli.reduction.reducers.base import Merger, Reducer, build_reducer

__all__ = [
    "acts_after",
    "check_channels",
    "check_components",
    "check_feeds",
    "check_reducer",
    "check_reducer_feeds",
    "feeds",
    "has_open_fields",
    "resolve_for",
    "with_defaults",
]


def resolve_for(model: nn.Module, recipe: Recipe) -> Plan:
    """Lay a recipe over a dense model of a supported family.

    Raises:
        ModelError: the model is not supported.
        RecipeError: the recipe cannot be followed.
    """
    family, reducer = match(model), build_reducer(recipe.reducer, recipe.place)
    check_reducer(reducer, family, model, recipe.place)
    most = reducer.most if isinstance(reducer, Merger) else None
    plan = resolve(recipe, family.layout(model), reducer.after, most)
    sites = {site.name: site for site in family.sites(model)}
    for planned in plan.sites:
        check_reducer_feeds(reducer, sites[planned.site], recipe.place)
    return plan


def check_reducer(reducer: Reducer, family: Family, model: nn.Module, place: Place | None = None) -> None:
    """Refuse a reducer that the model's family cannot carry out.

    Raises:
        RecipeError: with its place in the recipe.
    """
    where = f"{place.at(('reducer',))}: " if place else ""
    if isinstance(reducer, Merger) and (reason := family.merge_refusal(model)) is not None:
        raise RecipeError(f"{where}{reducer.kind} merges tokens, and {reason}", "Use reducer: {kind: prune}.")
    if reducer.after == "attention" and any(site.attended is None for site in family.sites(model)):
        raise RecipeError(f"{where}{reducer.kind} acts after attention, where {family.name} models cannot be reduced")


def check_reducer_feeds(reducer: Reducer, site: Site, place: Place | None = None) -> None:
    """Refuse a reducer that asks for a tensor which the block at `site` cannot show when it acts.

    Raises:
        RecipeError: with the reason that the family gives, and its place in the recipe.
    """
    lacking = sorted(reducer.taps() - _shown(site, reducer.after))
    if lacking:
        where = f"{place.at(('reducer',))}: " if place else ""
        raise RecipeError(
            f"{where}{reducer.kind} needs {lacking[0]}, which {site.name} cannot show: {_reason(site, lacking[0])}",
            "Use reducer: {kind: merge} (by the hidden state) or {kind: prune}.",
        )


def check_components(recipe: Recipe) -> None:
    """Build every metric and the reducer that a recipe names, to refuse what cannot be before any work.

    Raises:
        RecipeError: an unknown kind or option, with its place in the recipe.
    """
    build_metric(recipe.metric, recipe.place)
    for index, drop in enumerate(recipe.layers):
        if drop.metric is not None:
            build_metric(drop.metric, recipe.place, ("layers", index, "metric"))
    build_reducer(recipe.reducer, recipe.place)


def acts_after(reducer: ComponentSpec) -> After:
    """What of a block has been computed when a reducer acts."""
    return build_reducer(reducer).after


def has_open_fields(plan: Plan) -> bool:
    """Whether the plan leaves something for calibration to choose."""
    return build_reducer(plan.reducer).scored and any(build_metric(planned.metric).open for planned in plan.sites)


def with_defaults(plan: Plan, sites: Mapping[str, Site]) -> Plan:
    """The plan with the open fields of its metrics as the paper has them, or as a site allows where it cannot."""
    chosen = []
    for planned in plan.sites:
        metric = build_metric(planned.metric)
        choices = [metric.with_defaults(), *metric.variants()]
        fitting = (choice for choice in choices if feeds(choice, sites[planned.site], planned.after))
        chosen.append(next(fitting, choices[0]).spec())
    return plan.with_metrics(chosen)


def feeds(metric: Metric, site: Site, after: After = "block") -> bool:
    """Whether the block at `site` can show every tensor that the metric asks for, at the time when it is asked."""
    return metric.taps() <= _shown(site, after)


def _shown(site: Site, after: After) -> frozenset[str]:
    return site.early if after == "attention" else frozenset({"block_input", "block_output", *site.probes})


def check_feeds(
    metric: Metric,
    site: Site,
    after: After = "block",
    place: Place | None = None,
    path: tuple[str | int, ...] = ("metric",),
) -> None:
    """Refuse a metric, which stands at `path` of a recipe, if the block at `site` can feed no variant of it.

    Raises:
        RecipeError: with the reason that the family gives.
    """
    if any(feeds(variant, site, after) for variant in metric.variants()):
        return
    lacking = min(metric.variants()[0].taps() - _shown(site, after))
    where = f"{place.at(path)}: " if place else ""
    if after == "attention" and feeds(metric.variants()[0], site):
        raise RecipeError(
            f"{where}{metric.kind} needs {lacking}, which is not there yet after the attention of {site.name}, where "
            "tokens are merged",
            "Possible are representation_shift with operation: attention or block, and the other metrics.",
        )
    raise RecipeError(
        f"{where}{metric.kind} needs {lacking}, which {site.name} cannot show: {_reason(site, lacking)}",
        "representation_shift with operation: block works on every block.",
    )


def check_channels(metric: Metric, site: Site) -> None:
    """Raise if the metric needs a number of channels that the site does not have."""
    if site.width and metric.channels not in (None, site.width):
        raise RecipeError(
            f"{metric.kind} has weights for {metric.channels} channels, and tokens at {site.name} have {site.width}",
            "Its weights are of another model: leave them out, and calibration fits them.",
        )


def _reason(site: Site, lacking: str) -> str:
    return site.missing.get(lacking) or site.missing.get("*", "the family does not show it")
