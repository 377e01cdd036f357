"""From a budget to a recipe: the search, where its result came from, and the picture of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from repshift_cli.calibration.fit import is_classifier
from repshift_cli.checkpoints.identify.names import is_model_name
from repshift_cli.checkpoints.load import BUILTIN
from repshift_cli.checkpoints.loaded import LoadedModel
from repshift_cli.data.inputs import ImageBatch
from repshift_cli.errors import UsageError
from repshift_cli.measure.device import device_name
from repshift_cli.planning.recipe import Budget, Part, Recipe
from repshift_cli.reduction.checks import check_reducer
from repshift_cli.reduction.families.base import Family, match
from repshift_cli.reduction.reducers.base import Merger, build_reducer
from repshift_cli.search.plot import Chart, Limit, Mark
from repshift_cli.search.plot import Point as Spot
from repshift_cli.search.result import Point, SearchResult, SearchSettings
from repshift_cli.search.search import search
from repshift_cli.search.target import Target
from repshift_cli.utils.progress import Progress

__all__ = ["Found", "Request", "find", "start_recipe", "with_reducers"]

_PAPER = "the paper's schedule"


@dataclass(frozen=True)
class Request:
    """What to search for, and how hard.

    Attributes:
        evaluations: how many schedules the refinement tries; None for as many as `search` does by itself.
        reducers: kinds to try, the first one first; empty for that of the recipe that the search starts from, or what
            suits the model (`with_reducers`).
        state: file that holds how far the search is, so that it can go on; None to keep none.
        seconds: for each measurement of latency; 0 measures none.
    """

    target: Target
    evaluations: int | None = None
    reducers: tuple[str, ...] = ()
    state: Path | None = None
    seconds: float = 5.0


@dataclass(frozen=True)
class Found:
    """A finished search, and all that its result depends on.

    Attributes:
        recipe: the found one; its text begins with where it came from.
        inputs: what was looked at: the first half chose, the second checked.
        measured_on: device, dtype, batch, threads and attention of the measurements.
    """

    loaded: LoadedModel
    family: Family
    recipe: Recipe
    result: SearchResult
    inputs: ImageBatch
    measured_on: Mapping[str, Any]

    @property
    def held_back(self) -> ImageBatch:
        """The inputs that took no part, except to decide between the found schedule and the paper's."""
        batch = self.inputs
        half = len(batch.tensor) // 2
        rest = batch.tensor[half:]
        identity = {**batch.identity, "count": len(rest), "part": "held back"}
        return ImageBatch(rest, identity, f"{len(rest)} that took no part, of {batch.description}", batch.builtin)

    def missed_on_others(self) -> str | None:
        """A warning where the target is met on the inputs that chose, but not on the others; else None."""
        if not self.result.met or self.result.held_back_met is not False:
            return None
        return (
            f"the target {self.result.target} is met on the half that chose, but missed on the half held back; "
            "on more pictures (--images) chance decides less"
        )

    def provenance(self) -> dict[str, Any]:
        """What the artifact keeps: the target, the data, the seed, and what was measured."""
        known = self.result.to_dict()
        kept = (
            *("met", "nearest", "points", "paper_is_found", "held_back_decided", "held_back_met", "evaluations"),
            *("interrupted", "data", "seed"),
        )
        return {
            "target": str(self.result.target),
            **{key: known[key] for key in kept},
            "labelled": self.inputs.labels is not None,
            "measured_on": dict(self.measured_on),
        }

    def chart(self) -> Chart:
        """Quality against cost: of named schedules on the inputs held back, of all others on those that chose."""
        result = self.result
        # predictions unchanged are 100% for the dense model on every half; top-1 only where it is the target
        named = (("dense", "dense", result.dense), ("paper", _PAPER, result.paper), ("found", "found", result.found))
        shown = (
            "top-1" if result.target.kind == "max-drop" else "head" if result.dense.agreement is not None else "none"
        )
        words = {"top-1": "top-1, %", "head": "predictions unchanged, %", "none": "cosine of features to dense"}
        return Chart(
            title=f"{self.loaded.description.name}, {result.target}, {self.inputs.description}\n"
            "named schedules: on the half that took no part, but to decide between found and paper",
            quality=words[shown],
            marks=tuple(Mark(role, label, _spot(point, shown)) for role, label, point in named if point is not None),
            tried=tuple(_spot(point, shown) for point in result.tried),
            limit=_limit(result),
        )


def with_reducers(recipe: Recipe | None, request: Request, loaded: LoadedModel, family: Family) -> Request:
    """The request, where nobody said what becomes of dropped tokens: merging where the model can, else pruning."""
    if recipe is not None or request.reducers:
        return request
    merges = family.merge_refusal(loaded.model) is None
    return replace(request, reducers=("merge", "prune") if merges else ("prune",))


def start_recipe(recipe: Recipe | None, request: Request, loaded: LoadedModel) -> Recipe:
    """The recipe that the search starts from, with the first reducer of the request.

    Where none is given, the score is a fitted one, which no single score beat on the built-in classifiers, and none of
    the merged sides on the built-in video models; but with what is dropped gone it did not hold on those
    (docs/results.md), so there the shift is where the search starts.

    Raises:
        RecipeError: a reducer that there is not, or that the model cannot carry out.
    """
    family = match(loaded.model)
    for kind in request.reducers:
        check_reducer(build_reducer(Part(kind=kind)), family, loaded.model)
    if recipe is not None and not request.reducers:
        check_reducer(build_reducer(recipe.reducer, recipe.place), family, loaded.model, recipe.place)
    target = request.target
    if recipe is None:
        budget = Budget.model_validate({target.kind.replace("-", "_"): target.value})
        merged = bool(request.reducers) and isinstance(build_reducer(Part(kind=request.reducers[0])), Merger)
        metric = Part(kind="fitted" if merged or is_classifier(loaded.model) else "representation_shift")
        recipe = Recipe(version=1, budget=budget, metric=metric)
    if request.reducers and request.reducers[0] != recipe.reducer.kind:
        recipe = recipe.model_copy(update={"reducer": Part(kind=request.reducers[0])})
    return recipe


