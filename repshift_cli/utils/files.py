"""Reading input files, and checking and writing output files."""

from __future__ import annotations

import errno
import io
import os
import secrets
import select
import shutil
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from repshift_cli.errors import OutputError, UsageError

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
WEIGHT_SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
"""Extensions of weight files."""

EXPORT_SUFFIXES = (".onnx", ".pt2", ".xml")
"""Extensions of exported models."""

IR_FILES = ("openvino_model.bin", "openvino_model.xml")
"""Weights and graph of an OpenVINO IR in its folder, as optimum names them."""

LARGEST_DOCUMENT = 1 << 24
"""Maximum bytes of a document: a recipe, a configuration, the metadata of a file."""

PIPE_SECONDS = 10.0
"""Maximum time to read a pipe."""

_READ_BYTES = 1 << 22


class InvalidFile(OSError):
    """A path that names no regular file, or a file that is too large."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(errno.EINVAL, reason, str(path))


def open_file(path: Path, largest: int | None = None) -> BinaryIO:
    """Open a regular file for reading. All input files are opened here: a FIFO or a device may never end.

    Args:
        path: followed where it is a link.
        largest: maximum size in bytes; None for any.

    Raises:
        InvalidFile: it is not a regular file, or is larger.
        OSError: it is missing or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # without it, open() waits at a FIFO
    except ValueError as error:  # a null byte or a lone surrogate
        raise InvalidFile(path, "no file can have this name") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        reason = "is a folder" if stat.S_ISDIR(status.st_mode) else "is not a regular file"
    elif largest is not None and status.st_size > largest:
        reason = f"has {status.st_size} bytes, more than the maximum of {largest}"
    else:
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise InvalidFile(path, reason)


def read_text(path: Path, largest: int = LARGEST_DOCUMENT, encoding: str = "utf-8") -> str:
    """The text of a regular file; errors as `open_file`, or UnicodeDecodeError."""
    with open_file(path, largest) as file:
        return file.read().decode(encoding)


@cache
def read_pipe(path: Path, largest: int) -> str:
    """The text of a pipe or a device. It can be read only once, so later calls return the same text.

    Raises:
        InvalidFile: it has no end within `PIPE_SECONDS`, or is larger.
        OSError, UnicodeDecodeError: as `read_text`.
    """
    found, end = bytearray(), time.monotonic() + PIPE_SECONDS
    with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb", buffering=0) as file:
        while select.select([file], [], [], max(0.0, end - time.monotonic()))[0]:
            part = file.read(_READ_BYTES)
            if part == b"":
                return found.decode()
            found += part or b""
            if len(found) > largest:
                raise InvalidFile(path, f"has more than the maximum of {largest} bytes")
    raise InvalidFile(path, f"has no end after {PIPE_SECONDS:g} s")


def sha256_of(path: Path) -> str:
    """SHA-256 of a regular file, in hexadecimal; errors as `open_file`."""
    with open_file(path) as file:
        return sha256_of_file(file)


def sha256_of_file(file: BinaryIO) -> str:
    """SHA-256 of the rest of an open file, in hexadecimal."""
    digest = sha256()
    while part := file.read(_READ_BYTES):
        digest.update(part)
    return digest.hexdigest()


def check_output(path: Path, force: bool, *, is_folder: bool = False) -> None:
    """Check before the work that an output, a file or a folder, can be written.

    Raises:
        UsageError: it exists and `force` is false, or it is something else.
        OutputError: the folder to write to is missing or cannot be written to.
    """
    try:
        exists = os.path.lexists(path)
        fits = path.is_dir() if is_folder else path.is_file() or not path.exists()
        folder = path if is_folder and exists else path.parent
        has_folder = folder.is_dir()
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    if exists and not fits:
        raise UsageError(f"{path} is not a {'folder' if is_folder else 'regular file'}", "Give another name.")
    if exists and not force:
        raise _exists(path)
    if not has_folder:
        raise OutputError(f"the folder {folder} does not exist", "Create it first, or give another path.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write to the folder {folder}", "Give another path.")


def _exists(path: Path) -> UsageError:
    return UsageError(f"{path} already exists", "Add --force to overwrite it, or give another file name.")


def check_outputs(named: Mapping[str, Path | None], force: bool) -> None:
    """Check several outputs, given by option.

    Raises:
        UsageError: two options name the same file; or as `check_output`.
        OutputError: as `check_output`.
    """
    given = {option: path for option, path in named.items() if path is not None}
    seen: dict[str, str] = {}
    for option, path in given.items():
        other = seen.setdefault(os.path.realpath(path), option)  # Path.resolve raises at a loop of links
        if other != option:
            raise UsageError(f"{other} and {option} both name {path}", "Give two different files.")
    for path in given.values():
        check_output(path, force)


