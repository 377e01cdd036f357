"""Labelled images by number."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from repshift_cli.utils.progress import Messages
from repshift_cli.utils.ranges import check_ranges

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class EncodedFile:
    """A video, a folder of frames or a spectrogram, which is read when the input of the model is known."""

    path: Path


@dataclass(frozen=True)
class DatasetInfo:
    """How a dataset was read.

    Attributes:
        class_order: of labels by name: natural, text, imagenet, model, or the file of the list; None for other labels.
        left_out: number of other files, by suffix.
        warning: why the labels may be wrong.
    """

    class_order: str | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    warning: str | None = None

    def report(self, progress: Messages) -> None:
        """Print the notes and the warning."""
        total = sum(self.left_out.values())
        named = ", ".join(f"{suffix} {self.left_out[suffix]}" for suffix in sorted(self.left_out)[:8])
        left_out = [f"{total} file{'s' * (total > 1)} with other endings left out ({named})"] if total else []
        for note in (*self.notes, *left_out):
            progress.note(note)
        if self.warning:
            progress.warn(self.warning)


class ImageDataset(ABC):
    """Images, videos or spectrograms with labels, by number, in a fixed order.

    Attributes:
        name: the name that the user gave.
        unit: what they are.
        info: how it was read.
        random_access: whether `load` may be called in any order and from several processes. If False, read in
            ascending order from one process.
        outputs: indices of the head's outputs that the classes of the dataset have; None for all outputs.
    """

    name: str
    unit: Literal["images", "videos", "spectrograms"] = "images"
    info: DatasetInfo = DatasetInfo()
    random_access: bool = True
    outputs: tuple[int, ...] | None = None

    @property
    @abstractmethod
    def description(self) -> str:
        """One line for the user: what it is and where it is stored."""

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...] | None:
        """Class names, `classes[label]`; None if the source has none."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def sample_id(self, index: int) -> str:
        """The path or name of one image."""

    @abstractmethod
    def load(self, index: int) -> tuple[Image.Image | EncodedFile, int]:
        """One RGB image, or the file of a clip or spectrogram, and its label.

        Raises:
            UnreadableSample: the file is truncated, empty, too large to decode safely, or not an image.
        """

    def answers(self, index: int, label: int) -> tuple[int, ...]:
        """The correct outputs of the head, one or more, for an image that `load` labels `label`."""
        del index
        return (label,)

    def fingerprint(self, index: int) -> str:
        """A text that changes when the file changes: its name and size, not its pixels."""
        return self.sample_id(index)

    def key(self, index: int) -> str:
        """A name of one image that does not depend on where the dataset is stored; UTF-8."""
        return self.sample_id(index)

    def stamp(self, index: int) -> str:
        """`fingerprint` with the time of the last write and the label, for runs that are resumed."""
        return self.fingerprint(index)

    def for_head(self, num_classes: int, names: Sequence[str] = ()) -> ImageDataset:
        """The same images, with labels for a head of `num_classes` outputs, whose classes have `names` if known."""
        del num_classes, names
        return self


class Subset(ImageDataset):
    """The images of another dataset at `indices`."""

    def __init__(self, dataset: ImageDataset, indices: Sequence[int]) -> None:
        self.dataset = dataset
        self.name = dataset.name
        self.unit = dataset.unit
        self.info = dataset.info
        self.random_access = dataset.random_access
        self.outputs = dataset.outputs
        self.indices = indices

    @property
    def description(self) -> str:
        return f"{self.dataset.description}; {len(self)} of {len(self.dataset)} {self.unit}"

    @property
    def classes(self) -> tuple[str, ...] | None:
        return self.dataset.classes

    def __len__(self) -> int:
        return len(self.indices)

    def sample_id(self, index: int) -> str:
        return self.dataset.sample_id(self.indices[index])

    def load(self, index: int) -> tuple[Image.Image | EncodedFile, int]:
        return self.dataset.load(self.indices[index])

    def answers(self, index: int, label: int) -> tuple[int, ...]:
        return self.dataset.answers(self.indices[index], label)

    def fingerprint(self, index: int) -> str:
        return self.dataset.fingerprint(self.indices[index])

    def key(self, index: int) -> str:
        return self.dataset.key(self.indices[index])

    def stamp(self, index: int) -> str:
        return self.dataset.stamp(self.indices[index])


class EvenSubset(Subset):
    """`count` images or videos, evenly spaced over another dataset."""

    def __init__(self, dataset: ImageDataset, count: int) -> None:
        super().__init__(dataset, even_indices(len(dataset), count))

    @property
    def description(self) -> str:
        return f"{super().description}, evenly spaced"

    def for_head(self, num_classes: int, names: Sequence[str] = ()) -> ImageDataset:
        return EvenSubset(self.dataset.for_head(num_classes, names), len(self))


def shuffled(count: int, seed: int) -> list[int]:
    """The numbers `0 .. count - 1` in the random order of a seed."""
    import numpy as np

    return [int(index) for index in np.random.default_rng(seed).permutation(count)]


def even_indices(total: int, count: int) -> list[int]:
    """The middles of `count` equal parts of `0 .. total - 1`, ascending; all numbers if `count >= total`."""
    if count >= total:
        return list(range(total))
    return [(2 * part + 1) * total // (2 * count) for part in range(count)]


def limited(dataset: ImageDataset, limit: int | None) -> ImageDataset:
    """The dataset, or an evenly spaced subset of it; raises UsageError for an invalid limit."""
    check_ranges(limit=limit)
    if limit is None or limit >= len(dataset):
        return dataset
    return EvenSubset(dataset, limit)
