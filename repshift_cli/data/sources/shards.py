"""Tar files of images: WebDataset shards, or class folders in a tar. They are read without extraction."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from repshift_cli.data.dataset import DatasetInfo, ImageDataset
from repshift_cli.data.decode import IMAGE_SUFFIXES, decode_bytes
from repshift_cli.data.sources.class_labels import class_list, class_root, named_classes
from repshift_cli.data.sources.folder import ending, is_hidden
from repshift_cli.data.sources.tar import Member, read_member, tar_members
from repshift_cli.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

_RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")
_MAX_SHARDS = 100_000
_LARGEST_LABEL, _MAX_DIGITS = 64, 9
"""Maximum bytes of a `.cls` file, and of the number in it."""

_LAYOUT = (
    "Supported: tars with KEY.jpg and KEY.cls, which holds the label as a number (WebDataset), and tars of class "
    "folders, such as cat/1.jpg."
)


@dataclass(frozen=True)
class _Member:
    """An image in a shard, and its label: a member to read, or the parts of its folder."""

    shard: int
    image: Member
    label: Member | None
    folders: tuple[str, ...]


def is_shards(name: str) -> bool:
    """Whether a name is the path of a tar, or of several tars with a range such as `{0000..0127}`."""
    return name.lower().endswith(".tar")


def shard_paths(name: str) -> list[Path]:
    """The tars of a path, which may have one range of numbers, or of a folder, in the order of their names.

    Raises:
        DataError: there are none, or one of a range is missing.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        found = sorted(entry for entry in path.iterdir() if is_shards(entry.name) and not entry.name.startswith("."))
        if not found:
            raise DataError(f"there are no tars in {path}", _LAYOUT)
    else:
        found = [Path(text) for text in _expanded(str(path))]
    first: dict[str, Path] = {}
    for entry in found:
        if (other := first.setdefault(os.path.realpath(entry), entry)) is not entry:
            raise DataError(f"{other} and {entry} are the same file by a link", "Remove one of them.")
    missing = [entry for entry in found if not entry.exists()]
    if missing:
        raise DataError(f"there is no file {missing[0]}" + (f" ({len(missing)} are missing)" if missing[1:] else ""))
    return found


def open_shards(name: str, paths: Sequence[Path], class_order: str | None = None) -> ImageDataset:
    """Open tars as one dataset.

    Args:
        name: the name that the user gave.
        paths: in the order of reading.
        class_order: as for `named_classes`.

    Raises:
        DataError: one is damaged, or has images without labels; or as `named_classes`.
    """
    samples: list[_Member] = []
    left_out: Counter[str] = Counter()
    below: defaultdict[tuple[str, ...], set[str]] = defaultdict(set)
    for number, path in enumerate(paths):
        members = tar_members(path, folders=True)
        samples += _images(number, path, members, left_out)
        for folders in {_folders(member.name) for member in members}:
            for depth, folder in enumerate(folders):
                below[folders[:depth]].add(folder)
    if not samples:
        raise DataError(f"there are no images in {paths[0] if len(paths) == 1 else f'{len(paths)} tars'}", _LAYOUT)
    labelled = sum(entry.label is not None for entry in samples)
    if labelled not in (0, len(samples)):
        raise DataError(
            f"{labelled} of the {len(samples)} images of {name} have a .cls file, the others have none", _LAYOUT
        )
    info = DatasetInfo(left_out=left_out)
    if labelled:
        return _Shards(name, paths, samples, info)
    with_images = {sample.folders for sample in samples}
    root, notes = class_root(name, lambda parts: (sorted(below[parts]), parts in with_images), class_list(class_order))
    samples = [sample for sample in samples if sample.folders[: len(root)] == root]
    if bare := next((sample for sample in samples if sample.folders == root), None):
        raise DataError(f"{paths[bare.shard]}: {bare.image.name} has no label", _LAYOUT)
    images, names = _Shards(name, paths, samples, info), [sample.folders[len(root)] for sample in samples]
    return named_classes(images, names, below[root], class_order, replace(info, notes=notes))


