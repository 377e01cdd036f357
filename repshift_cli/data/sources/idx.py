"""Fashion-MNIST (Xiao et al. 2017) in IDX files, the format of MNIST: a header, then unsigned bytes."""

from __future__ import annotations

import gzip
import zlib
from hashlib import sha256
from math import prod
from pathlib import Path

import numpy as np
from PIL import Image

from repshift_cli.data.dataset import ImageDataset
from repshift_cli.data.preprocessing import LARGEST_SIDE
from repshift_cli.errors import DataError
from repshift_cli.utils.files import open_file

FASHION = "fashion-mnist"

FASHION_FOLDERS = (FASHION, "FashionMNIST/raw", "FashionMNIST")
"""Names of the folders that may hold the files: that of Debian, and those of torchvision."""

FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)

_PACKAGE_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where the Debian package dataset-fashion-mnist has the files."""

_HINT = (
    "Install the Debian package dataset-fashion-mnist, or give a folder with {}-images-idx3-ubyte and "
    "{}-labels-idx1-ubyte (or both with .gz) with --data-dir DIR or REPSHIFT_DATA_DIR."
)

_LARGEST = 1 << 28
"""Maximum bytes of a file, and of what it decompresses to."""

_UNSIGNED_BYTES = 8
_WORD = 4


class IdxDataset(ImageDataset):
    """Images and labels of one split, in memory.

    Attributes:
        images: uint8 `[n, H, W]`.
        labels: uint8 `[n]`.
    """

    name = FASHION
    classes = FASHION_CLASSES

    def __init__(self, folder: Path, split: str) -> None:
        prefix = "t10k" if split == "test" else split
        hint = _HINT.format(prefix, prefix)
        images = _file(folder, f"{prefix}-images-idx3-ubyte", hint)
        labels = _file(folder, f"{prefix}-labels-idx1-ubyte", hint)
        self.folder = folder
        self.split = split
        self.images = read_idx(images, 3)
        self.labels = read_idx(labels, 1)
        if len(self.images) != len(self.labels):
            raise DataError(
                f"{images} has {len(self.images)} images, {labels} has {len(self.labels)} labels",
                "Use two files of the same set.",
            )
        if len(invalid := np.flatnonzero(self.labels >= len(FASHION_CLASSES))):
            raise DataError(
                f"{labels}: label {self.labels[invalid[0]]} of image {invalid[0]} is not in 0 to "
                f"{len(FASHION_CLASSES) - 1}",
                hint,
            )

    @property
    def description(self) -> str:
        return f"{len(self)} {self.split} images of {self.name} in {self.folder}"

    def __len__(self) -> int:
        return len(self.images)

    def sample_id(self, index: int) -> str:
        return f"{self.name}/{self.split}/{index}"

    def load(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert("RGB"), int(self.labels[index])

    def fingerprint(self, index: int) -> str:
        return f"{self.sample_id(index)}:{sha256(self.images[index].tobytes()).hexdigest()}"

    def stamp(self, index: int) -> str:
        return f"{self.fingerprint(index)}:{self.labels[index]}"


def open_fashion(data_dir: Path | None, train: bool = False) -> IdxDataset:
    """Open the test split, or the training split, in `data_dir` or in the folder of the Debian package.

    Raises:
        DataError: there is no folder, a file is missing or damaged, or labels and images do not fit.
    """
    prefix = "train" if train else "t10k"
    folder = data_dir or _PACKAGE_FOLDER
    if not folder.is_dir():
        problem = f"{folder} is not a folder" if data_dir else f"the dataset {FASHION} needs a folder"
        raise DataError(problem, _HINT.format(prefix, prefix))
    return IdxDataset(folder, "train" if train else "test")


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes, decompressed if its name ends with `.gz`.

    Returns:
        The values, uint8, with as many dimensions as given.

    Raises:
        DataError: it is not such a file, is empty or too large, or its size is not that of its header.
        OSError: it cannot be read.
    """
    with open_file(path, _LARGEST) as file:
        stream = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
        try:
            header = stream.read(_WORD * (1 + dimensions))
            shape = _shape(header, dimensions, path)
            content = stream.read(prod(shape) + 1)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path} cannot be decompressed: {error}", "Download it again.") from error
    if len(content) != prod(shape):
        found = "more" if len(content) > prod(shape) else str(len(content))
        raise DataError(f"{path} has {found} bytes of values, its header states {prod(shape)}", "Download it again.")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _shape(header: bytes, dimensions: int, path: Path) -> tuple[int, ...]:
    expected = bytes((0, 0, _UNSIGNED_BYTES, dimensions))
    if header[:_WORD] != expected or len(header) != _WORD * (1 + dimensions):
        raise DataError(
            f"{path} is not an IDX file of unsigned bytes with {dimensions} dimensions: it starts with "
            f"{header[:_WORD].hex() or 'nothing'}, not {expected.hex()}",
            "Give the files of Fashion-MNIST.",
        )
    shape = tuple(int(size) for size in np.frombuffer(header, ">u4")[1:])
    if not all(shape) or max(shape[1:], default=1) > LARGEST_SIDE or prod(shape) > _LARGEST:
        raise DataError(
            f"{path}: its header states the shape {'x'.join(map(str, shape))}",
            f"Sides must be 1 to {LARGEST_SIDE}, and all values together at most {_LARGEST} bytes.",
        )
    return shape


def _file(folder: Path, name: str, hint: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return path
    raise DataError(f"there is no {name} or {name}.gz in {folder}", hint)
