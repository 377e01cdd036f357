"""Tar files of images: WebDataset shards, or class folders in a tar. They are read without extraction."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from repshift_cli.data.dataset import ImageDataset
from repshift_cli.data.decode import decode_bytes
from repshift_cli.data.sources.folder import IMAGE_SUFFIXES
from repshift_cli.data.sources.tar import Member, read_member, tar_members
from repshift_cli.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

_RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")
_MAX_SHARDS = 100_000
_LARGEST_LABEL = 64
"""Maximum bytes of a `.cls` file."""

_LAYOUT = (
    "Supported: tars with KEY.jpg and KEY.cls, which holds the label as a number (WebDataset), and tars of class "
    "folders, such as cat/1.jpg."
)


@dataclass(frozen=True)
class _Member:
    """An image in a shard, and its label: a member to read, or the name of its folder."""

    shard: int
    image: Member
    label: Member | None
    folder: str


def is_shards(name: str) -> bool:
    """Whether a name is the path of a tar, or of several tars with a range such as `{0000..0127}`."""
    return name.endswith(".tar")


def shard_paths(name: str) -> list[Path]:
    """The tars of a path, which may have one range of numbers, or of a folder, in the order of their names.

    Raises:
        DataError: there are none, or one of a range is missing.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        found = sorted(entry for entry in path.iterdir() if entry.suffix == ".tar" and not entry.name.startswith("."))
        if not found:
            raise DataError(f"there are no tars in {path}", _LAYOUT)
        return found
    found = [Path(text) for text in _expanded(str(path))]
    missing = [entry for entry in found if not entry.is_file()]
    if missing:
        raise DataError(f"there is no file {missing[0]}" + (f" ({len(missing)} are missing)" if missing[1:] else ""))
    return found


def open_shards(name: str, paths: Sequence[Path]) -> ImageDataset:
    """Open tars as one dataset.

    Args:
        name: the name that the user gave.
        paths: in the order of reading.

    Raises:
        DataError: one is damaged, or has images without labels.
    """
    samples: list[_Member] = []
    for number, path in enumerate(paths):
        for sample in _images(number, tar_members(path)):
            if sample.label is None and not sample.folder:
                raise DataError(f"{path}: {sample.image.name} has no label", _LAYOUT)
            samples.append(sample)
    if not samples:
        raise DataError(f"there are no images in {paths[0] if len(paths) == 1 else f'{len(paths)} tars'}", _LAYOUT)
    labelled = sum(entry.label is not None for entry in samples)
    if labelled not in (0, len(samples)):
        raise DataError(
            f"{labelled} of the {len(samples)} images of {name} have a .cls file, the others have none", _LAYOUT
        )
    return _Numbered(name, paths, samples) if labelled else _Named(name, paths, samples)


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


def _images(shard: int, members: Sequence[Member]) -> Iterator[_Member]:
    """The images of a tar; the files of one sample are adjacent and have the same key."""
    for _, files in groupby(members, key=lambda member: _split(member.name)[0]):
        found = list(files)
        label = next((member for member in found if _split(member.name)[1] == ".cls"), None)
        for member in found:
            path = PurePosixPath(member.name)
            hidden = path.name.startswith(".") or "__MACOSX" in path.parts
            if path.suffix.lower() in IMAGE_SUFFIXES and not hidden:
                yield _Member(shard, member, label, path.parent.name)


def _split(name: str) -> tuple[str, str]:
    """The key, up to the first dot of the file name, and the rest in lower case."""
    folder, slash, file = name.rpartition("/")
    stem, dot, ending = file.partition(".")
    return f"{folder}{slash}{stem}", f"{dot}{ending}".lower()


class _Shards(ImageDataset):
    def __init__(self, name: str, paths: Sequence[Path], samples: Sequence[_Member]) -> None:
        self.name = name
        self.paths = tuple(paths)
        self.samples = samples
        self.written = tuple(path.stat().st_mtime_ns for path in paths)

    @property
    def description(self) -> str:
        where = str(self.paths[0]) if len(self.paths) == 1 else f"{len(self.paths)} tars in {self.paths[0].parent}"
        return f"{len(self)} images in {where}"

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

    def _decoded(self, index: int) -> Image.Image:
        sample = self.samples[index]
        name = self.sample_id(index)
        return decode_bytes(read_member(self.paths[sample.shard], sample.image, name), name)


class _Numbered(_Shards):
    """Labels are the numbers in the shards, which have no class names."""

    @property
    def classes(self) -> None:
        return None

    def load(self, index: int) -> tuple[Image.Image, int]:
        sample, name = self.samples[index], self.sample_id(index)
        assert sample.label is not None
        if sample.label.size > _LARGEST_LABEL:
            raise DataError(f"{name}: its label has {sample.label.size} bytes, which is not a number")
        text = read_member(self.paths[sample.shard], sample.label, name).strip()
        if not text.isdigit():
            raise DataError(f"{name}: its label is {text.decode('utf-8', 'backslashreplace')!r}, which is not a number")
        return self._decoded(index), int(text)


class _Named(_Shards):
    """Labels are the sorted folder names; with ImageNet ids and a head of 1000, in ImageNet's order."""

    def __init__(
        self, name: str, paths: Sequence[Path], samples: Sequence[_Member], classes: tuple[str, ...] | None = None
    ) -> None:
        super().__init__(name, paths, samples)
        self._classes = classes or tuple(sorted({sample.folder for sample in samples}))
        self._labels = {folder: label for label, folder in enumerate(self._classes)}

    @property
    def classes(self) -> tuple[str, ...]:
        return self._classes

    def load(self, index: int) -> tuple[Image.Image, int]:
        return self._decoded(index), self._labels[self.samples[index].folder]

    def for_head(self, num_classes: int) -> ImageDataset:
        from repshift_cli.data.sources.class_labels import classes_for_head

        classes = classes_for_head(self.name, self._classes, num_classes)
        return self if classes == self._classes else _Named(self.name, self.paths, self.samples, classes)