def _expanded(text: str) -> Iterator[str]:
    match = _RANGE.search(text)
    if match is None:
        yield text
        return
    first, last = int(match[1]), int(match[2])
    if not 0 <= last - first < _MAX_SHARDS:
        raise DataError(f"{text}: invalid range {match[0]}: must be ascending, with at most {_MAX_SHARDS} tars")
    for number in range(first, last + 1):
        yield f"{text[: match.start()]}{number:0{len(match[1])}}{text[match.end() :]}"


def _images(shard: int, path: Path, members: Sequence[Member], left_out: Counter[str]) -> Iterator[_Member]:
    """The images of a tar; the files of one sample are adjacent and have the same key."""
    labelled: set[str] = set()
    visible = (member for member in members if not member.name.endswith("/") and not _is_hidden(member.name))
    for key, files in groupby(visible, key=lambda member: _split(member.name)[0]):
        found = list(files)
        label = next((member for member in found if _split(member.name)[1] == ".cls"), None)
        images = [member for member in found if PurePosixPath(member.name).suffix.lower() in IMAGE_SUFFIXES]
        if label is not None:
            # of KEY.jpg and KEY.mask.png only the first is the image
            plain = [member for member in images if _split(member.name)[1] in IMAGE_SUFFIXES]
            if len(plain or images) > 1 or key in labelled:
                raise DataError(f"{path} has more than one image with the key {key}", _LAYOUT)
            images = plain or images
            labelled.add(key)
        if label is None or not images:
            left_out.update(ending(member.name) for member in found if member not in images)
        for member in images:
            yield _Member(shard, member, label, _folders(member.name))


def _folders(name: str) -> tuple[str, ...]:
    """The folders of a member, or those of a folder and itself; none for hidden ones."""
    parts = PurePosixPath(f"{name}x" if name.endswith("/") else name).parts
    return () if any(map(is_hidden, parts[:-1])) else tuple(part for part in parts[:-1] if part != "/")


def _is_hidden(name: str) -> bool:
    *folders, file = PurePosixPath(name).parts
    return file.startswith(".") or any(map(is_hidden, folders))


def _split(name: str) -> tuple[str, str]:
    """The key, up to the first dot of the file name, and the rest in lower case."""
    folder, slash, file = name.rpartition("/")
    stem, dot, ending = file.partition(".")
    return f"{folder}{slash}{stem}", f"{dot}{ending}".lower()


class _Shards(ImageDataset):
    """Images in tars, without class names; labels are the numbers in the tars, if there are any."""

    def __init__(self, name: str, paths: Sequence[Path], samples: Sequence[_Member], info: DatasetInfo) -> None:
        self.name = name
        self.info = info
        self.paths = tuple(paths)
        self.samples = samples
        self.written = tuple(path.stat().st_mtime_ns for path in paths)

    @property
    def description(self) -> str:
        where = str(self.paths[0]) if len(self.paths) == 1 else f"{len(self.paths)} tars in {self.paths[0].parent}"
        return f"{len(self)} images in {where}"

    @property
    def classes(self) -> None:
        return None

    def __len__(self) -> int:
        return len(self.samples)

    def sample_id(self, index: int) -> str:
        sample = self.samples[index]
        return f"{self.paths[sample.shard]}:{sample.image.name}"

    def key(self, index: int) -> str:
        sample = self.samples[index]
        return f"{self.paths[sample.shard].name}:{sample.image.name}"

    def fingerprint(self, index: int) -> str:
        return f"{self.key(index)}:{self.samples[index].image.size}"

    def stamp(self, index: int) -> str:
        sample = self.samples[index]
        return f"{self.fingerprint(index)}:{sample.image.start}:{self.written[sample.shard]}"

    def load(self, index: int) -> tuple[Image.Image, int]:
        sample, name = self.samples[index], self.sample_id(index)
        label = -1 if sample.label is None else self._label(sample, sample.label, name)
        return decode_bytes(read_member(self.paths[sample.shard], sample.image, name), name), label

    def _label(self, sample: _Member, member: Member, name: str) -> int:
        if member.size > _LARGEST_LABEL:
            raise DataError(f"{name}: its label has {member.size} bytes, which is not a number")
        text = read_member(self.paths[sample.shard], member, name).strip()
        if not (text.isdigit() and len(text) <= _MAX_DIGITS):
            raise DataError(f"{name}: its label is {text.decode('utf-8', 'backslashreplace')!r}, which is not a number")
        return int(text)
