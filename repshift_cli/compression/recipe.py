"""Load the recipe of a job and check it before any weights are read, and against the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repshift_cli.checkpoints.identify.names import canonical_name, encoder_name
from repshift_cli.checkpoints.loaded import ModelDescription
from repshift_cli.errors import RecipeError, UsageError
from repshift_cli.planning.recipe import ComponentSpec, Recipe
from repshift_cli.reduction.checks import check_components
from repshift_cli.reduction.metrics.base import metric_kinds
from repshift_cli.reduction.reducers.base import reducer_kinds
from repshift_cli.utils.suggest import nearest


def checked_recipe(recipe: Recipe | str | Path | None) -> Recipe | None:
    """Load a recipe and check its metrics and reducer, before any weights are read."""
    if recipe is not None and not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe)
    if recipe is not None:
        check_components(recipe)
    return recipe


def named_parts(metric: str | None, reducer: str | None) -> dict[str, ComponentSpec]:
    """The metric and the reducer that options name, with open fields, by their key in a recipe.

    Raises a UsageError for an unknown one.
    """
    found = {}
    for key, kind, known in (("metric", metric, metric_kinds()), ("reducer", reducer, reducer_kinds())):
        if kind is not None and kind not in known:
            raise UsageError(f"--{key}: unknown {key} {kind!r}", f"{nearest(kind, known)}Allowed: {', '.join(known)}.")
        if kind is not None:
            found[key] = ComponentSpec(kind=kind)
    return found


def with_parts(recipe: Recipe, parts: Mapping[str, ComponentSpec]) -> Recipe:
    """The recipe with another metric at all layers, or another reducer."""
    if not parts:
        return recipe
    changes: dict[str, Any] = dict(parts)
    if "metric" in parts:
        changes["layers"] = tuple(drop.model_copy(update={"metric": None}) for drop in recipe.layers)
    return Recipe.parse(recipe.model_copy(update=changes).to_yaml(), recipe.place.name)


def require_layers(recipe: Recipe | None) -> Recipe | None:
    """Return the recipe, or raise RecipeError if it has a budget instead of layers, which needs a search."""
    if recipe is not None and recipe.budget is not None:
        raise RecipeError(
            f"{recipe.place.at(('budget',))}: the recipe has a budget instead of layers, which needs a search",
            "`repshift search MODEL --recipe FILE` finds the layers and writes a recipe with them.",
        )
    return recipe


def check_recipe_model(recipe: Recipe, description: ModelDescription) -> None:
    """Raise RecipeError if the recipe is for another model."""
    # the tag of the weights (.augreg_in21k) does not matter
    names = {encoder_name((name or "").partition(".")[0]) for name in (description.name, description.architecture)}
    if recipe.model is None or encoder_name(canonical_name(recipe.model.partition(".")[0])) in names:
        return
    raise RecipeError(
        f"{recipe.place.at(('model',))}: the recipe is for {recipe.model}, but the model is {description.name}",
        f"Use a recipe for {description.name}, or remove the key `model` from a copy of this one.",
    )
