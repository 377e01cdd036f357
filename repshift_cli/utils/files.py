"""Checking and writing output files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from repshift_cli.errors import OutputError, UsageError

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
WEIGHT_SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
"""Extensions of weight files."""

EXPORT_SUFFIXES = (".onnx", ".pt2")
"""Extensions of exported models."""

_READ_BYTES = 1 << 22


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = sha256()
    with path.open("rb") as file:
        while part := file.read(_READ_BYTES):
            digest.update(part)
    return digest.hexdigest()


def check_output(path: Path, force: bool) -> None:
    """Check before the work that an output can be written.

    Raises:
        UsageError: the file exists and `force` is false, or the path is not a regular file.
        OutputError: the folder is missing or cannot be written to.
    """
    try:
        is_folder, is_there = path.is_dir(), path.exists()
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    if is_folder:
        raise UsageError(f"{path} is a folder", "Give a file name.")
    if is_there and not path.is_file():
        raise UsageError(f"{path} is not a regular file", "Give another file name.")
    if is_there and not force:
        raise UsageError(f"{path} already exists", "Add --force to overwrite it, or give another file name.")
    folder = path.parent
    if not folder.is_dir():
        raise OutputError(f"the folder {folder} does not exist", "Create it first, or give another path.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write to the folder {folder}", "Give another path.")


def check_outputs(named: Mapping[str, Path | None], force: bool) -> None:
    """Check several outputs, given by option.

    Raises:
        UsageError: two options name the same file; or as `check_output`.
        OutputError: as `check_output`.
    """
    given = {option: path for option, path in named.items() if path is not None}
    seen: dict[Path, str] = {}
    for option, path in given.items():
        other = seen.setdefault(path.resolve(), option)
        if other != option:
            raise UsageError(f"{other} and {option} both name {path}", "Give two different files.")
    for path in given.values():
        check_output(path, force)


def weight_stem(name: str) -> str:
    """The file name of a checkpoint without folder and extension; other names unchanged.

    An exported file keeps its extension, which names the runtime.
    """
    path = Path(name)
    if path.suffix in EXPORT_SUFFIXES:
        return path.name
    return path.stem if path.suffix in WEIGHT_SUFFIXES else name


def default_output(model: str, suffix: str) -> Path:
    """The default output of a command: `<model><suffix>` in the current folder."""
    return Path(weight_stem(model.rstrip("/").rsplit("/", 1)[-1].removeprefix("builtin:")) + suffix)


@contextmanager
def atomic_output(path: Path, force: bool) -> Iterator[Path]:
    """Yield a temporary path in the same folder. It replaces `path` on success and is deleted on failure.

    Raises:
        UsageError: as `check_output`.
        OutputError: as `check_output`, or writing failed (a full disk, for example).
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
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
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
