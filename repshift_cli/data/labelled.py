"""Pictures for a search: as for calibration, and with labels where the source has those of the model's head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from repshift_cli.data.base import ImageDataset, UnreadableSample, shuffled
from repshift_cli.data.clips import load_inputs
from repshift_cli.data.images import ImageBatch, batch_of
from repshift_cli.errors import DataError
from repshift_cli.preprocessing import Preprocessing

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Labelled", "load_labelled"]

_SCENES = "builtin:digits"
_SCENE_SEED = 20_000
"""As in `load_images`: neither the training nor the test of the built-in models drew these scenes."""


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
        from repshift_cli.data.digits import DigitDataset

        source: ImageDataset = DigitDataset("train", count, _SCENE_SEED + seed)
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

    transform = preprocessing.transform()
    tensors: list[Tensor] = []
    labels: list[int] = []
    prints: list[str] = []
    skipped: list[str] = []
    for index in _order(source, seed):
        try:
            picture, label = source.load(index)
        except UnreadableSample as problem:
            skipped.append(f"{problem.sample}: {problem.reason}")
            continue
        if not 0 <= label < num_classes:
            raise DataError(f"{source.sample_id(index)} has label {label}, the head {num_classes} outputs")
        tensors.append(transform(picture))
        labels.append(label)
        prints.append(source.fingerprint(index))
        if len(tensors) == count:
            break
    if not tensors:
        raise DataError(f"none of the {len(skipped)} pictures of {source.name} can be read; {skipped[0]}")
    builtin = source.name == _SCENES
    what = "built-in training scenes" if builtin else f"of {len(source)} pictures in {source.name}"
    description = f"{len(tensors)} {what}, seed {seed}"
    batch = batch_of(source.name, description, tensors, prints, skipped, seed=seed, builtin=builtin)
    return Labelled(batch, torch.tensor(labels, dtype=torch.int64), None)


def _order(source: ImageDataset, seed: int) -> Sequence[int]:
    """Places in the order in which they are tried, as `load_images` tries them."""
    return range(len(source)) if source.name == _SCENES or not source.random_access else shuffled(len(source), seed)
