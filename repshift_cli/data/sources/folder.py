"""Images in folders: one folder per class, or any tree of images without labels."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from repshift_cli.data.dataset import DatasetInfo, ImageDataset
from repshift_cli.data.decode import IMAGE_SUFFIXES, decode_file
from repshift_cli.data.sources.class_labels import NamedClasses, class_list, class_root, named_classes
from repshift_cli.errors import DataError
from repshift_cli.utils.documents import readable
from repshift_cli.utils.files import sha256_of

if TYPE_CHECKING:
    from PIL import Image

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

    def __init__(
        self,
        name: str,
        root: Path,
        samples: Sequence[tuple[Path, int]],
        classes: tuple[str, ...],
        info: DatasetInfo = DatasetInfo(),  # noqa: B008
    ) -> None:
        self.name = name
        self.info = info
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
        return f"{file_fingerprint(path, self.root, with_time=True)}:{label}"


def open_folder(name: str, root: Path, class_order: str | None = None) -> NamedClasses:
    """Open a folder of class folders; an empty class folder counts as a class.

    Args:
        class_order: as for `named_classes`.

    Raises:
        DataError: the folder is missing, has no class folders, or they have no images; or as `named_classes`.
    """
    top = check_folder(root)

    def listing(parts: tuple[str, ...]) -> tuple[list[str], bool]:
        folder = top.joinpath(*parts)
        return [each.name for each in class_folders(folder)], _images_in(folder) > 0

    parts, notes = class_root(str(root), listing, class_list(class_order))
    root = top.joinpath(*parts)
    folders = class_folders(root)
    if not folders:
        raise DataError(f"there are no class folders in {root}", _LAYOUT)
    images = class_images(name, root, {folder: place for place, folder in enumerate(folders)}, ())
    if not len(images):
        raise DataError(f"there are no images in the {len(folders)} class folders of {root}", _LAYOUT)
    if outside := _images_in(root):
        notes = (*notes, f"{outside} images in {root} are in no class folder and were left out")
    found = [folder.name for folder in folders]
    info = replace(images.info, notes=(*notes, *images.info.notes))
    return named_classes(images, [found[place] for _, place in images.samples], found, class_order, info)


def open_image_tree(root: Path) -> FileDataset:
    """All images below a folder, without labels.

    Raises:
        DataError: there are none.
    """
    left_out: Counter[str] = Counter()
    paths = find_files(root, IMAGE_SUFFIXES, left_out)
    if not paths:
        raise DataError(f"there are no images in {root}", f"Give a folder with images ({_SUFFIXES}).")
    return FileDataset(str(root), root, [(path, -1) for path in paths], (), DatasetInfo(left_out=left_out))


def class_images(name: str, root: Path, folders: Mapping[Path, int], classes: tuple[str, ...]) -> FileDataset:
    """The images in class folders with the label of each folder; other arguments as for `FileDataset`.

    Raises:
        DataError: by a link, an image is in two class folders.
    """
    left_out: Counter[str] = Counter()
    owner: dict[str, Path] = {}  # class folder by real folder
    linked: dict[Path, tuple[Path, Path]] = {}
    found: list[tuple[Path, Path]] = []
    samples: list[tuple[Path, int]] = []
    for folder in folders:
        for path, real in _walk(folder, IMAGE_SUFFIXES, left_out):
            if (other := owner.setdefault(real, folder)) != folder:
                raise _linked(other, folder)
            found.append((path, folder))
    for path, folder in found:
        if path.is_symlink():
            file = Path(os.path.realpath(path))
            target = owner.get(str(file.parent)) if has_suffix(file.name, IMAGE_SUFFIXES) and file.exists() else None
            first = linked.setdefault(file, (path, folder) if target is None else (file, target))
            if first[1] != folder:
                raise _linked(first[0], path)
            if first[0] != path:
                continue
        samples.append((path, folders[folder]))
    links = len(found) - len(samples)
    notes = (f"{links} links to images of the same class left out",) if links else ()
    return FileDataset(name, root, samples, classes, DatasetInfo(left_out=left_out, notes=notes))


def _images_in(folder: Path) -> int:
    return sum(has_suffix(entry.name, IMAGE_SUFFIXES) for entry in folder.iterdir())


def _linked(one: Path, other: Path) -> DataError:
    return DataError(f"{one} and {other} are the same by a link, but they belong to two classes", "Remove one of them.")


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
        return sorted(entry for entry in root.iterdir() if entry.is_dir() and not is_hidden(entry.name))
    except OSError as error:
        raise DataError(f"the folder {root} cannot be listed: {error.strerror or error}") from error


def find_images(root: Path) -> list[Path]:
    """All image files below `root`; see `find_files`."""
    return find_files(root, IMAGE_SUFFIXES)


def find_files(root: Path, suffixes: Collection[str], left_out: Counter[str] | None = None) -> list[Path]:
    """All files below `root` with these suffixes, at any depth, in the order of their names.

    Links to folders are followed once. A broken link counts as a file, so that it is reported when it is read.

    Args:
        left_out: counts the suffixes of the other files.

    Raises:
        DataError: a folder cannot be listed.
    """
    return [path for path, _ in _walk(root, suffixes, left_out)]


def file_fingerprint(path: Path, root: Path, with_time: bool = False) -> str:
    """Relative name and size in bytes of a file, and the time of the last write in nanoseconds; -1 where unknown."""
    try:
        status = path.stat()
        size, time = status.st_size, status.st_mtime_ns
    except OSError:
        size = time = -1
    return f"{path.relative_to(root).as_posix()}:{size}" + (f":{time}" if with_time else "")


def identical_files(paths: Sequence[Path]) -> int:
    """Number of files whose bytes are those of another one of them; only files of one size are read."""
    by_size: dict[int, list[Path]] = {}
    for path in paths:
        with suppress(OSError):
            by_size.setdefault(path.stat().st_size, []).append(path)
    digests: Counter[str] = Counter()
    for path in (path for group in by_size.values() if len(group) > 1 for path in group):
        with suppress(OSError):
            digests[sha256_of(path)] += 1
    return sum(count for count in digests.values() if count > 1)


def readable_name(path: PurePath | str) -> str:
    """A path as text that can be encoded: bytes that are not UTF-8 are escaped."""
    return str(readable(path if isinstance(path, str) else path.as_posix()))


def _walk(root: Path, suffixes: Collection[str], left_out: Counter[str] | None) -> list[tuple[Path, str]]:
    """The files as `find_files`, each with the real path of its folder."""
    found: list[tuple[Path, str]] = []
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_raise_unlistable):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a parent folder
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = [name for name in subfolders if not is_hidden(name)]
        found += [(Path(folder, name), real) for name in names if has_suffix(name, suffixes)]
        if left_out is not None:
            left_out.update(ending(name) for name in names if not (name.startswith(".") or has_suffix(name, suffixes)))
    return sorted(found, key=lambda entry: entry[0].relative_to(root).parts)


def ending(name: str) -> str:
    """The lower-case suffix of a file name, for counts."""
    return PurePath(name).suffix.lower() or "no ending"


def is_hidden(folder_name: str) -> bool:
    """Whether a folder is never a class."""
    return (folder_name.startswith(".") and folder_name != "..") or folder_name == "__MACOSX"


def has_suffix(name: str, suffixes: Collection[str]) -> bool:
    """Whether a file has one of these suffixes, and is not hidden: macOS writes `._name.jpg` next to `name.jpg`."""
    return not name.startswith(".") and Path(name).suffix.lower() in suffixes


def _raise_unlistable(error: OSError) -> None:
    raise DataError(f"the folder {error.filename} cannot be listed: {error.strerror or error}") from error
