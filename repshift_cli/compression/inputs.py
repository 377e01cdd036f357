"""The images of a compression job."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from repshift_cli.calibration.calibrate import MIN_IMAGES
from repshift_cli.checkpoints.loaded import LoadedModel
from repshift_cli.compression.job import CompressionJob
from repshift_cli.compression.notes import Notes
from repshift_cli.compression.settings import Amounts, Settings
from repshift_cli.data.inputs import ImageBatch, load_inputs
from repshift_cli.errors import DataError
from repshift_cli.models.tensor_model import class_names

_KINDS = {
    3: ("spectrograms", "random spectrograms", "spectrograms"),
    4: ("images", "built-in scenes", "images"),
    5: ("videos", "built-in clips", "clips"),
}
"""By the dimensions of a batch: what files are called, built-in inputs, and inputs of the user."""


def draw_images(job: CompressionJob, settings: Settings, amounts: Amounts) -> tuple[ImageBatch | None, ImageBatch]:
    """Images for calibration and recovery (None if there is neither) and others for the comparison of predictions."""

    def load(where: str | None, count: int) -> ImageBatch:
        return load_job_inputs(job.loaded, where, count, settings.seed, job.notes)

    where = settings.calibration or settings.data
    needed = bool(settings.recover) or (job.has_open_fields and settings.calibrate)
    if not needed or (where is None and not job.loaded.is_builtin):
        if settings.calibration:
            job.notes.note("nothing is calibrated, so the images of --calibration only serve the comparison")
        return None, load(settings.data or where, amounts.agreement)
    if settings.data is None or is_same_folder(settings.data, where):
        return split_inputs(load(where, amounts.calibration + amounts.agreement), amounts.calibration)
    return load(where, amounts.calibration), load(settings.data, amounts.agreement)


def load_job_inputs(
    loaded: LoadedModel, where: str | None, count: int, seed: int, notes: Notes, **options: Any
) -> ImageBatch:
    """Load images, or built-in scenes, with the preprocessing of the model; `options` are those of `load_inputs`."""
    batch = load_inputs(where, count, loaded.description.preprocessing, seed, **options)
    _report(batch, notes)
    return batch


def load_search_inputs(loaded: LoadedModel, settings: Settings, count: int, notes: Notes) -> ImageBatch:
    """Load images for a search, with labels if they have any for the head of the model."""
    where, preprocessing = settings.calibration or settings.data, loaded.description.preprocessing
    if where is None and preprocessing.spectrogram:
        raise DataError("a search needs spectrograms of the model's own kind", "Give a folder of .npy files.")
    if where is None and not loaded.is_builtin:
        notes.warn(
            "no images were given, so the search uses built-in scenes, which are not of the model's own kind, and its "
            "result may be wrong for other images. Give unlabelled images of the model's own kind"
        )
        scenes = load_inputs(where, count, preprocessing, settings.seed)
        return replace(scenes, unlabelled="the built-in scenes have other classes than this model")
    num_classes = getattr(loaded.model, "num_classes", None)
    inputs = load_inputs(
        where,
        count,
        preprocessing,
        settings.seed,
        num_classes=num_classes,
        class_names=class_names(loaded.model),
        class_order=settings.class_order,
    )
    _report(inputs, notes)
    return inputs


def is_same_folder(one: str, other: str | None) -> bool:
    """Whether two names mean the same image folder."""
    return other is not None and (one == other or Path(one).resolve() == Path(other).resolve())


def _report(batch: ImageBatch, notes: Notes) -> None:
    batch.info.report(notes)
    if batch.skipped:
        files = _KINDS[batch.tensor.ndim][0]
        notes.warn(f"{len(batch.skipped)} {files} could not be read: {'; '.join(batch.skipped[:3])}")


def split_inputs(batch: ImageBatch, count: int) -> tuple[ImageBatch, ImageBatch]:
    """The first `count` images and the rest, which is at least a fifth of all; raises DataError for too few."""
    total = len(batch.tensor)
    border = min(count, max(total - max(total // 5, 1), 1))
    if border >= total:
        raise DataError(f"{total} images are too few to calibrate on some and check on others", "Give more.")
    if border < MIN_IMAGES:
        aside = f"{total - border} {'is' if total - border == 1 else 'are'} set aside to compare predictions"
        raise DataError(
            f"calibration needs at least {MIN_IMAGES} images: of the {total} given, {aside}, which leaves {border}",
            "Give more images.",
        )
    parts = []
    for name, part in (("calibration", batch.tensor[:border]), ("agreement", batch.tensor[border:])):
        identity = {**batch.identity, "count": len(part), "part": name}
        _, own, others = _KINDS[batch.tensor.ndim]
        kind = own if batch.builtin else f"{others} of {batch.identity['where']}"
        parts.append(ImageBatch(part, identity, f"{len(part)} {kind}, seed {batch.identity['seed']}", batch.builtin))
    return parts[0], parts[1]
