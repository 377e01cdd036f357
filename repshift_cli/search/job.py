"""From a target to a recipe: runs the search, and describes its result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from repshift_cli.calibration.fit import is_classifier
from repshift_cli.checkpoints.builtin import BUILTIN
from repshift_cli.checkpoints.identify.names import is_model_name
from repshift_cli.checkpoints.loaded import LoadedModel
from repshift_cli.data.inputs import ImageBatch
from repshift_cli.errors import UsageError
from repshift_cli.measure.device import device_name
from repshift_cli.planning.recipe import Budget, ComponentSpec, Recipe
from repshift_cli.reduction.checks import check_exact, check_reducer, check_restore
from repshift_cli.reduction.families.base import Family
from repshift_cli.reduction.metrics.base import build_metric
from repshift_cli.reduction.reducers.base import Merger, build_reducer
from repshift_cli.search.plot import MARKS, Chart
from repshift_cli.search.result import MeasuredSchedule, SearchResult, SearchSettings
from repshift_cli.search.search import search
from repshift_cli.search.target import SearchTarget
from repshift_cli.utils.progress import Progress
from repshift_cli.utils.ranges import check_ranges
from repshift_cli.utils.reproducible import is_reproducible, now

_PROVENANCE = (
    *("target", "met", "nearest", "points", "paper_is_found", "held_back_decided", "held_back_met", "evaluations"),
    *("interrupted", "data", "seed", "labelled", "measured_on", "limit", "front"),
)
"""The keys of `FinishedSearch.to_dict` that an artifact keeps."""


@dataclass(frozen=True)
class SearchRequest:
    """The options of a search; see `SearchSettings`.

    Attributes:
        reducers: kinds to try, starting with the first; empty for the one of the recipe, or see `start_recipe`.
    """

    target: SearchTarget
    evaluations: int = 40
    reducers: tuple[str, ...] = ()
    state: Path | None = None
    seconds: float = 5.0

    def __post_init__(self) -> None:
        check_ranges(evaluations=self.evaluations, seconds=self.seconds)


@dataclass(frozen=True)
class FinishedSearch:
    """A finished search with its inputs.

    Attributes:
        recipe: the found recipe; comments at its top describe the search.
        inputs: the first half was used for selection, the second half is held out.
        measured_on: device, dtype, batch and threads of the measurements.
        limit: of quality, checked on the held-out inputs; None if a quality was searched for, or none was asked for.
    """

    loaded: LoadedModel
    family: Family
    recipe: Recipe
    result: SearchResult
    inputs: ImageBatch
    measured_on: Mapping[str, Any]
    limit: SearchTarget | None = None

    @property
    def heldout(self) -> ImageBatch:
        """The held-out inputs."""
        batch = self.inputs
        half = len(batch.tensor) // 2
        rest = batch.tensor[half:]
        identity = {**batch.identity, "count": len(rest), "part": "held back"}
        return ImageBatch(rest, identity, f"{len(rest)} held out of {batch.description}", batch.builtin)

    def to_dict(self) -> dict[str, Any]:
        """The JSON document of the search."""
        return {
            "model": {"name": self.loaded.description.name, "family": self.family.name},
            **self.result.to_dict(),
            "recipe": self.recipe.text,
            "reducer": self.result.plan.reducer.kind,
            "labelled": self.inputs.labels is not None,
            "description": self.inputs.description,
            "measured_on": dict(self.measured_on),
            "limit": self._limit(),
        }

    def _limit(self) -> dict[str, Any] | None:
        if self.limit is None:
            return None
        quality = self.result.heldout_quality(self.limit)
        return {"target": str(self.limit), "reached": None if quality is None else round(quality, 6)}

    def provenance(self) -> dict[str, Any]:
        """The entry `search` of an artifact."""
        document = self.to_dict()
        selection = {name: point.to_dict() for name, point in self.result.selection.items()}
        return {**{key: document[key] for key in _PROVENANCE}, "selection": selection}

    def chart(self) -> Chart:
        """Quality against cost, all on the selection inputs."""
        result, target = self.result, self.result.target
        # the dense model has 100% unchanged predictions on any images; top-1 is drawn only if it is the target
        if target.kind == "max-drop":
            label, quality = "top-1, %", lambda point: point.top1 or 0.0
        elif result.dense.agreement is not None:
            label, quality = "predictions unchanged, %", lambda point: 100 * (point.agreement or 0.0)
        elif target.k:
            label, quality = f"{target.kind}, %", lambda point: 100 * (point.recall or 0.0)
        else:
            label, quality = "cosine of features to dense", lambda point: 1 - point.kl

        limits: dict[str, Any] = {
            "macs": ("macs", target.value),
            "latency": ("latency", target.value),
            "agreement": ("quality", 100 * target.value),
            "cosine": ("quality", target.value),
            f"recall@{target.k}": ("quality", 100 * target.value),
            "max-drop": ("quality", (result.selection["dense"].top1 or 0.0) - target.value),
        }
        return Chart(
            title=f"{self.loaded.description.name}, {target}, {self.inputs.description}\non the images for selection",
            label=label,
            quality=quality,
            named={name: point for name, point in result.selection.items() if name in MARKS},
            tried=result.tried,
            limit=limits[target.kind],
        )


def start_recipe(
    recipe: Recipe | None, request: SearchRequest, loaded: LoadedModel, family: Family
) -> tuple[Recipe, tuple[ComponentSpec, ...]]:
    """The start recipe of a search, and the reducers to try; the recipe has the first of them.

    Without a recipe and without reducers in the request, these are merge and prune if the family can merge, else
    prune. Without a recipe the metric is `coverage` where tokens are merged (docs/results/leaderboard.md). Where they
    are dropped, `fitted` was the best one for the built-in classifiers, and representation shift for video models
    (docs/results.md).

    Raises:
        RecipeError: a reducer is unknown, or does not fit the model.
    """
    kinds = request.reducers
    restore = recipe.restore if recipe else family.needs_restore(loaded.model) is not None
    check_restore(restore, family, loaded.model, recipe.place if recipe else None)
    if recipe is None and not kinds:
        kinds = ("merge", "prune") if family.merge_refusal(loaded.model, restore) is None else ("prune",)
    reducers = tuple(ComponentSpec(kind=kind) for kind in kinds)
    for reducer in reducers:
        check_reducer(build_reducer(reducer), family, loaded.model, restore=restore)
    if recipe is None:
        target = request.target
        wanted = {"recall": target.value, "k": target.k} if target.k else {target.kind.replace("-", "_"): target.value}
        budget = Budget.model_validate(wanted)
        metric = ComponentSpec(kind="fitted" if is_classifier(loaded.model) else "representation_shift")
        if isinstance(build_reducer(reducers[0]), Merger):
            metric = ComponentSpec(kind="coverage")
        return Recipe(version=1, budget=budget, metric=metric, reducer=reducers[0], restore=restore), reducers
    if recipe.last_block == "exact":
        check_exact(family, loaded.model, recipe.place)
    if not reducers:
        own = build_reducer(recipe.reducer, recipe.place)
        check_reducer(own, family, loaded.model, recipe.place, restore=restore)
    elif reducers[0].kind != recipe.reducer.kind:
        recipe = recipe.model_copy(update={"reducer": reducers[0]})
    return recipe, reducers


def find(
    loaded: LoadedModel,
    family: Family,
    start: Recipe,
    request: SearchRequest,
    inputs: ImageBatch,
    *,
    reducers: tuple[ComponentSpec, ...],
    batch_size: int,
    seed: int,
    progress: Progress,
) -> FinishedSearch:
    """Run the search and describe its result.

    Args:
        loaded: dense, on the device and in the dtype to search in.
        start, reducers: as returned by `start_recipe`.

    Raises:
        UsageError: the target needs labels, and there are none.
        RepshiftError: as `search`.
        KeyboardInterrupt: before the first schedule was found.
    """
    if request.target.kind == "max-drop" and inputs.labels is None:
        raise UsageError(
            f"the target {request.target} needs labels: {inputs.unlabelled}",
            "Give --data with one folder per class of the model, or ask for agreement=0.99, which needs none.",
        )
    settings = SearchSettings(
        target=request.target,
        images=inputs.tensor,
        labels=inputs.labels,
        identity=inputs.identity,
        start=start,
        batch_size=batch_size,
        seed=seed,
        evaluations=request.evaluations,
        reducers=reducers,
        state=request.state,
        seconds=request.seconds,
    )
    result = search(loaded.model, family, settings, progress)
    result = replace(result, recipe=_named(result.recipe, loaded))
    sample = next(loaded.model.parameters())
    measured_on = {
        "device": device_name(sample.device),
        "dtype": str(sample.dtype).removeprefix("torch."),
        "batch": batch_size,
        "threads": torch.get_num_threads(),
    }
    text = _comments(loaded, result, inputs, measured_on) + result.recipe.to_yaml()
    recipe = Recipe.parse(text, result.recipe.place.name)
    return FinishedSearch(loaded, family, recipe, result, inputs, measured_on)


def _named(recipe: Recipe, loaded: LoadedModel) -> Recipe:
    """The recipe restricted to this model if it holds fitted weights, which are useless for other models."""
    parts = [recipe.metric, *(drop.metric for drop in recipe.layers if drop.metric is not None)]
    name = loaded.description.name
    known = is_model_name(name.partition(".")[0]) or f"builtin:{name}" in BUILTIN
    if recipe.model is not None or not known or not any(build_metric(part).channels for part in parts):
        return recipe
    return Recipe.parse(recipe.model_copy(update={"model": name}).to_yaml(), recipe.place.name)


def _comments(loaded: LoadedModel, result: SearchResult, inputs: ImageBatch, measured_on: Mapping[str, Any]) -> str:
    from repshift_cli.version import __version__

    state = "; interrupted, this is the best so far" if result.interrupted else ""
    state += "" if result.met else f"; NOT MET, nearest is {result.nearest:.4g}"
    batch, source = inputs, loaded.source.sha256
    lines = [
        f"Found by repshift search {__version__} on {now():%Y-%m-%d} for {result.target}{state}",
        f"model  {loaded.description.name}" + (f", sha256 of its file {source}" if source else ""),
        f"data   {batch.description}{', labelled' if inputs.labels is not None else ', labels not used'}",
        f"       sha256 of names and sizes {batch.identity['sha256']}",
        f"search seed {result.seed}, {result.evaluations} schedules tried, torch {torch.__version__}",
        f"on     {', '.join(f'{key} {value}' for key, value in measured_on.items())}",
        f"Measured on {result.found.images} held-out inputs; MACs and latency are fractions of dense:",
    ]
    at = result.target.neighbours
    lines += [f"  {name:6} {_numbers(point, at)}" for name, point in result.points.items() if name != "given"]
    # the name of a folder may hold line breaks, or characters that YAML does not allow
    return "".join(f"# {''.join(letter if letter.isprintable() else '?' for letter in line)}\n" for line in lines)


def _numbers(point: MeasuredSchedule, neighbours: int) -> str:
    values = [f"MACs {point.macs:.4f}"]
    if point.latency is not None and not is_reproducible():
        values.append(f"latency {point.latency:.3f}")
    if point.agreement is not None:
        values.append(f"unchanged {point.agreement:.2%}")
    values.append(f"{'KL' if point.agreement is not None else '1 - cosine'} {point.kl:.5f}")
    if point.recall is not None:
        values.append(f"recall@{neighbours} {point.recall:.2%}")
    if point.top1 is not None:
        values.append(f"top-1 {point.top1:.2f}%")
    return ", ".join(values)
