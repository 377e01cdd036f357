"""Tar files of pictures: shards as WebDataset writes them, or class folders in a tar. Read in place, in their order."""

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

__all__ = ["is_shards", "open_shards", "shard_paths"]

_RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")
_MOST_SHARDS = 100_000
_LARGEST_LABEL = 64
"""Bytes of a `.cls`."""

_LAYOUT = (
    "Read are tars of KEY.jpg beside KEY.cls, which holds the label as a number (WebDataset), and tars of class "
    "folders, such as cat/1.jpg."
)


@dataclass(frozen=True)
class _Picture:
    """Where a picture lies, and its label: a member to read, or the name of its folder."""

    shard: int
    picture: Member
    label: Member | None
    folder: str


def is_shards(name: str) -> bool:
    """Whether a name is the path of a tar, or of several with a range such as `{0000..0127}`."""
    return name.endswith(".tar")


def shard_paths(name: str) -> list[Path]:
    """The tars of a path, in which one range of numbers may stand, or of a folder; in the order of their names.

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
    """Tars as one dataset.

    Args:
        name: the name that the user gave.
        paths: in the order in which they are read.

    Raises:
        DataError: one is damaged, or holds pictures without labels.
    """
    samples: list[_Picture] = []
    for number, path in enumerate(paths):
        found = list(_pictures(number, tar_members(path)))
        bare = next((entry for entry in found if entry.label is None and not entry.folder), None)
        if bare is not None:
            raise DataError(f"{path}: {bare.picture.name} has no label", _LAYOUT)
        samples += found
    if not samples:
        raise DataError(f"there are no pictures in {paths[0] if len(paths) == 1 else f'{len(paths)} tars'}", _LAYOUT)
    labelled = sum(entry.label is not None for entry in samples)
    if labelled not in (0, len(samples)):
        raise DataError(f"{labelled} of the {len(samples)} pictures of {name} have a .cls, the others none", _LAYOUT)
    return _Numbered(name, paths, samples) if labelled else _Named(name, paths, samples)


def _expanded(text: str) -> Iterator[str]:
    match = _RANGE.search(text)
    if match is None:
        yield text
        return
    first, last = int(match[1]), int(match[2])
    if not 0 <= last - first < _MOST_SHARDS:
        raise DataError(f"{text}: {match[0]} is no range of at most {_MOST_SHARDS} tars")
    for number in range(first, last + 1):
        yield f"{text[: match.start()]}{number:0{len(match[1])}}{text[match.end() :]}"


def _pictures(shard: int, members: Sequence[Member]) -> Iterator[_Picture]:
    """The pictures of a tar; files that belong together follow one another and have one key."""
    for _, files in groupby(members, key=lambda member: _split(member.name)[0]):
        found = list(files)
        label = next((member for member in found if _split(member.name)[1] == ".cls"), None)
        for member in found:
            path = PurePosixPath(member.name)
            hidden = path.name.startswith(".") or "__MACOSX" in path.parts
            if path.suffix.lower() in IMAGE_SUFFIXES and not hidden:
                yield _Picture(shard, member, label, path.parent.name)


def _split(name: str) -> tuple[str, str]:
    """The key, which is all up to the first dot of the file's own name, and the rest in lower case."""
    folder, slash, file = name.rpartition("/")
    stem, dot, ending = file.partition(".")
    return f"{folder}{slash}{stem}", f"{dot}{ending}".lower()


class _Shards(ImageDataset):
    def __init__(self, name: str, paths: Sequence[Path], samples: Sequence[_Picture]) -> None:
        self.name = name
        self.paths = tuple(paths)
        self.samples = samples
        self.written = tuple(path.stat().st_mtime_ns for path in paths)

    @property
    def description(self) -> str:
        where = str(self.paths[0]) if len(self.paths) == 1 else f"{len(self.paths)} tars in {self.paths[0].parent}"
        return f"{len(self)} pictures in {where}"

    def __len__(self) -> int:
        return len(self.samples)

    def sample_id(self, index: int) -> str:
        sample = self.samples[index]
        return f"{self.paths[sample.shard]}:{sample.picture.name}"

    def key(self, index: int) -> str:
        sample = self.samples[index]
        return f"{self.paths[sample.shard].name}:{sample.picture.name}"

    def fingerprint(self, index: int) -> str:
        return f"{self.key(index)}:{self.samples[index].picture.size}"

    def stamp(self, index: int) -> str:
        sample = self.samples[index]
        return f"{self.fingerprint(index)}:{sample.picture.start}:{self.written[sample.shard]}"

    def _decoded(self, index: int) -> Image.Image:
        sample = self.samples[index]
        name = self.sample_id(index)
        return decode_bytes(read_member(self.paths[sample.shard], sample.picture, name), name)


class _Numbered(_Shards):
    """Labels are numbers, as the shards hold them; whose numbers they are, the shards do not tell."""

    @property
    def classes(self) -> None:
        return None

    def load(self, index: int) -> tuple[Image.Image, int]:
        sample, name = self.samples[index], self.sample_id(index)
        assert sample.label is not None
        if sample.label.size > _LARGEST_LABEL:
            raise DataError(f"{name}: its label takes {sample.label.size} bytes, which is no number")
        text = read_member(self.paths[sample.shard], sample.label, name).strip()
        if not text.isdigit():
            raise DataError(f"{name}: its label is {text.decode('utf-8', 'backslashreplace')!r}, which is no number")
        return self._decoded(index), int(text)


class _Named(_Shards):
    """Labels are the places of the folders among their sorted names; ImageNet ids get ImageNet's for a head of 1000."""

    def __init__(
        self, name: str, paths: Sequence[Path], samples: Sequence[_Picture], classes: tuple[str, ...] | None = None
    ) -> None:
        super().__init__(name, paths, samples)
        self._classes = classes or tuple(sorted({sample.folder for sample in samples}))
        self._places = {folder: place for place, folder in enumerate(self._classes)}

    @property
    def classes(self) -> tuple[str, ...]:
        return self._classes

    def load(self, index: int) -> tuple[Image.Image, int]:
        return self._decoded(index), self._places[self.samples[index].folder]

    def for_head(self, num_classes: int) -> ImageDataset:
        from repshift_cli.data.sources.class_labels import classes_for_head

        classes = classes_for_head(self.name, self._classes, num_classes)
        return self if classes == self._classes else _Named(self.name, self.paths, self.samples, classes)
