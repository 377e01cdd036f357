"""Images in folders: one folder per class, or any tree of images without labels."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from repshift_cli.data.dataset import ImageDataset
from repshift_cli.data.decode import decode_file
from repshift_cli.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
"""Lower-case suffixes of image files."""

_SPLIT_NAMES = ("val", "validation", "test", "train")
"""Names of folders that are splits of a dataset and not classes, by preference."""

_SUFFIXES = ", ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
_LAYOUT = f"Lay it out with one folder per class: FOLDER/cat/1.jpg, FOLDER/dog/2.png, ... ({_SUFFIXES})."
_FOLDER_HINT = f"Give the path of a folder with images ({_SUFFIXES})."


class FileDataset(ImageDataset):
    """Image files with labels.

    Args:
        name: the name that the user gave.
        root: the folder of all files.
        samples: file and label of each image.
        classes: the class names; empty if there are no labels.
    """

    def __init__(self, name: str, root: Path, samples: Sequence[tuple[Path, int]], classes: tuple[str, ...]) -> None:
        self.name = name
        self.root = root
        self.samples = samples
        self._classes = classes

    @property
    def description(self) -> str:
        present = len({label for _, label in self.samples})
        of_classes = f" of {present} classes" if self._classes else ""
        return f"{len(self)} images{of_classes} in {self.root}"

    @property
    def classes(self) -> tuple[str, ...]:
        return self._classes

    def __len__(self) -> int:
        return len(self.samples)

    def sample_id(self, index: int) -> str:
        return str(self.samples[index][0])

    def load(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return decode_file(path), label

    def fingerprint(self, index: int) -> str:
        return file_fingerprint(self.samples[index][0], self.root)

    def key(self, index: int) -> str:
        return readable_name(self.samples[index][0].relative_to(self.root))

    def stamp(self, index: int) -> str:
        path, label = self.samples[index]
        return f"{file_fingerprint(path, self.root)}:{_written_at(path)}:{label}"


class ClassFolders(FileDataset):
    """One folder per class, labelled in sorted order; with ImageNet ids and a head of 1000, in ImageNet's order."""

    def for_head(self, num_classes: int) -> FileDataset:
        from repshift_cli.data.sources.class_labels import classes_for_head

        classes = classes_for_head(self.name, self.classes, num_classes)
        if classes == self.classes:
            return self
        labels = [classes.index(name) for name in self.classes]
        samples = [(path, labels[label]) for path, label in self.samples]
        return FileDataset(self.name, self.root, samples, classes)


def open_folder(name: str, root: Path) -> ClassFolders:
    """Open a folder of class folders; an empty class folder counts as a class.

    Raises:
        DataError: the folder is missing, has no class folders, or they have no images.
    """
    root = _evaluation_split(check_folder(root))
    folders = class_folders(root)
    if not folders:
        raise DataError(f"there are no class folders in {root}", _LAYOUT)
    samples = [(path, label) for label, folder in enumerate(folders) for path in find_images(folder)]
    if not samples:
        raise DataError(f"there are no images in the {len(folders)} class folders of {root}", _LAYOUT)
    return ClassFolders(name, root, samples, tuple(folder.name for folder in folders))


def open_image_tree(root: Path) -> FileDataset:
    """All images below a folder, without labels.

    Raises:
        DataError: there are none.
    """
    paths = find_images(root)
    if not paths:
        raise DataError(f"there are no images in {root}", f"Give a folder with images ({_SUFFIXES}).")
    return FileDataset(str(root), root, [(path, -1) for path in paths], ())


def check_folder(path: Path) -> Path:
    """Return the folder; raises DataError if it does not exist or is a file."""
    if not path.exists():
        raise DataError(f"the folder {path} does not exist", _FOLDER_HINT)
    if not path.is_dir():
        raise DataError(f"{path} is a file, not a folder", _FOLDER_HINT)
    return path


def class_folders(root: Path) -> list[Path]:
    """The folders directly in `root`, sorted by name, without hidden ones.

    Raises:
        DataError: `root` cannot be listed.
    """
    try:
        return sorted(entry for entry in root.iterdir() if entry.is_dir() and not _is_hidden(entry.name))
    except OSError as error:
        raise DataError(f"the folder {root} cannot be listed: {error.strerror or error}") from error


def find_images(root: Path) -> list[Path]:
    """All image files below `root`; see `find_files`."""
    return find_files(root, IMAGE_SUFFIXES)


def find_files(root: Path, suffixes: Collection[str]) -> list[Path]:
    """All files below `root` with these suffixes, at any depth, in the order of their names.

    Links to folders are followed once. A broken link counts as a file, so that it is reported when it is read.

    Raises:
        DataError: a folder cannot be listed.
    """
    return sorted(_walk(root, suffixes), key=lambda path: path.relative_to(root).parts)


def file_fingerprint(path: Path, root: Path) -> str:
    """Relative name and size in bytes of a file (-1 where it is unknown)."""
    try:
        size = path.stat().st_size
    except OSError:
        size = -1
    return f"{path.relative_to(root).as_posix()}:{size}"


def readable_name(path: PurePath) -> str:
    """A relative path as text that can be encoded: bytes that are not UTF-8 are escaped."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def _written_at(path: Path) -> int:
    """Time of the last write in nanoseconds; -1 where it is unknown."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return -1


def _walk(root: Path, suffixes: Collection[str]) -> Iterator[Path]:
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_raise_unlistable):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a parent folder
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = [name for name in subfolders if not _is_hidden(name)]
        for name in names:
            path = Path(folder, name)
            if _has_suffix(name, suffixes) and (path.is_file() or path.is_symlink()):
                yield path


def _is_hidden(folder_name: str) -> bool:
    return folder_name.startswith(".") or folder_name == "__MACOSX"


def _has_suffix(name: str, suffixes: Collection[str]) -> bool:
    # macOS writes a "._name.jpg" next to each file that it copies
    return not name.startswith(".") and Path(name).suffix.lower() in suffixes


def _raise_unlistable(error: OSError) -> None:
    raise DataError(f"the folder {error.filename} cannot be listed: {error.strerror or error}") from error


def _evaluation_split(root: Path) -> Path:
    """The evaluation split of a folder that has only splits (val, test, train), else the folder."""
    names = {folder.name for folder in class_folders(root)}
    if not names or not names <= set(_SPLIT_NAMES):
        return root
    split = root / next(name for name in _SPLIT_NAMES if name in names)
    return split if class_folders(split) else root
