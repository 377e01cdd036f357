"""`repshift_cli.compress`: reduce a model from Python."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from repshift_cli.calibration.calibrate import unfitted
from repshift_cli.checkpoints import artifact
from repshift_cli.checkpoints.artifact import Opened
from repshift_cli.checkpoints.loaded import LoadedModel
from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.compression.inputs import load_job_inputs
from repshift_cli.compression.job import CompressionJob, load_dense, show_assumptions, wrap_module
from repshift_cli.compression.notes import UNCHECKED, Notes, not_calibrated
from repshift_cli.compression.recipe import checked_recipe, require_layers
from repshift_cli.compression.run import search_loaded
from repshift_cli.compression.settings import Settings
from repshift_cli.errors import UsageError
from repshift_cli.planning.recipe import Recipe
from repshift_cli.reduction.compressed_model import CompressedModel, detach, is_attached
from repshift_cli.reduction.families.transformer import as_function
from repshift_cli.reduction.metrics.base import build_metric
from repshift_cli.search.job import SearchRequest
from repshift_cli.search.target import SearchTarget
from repshift_cli.utils.progress import Progress, Silent


def compress(
    model: nn.Module | str | Path,
    recipe: Recipe | str | Path | None = None,
    *,
    calibration: Tensor | str | Path | None = None,
    img_size: int | None = None,
    options: LoadOptions | None = None,
    progress: Progress | None = None,
) -> CompressedModel:
    """Attach a recipe to a model, without measuring or writing anything.

    A model in memory is hooked in place: it drops tokens from then on, until `detach`. A second call replaces the plan
    of the first.

    Args:
        model: a supported model in eval mode, or a checkpoint as for `load_checkpoint`.
        recipe: a recipe, its file or shipped name; None for the default schedule.
        calibration: images for open fields of the metric: `[n, C, H, W]` preprocessed, or a folder or dataset. Without
            them open fields get the values of the paper, with a warning; the metric `fitted` needs them.
        img_size: image size of a convolutional network, for which the plan is valid. Other models have a fixed size.
        options: what a checkpoint does not say about its model; not for modules.

    Raises:
        CheckFailed: no candidate of the calibration is clearly better than random dropping.
        RecipeError: the recipe is invalid or does not fit the model, or has a budget instead of layers.
        UsageError: the weights do not fit `img_size`, or the metric must be fitted and there are no images.
        RepshiftError: the checkpoint or the images cannot be loaded.
    """
    recipe = require_layers(checked_recipe(recipe))
    notes = Notes(progress or Silent())
    if isinstance(model, nn.Module):
        if options is not None:
            raise UsageError("options say how to read a checkpoint, and the model is a module", "Leave options out.")
        loaded = wrap_module(_dense(model), img_size)
    else:
        options = options or LoadOptions()
        options = options if img_size is None else replace(options, img_size=img_size)
        loaded = load_dense(model, options, recipe, notes)
    job = CompressionJob(loaded, recipe, notes, images=calibration is not None)
    plan, calibrated = job.default_plan(), None
    if calibration is None and job.has_open_fields:
        if any(unfitted(build_metric(site.metric)) for site in job.plan.sites):
            raise UsageError(
                "the metric fitted has no weights, and they are fitted on images",
                "Give calibration=FOLDER or a tensor.",
            )
        advice = "Give images of the model's own kind: calibration=FOLDER or a tensor"
        warnings.warn(not_calibrated("there are no images", advice), stacklevel=2)
    elif calibration is None and recipe is None:
        warnings.warn(UNCHECKED, stacklevel=2)
    if calibration is not None and job.has_open_fields:
        if isinstance(calibration, Tensor):
            found = job.calibrate(calibration, {"where": "tensor", "count": len(calibration)}, batch_size=16)
        else:
            batch = load_job_inputs(loaded, str(calibration), 128, 0, notes)
            found = job.calibrate(batch.tensor, batch.identity, batch_size=16)
        if not found.accepted:
            raise found.unclear_error()
        plan, calibrated = job.plan.with_metrics(found.specs), found.to_dict()
    return artifact.attach_loaded(loaded, plan, job.recipe, calibrated)


def search_recipe(
    model: nn.Module | str | Path,
    target: str,
    data: str | Path,
    *,
    recipe: Recipe | str | Path | None = None,
    reducers: Sequence[str] = (),
    images: int | None = None,
    evaluations: int = 40,
    class_order: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Recipe:
    """Find layers and token counts for a target; `compress` attaches the result.

    Args:
        model: as for `compress`; a model in memory is dense again afterwards.
        target: `macs=0.65`, `latency=0.6`, `agreement=0.99` or `max-drop=0.5`; for an encoder without a head also
            `recall@10=0.99` or `cosine=0.98`.
        data: a folder or dataset of images, labelled for `max-drop`. Half of them are held out.
        recipe: metric and reducer to start from.
        reducers: kinds to try, such as `("merge", "prune")`.
        images: how many images are drawn.
        class_order: `natural` or `text`, see `docs/evaluation.md`.

    Raises:
        CheckFailed: the target is missed, or random dropping is better on held-out images.
        RepshiftError: as `compress`; or the target is invalid or needs labels.
    """
    settings = Settings(
        data=str(data), class_order=class_order, calibration_images=images, seed=seed, recipe=None, seconds=1.0
    )
    request = SearchRequest(SearchTarget.parse(target), evaluations, tuple(reducers), seconds=1.0)
    notes, start = Notes(progress or Silent()), checked_recipe(recipe)
    if isinstance(model, nn.Module):
        loaded = wrap_module(_dense(model), None)
        loaded.model = as_function(loaded.model)
    else:
        loaded = load_dense(model, settings.load, start, notes)
    found = search_loaded(loaded, start, request, settings, notes)
    found.result.check_met(False, warnings.warn)
    return found.recipe


def _dense(model: nn.Module) -> nn.Module:
    """The model without an earlier plan."""
    model = model.model if isinstance(model, CompressedModel) else model
    return detach(model) if is_attached(model) else model


def compress_dense(
    name: str | Path,
    recipe_name: str | Path | None,
    options: LoadOptions | None = None,
    *,
    progress: Progress | None = None,
) -> Opened:
    """Load a dense model and attach a recipe (None: the default schedule); open fields get the values of the paper.

    Raises:
        CheckpointError: the checkpoint cannot be loaded or is already compressed.
        RecipeError: the recipe is invalid or does not fit the model, or has a budget instead of layers.
        UsageError: the weights do not fit the options.
    """
    recipe = require_layers(checked_recipe(recipe_name))
    notes = Notes(progress or Silent())
    return _attach(load_dense(name, options or LoadOptions(), recipe, notes), recipe, notes)


def open_compressed(name: str | Path, options: LoadOptions | None = None, *, progress: Progress) -> Opened:
    """Open a compressed checkpoint, or a dense one with the default schedule; it is read once. Errors as both."""
    opened = artifact.open_model(name, options)
    if opened.compressed is not None:
        return opened
    notes = Notes(progress)
    show_assumptions(opened.loaded, notes)
    return _attach(opened.loaded, None, notes)


def _attach(loaded: LoadedModel, recipe: Recipe | None, notes: Notes) -> Opened:
    """The model with a recipe, not calibrated."""
    job = CompressionJob(loaded, recipe, notes)
    if job.has_open_fields:
        notes.warn(not_calibrated("there are no images", "`repshift compress --calibration DIR` calibrates"))
    return Opened(loaded, artifact.attach_loaded(loaded, job.default_plan(), job.recipe))