def check_weights_name(path: Path) -> None:
    """Raise UsageError if the name of a compressed checkpoint has another ending than its format."""
    if path.suffix.lower() != WEIGHT_SUFFIXES[0]:
        raise UsageError(
            f"invalid output {path}: a compressed checkpoint is a safetensors file", "Give a name.safetensors."
        )


def export_file(path: Path) -> Path:
    """The file of an exported model: the graph in the folder of an OpenVINO IR, else the path itself."""
    graph = path / IR_FILES[1]
    return graph if graph.is_file() and not (path / "config.json").exists() else path


def size_of(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    return sum(part.stat().st_size for part in (path.iterdir() if path.is_dir() else [path]))


def weight_stem(name: str) -> str:
    """The file name of a checkpoint without folder and extension; other names unchanged.

    An exported file keeps its extension, which names the runtime.
    """
    path = Path(name)
    suffix = path.suffix.lower()
    if suffix in EXPORT_SUFFIXES:
        return path.name
    return path.stem if suffix in WEIGHT_SUFFIXES else name


def default_output(model: str, suffix: str) -> Path:
    """The default output of a command: `<model><suffix>` in the current folder."""
    name = model.rstrip("/").rsplit("/", 1)[-1].removeprefix("builtin:")
    return Path((Path(model).resolve().name if name in ("", ".", "..") else weight_stem(name)) + suffix)


@contextmanager
def atomic_output(path: Path, force: bool) -> Iterator[Path]:
    """Yield a temporary path in the same folder. It becomes `path` on success and is deleted on failure.

    Without `force`, a file that appears under `path` in the meantime is kept.

    Raises:
        UsageError: as `check_output`.
        OutputError: as `check_output`, or writing failed (a full disk, for example).
    """
    check_output(path, force)
    temporary = _temporary(path)
    try:
        temporary.touch(exist_ok=False)
        yield temporary
        _finish(temporary)
        _publish(temporary, path, force)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _finish(temporary: Path) -> None:
    """Wait until a written file is on the disk, which may be full, and set its permissions."""
    with temporary.open("rb+") as written:
        os.fsync(written.fileno())
    temporary.chmod(0o666 & ~_umask())  # some writers make a new file, for the user alone


def _publish(temporary: Path, path: Path, force: bool) -> None:
    if force:
        temporary.replace(path)
        return
    try:
        os.link(temporary, path)  # unlike a rename, it never replaces a file
    except FileExistsError as error:
        raise _exists(path) from error
    except OSError:  # a file system without hard links
        try:
            path.touch(exist_ok=False)
        except FileExistsError as error:
            raise _exists(path) from error
        try:
            temporary.replace(path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise


@contextmanager
def atomic_folder(output: Path, names: Sequence[str] | None, force: bool) -> Iterator[Path]:
    """Yield a temporary folder. It becomes `output` on success and is deleted on failure.

    Args:
        output: the folder.
        names: the files to write; None for all that were written, the largest first. With `force` they replace those
            of an existing folder, the last one last; its other files are kept.
        force: whether an existing folder is written to.

    Raises:
        UsageError: the folder exists and `force` is false, or it is no folder.
        OutputError: writing failed.
    """
    check_output(output, force, is_folder=True)
    existing = output.is_dir()
    try:
        # an existing folder may be a link, or another file system than its parent
        with temporary_folder(output / "export" if existing else output) as folder:
            yield folder
            if names is None:
                names = [path.name for path in sorted(folder.iterdir(), key=size_of, reverse=True)]
            for name in names:
                _finish(folder / name)
            if existing:
                for name in names:
                    (folder / name).replace(output / name)
            else:
                _publish_folder(folder, output)
    except OSError as error:
        raise OutputError(f"cannot write {output}: {error.strerror or error}", "No output was written.") from error


def _publish_folder(folder: Path, output: Path) -> None:
    try:
        output.mkdir()  # unlike a rename, it fails at an empty folder
    except FileExistsError as error:
        raise _exists(output) from error
    try:
        folder.rename(output)
    except BaseException:
        with suppress(OSError):
            output.rmdir()
        raise


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder next to `path`, which is deleted at the end."""
    folder = _temporary(path)
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _temporary(path: Path) -> Path:
    """A new name next to a path. It is chosen before the file is made, so that an interruption leaves no file."""
    return path.absolute().parent / f".{path.name[:100]}.{secrets.token_hex(6)}.part"


class DeferredErrors(io.FileIO):
    """A file whose first error is raised by `close`, not by `write`.

    torch's archive writer aborts the process if `write` raises while it is destroyed.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w")
        self._problem: BaseException | None = None

    def write(self, data: Any) -> int:
        try:
            rest = memoryview(data).cast("B")
            while rest and self._problem is None:
                rest = rest[super().write(rest) :]
        except BaseException as problem:  # an interruption, too
            self._problem = problem
        return len(data)

    def close(self) -> None:
        super().close()
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem


def write_text(path: Path, text: str, force: bool) -> None:
    """Write a text file atomically; errors as `atomic_output`."""
    with atomic_output(path, force) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
