"""The combinations of a sweep, and the plan of each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt

from repshift_cli.checkpoints.loaded import LoadedModel
from repshift_cli.compression.job import CompressionJob
from repshift_cli.compression.notes import Notes
from repshift_cli.errors import RecipeError, UsageError
from repshift_cli.planning.recipe import ComponentSpec, LayerDrop, Place, Recipe, StrictModel, scaled_recipe, validate
from repshift_cli.reduction.compressed_model import attach
from repshift_cli.reduction.families.base import match
from repshift_cli.reduction.metrics.base import build_metric
from repshift_cli.reduction.reducers.base import build_reducer
from repshift_cli.utils.progress import Silent
from repshift_cli.utils.ranges import check_ranges

_STEPS = 10_000
"""Ratios that are tried for a share of the MACs are multiples of 1 / `_STEPS`."""


class Combination(StrictModel):
    """One setting of a sweep.

    Attributes:
        cost: `ratio` drops the share `amount` of the tokens at each layer. `macs` takes the smallest ratio, the same at
            each layer, with which the model has at most `amount` of the dense MACs.
        metric: its open fields are calibrated; None for a reducer without scores.
        seed: of the calibration images, or of the metric `random`; None if the result depends on no seed.
    """

    cost: Literal["ratio", "macs"]
    amount: Annotated[float, Field(gt=0, lt=1)]
    layers: tuple[int | str, ...]
    reducer: ComponentSpec
    metric: ComponentSpec | None = None
    seed: NonNegativeInt | None = None

    @property
    def calibrated(self) -> bool:
        """Whether the metric is calibrated on images."""
        return self.metric is not None and build_metric(self.metric).open

    @property
    def without_seed(self) -> Combination:
        """The same for all seeds."""
        return self.model_copy(update={"seed": None})

    def recipe(self, ratio: float, restore: bool) -> Recipe:
        """The recipe with this drop ratio at each layer.

        Raises:
            RecipeError: the name of a layer is invalid.
        """
        metric = self.metric or ComponentSpec(kind="representation_shift")
        if metric.kind == "random":
            metric = metric.model_copy(update={"seed": self.seed})
        place = Place("layers", {})
        layers = (validate(LayerDrop, {"layer": layer, "drop_ratio": ratio}, place, ()) for layer in self.layers)
        return Recipe(version=1, metric=metric, reducer=self.reducer, restore=restore, layers=tuple(layers))


def combinations_of(
    loaded: LoadedModel,
    *,
    ratios: Sequence[float] = (),
    macs: Sequence[float] = (),
    metrics: Sequence[ComponentSpec],
    reducers: Sequence[ComponentSpec],
    layers: Sequence[int | str] = (),
    seeds: Sequence[int] = (0,),
) -> list[Combination]:
    """All combinations, each once: a seed is left out where the result does not depend on it, and so is a metric.

    Args:
        layers: tokens are dropped after these; empty for those of the default recipe.

    Raises:
        UsageError: a ratio, a share of MACs or a seed is invalid.
        RecipeError: a metric or a reducer is unknown, or has an invalid option.
    """
    amounts = [*(("ratio", ratio) for ratio in ratios), *(("macs", share) for share in macs)]
    for cost, amount in amounts:
        if not 0 < amount < 1:
            raise UsageError(f"invalid {cost} {amount:g}", "Allowed are numbers between 0 and 1, both excluded.")
    for seed in seeds:
        check_ranges(seed=seed)
    if not layers:
        sites = [site.layer for site in match(loaded.model).layout(loaded.model).sites]
        layers = [drop.layer for drop in scaled_recipe("paper", len(sites), sites).layers]
    found: dict[Combination, None] = {}
    for (cost, amount), metric, reducer, seed in product(amounts, metrics, reducers, seeds):
        scored = build_reducer(reducer).scored
        by_seed = scored and (metric.kind == "random" or build_metric(metric).open)
        parts = {"metric": metric if scored else None, "reducer": reducer, "seed": seed if by_seed else None}
        found[Combination.model_validate({"cost": cost, "amount": amount, "layers": tuple(layers), **parts})] = None
    return list(found)


def job_of(loaded: LoadedModel, combination: Combination) -> tuple[CompressionJob, float]:
    """The compression job of a combination, and its drop ratio.

    Raises:
        RecipeError: the model does not support it, or the share of MACs cannot be reached after these layers.
    """
    family = match(loaded.model)
    restore, dense = family.needs_restore(loaded.model) is not None, family.macs(loaded.model, None)

    def job_at(ratio: float) -> CompressionJob:
        return CompressionJob(loaded, combination.recipe(ratio, restore), Notes(Silent()))

    if combination.cost == "ratio":
        return job_at(combination.amount), combination.amount
    found, problem, low, high = None, None, 0, _STEPS
    while high - low > 1:
        middle = (low + high) // 2
        try:
            job = job_at(middle / _STEPS)
            compressed = attach(loaded.model, job.default_plan())
        except RecipeError as error:  # no token would be left, or more would be merged than possible
            problem, high = error, middle
            continue
        share = compressed.macs() / dense
        compressed.detach()
        if share <= combination.amount:
            found, high = (job, middle / _STEPS), middle
        else:
            low = middle
    if found is not None:
        return found
    if problem is not None and low == 0:
        raise problem
    raise RecipeError(f"{combination.amount:g} of the MACs is not reached by dropping after these layers")
