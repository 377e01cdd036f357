"""The labels of images in class folders, on disk or in tars, and ImageNet's class names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repshift_cli.data.dataset import DatasetInfo, EncodedFile, ImageDataset, Subset
from repshift_cli.errors import DataError
from repshift_cli.utils.files import read_text
from repshift_cli.utils.suggest import first_names

if TYPE_CHECKING:
    from PIL import Image

WNID_PATTERN = re.compile(r"n\d{8}")

NATURAL, TEXT, IMAGENET, MODEL = "natural", "text", "imagenet", "model"

_TRAINING = ("train", "training")
_SPLITS = ("val", "valid", "validation", "dev", "eval", "evaluation", "test", "testing", *_TRAINING)
"""Lower-case names of folders that are splits of a dataset and not classes, by preference."""

Listing = Callable[[tuple[str, ...]], tuple[Collection[str], bool]]
"""The names of the folders in a folder, which is given by its parts, and whether it has images itself."""


class NamedClasses(Subset):
    """The images of another dataset, with labels by the names of their classes.

    Args:
        images: without labels.
        names: the class of each image.
        classes: all classes, in the order of their labels.
        info: with that order.
        ordered: whether the user gave the order.
    """

    def __init__(
        self,
        images: ImageDataset,
        names: Sequence[str],
        classes: tuple[str, ...],
        info: DatasetInfo,
        ordered: bool = False,
    ) -> None:
        super().__init__(images, range(len(images)))
        self.ordered = ordered
        self.info = info
        self.names = names
        self._classes = classes
        self._labels = {name: label for label, name in enumerate(classes)}

    @property
    def description(self) -> str:
        return f"{self.dataset.description}, {len(set(self.names))} classes"

    @property
    def classes(self) -> tuple[str, ...]:
        return self._classes

    def load(self, index: int) -> tuple[Image.Image | EncodedFile, int]:
        return self.dataset.load(index)[0], self._labels[self.names[index]]

    def stamp(self, index: int) -> str:
        return f"{self.dataset.stamp(index)}:{self._labels[self.names[index]]}"

    def for_head(self, num_classes: int, names: Sequence[str] = ()) -> NamedClasses:
        """The same images; with ImageNet's labels, if the classes are ImageNet ids and the head has 1000 outputs.

        If the model names its classes, and all folders are among them, labels follow the model, unless the user gave an
        order. Case, spaces, `_` and `-` do not matter in names.

        Raises:
            DataError: the names are WordNet ids but not ImageNet-1k's, for a head of 1000; or numbers in an unclear
                order.
        """
        wnids = imagenet_wnids()
        by_name = self.info.class_order in {NATURAL, TEXT}
        outputs = {_plain(name): output for output, name in enumerate(names)}
        if by_name and not self.ordered and len(outputs) == num_classes and {*map(_plain, self._classes)} <= {*outputs}:
            own = {outputs[_plain(name)]: name for name in self._classes}
            classes = tuple(own.get(output, name) for output, name in enumerate(names))
            return NamedClasses(
                self.dataset, self.names, classes, replace(self.info, class_order=MODEL, warning=None), ordered=True
            )
        if by_name and num_classes == len(wnids) and all(map(WNID_PATTERN.fullmatch, self._classes)):
            if unknown := sorted(set(self._classes) - set(wnids)):
                raise DataError(
                    f"{len(unknown)} classes of {self.name} are not ImageNet-1k classes: {first_names(unknown)}",
                    "A head of 1000 outputs is assumed to be of ImageNet-1k where folders are named by WordNet ids.",
                )
            info = replace(self.info, class_order=IMAGENET, warning=None)
            return NamedClasses(self.dataset, self.names, wnids, info)
        if self.info.warning and len(self._classes) == num_classes and all(map(str.isdecimal, self._classes)):
            raise DataError(
                f"the classes of {self.name} are numbers, which some tools sort as text (1, 10, 2) and others by value",
                f"Give the order of the training with --class-order {NATURAL} (by value), {TEXT}, or a file with one "
                "name per line. ImageNet-V2 is --dataset imagenet-v2.",
            )
        return self


def named_classes(
    images: ImageDataset, names: Sequence[str], found: Collection[str], order: str | None, info: DatasetInfo
) -> NamedClasses:
    """Label images by the names of their classes.

    Args:
        images, names, info: as for `NamedClasses`.
        found: the names of all classes.
        order: `natural` or `text`, or a file with the names in the order of their labels; None for natural order, as in
            timm's readers, with a warning where text order differs.

    Raises:
        DataError: the file cannot be read, or lacks a class.
    """
    text = tuple(sorted(found))
    natural = tuple(sorted(text, key=natural_key))
    classes = class_list(order) or (text if order == TEXT else natural)
    if unlisted := sorted(set(found) - set(classes)):
        raise DataError(f"{order} lacks {len(unlisted)} of the classes: {first_names(unlisted)}")
    other = next((label for label, name in enumerate(natural) if name != text[label]), None)
    warning = None
    if order is None and other is not None:
        warning = (
            f"label {other} is {natural[other]} in the natural order of timm, which is used, and {text[other]} in text "
            f"order (torchvision). Give the order of the training with --class-order {NATURAL}, {TEXT} or FILE"
        )
    info = replace(info, class_order=order or NATURAL, warning=warning)
    return NamedClasses(images, names, classes, info, ordered=order is not None)


def _plain(name: str) -> str:
    """A name of a class without case, spaces, `_` and `-`."""
    return re.sub(r"[\s_-]+", "", name.casefold())


def natural_key(name: str) -> list[Any]:
    """The sort key of timm's readers: case is ignored, and numbers are sorted by value."""
    parts = enumerate(re.split(r"(\d+)", name.lower()))
    return [(len(digits := part.lstrip("0")), digits) if place % 2 else part for place, part in parts]