def find(
    loaded: LoadedModel,
    family: Family,
    start: Recipe,
    request: Request,
    inputs: ImageBatch,
    *,
    batch_size: int,
    seed: int,
    progress: Progress,
) -> Found:
    """Search, and put down where the result came from.

    Args:
        loaded: dense, on the device and in the dtype to search in.
        start: as `start_recipe` gives it.

    Raises:
        UsageError: the target needs labels and there are none.
        RepshiftError: as `search`.
        KeyboardInterrupt: before a first schedule was found.
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
        reducers=tuple(Part(kind=kind) for kind in request.reducers),
        state=request.state,
        seconds=request.seconds,
    )
    if request.evaluations is not None:
        settings = replace(settings, evaluations=request.evaluations)
    result = search(loaded.model, family, settings, progress)
    result = replace(result, recipe=_named(result.recipe, loaded))
    sample = next(loaded.model.parameters())
    measured_on = {
        "device": device_name(sample.device),
        "dtype": str(sample.dtype).removeprefix("torch."),
        "batch": batch_size,
        "threads": torch.get_num_threads(),
    }
    text = _header(loaded, result, inputs, measured_on) + result.recipe.to_yaml()
    recipe = Recipe.parse(text, result.recipe.place.name)
    return Found(loaded, family, recipe, result, inputs, measured_on)


def _named(recipe: Recipe, loaded: LoadedModel) -> Recipe:
    """The recipe for this model alone, where it has fitted weights: those of another one of equal width are others."""
    parts = [recipe.metric, *(drop.metric for drop in recipe.layers if drop.metric is not None)]
    name = loaded.description.name
    known = is_model_name(name.partition(".")[0]) or f"builtin:{name}" in BUILTIN
    if recipe.model is not None or not known or not any(part.kind == "fitted" for part in parts):
        return recipe
    return Recipe.parse(recipe.model_copy(update={"model": name}).to_yaml(), recipe.place.name)


# ---------------------------------------------------------------------------------------------------------------------
# Words and pictures


def _header(loaded: LoadedModel, result: SearchResult, inputs: ImageBatch, measured_on: Mapping[str, Any]) -> str:
    """Where the recipe came from, as comments."""
    from repshift_cli.version import __version__

    state = "; interrupted, this is the best so far" if result.interrupted else ""
    state += "" if result.met else f"; NOT MET, nearest is {result.nearest:.4g}"
    source = loaded.source.sha256
    lines = [
        f"Found by repshift search {__version__} on {datetime.now(timezone.utc):%Y-%m-%d} for {result.target}{state}",
        f"model  {loaded.description.name}" + (f", sha256 of its file {source}" if source else ""),
        f"data   {inputs.description}{', labelled' if inputs.labels is not None else ', labels not used'}",
        f"       sha256 of names and sizes {inputs.identity['sha256']}",
        f"search seed {result.seed}, {result.evaluations} schedules tried, torch {torch.__version__}",
        f"on     {', '.join(f'{key} {value}' for key, value in measured_on.items())}",
        f"Measured on the {result.found.images} inputs that took no part, except to decide between the found schedule",
        "and the paper's; MACs and latency are fractions of dense:",
    ]
    named = {"dense": result.dense, "paper": result.paper, "found": result.found, "random": result.random}
    lines += [f"  {name:6} {_measured(point)}" for name, point in named.items() if point is not None]
    # the name of a folder may hold what ends a comment, or what YAML does not take
    return "".join(f"# {''.join(letter if letter.isprintable() else '?' for letter in line)}\n" for line in lines)


def _measured(point: Point) -> str:
    """The numbers of a point in words."""
    values = [f"MACs {point.macs:.4f}"]
    if point.latency is not None:
        values.append(f"latency {point.latency:.3f}")
    if point.agreement is not None:
        values.append(f"unchanged {point.agreement:.2%}")
    values.append(f"{'KL' if point.agreement is not None else '1 - cosine'} {point.kl:.5f}")
    if point.top1 is not None:
        values.append(f"top-1 {point.top1:.2f}%")
    return ", ".join(values)


def _spot(point: Point, shown: str) -> Spot:
    """A point as it is drawn; larger is better."""
    if shown == "top-1":
        return Spot(point.macs, point.latency, point.top1 or 0.0)
    if shown == "head":
        return Spot(point.macs, point.latency, 100 * (point.agreement or 0.0))
    return Spot(point.macs, point.latency, 1 - point.kl)


def _limit(result: SearchResult) -> Limit:
    """The target as a line; a drop counts from the dense model's top-1."""
    target = result.target
    if target.kind == "macs":
        return Limit("macs", target.value)
    if target.kind == "latency":
        return Limit("latency", target.value)
    if target.kind == "agreement":
        return Limit("quality", 100 * target.value)
    return Limit("quality", (result.dense.top1 or 0.0) - target.value)
