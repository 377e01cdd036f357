"""Uncompressed tar archives, read without extraction, so that no member name can lead out of a folder."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import NamedTuple

from repshift_cli.data.decode import UnreadableSample
from repshift_cli.errors import DataError
from repshift_cli.utils.files import open_file

_LARGEST_MEMBER = 1 << 28
"""Maximum bytes of one image."""

_LARGEST_HEADER = 1 << 16
"""Maximum bytes of one header record, such as a long name."""

_LARGEST_END = 1 << 20
"""Maximum bytes of zeros at the end. Archives are filled up to a multiple of 10 kB, rarely more."""

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Member(NamedTuple):
    """A regular file in an archive: its name, offset and size in bytes. A folder has a slash at the end of its name."""

    name: str
    start: int
    size: int


class _Headers(io.FileIO):
    """A file that `tarfile` reads headers from. Raises for large records before memory is allocated."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def tar_members(path: Path, folders: bool = False) -> list[Member]:
    """The regular files of an archive, in its order; links and devices are skipped.

    Args:
        folders: whether folders are listed too.

    Raises:
        DataError: it cannot be read, is compressed, damaged, truncated, or has sparse files or a name twice.
    """
    try:
        with open_file(path) as opened, _Headers(os.dup(opened.fileno())) as file:
            found = _members(file, path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    files = [member for member in found if not member.name.endswith("/")]
    names = {member.name for member in files}
    for member in files if len(names) < len(files) else ():
        if member.name not in names:
            raise DataError(f"{path} has the file {member.name} more than once", "Pack it again.")
        names.remove(member.name)
    return found if folders else files


def read_member(path: Path, member: Member, sample: str) -> bytes:
    """Read a file in an archive; raises UnreadableSample with the name `sample`."""
    if member.size > _LARGEST_MEMBER:
        raise UnreadableSample(sample, f"{member.size} bytes are too many for an image")
    try:
        with open_file(path) as archive:
            archive.seek(member.start)
            content = archive.read(member.size)
    except OSError as error:
        raise UnreadableSample(sample, error.strerror or str(error)) from error
    if len(content) < member.size:
        raise UnreadableSample(sample, "the archive is truncated")
    return content


def _members(file: _Headers, path: Path) -> list[Member]:
    length = file.seek(0, io.SEEK_END)
    file.seek(0)
    start = file.read(max(map(len, _COMPRESSED)))
    for magic, kind in _COMPRESSED.items():
        if start.startswith(magic):
            raise DataError(
                f"{path} is compressed ({kind}), which is not supported",
                "Decompress it to a plain .tar.",
            )
    file.seek(0)
    found, place = [], 0
    try:
        archive = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="backslashreplace")
        for info in iter(archive.next, None):
            archive.members.clear()  # type: ignore[attr-defined]  # otherwise it keeps all headers
            if info.size < 0 or "\0" in info.name:
                raise tarfile.ReadError("an invalid header")  # noqa: TRY301
            if info.issparse():
                raise DataError(f"{path} has a sparse file, {info.name}", "Pack it without --sparse.")  # noqa: TRY301
            if info.isreg():
                found.append(Member(info.name.rstrip("/"), info.offset_data, info.size))
            elif info.isdir():
                found.append(Member(f"{info.name}/", info.offset_data, 0))
            place = archive.offset
    except (DataError, OSError):
        raise
    except Exception as error:  # damaged headers raise many kinds of errors
        raise _truncated(path) if file.tell() >= length else _damaged(path, place) from error
    _check_rest(file, path, place)
    return found


def _check_rest(file: _Headers, path: Path, place: int) -> None:
    """Two blocks of zeros and only zeros follow the last member: `tarfile` stops without an error elsewhere too."""
    rest = file.seek(0, io.SEEK_END) - place
    if rest < 2 * tarfile.BLOCKSIZE:
        raise _truncated(path)
    file.seek(place)
    for start in range(place, place + min(rest, _LARGEST_END), _LARGEST_HEADER):
        chunk = file.read(_LARGEST_HEADER)
        if data := chunk.lstrip(b"\0"):
            raise _damaged(path, start + len(chunk) - len(data))
    if rest > _LARGEST_END:
        raise DataError(
            f"{path} has more than {_LARGEST_END} zeros at byte {place}, so images are missing", "Download it again."
        )


def _damaged(path: Path, place: int) -> DataError:
    return DataError(
        f"{path} cannot be read as an uncompressed tar: there is no header at byte {place}",
        "Download it again, or extract it.",
    )


def _truncated(path: Path) -> DataError:
    return DataError(f"{path} is truncated, so images are missing", "Download it again.")
