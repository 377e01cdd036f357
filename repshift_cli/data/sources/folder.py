"""Images, videos or spectrograms in folders: one folder per class, or any tree without labels."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Literal

from repshift_cli.data.dataset import DatasetInfo, EncodedFile, ImageDataset
from repshift_cli.data.decode import FRAME_SUFFIXES, IMAGE_SUFFIXES, VIDEO_SUFFIXES, decode_file
from repshift_cli.data.sources.class_labels import NamedClasses, class_list, class_root, named_classes
from repshift_cli.errors import DataError
from repshift_cli.utils.documents import readable
from repshift_cli.utils.files import sha256_of

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Media:
    """What the files of a dataset are.

    Attributes:
        unit: what they are called.
        suffixes: of the files.
        taken: what a model for them takes.
        example: of class folders.
        instead: what can stand for a file, for hints.
    """

    unit: Literal["images", "videos", "spectrograms"]
    suffixes: Collection[str]
    taken: str
    example: str
    instead: str = ""

    @property
    def named(self) -> str:
        """The suffixes, for hints."""
        return ", ".join(suffix[1:] for suffix in self.suffixes) + self.instead

    @property
    def layout(self) -> str:
        """How class folders are laid out."""
        return f"Lay it out with one folder per class: {self.example}, ... ({self.named})."

    def nothing(self, where: str, others: Mapping[str, int]) -> str:
        """That there are none of them, only `others`: counts by suffix."""
        for other in MEDIA.values():
            if other is not self and (count := sum(others.get(suffix, 0) for suffix in other.suffixes)):
                return f"there are no {self.unit} in {where}, but {count} {other.unit}; the model takes {self.taken}"
        return f"there are no {self.unit} in {where}"


IMAGES = Media("images", sorted(IMAGE_SUFFIXES), "images", "FOLDER/cat/1.jpg, FOLDER/dog/2.png")
VIDEOS = Media(
    *("videos", VIDEO_SUFFIXES, "clips", "FOLDER/run/1.mp4, FOLDER/swim/2.avi"),
    f"; or a folder of frames each: {', '.join(sorted(suffix[1:] for suffix in FRAME_SUFFIXES))}",
)
SPECTROGRAMS = Media("spectrograms", (".npy",), "spectrograms", "FOLDER/rain/1.npy, FOLDER/dog/2.npy")
MEDIA = {"image": IMAGES, "clip": VIDEOS, "spectrogram": SPECTROGRAMS}
"""By the unit of `Preprocessing`."""


class FileDataset(ImageDataset):
    """Files with labels: images, spectrograms, or videos, each of which is a file or a folder of frames.

    Args:
        name: the name that the user gave.
        root: the folder of all files.
        samples: file and label of each of them.
        classes: the class names; empty if there are no labels.
        media: what the files are.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        samples: Sequence[tuple[Path, int]],
        classes: tuple[str, ...],
        info: DatasetInfo = DatasetInfo(),  # noqa: B008
        *,
        media: Media = IMAGES,
    ) -> None:
        self.name = name
        self.unit = media.unit
        self.info = info
        self.root = root
        self.samples = samples
        self._classes = classes

    @property
    def description(self) -> str:
        present = len({label for _, label in self.samples})
        of_classes = f" of {present} classes" if self._classes else ""
        return f"{len(self)} {self.unit}{of_classes} in {self.root}"

    @property
    def classes(self) -> tuple[str, ...]:
        return self._classes

    def __len__(self) -> int:
        return len(self.samples)

    def sample_id(self, index: int) -> str:
        return str(self.samples[index][0])

    def load(self, index: int) -> tuple[Image.Image | EncodedFile, int]:
        path, label = self.samples[index]
        return decode_file(path) if self.unit == "images" else EncodedFile(path), label

    def fingerprint(self, index: int) -> str:
        return self._fingerprint(index, with_time=False)

    def key(self, index: int) -> str:
        return readable_name(self.samples[index][0].relative_to(self.root))

    def stamp(self, index: int) -> str:
        return f"{self._fingerprint(index, with_time=True)}:{self.samples[index][1]}"

    def _fingerprint(self, index: int, with_time: bool) -> str:
        """`file_fingerprint` of a file, or of all frames of a video."""
        path = self.samples[index][0]
        files = find_files(path, FRAME_SUFFIXES) if self.unit == "videos" and path.is_dir() else [path]
        return "\n".join(file_fingerprint(file, self.root, with_time) for file in files)


def open_folder(name: str, root: Path, class_order: str | None = None, media: Media = IMAGES) -> NamedClasses:
    """Open a folder of class folders; an empty class folder counts as a class.

    Args:
        class_order: as for `named_classes`.

    Raises:
        DataError: the folder is missing, has no class folders, or they have no such files; or as `named_classes`.
    """
    top = check_folder(root, media)

    def listing(parts: tuple[str, ...]) -> tuple[list[str], bool]:
        folder = top.joinpath(*parts)
        return [each.name for each in class_folders(folder)], _files_in(folder, media) > 0

    parts, notes = class_root(str(root), listing, class_list(class_order))
    root = top.joinpath(*parts)
    folders = class_folders(root)
    if not folders:
        raise DataError(f"there are no class folders in {root}", media.layout)
    images = class_images(name, root, {folder: place for place, folder in enumerate(folders)}, (), media)
    if not len(images):
        where = f"the {len(folders)} class folders of {root}"
        raise DataError(media.nothing(where, images.info.left_out), media.layout)
    if outside := _files_in(root, media):
        notes = (*notes, f"{outside} {media.unit} in {root} are in no class folder and were left out")
    found = [folder.name for folder in folders]
    info = replace(images.info, notes=(*notes, *images.info.notes))
    return named_classes(images, [found[place] for _, place in images.samples], found, class_order, info)


