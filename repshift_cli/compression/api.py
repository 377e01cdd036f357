"""`repshift_cli.compress`: reduce a model from Python."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from repshift_cli.calibration.calibrate import calibrate
from repshift_cli.checkpoints import artifact
from repshift_cli.checkpoints.artifact import Opened
from repshift_cli.checkpoints.identify import Clips
from repshift_cli.compression.inputs import unclear_choice
from repshift_cli.compression.job import (
    CompressionJob,
    DenseModel,
    checked_recipe,
    load_dense,
    with_layers,
    wrap_module,
)
from repshift_cli.data.inputs import load_inputs
from repshift_cli.planning.recipe import Recipe
from repshift_cli.reduction.compressed_model import CompressedModel
from repshift_cli.utils.progress import Progress, Silent

__all__ = [
    "compress",
    "compress_dense",
]


def compress(
    model: nn.Module | str | Path,
    recipe: Recipe | str | Path | None = None,
    *,
    calibration: Tensor | str | Path | None = None,
    img_size: int | None = None,
    progress: Progress | None = None,
) -> CompressedModel:
    """Attach a recipe to a model, without measuring or writing anything.

    Args:
        model: a supported model in eval mode, or whatever `checkpoint.load` takes.
        recipe: a recipe, its file or shipped name; None for the default schedule.
        calibration: images for open fields of the metric: `[n, C, H, W]` preprocessed, or a folder or dataset.
            Without them open fields are as the paper has them.
        img_size: side of the images that a convolutional network is to take, which the plan then holds for. The images
            of other models are as large as their weights have it.

    Raises:
        CheckFailed: calibration found nothing that beats random dropping clearly.
        RecipeError: the recipe has a budget in place of layers.
        UsageError: the weights do not fit `img_size`.
        RepshiftError: as the parts that it calls.
    """
    recipe = with_layers(checked_recipe(recipe))
    listener = progress or Silent()
    wrapped = (
        wrap_module(model, img_size) if isinstance(model, nn.Module) else load_dense(model, recipe, img_size=img_size)
    )
    job = CompressionJob(DenseModel.of(wrapped, listener), recipe)
    loaded, plan = job.loaded, job.default_plan()
    if calibration is not None and job.open:
        if isinstance(calibration, Tensor):
            images, identity = calibration, {"where": "tensor", "count": len(calibration)}
        else:
            batch = load_inputs(str(calibration), 128, loaded.description.preprocessing, 0)
            images, identity = batch.tensor, batch.identity
        found = calibrate(
            loaded.model,
            job.family,
            job.plan,
            images=images,
            identity=identity,
            batch_size=16,
            progress=listener,
        )
        if not (found.clear or found.mild):
            raise unclear_choice(found)
        plan = job.plan.with_metrics(found.specs)
    return artifact.attach_loaded(loaded, plan)


def compress_dense(
    name: str | Path,
    recipe_name: str | Path,
    model_name: str | None = None,
    heads: int | None = None,
    img_size: int | None = None,
    *,
    clips: Clips | None = None,
    progress: Progress | None = None,
) -> Opened:
    """Load a dense model and attach a recipe, uncalibrated: open fields are as the paper has them.

    Raises:
        CheckpointError: the checkpoint cannot be loaded or is compressed already.
        RecipeError: the recipe cannot be followed, or has a budget in place of layers.
        UsageError: the weights do not fit `img_size`.
    """
    recipe = with_layers(checked_recipe(recipe_name))
    loaded = load_dense(name, recipe, model_name, heads, img_size, clips=clips)
    job = CompressionJob(DenseModel.of(loaded, progress or Silent()), recipe)
    return Opened(job.loaded, artifact.attach_loaded(job.loaded, job.default_plan()))
