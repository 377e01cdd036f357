"""The ImageNet-1k validation set (ILSVRC 2012), in its common layouts.

The label of an image is the index of its WordNet id among the 1000 sorted ids, as in the training of ImageNet models.
The development kit numbers the classes in another order; its numbers are used only with a table of their WordNet ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repshift_cli.data.dataset import ImageDataset
from repshift_cli.data.decode import decode_bytes
from repshift_cli.data.sources.class_labels import WNID_PATTERN, imagenet_wnids
from repshift_cli.data.sources.folder import FileDataset, class_folders, class_images, find_images
from repshift_cli.data.sources.tar import read_member, tar_members
from repshift_cli.errors import DataError
from repshift_cli.utils.files import open_file, read_text
from repshift_cli.utils.suggest import first_names

if TYPE_CHECKING:
    from PIL import Image

_NAME = "imagenet-val"

_TAR = "ILSVRC2012_img_val.tar"

_VAL_COUNT = 50_000

_IMAGE_NAME = re.compile(r"ILSVRC2012_val_(\d{8})(?:_(n\d{8}))?(\.\w+)?", re.IGNORECASE)
"""The official name, and the one of the Hugging Face hub, which has the label in it."""

_NUMBER = re.compile(r"\d{1,9}")

_LARGEST_TABLE = 1 << 26
"""Maximum bytes of a file of labels."""

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

_KAGGLE_FILE, _KAGGLE_HEADER = "LOC_val_solution.csv", "ImageId"

_TRUTH_FILE = "ILSVRC2012_validation_ground_truth.txt"

_META_FILE = "meta.mat"

_LAYOUT = f"""Download the set from https://image-net.org. Supported layouts of DIR:
  DIR/n01440764/*.JPEG, DIR/n01443537/*.JPEG, ...   (or below DIR/val)
  DIR/ILSVRC2012_val_00000001.JPEG, ...             (or below DIR/val) with a label file
  DIR/{_TAR}                        with a label file
  DIR/ILSVRC2012_val_00000001_n01751748.JPEG, ...
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
    found = _open(data_dir) if data_dir.is_dir() else _TarValidation(data_dir, data_dir.parent)
    if len(found) != _VAL_COUNT:
        note = f"{len(found)} of the {_VAL_COUNT} images of the set are there"
        found.info = replace(found.info, notes=(*found.info.notes, note))
    return found


def _open(data_dir: Path) -> ImageDataset:
    places = [data_dir / place for place in _IMAGE_PLACES if (data_dir / place).is_dir()]
    for place in places:
        if any(WNID_PATTERN.fullmatch(folder.name) for folder in class_folders(place)):
            hint = "Remove them, or use `--dataset folder --data-dir DIR` for your own classes."
            return known_class_folders(_NAME, place, imagenet_wnids(), hint)
        if flat := _flat_images(place):
            _check_once([number for _, number in flat], place)
            labels = _labels_of([(path.name, number) for path, number in flat], place, data_dir)
            samples = [(path, label) for (path, _), label in zip(flat, labels, strict=True)]
            return FileDataset(_NAME, place, samples, imagenet_wnids())
    for place in places:
        if (place / _TAR).exists():
            return _TarValidation(place / _TAR, data_dir)
    raise DataError(f"no ImageNet validation images were found in {data_dir}", _LAYOUT)


def known_class_folders(name: str, root: Path, classes: tuple[str, ...], hint: str) -> FileDataset:
    """The images in the class folders of `root`, each with the index of its folder among `classes`.

    Args:
        name: of the dataset.
        hint: what to do about other folders.

    Raises:
        DataError: a folder with images has another name, or there are no images.
    """
    labels = {known: label for label, known in enumerate(classes)}
    folders = class_folders(root)
    if unknown := [folder.name for folder in folders if folder.name not in labels and find_images(folder)]:
        raise DataError(
            f"{len(unknown)} folders with images in {root} are not classes of {name}: {first_names(unknown)}", hint
        )
    known = sorted((labels[folder.name], folder) for folder in folders if folder.name in labels)
    found = class_images(name, root, {folder: label for label, folder in known}, classes)
    if not len(found):
        raise DataError(f"the class folders in {root} have no images", hint)
    return found


def _flat_images(root: Path) -> list[tuple[Path, int]]:
    """Files with official names directly in `root`, each with its number, sorted by number."""
    matches = ((path, _IMAGE_NAME.fullmatch(path.name)) for path in root.iterdir())
    return sorted(((path, int(match[1])) for path, match in matches if match), key=lambda entry: (entry[1], entry[0]))


def _labels_of(images: Sequence[tuple[str, int]], *roots: Path) -> list[int]:
    """The labels of images by name and number: from the names, else from the first file of labels in the folders."""
    wnids = [match[2] if (match := _IMAGE_NAME.fullmatch(name)) else None for name, _ in images]
    if all(wnids):
        if unknown := sorted({str(wnid) for wnid in wnids} - set(imagenet_wnids())):
            raise DataError(f"file names in {roots[0]} have other ids than ImageNet-1k: {first_names(unknown)}")
        return [_label_places()[str(wnid)] for wnid in wnids]
    path, labels = _read_labels(roots)
    if missing := next((name for name, number in images if number not in labels), None):
        raise DataError(f"{path} has no label for {missing}", "Use the file of the whole set.")
    return [labels[number] for _, number in images]


class _TarValidation(ImageDataset):
    """The official tar. Only offsets and sizes of its members are kept, so any process can read any image."""

    name = _NAME

    def __init__(self, path: Path, data_dir: Path) -> None:
        self.path = path
        found = ((validation_number(Path(member.name).name), member) for member in tar_members(path))
        numbered = [(number, member) for number, member in found if number is not None]
        numbered.sort(key=lambda entry: entry[0])
        if not numbered:
            raise DataError(f"there are no ImageNet validation images in {path}", _LAYOUT)
        _check_once([number for number, _ in numbered], path)
        self.members = [member for _, member in numbered]
        self.names = [Path(member.name).name for member in self.members]
        numbers = [number for number, _ in numbered]
        self.labels = _labels_of(list(zip(self.names, numbers, strict=True)), path.parent, data_dir)
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


def _read_labels(roots: Sequence[Path]) -> tuple[Path, dict[int, int]]:
    """The first file of labels in or near one of the folders, and its labels by official number."""
    for name in (*_SYNSET_FILES, _KAGGLE_FILE):
        if path := _find_file(roots, name):
            return path, _read_names(path)
    if path := _find_file(roots, _TRUTH_FILE):
        return path, _read_truth(path, roots)
    raise DataError(
        f"the images in {roots[0]} have no labels",
        f"Add one of these files to the folder: {', '.join((*_SYNSET_FILES, _KAGGLE_FILE))}, or {_TRUTH_FILE} with "
        f"{_META_FILE} from the development kit (ILSVRC2012_devkit_t12.tar.gz).",
    )


def _find_file(roots: Iterable[Path], name: str) -> Path | None:
    candidates = (root / place / name for root in roots for place in _LABEL_PLACES)
    return next((path for path in candidates if path.is_file()), None)


def _read_names(path: Path) -> dict[int, int]:
    """Lines of `WNID` (line i is image i, so there must be 50,000), `FILE WNID`, or Kaggle's `FILE,WNID BOX ...`."""
    rows = [text.replace('"', "").replace(",", " ").split() for text in _lines(path)]
    if all(len(row) == 1 for row in rows):
        _check_count(path, len(rows))
        return {number: _label(row[0], path, number) for number, row in enumerate(rows, 1)}
    labels: dict[int, int] = {}
    for line, row in enumerate(rows, 1):
        if line == 1 and row[:1] == [_KAGGLE_HEADER]:
            continue
        match = _IMAGE_NAME.fullmatch(Path(row[0]).name) if len(row) > 1 else None
        if match is None:
            raise DataError(f"{path}, line {line}: invalid line {' '.join(row)[:60]!r}", "Expected: `FILE WNID`.")
        number = int(match[1])
        if number in labels:
            raise DataError(f"{path}, line {line}: {number} is there more than once", "Download the file again.")
        labels[number] = _label(row[1], path, line)
    return labels


def _read_truth(path: Path, roots: Sequence[Path]) -> dict[int, int]:
    """Lines of ILSVRC2012_ID (1..1000); the table of the development kit has their wnids."""
    meta = _find_file((path.parent, *roots), _META_FILE)
    if meta is None:
        raise DataError(
            f"{path} has class numbers of the development kit, which are not the labels of the models",
            f"Add the kit's {_META_FILE} (folder data/ of ILSVRC2012_devkit_t12.tar.gz) to the same folder, or use a "
            f"file with WordNet ids instead, such as {_SYNSET_FILES[0]}.",
        )
    table = _read_meta(meta)
    if len(table) != len(imagenet_wnids()) or set(table.values()) != set(imagenet_wnids()):
        raise DataError(f"{meta} does not have the 1000 classes of ILSVRC 2012", "Download it again.")
    lines = _lines(path)
    _check_count(path, len(lines))
    labels: dict[int, int] = {}
    for number, text in enumerate(lines, 1):
        wnid = table.get(int(text)) if _NUMBER.fullmatch(text) else None
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
            f"Run `pip install scipy`, or add {_SYNSET_FILES[0]} to the folder.",
        ) from error
    try:
        with open_file(path, _LARGEST_TABLE) as file:
            synsets: Any = loadmat(file, squeeze_me=True)["synsets"]
        pairs = (
            (int(number), str(wnid)) for number, wnid in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)
        )
        return {number: wnid for number, wnid in pairs if 1 <= number <= len(imagenet_wnids())}
    except Exception as error:  # a damaged MATLAB file fails in many ways
        raise DataError(
            f"{path} cannot be read as the kit's {_META_FILE}: {error}", "Download the kit again."
        ) from error


def _lines(path: Path) -> list[str]:
    """The stripped lines of a text file, without empty lines at the end."""
    try:
        return [line.strip() for line in read_text(path, _LARGEST_TABLE).rstrip().splitlines()]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
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
            f"{path}, line {line}: {wnid[:20]!r} is not a class of ImageNet-1k", "Expected: ids such as n01440764."
        )
    return label


@lru_cache(maxsize=1)
def _label_places() -> dict[str, int]:
    return {wnid: label for label, wnid in enumerate(imagenet_wnids())}
