"""The test sets for ImageNet models: validation set, reassessed labels, ImageNet-V2, and two with 200 classes.

Which classes the last two have, and the reassessed labels, come with timm; nothing is known by heart here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from repshift_cli.data.dataset import ImageDataset
from repshift_cli.data.sources.class_labels import imagenet_wnids
from repshift_cli.data.sources.folder import FileDataset, check_folder, class_folders, find_images
from repshift_cli.data.sources.imagenet import open_imagenet_val, validation_number
from repshift_cli.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["TEST_SETS", "V2_FOLDERS", "open_imagenet", "open_imagenet_real", "open_imagenet_subset", "open_imagenet_v2"]

Subset = Literal["a", "r"]

V2_FOLDERS = (
    "imagenetv2-matched-frequency-format-val",
    "imagenetv2-threshold0.7-format-val",
    "imagenetv2-top-images-format-val",
)
"""What the three versions of ImageNet-V2 unpack to."""

_VAL, _REAL, _V2 = "imagenet-val", "imagenet-real", "imagenet-v2"
_CLASSES = 1000
_SHOWN = 5

TEST_SETS: Mapping[str, tuple[str, ...]] = {
    _VAL: (_VAL, "imagenet", "ImageNet", "ILSVRC2012"),
    _REAL: (_REAL, _VAL, "imagenet", "ImageNet", "ILSVRC2012"),
    _V2: (_V2, "imagenetv2"),
    "imagenet-a": ("imagenet-a",),
    "imagenet-r": ("imagenet-r",),
}
"""By name, the folders in which each may lie."""


def open_imagenet(name: str, data_dir: Path | None) -> ImageDataset:
    """One of `TEST_SETS`, which lies in this folder.

    Raises:
        DataError: as the functions below.
    """
    if name == _VAL:
        return open_imagenet_val(data_dir)
    if name == _REAL:
        return open_imagenet_real(data_dir)
    if name == _V2:
        return open_imagenet_v2(data_dir)
    return open_imagenet_subset("a" if name == "imagenet-a" else "r", data_dir)


def open_imagenet_real(data_dir: Path | None) -> ImageDataset:
    """The validation pictures with the labels of "Are we done with ImageNet?": several may be right.

    Pictures for which the authors found none are left out, as they do.

    Raises:
        DataError: as `open_imagenet_val`; or a picture has no official name, which tells its labels.
    """
    return _Reassessed(open_imagenet_val(data_dir))


def open_imagenet_v2(data_dir: Path | None) -> FileDataset:
    """One of the three versions of ImageNet-V2: folders `0` to `999`, named by the label itself.

    Raises:
        DataError: there is none, more than one, or folders of other names.
    """
    root = _v2_root(_needed(_V2, data_dir, f"It holds folders 0 to 999, or one of {', '.join(V2_FOLDERS)}."))
    folders = class_folders(root)
    strangers = [folder.name for folder in folders if not _is_label(folder.name)]
    if strangers or not folders:
        what = f"such as {strangers[0]}" if strangers else "or rather none"
        raise DataError(
            f"{root} has folders that are no labels of ImageNet-V2, {what}",
            "Expected are folders 0 to 999, as the archive of its authors has them.",
        )
    ordered = sorted(folders, key=lambda folder: int(folder.name))
    samples = [(path, int(folder.name)) for folder in ordered for path in find_images(folder)]
    return FileDataset(_V2, root, _some_pictures(samples, root), imagenet_wnids())


def open_imagenet_subset(subset: Subset, data_dir: Path | None) -> ImageDataset:
    """ImageNet-A or ImageNet-R: 200 folders named by WordNet ids.

    A head of 1000 outputs chooses among the 200 that the set has, as its authors evaluate; a head of 200 has them in
    the order of their ids.

    Raises:
        DataError: the folder is missing, has other classes, or no pictures.
    """
    name = f"imagenet-{subset}"
    root = check_folder(_needed(name, data_dir, "It holds 200 folders named by WordNet ids."))
    wnids = _subset_wnids(subset)
    places = {wnid: place for place, wnid in enumerate(wnids)}
    samples: list[tuple[Path, int]] = []
    strangers: list[str] = []
    for folder in class_folders(root):
        pictures = find_images(folder)
        if folder.name in places:
            samples += [(path, places[folder.name]) for path in pictures]
        elif pictures:
            strangers.append(folder.name)
    if strangers:
        raise DataError(
            f"{len(strangers)} folders in {root} are no classes of {name}: {', '.join(strangers[:_SHOWN])}",
            "Take them out, or evaluate the folder as --dataset PATH.",
        )
    return _SubsetFolders(name, root, _some_pictures(samples, root), wnids)


class _SubsetFolders(FileDataset):
    """Pictures of some classes of ImageNet, labelled by their place among those."""

    def for_head(self, num_classes: int) -> FileDataset:
        if num_classes != _CLASSES:
            return self
        all_wnids = imagenet_wnids()
        outputs = tuple(all_wnids.index(wnid) for wnid in self.classes)
        samples = [(path, outputs[label]) for path, label in self.samples]
        found = FileDataset(self.name, self.root, samples, all_wnids)
        found.outputs = outputs
        return found


class _Reassessed(ImageDataset):
    """The validation pictures that have reassessed labels, each with all of them."""

    name = _REAL

    def __init__(self, whole: ImageDataset) -> None:
        self.whole = whole
        self.random_access = whole.random_access
        labels = _real_labels()
        numbers = [self._number(index) for index in range(len(whole))]
        self.indices = [index for index, number in enumerate(numbers) if labels[number - 1]]
        self.labels = [labels[numbers[index] - 1] for index in self.indices]
        if not self.indices:
            raise DataError(f"none of the {len(whole)} pictures has a reassessed label")

    def _number(self, index: int) -> int:
        number = validation_number(Path(self.whole.key(index)).name)
        if number is None or not 1 <= number <= len(_real_labels()):
            raise DataError(
                f"{self.whole.sample_id(index)} is not named as ILSVRC2012_val_00000001.JPEG is, so its reassessed "
                "labels are not known",
                "Keep the official names of the validation pictures.",
            )
        return number

    @property
    def description(self) -> str:
        without = len(self.whole) - len(self)
        return f"{self.whole.description}; {without} without a reassessed label are left out"

    @property
    def classes(self) -> tuple[str, ...]:
        return imagenet_wnids()

    def __len__(self) -> int:
        return len(self.indices)

    def sample_id(self, index: int) -> str:
        return self.whole.sample_id(self.indices[index])

    def load(self, index: int) -> tuple[Image.Image, int]:
        picture, _ = self.whole.load(self.indices[index])
        return picture, self.labels[index][0]

    def answers(self, index: int, label: int) -> tuple[int, ...]:
        del label
        return self.labels[index]

    def fingerprint(self, index: int) -> str:
        return self.whole.fingerprint(self.indices[index])

    def key(self, index: int) -> str:
        return self.whole.key(self.indices[index])

    def stamp(self, index: int) -> str:
        return f"{self.whole.stamp(self.indices[index])}:{self.labels[index]}"


def _v2_root(folder: Path) -> Path:
    folder = check_folder(folder)
    versions = [folder / name for name in V2_FOLDERS if (folder / name).is_dir()]
    if len(versions) > 1:
        raise DataError(
            f"{folder} holds {len(versions)} versions of ImageNet-V2: {', '.join(path.name for path in versions)}",
            "Name one of them with --data-dir.",
        )
    return versions[0] if versions else folder


def _is_label(name: str) -> bool:
    return name.isascii() and name.isdigit() and str(int(name)) == name and int(name) < _CLASSES


def _some_pictures(samples: Sequence[tuple[Path, int]], root: Path) -> Sequence[tuple[Path, int]]:
    if not samples:
        raise DataError(f"the class folders in {root} hold no pictures")
    return samples


def _needed(name: str, data_dir: Path | None, layout: str) -> Path:
    if data_dir is None:
        raise DataError(f"the dataset {name} needs a folder", f"Name it: --data-dir PATH. {layout}")
    return data_dir


@lru_cache(maxsize=2)
def _subset_wnids(subset: Subset) -> tuple[str, ...]:
    """The WordNet ids of a subset, as timm lists them, which is sorted order."""
    wnids = tuple(_timm_text(f"imagenet_{subset}_synsets.txt").split())
    if not set(wnids) <= set(imagenet_wnids()) or list(wnids) != sorted(set(wnids)):
        raise DataError(f"the classes of imagenet-{subset} in the installed timm are not as expected")
    return wnids


@lru_cache(maxsize=1)
def _real_labels() -> tuple[tuple[int, ...], ...]:
    """By the number of the validation picture less one: the labels that are right, none to several."""
    return tuple(tuple(labels) for labels in json.loads(_timm_text("imagenet_real_labels.json")))


def _timm_text(name: str) -> str:
    try:
        return files("timm.data").joinpath("_info").joinpath(name).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"the installed timm does not have {name}", "Upgrade timm.") from error