def class_list(order: str | None) -> tuple[str, ...]:
    """The names in a file of classes, by label; none if `order` is not a file.

    Raises:
        DataError: it cannot be read, or has an empty line or a name twice.
    """
    if order in {None, NATURAL, TEXT}:
        return ()
    return names_of_file(Path(str(order)).expanduser(), "--class-order", f"{NATURAL}, {TEXT}, or ")


def names_of_file(path: Path, option: str, others: str = "") -> tuple[str, ...]:
    """The names in a file of classes, one per line; `option` and its `others` values are for messages.

    Raises:
        DataError: it cannot be read, or has an empty line or a name twice.
    """
    try:
        names = tuple(line.strip() for line in read_text(path, encoding="utf-8-sig").rstrip().split("\n"))
    except (OSError, UnicodeDecodeError) as error:
        hint = f"Give {others}a file with one class name per line to {option}."
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"the list of classes {path} cannot be read: {reason}", hint) from error
    if twice := [name for name, count in Counter(names).items() if count > 1 or not name]:
        raise DataError(f"the list of classes {path} has an empty line, or a name twice: {first_names(twice)}")
    return names


def class_root(where: str, listing: Listing, listed: Collection[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The folder whose folders are the classes, by its parts, and notes for the user.

    It is the common folder of all images, or the evaluation split of a folder with splits.

    Args:
        where: the folder or tar, for messages.
        listed: known names of classes.

    Raises:
        DataError: it is not clear which folders are the classes.
    """
    root: tuple[str, ...] = ()
    notes: list[str] = []
    known = set(listed)
    while True:
        folders, has_images = listing(root)
        if any(name in known or WNID_PATTERN.fullmatch(name) for name in folders):
            return root, tuple(notes)
        place = "/".join((where, *root))
        splits = [name for split in _SPLITS for name in folders if name.lower() == split]
        if splits and (len(splits) == len(folders) or {name.lower() in _TRAINING for name in splits} == {True, False}):
            if len(splits) < len(folders) or not listing((*root, splits[0]))[0]:
                raise DataError(
                    f"the folders {first_names(sorted(folders))} of {place} look like splits, not classes",
                    f"Give the folder of one split, with one folder per class: --dataset {place}/{splits[0]}. If they "
                    "are classes, list them in a file for --class-order.",
                )
            notes.append(f"the split {splits[0]} of {place} is used; it has {', '.join(splits)}")
            root = (*root, splits[0])
            continue
        inner = (*root, *folders)
        if len(folders) != 1 or has_images or listing(inner)[1] or not listing(inner)[0]:
            return root, tuple(notes)
        notes.append(f"the classes are the folders in {place}/{inner[-1]}")
        root = inner


@lru_cache(maxsize=1)
def imagenet_wnids() -> tuple[str, ...]:
    """The 1000 WordNet ids in label order, which is sorted order."""
    from timm.data.imagenet_info import ImageNetInfo

    info: Any = ImageNetInfo("imagenet-1k")
    return tuple(info.label_names())
