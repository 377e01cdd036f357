"""Check a recipe and a plan against a model and its family."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from repshift_cli.errors import RecipeError
from repshift_cli.planning.layout import After, Layout, shape_text
from repshift_cli.planning.plan import Plan
from repshift_cli.planning.recipe import Place, Recipe
from repshift_cli.planning.resolve import check_windows
from repshift_cli.reduction.families.base import Family, Site
from repshift_cli.reduction.metrics.base import Metric, build_metric
from repshift_cli.reduction.reducers.base import Merger, Reducer, build_reducer


def check_components(recipe: Recipe) -> None:
    """Build every metric and the reducer of a recipe, so that errors in them show before any work."""
    build_metric(recipe.metric, recipe.place)
    for index, drop in enumerate(recipe.layers):
        if drop.metric is not None:
            build_metric(drop.metric, recipe.place, ("layers", index, "metric"))
    build_reducer(recipe.reducer, recipe.place)


def check_plan(
    plan: Plan, model: nn.Module, family: Family, metrics: Sequence[Sequence[Metric]], reducer: Reducer
) -> None:
    """Raise `RecipeError` unless the plan, with these metrics at its sites, fits the model."""
    _check_counts(plan, family.layout(model))
    check_restore(plan.restore, family, model)
    if plan.last_block == "exact":
        check_exact(family, model, plan=plan)
    check_reducer(reducer, family, model, restore=plan.restore)
    sites = {site.name: site for site in family.sites(model)}
    for planned, site_metrics in zip(plan.sites, metrics, strict=True):
        site = sites[planned.site]
        if planned.after != reducer.after:
            raise RecipeError(f"the plan reduces after the {planned.after}, which {reducer.kind} does not do")
        removed, patches = planned.tokens_in - planned.tokens_out, planned.tokens_in - plan.prefix_tokens
        if isinstance(reducer, Merger) and removed > (most := reducer.most(patches)):
            raise RecipeError(
                f"the plan removes {removed} of {patches} tokens at {planned.site}; {reducer.kind} can remove {most}"
            )
        for metric in site_metrics:
            check_feeds(metric, site, planned.after)
            if planned.grid_in and metric.pairwise:
                raise RecipeError(
                    f"{metric.kind} needs to compare all positions of a map with each other at {site.name}, which "
                    "costs more than the layers",
                    "Use representation_shift or fitted.",
                )
            if site.width and metric.channels not in (None, site.width):
                raise RecipeError(
                    f"{metric.kind} has weights for {metric.channels} channels, and tokens at {site.name} have "
                    f"{site.width}",
                    "Its weights are of another model: leave them out, and calibration fits them.",
                )
        check_reducer_taps(reducer, site)


def _check_counts(plan: Plan, layout: Layout) -> None:
    expected = (layout.family, layout.prefix_tokens, layout.patch_tokens)
    if (plan.family, plan.prefix_tokens, plan.patch_tokens) != expected:
        raise RecipeError(
            f"the plan is for {plan.family} with {plan.prefix_tokens} + {plan.patch_tokens} tokens, "
            f"the model is {layout.family} with {layout.prefix_tokens} + {layout.patch_tokens}"
        )
    known = {(site.name, site.layer) for site in layout.sites}
    for planned in plan.sites:
        if (planned.site, planned.layer) not in known:
            raise RecipeError(f"the plan names {planned.site} as layer {planned.layer}, which the model does not have")
    arriving = {site.layer: grid for site, grid in layout.grids(plan.grids_kept)} if layout.map_size else {}
    for planned in plan.sites:
        if planned.grid_in != arriving.get(planned.layer):
            raise RecipeError(
                f"the plan has {shape_text(planned.shape_in)} tokens at {planned.site}, "
                f"the model has {shape_text(arriving.get(planned.layer) or ())}"
            )
    if layout.map_size:
        last = next(site for site in layout.sites if site.layer == plan.sites[-1].layer)
        check_windows(layout, plan.grids_kept, last, "the plan")


def check_restore(restore: bool, family: Family, model: nn.Module, place: Place | None = None) -> None:
    """Raise `RecipeError`, with the place in the recipe, if tokens of the model cannot be put back, or must be."""
    if not restore and (reason := family.needs_restore(model)) is not None:
        raise RecipeError(f"{_where(place, ())}{reason}", "Put `restore: true` into the recipe.")
    if restore and (reason := family.restore_refusal(model)) is not None:
        raise RecipeError(f"{_where(place, ('restore',))}restore: {reason}", "Leave restore out.")


def check_exact(family: Family, model: nn.Module, place: Place | None = None, plan: Plan | None = None) -> None:
    """Raise `RecipeError`, with the place in the recipe, unless the last block, of a plan or of any, can be `exact`."""
    if (reason := exact_refusal(family, model, plan)) is not None:
        where = _where(place, ("last_block",))
        raise RecipeError(f"{where}last_block: exact is not possible: {reason}", "Use full, or leave last_block out.")


def exact_refusal(family: Family, model: nn.Module, plan: Plan | None = None) -> str | None:
    """Why the last block cannot be computed for the prefix tokens only, or None if it can."""
    found = family.last_block(model)
    if isinstance(found, str):
        return found
    if plan is not None and plan.restore:
        return "restore puts tokens back behind it"
    if plan is not None and plan.sites[-1].layer == family.layout(model).sites[-1].layer:
        return f"tokens are dropped after it, at {plan.sites[-1].site}"
    return None


def check_reducer(
    reducer: Reducer, family: Family, model: nn.Module, place: Place | None = None, *, restore: bool = False
) -> None:
    """Raise `RecipeError`, with the place in the recipe, if models of the family do not support the reducer."""
    where = _where(place, ("reducer",))
    if isinstance(reducer, Merger) and (reason := family.merge_refusal(model, restore)) is not None:
        raise RecipeError(f"{where}{reducer.kind} merges tokens, and {reason}", "Use reducer: {kind: prune}.")
    if reducer.after == "attention" and any(site.attended is None for site in family.sites(model)):
        raise RecipeError(f"{where}{reducer.kind} acts after attention, where {family.name} models cannot be reduced")


def check_reducer_taps(reducer: Reducer, site: Site, place: Place | None = None) -> None:
    """Raise `RecipeError` if a tensor that the reducer reads is not available at the site."""
    if missing := sorted(reducer.taps() - _available(site, reducer.after)):
        raise RecipeError(
            f"{_where(place, ('reducer',))}{reducer.kind} needs {missing[0]}, which {site.name} does not provide: "
            f"{_reason(site, missing[0])}",
            "Use reducer: {kind: merge} (by the hidden state) or {kind: prune}.",
        )


def check_feeds(
    metric: Metric,
    site: Site,
    after: After = "block",
    place: Place | None = None,
    path: tuple[str | int, ...] = ("metric",),
) -> None:
    """Raise `RecipeError` if the site has the tensors for no variant of the metric, which stands at `path`."""
    if any(feeds(variant, site, after) for variant in metric.variants()):
        return
    first = metric.variants()[0]
    missing = min(first.taps() - _available(site, after))
    start = f"{_where(place, path)}{metric.kind} needs {missing}"
    if after == "attention" and feeds(first, site):
        raise RecipeError(
            f"{start}, which does not exist yet after the attention of {site.name}, where tokens are merged",
            "Possible are representation_shift with operation: attention or block, and the other metrics.",
        )
    raise RecipeError(
        f"{start}, which {site.name} does not provide: {_reason(site, missing)}",
        "representation_shift with operation: block works on every block.",
    )


def feeds(metric: Metric, site: Site, after: After = "block") -> bool:
    """Whether every tensor that the metric reads is available at the site."""
    return metric.taps() <= _available(site, after)


def _available(site: Site, after: After) -> frozenset[str]:
    if after == "attention":
        return site.early
    places = ("patch_place",) if site.grid else ()
    return frozenset({"block_input", "block_output", *site.probes, *places})


def _reason(site: Site, tensor: str) -> str:
    return site.missing.get(tensor) or site.missing.get("*", "the family does not provide it")


def _where(place: Place | None, path: tuple[str | int, ...]) -> str:
    return f"{place.at(path)}: " if place else ""
