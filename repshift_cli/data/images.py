"""Unlabelled pictures, ready for the model: what calibration and agreement are measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repshift_cli.data.base import ImageDataset, UnreadableSample, decode_file, shuffled
from repshift_cli.errors import DataError, UsageError
from repshift_cli.preprocessing import Preprocessing

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

__all__ = [
    "Drawn",
    "ImageBatch",
    "batch_of",
    "calibration_scenes",
    "draw_pictures",
    "load_images",
    "open_pictures",
    "picture_batch",
]

_SCENES = "builtin:digits"

_SCENE_SEED = 20_000
"""Added to the seed of built-in scenes: the built-in models were trained on others, and the test draws others."""


@dataclass(frozen=True)
class ImageBatch:
    """Pictures, or clips of them, that went through the model's own transform.

    Attributes:
        tensor: float32 `[n, C, H, W]`, of clips `[n, T, C, H, W]`.
        identity: what names these pictures: `where`, `count`, `seed`, `sha256` (of names and sizes, or of the
            parameters of scenes).
        description: one line for people.
        builtin: whether these are the built-in scenes rather than pictures of the user.
        skipped: pictures that were drawn but could not be read, each with the reason; others took their places.
    """

    tensor: Tensor
    identity: dict[str, Any]
    description: str
    builtin: bool
    skipped: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Drawn:
    """Pictures out of a source, in the order in which they were drawn.

    Attributes:
        tensors: each through the model's own transform.
        places, labels: their places in the source, and what it says that they show.
        skipped: those that could not be read, each with the reason.
    """

    tensors: list[Tensor] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def draw_pictures(source: ImageDataset, count: int, preprocessing: Preprocessing, seed: int, name: str) -> Drawn:
    """Draw readable pictures: at random, but scenes, which are random already, and streams from their start.

    Args:
        count: how many; fewer come where there are fewer.
        name: of the source, for messages.

    Raises:
        DataError: none can be read.
    """
    drawn, transform = Drawn(), preprocessing.transform()
    as_they_lie = source.name.startswith("builtin:") or not source.random_access
    for index in range(len(source)) if as_they_lie else shuffled(len(source), seed):
        try:
            picture, label = source.load(index)
        except UnreadableSample as problem:
            drawn.skipped.append(f"{problem.sample}: {problem.reason}")
            continue
        drawn.tensors.append(transform(picture))
        drawn.places.append(index)
        drawn.labels.append(label)
        if len(drawn.tensors) == count:
            break
    if not drawn.tensors:
        raise DataError(f"none of the {len(drawn.skipped)} pictures of {name} can be read; {drawn.skipped[0]}")
    return drawn


def calibration_scenes(count: int, seed: int) -> ImageDataset:
    """Built-in scenes of the training digits, which no evaluation uses."""
    from repshift_cli.data.digits import DigitDataset

    return DigitDataset("train", count, _SCENE_SEED + seed)


def picture_batch(source: ImageDataset, drawn: Drawn, seed: int) -> ImageBatch:
    """Pictures that were drawn from a source, with what names them."""
    builtin = source.name == _SCENES
    what = "built-in training scenes" if builtin else f"of {len(source)} pictures in {source.name}"
    description = f"{len(drawn.tensors)} {what}, seed {seed}"
    prints = [source.fingerprint(index) for index in drawn.places]
    return batch_of(source.name, description, drawn.tensors, prints, drawn.skipped, seed=seed, builtin=builtin)


def load_images(where: str | Path | None, count: int, preprocessing: Preprocessing, seed: int) -> ImageBatch:
    """Draw pictures for calibration; the same arguments and files give the same pictures.

    Args:
        where: a folder, searched at any depth; the name of a dataset (labels are not used); None for built-in scenes
            (of the training digits, which no evaluation uses).
        count: how many; fewer come where there are fewer.
        preprocessing: the model's own transform.
        seed: which ones are drawn.

    Raises:
        DataError: there is no picture, or none that can be read.
        UsageError: the count is not positive.
    """
    if count < 1:
        raise UsageError(f"{count} images were asked for", "Give a number of 1 or more.")
    source = _open(where, count, seed)
    return picture_batch(source, draw_pictures(source, count, preprocessing, seed, source.name), seed)


def open_pictures(where: str | Path, count: int, seed: int = 0) -> ImageDataset:
    """Pictures whose labels do not matter: a folder, searched at any depth, or a dataset by name.

    Args:
        count: how many built-in scenes; of other sources all are there.
        seed: which built-in scenes.

    Raises:
        DataError: there is no picture.
    """
    return _open(where, count, seed)


def batch_of(
    where: str,
    description: str,
    tensors: Sequence[Tensor],
    prints: Sequence[str],
    skipped: Sequence[str] = (),
    *,
    seed: int,
    builtin: bool = False,
) -> ImageBatch:
    """Inputs that were drawn, with the text that names each one (`prints`); the other arguments as `ImageBatch`."""
    import torch

    digest = sha256("\n".join(prints).encode()).hexdigest()
    identity = {"where": where, "count": len(tensors), "seed": seed, "sha256": digest}
    return ImageBatch(torch.stack(list(tensors)), identity, description, builtin, list(skipped))


def _open(where: str | Path | None, count: int, seed: int) -> ImageDataset:
    from repshift_cli.data import is_dataset_name, open_dataset

    if where is None or where == _SCENES:
        return calibration_scenes(count, seed)
    if isinstance(where, str) and is_dataset_name(where):
        return open_dataset(where, None)
    return _open_tree(Path(where).expanduser())


def _open_tree(root: Path) -> ImageDataset:
    from repshift_cli.data import dataset_names
    from repshift_cli.data.folder import PICTURE_SUFFIXES, find_pictures

    endings = ", ".join(sorted(suffix[1:] for suffix in PICTURE_SUFFIXES))
    hint = f"Give a folder with pictures ({endings}; class folders or not), or a dataset: {', '.join(dataset_names())}."
    if not root.exists():
        raise DataError(f"the folder {root} does not exist", hint)
    if not root.is_dir():
        raise DataError(f"{root} is a file, not a folder", hint)
    paths = find_pictures(root)
    if not paths:
        raise DataError(f"there are no pictures in {root}", hint)
    return _PictureTree(root, paths)


class _PictureTree(ImageDataset):
    """Pictures without labels, at any depth below a folder."""

    def __init__(self, root: Path, paths: list[Path]) -> None:
        self.name = str(root)
        self.root = root
        self.paths = paths

    @property
    def description(self) -> str:
        return f"{len(self)} pictures in {self.root}"

    @property
    def classes(self) -> None:
        return None

    def __len__(self) -> int:
        return len(self.paths)

    def sample_id(self, index: int) -> str:
        return str(self.paths[index])

    def load(self, index: int) -> tuple[Image.Image, int]:
        return decode_file(self.paths[index]), -1

    def fingerprint(self, index: int) -> str:
        from repshift_cli.data.folder import file_fingerprint

        return file_fingerprint(self.paths[index], self.root)
