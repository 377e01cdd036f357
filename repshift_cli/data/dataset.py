"""What a dataset is to the rest of the program: pictures by number, each with a label and a name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from repshift_cli.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image


__all__ = [
    "EvenSubset",
    "ImageDataset",
    "even_indices",
    "limited",
    "shuffled",
]


class ImageDataset(ABC):
    """Pictures with labels, by number, in an order that never changes.

    Attributes:
        name: the name that the user gave.
        random_access: whether `load` may be called in any order and from several processes. Where it is False,
            read in ascending order from one process.
        outputs: places of the head's outputs among which a model chooses; None for all of them.
    """

    name: str
    random_access: bool = True
    outputs: tuple[int, ...] | None = None

    @property
    @abstractmethod
    def description(self) -> str:
        """One line for people: what it is and where it lies."""

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...] | None:
        """Class names, where label `i` is `classes[i]`; None where the source does not tell."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def sample_id(self, index: int) -> str:
        """The path or name of one picture."""

    @abstractmethod
    def load(self, index: int) -> tuple[Image.Image, int]:
        """One RGB picture and its label.

        Raises:
            UnreadableSample: the picture is truncated, empty, too large to be safe, or no picture at all.
        """

    def answers(self, index: int, label: int) -> tuple[int, ...]:
        """The outputs of the head that are right for a picture, where `load` gave `label`; one or more."""
        del index
        return (label,)

    def fingerprint(self, index: int) -> str:
        """A text that changes when another picture lies in this place; cheap, so not the pixels."""
        return self.sample_id(index)

    def key(self, index: int) -> str:
        """A name of one picture that does not depend on where the dataset lies; UTF-8."""
        return self.sample_id(index)

    def stamp(self, index: int) -> str:
        """As `fingerprint`, but also of when it was written, and of its label: what work that goes on relies on."""
        return self.fingerprint(index)

    def for_head(self, num_classes: int) -> ImageDataset:
        """The same pictures, labelled for a head of `num_classes` outputs where the source allows more than one way."""
        del num_classes
        return self


class EvenSubset(ImageDataset):
    """`count` pictures, evenly spaced over another dataset, so that each part of it has its share."""

    def __init__(self, whole: ImageDataset, count: int) -> None:
        self.whole = whole
        self.name = whole.name
        self.random_access = whole.random_access
        self.outputs = whole.outputs
        self.indices = even_indices(len(whole), count)

    @property
    def description(self) -> str:
        return f"{self.whole.description}; {len(self)} of {len(self.whole)} pictures, evenly spaced"

    @property
    def classes(self) -> tuple[str, ...] | None:
        return self.whole.classes

    def __len__(self) -> int:
        return len(self.indices)

    def sample_id(self, index: int) -> str:
        return self.whole.sample_id(self.indices[index])

    def load(self, index: int) -> tuple[Image.Image, int]:
        return self.whole.load(self.indices[index])

    def answers(self, index: int, label: int) -> tuple[int, ...]:
        return self.whole.answers(self.indices[index], label)

    def fingerprint(self, index: int) -> str:
        return self.whole.fingerprint(self.indices[index])

    def key(self, index: int) -> str:
        return self.whole.key(self.indices[index])

    def stamp(self, index: int) -> str:
        return self.whole.stamp(self.indices[index])

    def for_head(self, num_classes: int) -> ImageDataset:
        return EvenSubset(self.whole.for_head(num_classes), len(self))


def shuffled(count: int, seed: int) -> list[int]:
    """The numbers `0 .. count - 1` in the order in which a seed tries them."""
    import numpy as np

    return [int(index) for index in np.random.default_rng(seed).permutation(count)]


def even_indices(total: int, count: int) -> list[int]:
    """The middles of `count` equal parts of `0 .. total - 1`, ascending, no repeats; all where `count >= total`."""
    if count >= total:
        return list(range(total))
    return [(2 * part + 1) * total // (2 * count) for part in range(count)]


def limited(dataset: ImageDataset, limit: int | None) -> ImageDataset:
    """The dataset, or an evenly spaced part of it.

    Raises:
        UsageError: the limit is not positive.
    """
    check_limit(limit)
    if limit is None or limit >= len(dataset):
        return dataset
    return EvenSubset(dataset, limit)


def check_limit(limit: int | None) -> None:
    """Refuse a limit below one.

    Raises:
        UsageError: the limit is not positive.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"the limit is {limit}", "Give the number of pictures to use, 1 or more.")
