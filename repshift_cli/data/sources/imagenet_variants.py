"""The test sets for ImageNet models: validation set, reassessed labels, ImageNet-V2, ImageNet-A and ImageNet-R.

The classes of the last two and the reassessed labels are read from timm.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from repshift_cli.data.dataset import EncodedFile, ImageDataset, Subset
from repshift_cli.data.sources.class_labels import imagenet_wnids
from repshift_cli.data.sources.folder import FileDataset, check_folder
from repshift_cli.data.sources.imagenet import known_class_folders, open_imagenet_val, validation_number
from repshift_cli.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

V2_FOLDERS = (
    "imagenetv2-matched-frequency-format-val",
    "imagenetv2-threshold0.7-format-val",
    "imagenetv2-top-images-format-val",
)
"""The folders of the three versions of ImageNet-V2."""

_VAL, _REAL, _V2 = "imagenet-val", "imagenet-real", "imagenet-v2"
_CLASSES = 1000

_V2_LAYOUT = f"It must have the folders 0 to 999 of its authors, or one of {', '.join(V2_FOLDERS)}."

TEST_SETS: Mapping[str, tuple[str, ...]] = {
    _VAL: (_VAL, "imagenet", "ImageNet", "ILSVRC2012"),
    _REAL: (_REAL, _VAL, "imagenet", "ImageNet", "ILSVRC2012"),
    _V2: (_V2, "imagenetv2"),
    "imagenet-a": ("imagenet-a",),
    "imagenet-r": ("imagenet-r",),
}
"""Names of the folders that may hold each test set."""


def open_imagenet(name: str, data_dir: Path | None) -> ImageDataset:
    """Open one of `TEST_SETS`; raises DataError as the functions below."""
    if name == _VAL:
        return open_imagenet_val(data_dir)
    if name == _REAL:
        return _Reassessed(open_imagenet_val(data_dir))
    if name == _V2:
        return open_imagenet_v2(data_dir)
    return open_imagenet_subset("a" if name == "imagenet-a" else "r", data_dir)


def open_imagenet_v2(data_dir: Path | None) -> FileDataset:
    """One of the three versions of ImageNet-V2: folders `0` to `999`, named by the label.

    Raises:
        DataError: there is none, more than one, or a folder with another name.
    """
    root = _v2_root(_needed(_V2, data_dir, _V2_LAYOUT))
    found = known_class_folders(_V2, root, tuple(map(str, range(_CLASSES))), _V2_LAYOUT)
    return FileDataset(_V2, root, found.samples, imagenet_wnids(), found.info)


def open_imagenet_subset(subset: Literal["a", "r"], data_dir: Path | None) -> ImageDataset:
    """ImageNet-A or ImageNet-R: 200 folders named by WordNet ids.

    Of a head of 1000 outputs only the 200 classes of the set are compared, as in the authors' evaluation; a head of
    200 outputs has them in the order of their ids.

    Raises:
        DataError: the folder is missing, has other classes, or no images.
    """
    name = f"imagenet-{subset}"
    root = check_folder(_needed(name, data_dir, "It must have 200 folders named by WordNet ids."))
    wnids = _subset_wnids(subset)
    found = known_class_folders(name, root, wnids, "Remove them, or evaluate the folder with --dataset PATH.")
    return _SubsetFolders(name, root, found.samples, wnids, found.info)


class _SubsetFolders(FileDataset):
    """Images of some classes of ImageNet, labelled by the index of the class among them."""

    def for_head(self, num_classes: int, names: Sequence[str] = ()) -> FileDataset:
        if num_classes != _CLASSES:
            return self
        all_wnids = imagenet_wnids()
        outputs = tuple(all_wnids.index(wnid) for wnid in self.classes)
        samples = [(path, outputs[label]) for path, label in self.samples]
        found = FileDataset(self.name, self.root, samples, all_wnids, self.info)
        found.outputs = outputs
        return found


class _Reassessed(Subset):
    """The validation images with the labels of "Are we done with ImageNet?"; an image may have several.

    Images for which the authors found no label are skipped, as in their evaluation.
    """

    def __init__(self, dataset: ImageDataset) -> None:
        all_labels = _real_labels()
        labels = [all_labels[_validation_number(dataset, index, len(all_labels)) - 1] for index in range(len(dataset))]
        super().__init__(dataset, [index for index, correct in enumerate(labels) if correct])
        self.name = _REAL
        self.labels = [correct for correct in labels if correct]
        if not self.indices:
            raise DataError(f"none of the {len(dataset)} images has a reassessed label")

    @property
    def description(self) -> str:
        return f"{self.dataset.description}; {len(self.dataset) - len(self)} without a reassessed label are skipped"

    def load(self, index: int) -> tuple[Image.Image | EncodedFile, int]:
        image, _ = super().load(index)
        return image, self.labels[index][0]

    def answers(self, index: int, label: int) -> tuple[int, ...]:
        del label
        return self.labels[index]

    def stamp(self, index: int) -> str:
        return f"{super().stamp(index)}:{self.labels[index]}"

    def for_head(self, num_classes: int, names: Sequence[str] = ()) -> ImageDataset:
        del num_classes, names
        return self


def _validation_number(dataset: ImageDataset, index: int, count: int) -> int:
    number = validation_number(Path(dataset.key(index)).name)
    if number is None or not 1 <= number <= count:
        raise DataError(
            f"{dataset.sample_id(index)} is not named like ILSVRC2012_val_00000001.JPEG, so its reassessed labels are "
            "unknown",
            "Keep the official names of the validation images.",
        )
    return number


def _v2_root(folder: Path) -> Path:
    folder = check_folder(folder)
    versions = [folder / name for name in V2_FOLDERS if (folder / name).is_dir()]
    if len(versions) > 1:
        raise DataError(
            f"{folder} has {len(versions)} versions of ImageNet-V2: {', '.join(path.name for path in versions)}",
            "Give one of them with --data-dir.",
        )
    return versions[0] if versions else folder


def _needed(name: str, data_dir: Path | None, layout: str) -> Path:
    if data_dir is None:
        raise DataError(f"the dataset {name} needs a folder", f"Give it with --data-dir PATH. {layout}")
    return data_dir


@lru_cache(maxsize=2)
def _subset_wnids(subset: Literal["a", "r"]) -> tuple[str, ...]:
    """The WordNet ids of a subset in timm's order, which is sorted."""
    wnids = tuple(_timm_text(f"imagenet_{subset}_synsets.txt").split())
    if not set(wnids) <= set(imagenet_wnids()) or list(wnids) != sorted(set(wnids)):
        raise DataError(f"the classes of imagenet-{subset} in the installed timm are not as expected")
    return wnids


@lru_cache(maxsize=1)
def _real_labels() -> tuple[tuple[int, ...], ...]:
    """The correct labels, none to several, by the number of the validation image minus one."""
    return tuple(tuple(labels) for labels in json.loads(_timm_text("imagenet_real_labels.json")))


def _timm_text(name: str) -> str:
    try:
        return files("timm.data").joinpath("_info").joinpath(name).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"the installed timm does not have {name}", "Upgrade timm.") from error
