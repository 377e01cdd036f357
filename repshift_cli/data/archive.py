"""Uncompressed tar archives, read in place. Nothing is ever extracted, so no name in one can lead anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from repshift_cli.data.base import UnreadableSample
from repshift_cli.errors import DataError

__all__ = ["Member", "read_member", "tar_members"]

_BLOCK = 512
_LARGEST_MEMBER = 1 << 28
"""Bytes of one picture; what is larger is none."""

_LARGEST_NAME = 1 << 16
"""Bytes of a record that only names the next member."""

_REGULAR = frozenset({b"0", b"\0", b"7"})
_WITHOUT_DATA = frozenset({b"1", b"2", b"3", b"4", b"5", b"6"})
"""Links, devices and folders: a size that stands there is that of something else."""

_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL = _RECORDS = (b"L", b"K", b"x", b"g")
"""What only tells of the next member, or of all."""

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Member(NamedTuple):
    """A regular file in an archive: its name, its first byte and its length."""

    name: str
    start: int
    size: int


@dataclass(frozen=True)
class _Header:
    name: str
    size: int
    kind: bytes


def tar_members(path: Path) -> list[Member]:
    """The regular files of an archive, in its order; links, devices and folders are left out.

    Raises:
        DataError: it cannot be read, is compressed, damaged, or ends early: what is left would give other numbers.
    """
    try:
        with path.open("rb") as archive:
            return list(_members(archive, path, archive.seek(0, 2)))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def read_member(path: Path, member: Member, sample: str) -> bytes:
    """The content of a file in an archive; `sample` is what messages call it.

    Raises:
        UnreadableSample: it is larger than any picture, or the archive cannot be read.
    """
    if member.size > _LARGEST_MEMBER:
        raise UnreadableSample(sample, f"{member.size} bytes are too many for a picture")
    try:
        with path.open("rb") as archive:
            archive.seek(member.start)
            content = archive.read(member.size)
    except OSError as error:
        raise UnreadableSample(sample, error.strerror or str(error)) from error
    if len(content) < member.size:
        raise UnreadableSample(sample, "the archive ends within it")
    return content


def _members(archive: BinaryIO, path: Path, length: int) -> Iterator[Member]:
    place = 0
    name: str | None = None
    size: int | None = None
    while (header := _header(archive, path, place)) is not None:
        start = place + _BLOCK
        told = header.size if size is None or header.kind in _RECORDS else size
        data = 0 if header.kind in _WITHOUT_DATA else told
        place = start + -(-data // _BLOCK) * _BLOCK
        # the last member may lack the padding of its last block, but nothing of itself
        if start + data > length:
            raise _ended(path)
        if header.kind == _LONG_NAME:
            name = _text(_record(archive, path, start, data).rstrip(b"\0"))
        elif header.kind == _PAX:
            keys = _pax(_record(archive, path, start, data), path)
            name, size = keys.get("path", name), _pax_size(keys, path, size)
        elif header.kind not in (_LONG_LINK, _PAX_GLOBAL):
            if header.kind in _REGULAR:
                yield Member(name or header.name, start, data)
            name, size = None, None


def _header(archive: BinaryIO, path: Path, place: int) -> _Header | None:
    """The header at a place; None for the mark of the end."""
    archive.seek(place)
    block = archive.read(_BLOCK)
    if place == 0:
        for magic, kind in _COMPRESSED.items():
            if block.startswith(magic):
                raise DataError(
                    f"{path} is compressed ({kind}), and is not unpacked here",
                    "Unpack it to a plain .tar, which is read in place.",
                )
    if len(block) < _BLOCK:
        raise _ended(path)
    if not any(block):
        return None
    # the sum of all bytes, its own field taken as blanks
    if _number(block[148:156]) != sum(block) - sum(block[148:156]) + 8 * ord(" "):
        raise _damaged(path, place)
    size = _number(block[124:136])
    if size is None:
        raise _damaged(path, place)
    prefix = block[345:500] if block[257:263] == b"ustar\0" else b""
    parts = (part.partition(b"\0")[0] for part in (prefix, block[:100]))
    return _Header("/".join(_text(part) for part in parts if part), size, block[156:157])


def _number(field: bytes) -> int | None:
    """A number that is octal, or binary where its first bit is set; None where it is neither, or negative."""
    if field[0] == 0x80:  # noqa: PLR2004
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    return int(digits or b"0", 8) if all(digit in b"01234567" for digit in digits) else None


def _record(archive: BinaryIO, path: Path, start: int, size: int) -> bytes:
    if size > _LARGEST_NAME:
        raise DataError(f"{path} is damaged: the name of a file in it takes {size} bytes")
    archive.seek(start)
    return archive.read(size)


def _pax(record: bytes, path: Path) -> dict[str, str]:
    """The keys of an extended header, lines of `LENGTH KEY=VALUE`."""
    keys: dict[str, str] = {}
    while record:
        digits, space, _ = record.partition(b" ")
        length = int(digits) if space and digits.isdigit() and len(digits) <= len(str(_LARGEST_NAME)) else 0
        key, equals, value = record[len(digits) + 1 : max(length - 1, 0)].partition(b"=")
        if length > len(record) or not equals:
            raise DataError(f"{path} is damaged: one of its extended headers cannot be read")
        keys[_text(key)] = _text(value)
        record = record[length:]
    return keys


def _pax_size(keys: dict[str, str], path: Path, before: int | None) -> int | None:
    text = keys.get("size")
    if text is None:
        return before
    if not text.isdecimal() or len(text) > len(str(1 << 63)):
        raise DataError(f"{path} is damaged: a file in it has the size {text[:40]!r}")
    return int(text)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _damaged(path: Path, place: int) -> DataError:
    return DataError(
        f"{path} cannot be read as an uncompressed tar: there is no header at byte {place}",
        "Fetch it again, or unpack what it holds.",
    )


def _ended(path: Path) -> DataError:
    return DataError(f"{path} ends early, so pictures are missing", "Fetch it again.")