def open_tree(root: Path, media: Media = IMAGES) -> FileDataset:
    """All images or spectrograms below a folder, without labels.

    Raises:
        DataError: there are none.
    """
    left_out: Counter[str] = Counter()
    paths = find_files(root, media.suffixes, left_out)
    if not paths:
        raise DataError(media.nothing(str(root), left_out), f"Give a folder with {media.unit} ({media.named}).")
    info = DatasetInfo(left_out=left_out)
    return FileDataset(str(root), root, [(path, -1) for path in paths], (), info, media=media)


def open_videos(root: Path) -> FileDataset:
    """Video files and folders of frames at any depth, or one file, without labels.

    Raises:
        DataError: there are none.
    """
    hint = f"Give a folder with videos ({VIDEOS.named})."
    if not root.exists():
        raise DataError(f"the folder {root} does not exist", hint)
    if root.is_file():
        return FileDataset(str(root), root.parent, [(root, -1)], (), media=VIDEOS)
    folders = {path.parent for path in find_files(root, FRAME_SUFFIXES)}
    paths = sorted([*find_files(root, VIDEO_SUFFIXES), *folders])
    if not paths:
        raise DataError(f"there are no videos in {root}", hint)
    info = DatasetInfo(notes=_note_frames(len(folders), root))
    return FileDataset(str(root), root, [(path, -1) for path in paths], (), info, media=VIDEOS)


def class_images(
    name: str, root: Path, folders: Mapping[Path, int], classes: tuple[str, ...], media: Media = IMAGES
) -> FileDataset:
    """The files in class folders with the label of each folder; other arguments as for `FileDataset`.

    Raises:
        DataError: by a link, a file is in two class folders.
    """
    left_out: Counter[str] = Counter()
    owner: dict[str, Path] = {}  # class folder by real folder
    linked: dict[Path, tuple[Path, Path]] = {}
    found: list[tuple[Path, Path]] = []
    samples: list[tuple[Path, int]] = []
    for folder in folders:
        for path, real in _members(folder, media, left_out):
            if (other := owner.setdefault(real, folder)) != folder:
                raise _linked(other, folder)
            found.append((path, folder))
    for path, folder in found:
        if path.is_symlink():
            file = Path(os.path.realpath(path))
            target = owner.get(str(file.parent)) if has_suffix(file.name, media.suffixes) and file.exists() else None
            first = linked.setdefault(file, (path, folder) if target is None else (file, target))
            if first[1] != folder:
                raise _linked(first[0], path)
            if first[0] != path:
                continue
        samples.append((path, folders[folder]))
    links = len(found) - len(samples)
    notes = _note_frames(sum(not has_suffix(path.name, media.suffixes) for path, _ in samples), root)
    notes += (f"{links} links to {media.unit} of the same class left out",) if links else ()
    return FileDataset(name, root, samples, classes, DatasetInfo(left_out=left_out, notes=notes), media=media)


def _members(folder: Path, media: Media, left_out: Counter[str]) -> list[tuple[Path, str]]:
    """The files of a class, or folders of frames below its folder, each with the real path of a folder of its own."""
    found = _walk(folder, media.suffixes, left_out)
    frames = [] if media is not VIDEOS else _walk(folder, FRAME_SUFFIXES, None)
    frames = [(path, real) for path, real in frames if path.parent != folder]
    left_out -= Counter(ending(path.name) for path, _ in frames)
    return found + list({path.parent: real for path, real in frames}.items())


def _note_frames(count: int, root: Path) -> tuple[str, ...]:
    return (f"{count} folders of images in {root} are each taken as the frames of one clip",) if count else ()


def _files_in(folder: Path, media: Media) -> int:
    return sum(has_suffix(entry.name, media.suffixes) for entry in folder.iterdir())


def _linked(one: Path, other: Path) -> DataError:
    return DataError(f"{one} and {other} are the same by a link, but they belong to two classes", "Remove one of them.")


def check_folder(path: Path, media: Media = IMAGES) -> Path:
    """Return the folder; raises DataError if it does not exist or is a file."""
    hint = f"Give the path of a folder with {media.unit} ({media.named})."
    if not path.exists():
        raise DataError(f"the folder {path} does not exist", hint)
    if not path.is_dir():
        raise DataError(f"{path} is a file, not a folder", hint)
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


def identical_files(data: ImageDataset) -> int:
    """Number of image files whose bytes are those of another one; only files of one size are read."""
    by_size: dict[int, list[Path]] = {}
    for path in (Path(data.sample_id(index)) for index in range(len(data))):
        if path.is_file() and os.access(path, os.R_OK):
            by_size.setdefault(path.stat().st_size, []).append(path)
    digests = Counter(sha256_of(path) for group in by_size.values() if len(group) > 1 for path in group)
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
