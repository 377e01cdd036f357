"""The ImageNet-1k validation set (ILSVRC 2012), in its common layouts.

The label of an image is the index of its WordNet id among the 1000 sorted ids, as in the training of ImageNet models.
The development kit numbers the classes in another order; its numbers are used only with a table of their WordNet ids.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repshift_cli.data.dataset import ImageDataset
from repshift_cli.data.decode import decode_bytes
from repshift_cli.data.sources.class_labels import WNID_PATTERN, first_names, imagenet_wnids
from repshift_cli.data.sources.folder import FileDataset, class_folders, find_images
from repshift_cli.data.sources.tar import read_member, tar_members
from repshift_cli.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

_NAME = "imagenet-val"

_TAR = "ILSVRC2012_img_val.tar"

_VAL_COUNT = 50_000

_IMAGE_NAME = re.compile(r"ILSVRC2012_val_(\d{8})(\.\w+)?", re.IGNORECASE)

_IMAGE_PLACES = (
    ".",
    "val",
    "validation",
    "ILSVRC2012_img_val",
    "ILSVRC2012_img_val/val",
    "Data/CLS-LOC/val",
    "ILSVRC/Data/CLS-LOC/val",
)

_LABEL_PLACES = (".", "..", "data", "devkit/data", "ILSVRC2012_devkit_t12", "ILSVRC2012_devkit_t12/data")

_SYNSET_FILES = (
    "imagenet_2012_validation_synset_labels.txt",
    "validation_synset_labels.txt",
    "val_synsets.txt",
    "synset_labels.txt",
)

_KAGGLE_FILE = "LOC_val_solution.csv"

_TRUTH_FILE = "ILSVRC2012_validation_ground_truth.txt"

_META_FILE = "meta.mat"

_CLASS_MAP_FILE = "map_clsloc.txt"

_LAYOUT = f"""Download the set from https://image-net.org. Supported layouts of DIR:
  DIR/n01440764/*.JPEG, DIR/n01443537/*.JPEG, ...   (or below DIR/val)
  DIR/ILSVRC2012_val_00000001.JPEG, ...             (or below DIR/val) with a label file
  DIR/{_TAR}                        with a label file
A label file is {_SYNSET_FILES[0]}, {_KAGGLE_FILE}, or the development kit's {_TRUTH_FILE} with {_META_FILE}.
Give the folder with --data-dir DIR or REPSHIFT_DATA_DIR."""


def validation_number(name: str) -> int | None:
    """The official number of a validation image, from 1, by its file name; None for other names."""
    match = _IMAGE_NAME.fullmatch(name)
    return int(match[1]) if match else None


def open_imagenet_val(data_dir: Path | None) -> ImageDataset:
    """Open the validation set in `data_dir`: class folders, a flat folder, or the official tar.

    Raises:
        DataError: there are no images or no labels, or a file of labels is damaged.
    """
    if data_dir is None:
        raise DataError(f"the dataset {_NAME} needs a folder", _LAYOUT)
    if not data_dir.exists():
        raise DataError(f"the folder {data_dir} does not exist", _LAYOUT)
    if data_dir.is_file():
        return _TarValidation(data_dir, _Labels.find(data_dir.parent, data_dir.parent))
    places = [data_dir / place for place in _IMAGE_PLACES if (data_dir / place).is_dir()]
    for place in places:
        if any(WNID_PATTERN.fullmatch(folder.name) for folder in class_folders(place)):
            hint = "Remove them, or use `--dataset folder --data-dir DIR` for your own classes."
            samples = known_class_folders(place, imagenet_wnids(), "ImageNet-1k", hint)
            return FileDataset(_NAME, place, samples, imagenet_wnids())
        if flat := _flat_images(place):
            return _open_flat(place, flat, _Labels.find(place, data_dir))
    for place in places:
        if (place / _TAR).is_file():
            return _TarValidation(place / _TAR, _Labels.find(place, data_dir))
    raise DataError(f"no ImageNet validation images were found in {data_dir}", _LAYOUT)


def known_class_folders(root: Path, classes: Sequence[str], name: str, hint: str) -> list[tuple[Path, int]]:
    """The images in the class folders of `root`, each with the index of its folder among `classes`.

    Args:
        name: of the dataset, for messages.
        hint: what to do about other folders.

    Raises:
        DataError: a folder with images has another name, or there are no images.
    """
    labels = {known: label for label, known in enumerate(classes)}
    samples: list[tuple[Path, int]] = []
    unknown: list[str] = []
    for folder in class_folders(root):
        images = find_images(folder)
        if folder.name in labels:
            samples += [(image, labels[folder.name]) for image in images]
        elif images:
            unknown.append(folder.name)
    if unknown:
        raise DataError(
            f"{len(unknown)} folders with images in {root} are not classes of {name}: {first_names(unknown)}", hint
        )
    if not samples:
        raise DataError(f"the class folders in {root} have no images", "Expected: one folder per class, with images.")
    return samples


def _flat_images(root: Path) -> list[tuple[Path, int]]:
    """Files with official names directly in `root`, each with its number, sorted by number."""
    matches = ((path, _IMAGE_NAME.fullmatch(path.name)) for path in root.iterdir())
    return sorted(((path, int(match[1])) for path, match in matches if match), key=lambda entry: (entry[1], entry[0]))


def _open_flat(root: Path, images: list[tuple[Path, int]], labels: _Labels) -> FileDataset:
    _check_once([number for _, number in images], root)
    samples = [(path, labels.of(path.name, number)) for path, number in images]
    return FileDataset(_NAME, root, samples, imagenet_wnids())


class _TarValidation(ImageDataset):
    """The official tar. Only offsets and sizes of its members are kept, so any process can read any image."""

    name = _NAME

    def __init__(self, path: Path, labels: _Labels) -> None:
        self.path = path
        found = ((validation_number(Path(member.name).name), member) for member in tar_members(path))
        numbered = [(number, member) for number, member in found if number is not None]
        numbered.sort(key=lambda entry: entry[0])
        if not numbered:
            raise DataError(f"there are no ImageNet validation images in {path}", _LAYOUT)
        _check_once([number for number, _ in numbered], path)
        self.members = [member for _, member in numbered]
        self.names = [Path(member.name).name for member in self.members]
        self.labels = [labels.of(name, number) for name, (number, _) in zip(self.names, numbered, strict=True)]
        self.written = path.stat().st_mtime_ns

    @property
    def description(self) -> str:
        return f"{len(self)} images in {self.path}"

    @property
    def classes(self) -> tuple[str, ...]:
        return imagenet_wnids()

    def __len__(self) -> int:
        return len(self.members)

    def sample_id(self, index: int) -> str:
        return f"{self.path}:{self.names[index]}"

    def load(self, index: int) -> tuple[Image.Image, int]:
        name = self.sample_id(index)
        return decode_bytes(read_member(self.path, self.members[index], name), name), self.labels[index]

    def fingerprint(self, index: int) -> str:
        return f"{self.names[index]}:{self.members[index].size}"

    def key(self, index: int) -> str:
        return self.names[index]

    def stamp(self, index: int) -> str:
        return f"{self.fingerprint(index)}:{self.members[index].start}:{self.written}:{self.labels[index]}"


def _check_once(numbers: Sequence[int], where: Path) -> None:
    """Raise DataError if a number is there twice: the image would be counted twice."""
    twice = next((one for one, other in pairwise(numbers) if one == other), None)
    if twice is not None:
        raise DataError(f"image {twice:08d} is in {where} more than once", "Keep one of them.")


@dataclass(frozen=True)
class _Labels:
    """Labels of validation images, by official number from 1.

    Attributes:
        path: the file of the labels.
        by_number: label 0..999 of each number in the file.
    """

    path: Path
    by_number: Mapping[int, int]

    def of(self, name: str, number: int) -> int:
        """The label of an image; raises DataError if the file has none."""
        if number not in self.by_number:
            raise DataError(f"{self.path} has no label for {name}", "Use the file of the whole set.")
        return self.by_number[number]

    @classmethod
    def find(cls, *roots: Path) -> _Labels:
        """Read the first file of labels in or near one of the folders.

        Raises:
            DataError: there is none, or it is damaged.
        """
        for name in _SYNSET_FILES:
            if path := _find_file(roots, name):
                return cls(path, _read_synsets(path))
        if path := _find_file(roots, _KAGGLE_FILE):
            return cls(path, _read_kaggle(path))
        if path := _find_file(roots, _TRUTH_FILE):
            return cls(path, _read_truth(path, roots))
        raise DataError(
            f"the images in {roots[0]} have no labels",
            f"Add one of these files to the folder: {', '.join((*_SYNSET_FILES, _KAGGLE_FILE))}, or {_TRUTH_FILE} with "
            f"{_META_FILE} from the development kit (ILSVRC2012_devkit_t12.tar.gz).",
        )


def _find_file(roots: Iterable[Path], name: str) -> Path | None:
    candidates = (root / place / name for root in roots for place in _LABEL_PLACES)
    return next((path for path in candidates if path.is_file()), None)


def _read_synsets(path: Path) -> dict[int, int]:
    """Lines of `wnid` (line i is image i, so there must be 50,000) or of `file-name wnid`."""
    rows = [line.split() for line in _lines(path)]
    if all(len(row) == 1 for row in rows):
        _check_count(path, len(rows))
        return {number: _label(row[0], path, number) for number, row in enumerate(rows, 1)}
    labels: dict[int, int] = {}
    for line, row in enumerate(rows, 1):
        match = _IMAGE_NAME.fullmatch(Path(row[0]).name) if len(row) > 1 else None
        if match is None:
            raise DataError(f"{path}, line {line}: invalid line {' '.join(row)!r}", "Expected: `FILE WNID` or `WNID`.")
        labels[int(match[1])] = _label(row[1], path, line)
    return labels


def _read_kaggle(path: Path) -> dict[int, int]:
    """Rows of `ImageId,PredictionString`; the string starts with the wnid, followed by boxes."""
    labels: dict[int, int] = {}
    for line, row in enumerate(csv.reader(_lines(path)), 1):
        match = _IMAGE_NAME.fullmatch(row[0].strip()) if len(row) > 1 else None
        if match is not None and row[1].split():
            labels[int(match[1])] = _label(row[1].split()[0], path, line)
        elif line > 1:  # the first line is the header
            raise DataError(f"{path}, line {line}: invalid row", "Expected: ImageId,PredictionString.")
    return labels


def _read_truth(path: Path, roots: tuple[Path, ...]) -> dict[int, int]:
    """Lines of ILSVRC2012_ID (1..1000); the tables of the development kit have their wnids."""
    if meta := _find_file((path.parent, *roots), _META_FILE):
        table, table_path = _read_meta(meta), meta
    elif classes := _find_file((path.parent, *roots), _CLASS_MAP_FILE):
        table, table_path = _read_class_map(classes), classes
    else:
        raise DataError(
            f"{path} has class numbers of the development kit, which are not the labels of the models",
            f"Add the kit's {_META_FILE} (folder data/ of ILSVRC2012_devkit_t12.tar.gz) or {_CLASS_MAP_FILE} to the "
            f"same folder, or use a file with WordNet ids instead, such as {_SYNSET_FILES[0]}.",
        )
    if len(table) != len(imagenet_wnids()) or set(table.values()) != set(imagenet_wnids()):
        raise DataError(f"{table_path} does not have the 1000 classes of ILSVRC 2012", "Download it again.")
    lines = _lines(path)
    _check_count(path, len(lines))
    labels: dict[int, int] = {}
    for number, text in enumerate(lines, 1):
        wnid = table.get(int(text)) if text.isdecimal() else None
        if wnid is None:
            raise DataError(f"{path}, line {number}: {text!r} is not a class number from 1 to 1000")
        labels[number] = _label(wnid, path, number)
    return labels


def _read_meta(path: Path) -> dict[int, str]:
    """ILSVRC2012_ID to wnid for the 1000 classes of the challenge, from the kit's MATLAB file."""
    try:
        loadmat = import_module("scipy.io").loadmat
    except ImportError as error:
        raise DataError(
            f"reading {path} needs SciPy, which is not installed",
            f"Run `pip install scipy`, or add {_CLASS_MAP_FILE} or {_SYNSET_FILES[0]} to the folder.",
        ) from error
    try:
        synsets: Any = loadmat(path, squeeze_me=True)["synsets"]
        pairs = (
            (int(number), str(wnid)) for number, wnid in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)
        )
        return {number: wnid for number, wnid in pairs if 1 <= number <= len(imagenet_wnids())}
    except Exception as error:  # a damaged MATLAB file fails in many ways
        raise DataError(
            f"{path} cannot be read as the kit's {_META_FILE}: {error}", "Download the kit again."
        ) from error


def _read_class_map(path: Path) -> dict[int, str]:
    """Class number to wnid, from lines of `wnid number name`."""
    table: dict[int, str] = {}
    for line, text in enumerate(_lines(path), 1):
        words = text.split()
        if len(words) < 2 or not WNID_PATTERN.fullmatch(words[0]) or not words[1].isdecimal():  # noqa: PLR2004
            raise DataError(f"{path}, line {line}: invalid line {text!r}", "Expected: `WNID NUMBER NAME`.")
        table[int(words[1])] = words[0]
    return table


def _lines(path: Path) -> list[str]:
    """The stripped lines of a text file, without empty lines at the end."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text: {error}") from error


def _check_count(path: Path, count: int) -> None:
    if count != _VAL_COUNT:
        raise DataError(
            f"{path} has {count} lines, but the set has {_VAL_COUNT} images",
            "Use the file of the whole set, or one with lines of `FILE WNID`.",
        )


def _label(wnid: str, path: Path, line: int) -> int:
    label = _label_places().get(wnid)
    if label is None:
        raise DataError(
            f"{path}, line {line}: {wnid!r} is not a class of ImageNet-1k", "Expected: ids such as n01440764."
        )
    return label


@lru_cache(maxsize=1)
def _label_places() -> dict[str, int]:
    return {wnid: label for label, wnid in enumerate(imagenet_wnids())}
