"""Writing files so that nothing is lost: a temporary neighbour first, then a rename."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from repshift_cli.errors import OutputError, UsageError

__all__ = [
    "EXPORT_SUFFIXES",
    "TORCH_SUFFIXES",
    "WEIGHT_SUFFIXES",
    "atomic_output",
    "check_output",
    "check_outputs",
    "sha256_of",
    "weight_stem",
    "write_text",
]

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
WEIGHT_SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
"""Endings of files that hold weights."""

EXPORT_SUFFIXES = (".onnx", ".pt2")
"""Endings of files that hold a model as a graph."""

_READ_BYTES = 1 << 22


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = sha256()
    with path.open("rb") as file:
        while part := file.read(_READ_BYTES):
            digest.update(part)
    return digest.hexdigest()


def check_output(path: Path, force: bool) -> None:
    """Refuse an output that could not be written, before any work is done for it.

    Raises:
        UsageError: the file exists and `force` is off, or the path is a folder.
        OutputError: the folder is missing or cannot be written to.
    """
    try:
        is_folder, is_there = path.is_dir(), path.exists()
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    if is_folder:
        raise UsageError(f"{path} is a folder", "Give the name of a file with -o.")
    if is_there and not path.is_file():
        raise UsageError(f"{path} is not a regular file", "Give the name of a file with -o.")
    if is_there and not force:
        raise UsageError(f"{path} already exists", "Add --force to replace it, or choose another name with -o.")
    folder = path.parent
    if not folder.is_dir():
        raise OutputError(f"the folder {folder} does not exist", "Create it first, or choose another place with -o.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"the folder {folder} cannot be written to", "Choose another place with -o.")


def check_outputs(named: Mapping[str, Path | None], force: bool) -> None:
    """Refuse outputs that could not all be written.

    Args:
        named: by option, the file that it names, if any.

    Raises:
        UsageError: two options name one file; or as `check_output`.
        OutputError: as `check_output`.
    """
    seen: dict[Path, str] = {}
    for option, path in named.items():
        if path is None:
            continue
        other = seen.setdefault(path.resolve(), option)
        if other != option:
            raise UsageError(f"{other} and {option} both name {path}", "Give two different files.")
    for path in named.values():
        if path is not None:
            check_output(path, force)


def weight_stem(name: str) -> str:
    """A file's name without its folder and without an ending of weights; other names as they are.

    That of an exported file keeps its ending, which tells what runs it.
    """
    path = Path(name)
    if path.suffix in EXPORT_SUFFIXES:
        return path.name
    return path.stem if path.suffix in WEIGHT_SUFFIXES else name


@contextmanager
def atomic_output(path: Path, force: bool) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes the place of `path`, on any failure it vanishes.

    Raises:
        UsageError, OutputError: as `check_output`.
        OutputError: the system could not write (a full disk, for example).
    """
    check_output(path, force)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
    except OSError as error:
        raise OutputError(f"cannot write to {path.parent}: {error.strerror or error}") from error
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}", "Nothing was left under its name."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, force: bool) -> None:
    """Write a text file atomically; errors as `atomic_output`."""
    with atomic_output(path, force) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
