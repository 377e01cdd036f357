"""Pictures for a search: as for calibration, and with labels where the source has those of the model's head."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from repshift_cli.data.base import ImageDataset
from repshift_cli.data.clips import load_inputs
from repshift_cli.data.images import ImageBatch, calibration_scenes, draw_pictures, picture_batch
from repshift_cli.errors import DataError
from repshift_cli.preprocessing import Preprocessing

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Labelled", "load_labelled"]

_SCENES = "builtin:digits"


@dataclass(frozen=True)
class Labelled:
    """Inputs of a model and, where known, what they show.

    Attributes:
        batch: the inputs.
        labels: int64 `[n]`, indices of the head's classes; None where the source tells none that fit the head.
        unlabelled: why there are no labels; None where there are.
    """

    batch: ImageBatch
    labels: Tensor | None
    unlabelled: str | None


def load_labelled(
    where: str | None, count: int, preprocessing: Preprocessing, num_classes: int | None, seed: int
) -> Labelled:
    """Draw inputs as `load_inputs` does, with labels where `repshift eval` would find some for this head.

    Args:
        where: a folder, the name of a dataset, or None for built-in scenes (of the training digits, which no evaluation
            uses).
        count: how many; fewer come where there are fewer.
        preprocessing: the model's own transform.
        num_classes: outputs of its head; None or 0 where it has none.
        seed: which ones are drawn.

    Raises:
        DataError, UsageError: as `load_inputs`.
    """
    if preprocessing.frames is not None:
        return Labelled(load_inputs(where, count, preprocessing, seed), None, "clips come without labels")
    if not num_classes:
        return Labelled(load_inputs(where, count, preprocessing, seed), None, "the model has no classification head")
    found = _labelled_source(where, count, num_classes, seed)
    if isinstance(found, str):
        return Labelled(load_inputs(where, count, preprocessing, seed), None, found)
    return _draw(found, count, preprocessing, num_classes, seed)


def _labelled_source(where: str | None, count: int, num_classes: int, seed: int) -> ImageDataset | str:
    """The source with its labels, or why it has none for this head."""
    from repshift_cli.data import is_dataset_name, open_dataset
    from repshift_cli.data.folder import class_folders, open_folder

    if where is None or where == _SCENES:
        source = calibration_scenes(count, seed)
    elif is_dataset_name(where):
        source = open_dataset(where, None).for_head(num_classes)
    else:
        root = Path(where).expanduser()
        if not root.is_dir() or not class_folders(root):
            return f"{where} has no class folders"
        try:
            source = open_folder(where, root).for_head(num_classes)
        except DataError:
            return f"the pictures of {where} do not lie in class folders"
    classes = source.classes
    if classes is None:
        return f"{source.name} does not name its classes"
    if len(classes) != num_classes:
        return f"{source.name} has {len(classes)} classes, the head of the model {num_classes}"
    return source


def _draw(source: ImageDataset, count: int, preprocessing: Preprocessing, num_classes: int, seed: int) -> Labelled:
    import torch

    drawn = draw_pictures(source, count, preprocessing, seed, source.name)
    for index, label in zip(drawn.places, drawn.labels, strict=True):
        if not 0 <= label < num_classes:
            raise DataError(f"{source.sample_id(index)} has label {label}, the head {num_classes} outputs")
    return Labelled(picture_batch(source, drawn, seed), torch.tensor(drawn.labels, dtype=torch.int64), None)
