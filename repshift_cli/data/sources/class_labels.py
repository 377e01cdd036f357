"""ImageNet class names, and the classes of a model's head."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from repshift_cli.errors import DataError

WNID_PATTERN = re.compile(r"n\d{8}")


def classes_for_head(name: str, classes: tuple[str, ...], num_classes: int) -> tuple[str, ...]:
    """The class names by label for folders of these names and a head of `num_classes` outputs.

    Args:
        name: of the dataset, for messages.
        classes: the sorted names of the folders.

    Returns:
        The 1000 ImageNet ids, if the names are some of them and the head has 1000 outputs; else the names.

    Raises:
        DataError: the names are WordNet ids but not ImageNet-1k's, for a head of 1000; or numbers in an unclear order.
    """
    wnids = imagenet_wnids()
    if num_classes == len(wnids) and all(WNID_PATTERN.fullmatch(folder) for folder in classes):
        if unknown := sorted(set(classes) - set(wnids)):
            raise DataError(
                f"{len(unknown)} classes of {name} are not ImageNet-1k classes: {first_names(unknown)}",
                "A head of 1000 outputs is assumed to be of ImageNet-1k where folders are named by WordNet ids.",
            )
        return wnids
    numbers = len(classes) == num_classes and all(folder.isdecimal() for folder in classes)
    if numbers and sorted(classes, key=int) != list(classes):
        raise DataError(
            f"the classes of {name} are numbers, which some tools sort as text (1, 10, 2) and others by value",
            "Give all folder names the same number of digits (001, 002, 010), in the order of the labels that the "
            "model was trained with. ImageNet-V2 is --dataset imagenet-v2.",
        )
    return classes


@lru_cache(maxsize=1)
def imagenet_wnids() -> tuple[str, ...]:
    """The 1000 WordNet ids in label order, which is sorted order."""
    from timm.data.imagenet_info import ImageNetInfo

    info: Any = ImageNetInfo("imagenet-1k")
    return tuple(info.label_names())


def first_names(names: list[str], count: int = 5) -> str:
    """Join the first few names for a message."""
    rest = len(names) - count
    return ", ".join(names[:count]) + (f" and {rest} more" if rest > 0 else "")
