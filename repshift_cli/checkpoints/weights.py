"""Read tensors and metadata from safetensors and PyTorch files without running code from them.

A file is read from one open descriptor, so that the tensors and the hash belong to the same bytes, and it is not
memory-mapped: a file that is overwritten or truncated later does not change the weights.
"""

from __future__ import annotations

import argparse
import errno
import os
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from repshift_cli.checkpoints.containers import (
    check_kind,
    plain,
    training_options,
    unwrap,
)
from repshift_cli.checkpoints.options import WeightsKind
from repshift_cli.errors import CheckpointError, first_line
from repshift_cli.utils.documents import parse_document, parse_json
from repshift_cli.utils.files import (
    EXPORT_SUFFIXES,
    LARGEST_DOCUMENT,
    TORCH_SUFFIXES,
    WEIGHT_SUFFIXES,
    open_file,
    read_text,
    sha256_of_file,
)
from repshift_cli.utils.suggest import first_names

METADATA_KEY = "repshift"
"""Key of our JSON document in the metadata of a safetensors file (see docs/artifact.md)."""

FORMAT_VERSION = 8
"""Version of that document. Readers refuse newer ones. Increase it with any change that an older reader would miss."""

INDEX_SUFFIX = ".safetensors.index.json"
"""The end of the name of the index of a checkpoint in several files."""

_OPTIONS = ("utils.easydict.EasyDict", "easydict.EasyDict")
_READ_BYTES = 1 << 20
_HEADER_LENGTH, _LARGEST_HEADER = 8, 100_000_000  # bytes; limits of the format
_AGAIN = "Copy or download it again."
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool, "C64": torch.complex64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
"""Types of safetensors."""


@dataclass(frozen=True)
class Source:
    """Where weights came from. `sha256` is None without a file (random weights, a model in memory)."""

    origin: Literal["file", "folder", "cache", "random", "builtin", "object"]
    path: str | None
    sha256: str | None

    def to_dict(self) -> dict[str, Any]:
        """For documents: the name of the file, without its folder."""
        return {"origin": self.origin, "name": Path(self.path).name if self.path else None, "sha256": self.sha256}


@dataclass
class Weights:
    """Content of a file: tensors, without wrappers, and our document if there is one.

    Attributes:
        training: options of the training script that have a value, with the name of the model under `model`.
    """

    tensors: dict[str, Tensor]
    document: dict[str, Any] | None
    source: Source
    notes: list[str] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)


def read_weights(path: Path, which: WeightsKind | None = None, prefix: str = "") -> Weights:
    """Read the tensors of a `.safetensors` or a PyTorch file, without the mappings of training scripts around them.

    Args:
        path: the file, or the index of a checkpoint in several files.
        which: the weights to take from a file that holds both; the averaged ones by default.
        prefix: of the keys of the tensors to read, of safetensors.

    Raises:
        CheckpointError: the file is missing, empty, damaged, exported, of an unknown kind, or a pickle with code.
    """
    try:
        return (_read_shards if path.name.endswith(INDEX_SUFFIX) else _read_file)(path, which, prefix)
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename or path}: {error.strerror or error}") from error


def read_names(path: Path) -> list[str]:
    """The keys of a safetensors file, or of all that an index names; raises CheckpointError if it is damaged."""
    if path.name.endswith(INDEX_SUFFIX):
        return list(_read_index(path))
    try:
        with safe_open(path, framework="pt", device="cpu") as archive:
            return list(archive.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a safetensors file, or is damaged: {first_line(error)}", _AGAIN
        ) from error


def _read_file(path: Path, which: WeightsKind | None, prefix: str = "") -> Weights:
    with open_file(path) as file:
        before = os.fstat(file.fileno())
        if before.st_size == 0:
            raise CheckpointError(f"{path} is empty")
        weights = _read(file, path, which, prefix)
        after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise CheckpointError(f"{path} changed while it was read", "Wait until it is complete.")
    if weights.tensors or not prefix:
        weights.tensors = plain(weights.tensors, str(path), after.st_size)
    return weights


def _read(file: BinaryIO, path: Path, which: WeightsKind | None, prefix: str) -> Weights:
    if _is_safetensors(file, path):
        check_kind(which, str(path))
        return _read_safetensors(file, path, prefix)
    content, digest = _read_torch(file, path)
    tensors, notes = unwrap(content, str(path), which)
    return Weights(tensors, None, Source("file", str(path), digest), notes, training_options(content))


def _is_safetensors(file: BinaryIO, path: Path) -> bool:
    """By the suffix of the file or of the link's target, else by the content; else it is a PyTorch file."""
    start = file.read(_HEADER_LENGTH + 1)
    file.seek(0)
    for suffix in (path.suffix.lower(), path.resolve().suffix.lower()):
        if suffix in EXPORT_SUFFIXES:
            raise CheckpointError(
                f"{path} is an exported file, which only bench, eval and inspect can open",
                "Give the checkpoint that it was exported from.",
            )
        if suffix in WEIGHT_SUFFIXES:
            return suffix not in TORCH_SUFFIXES
    if start[_HEADER_LENGTH:] != b"{" and not start.startswith((b"PK\x03\x04", b"\x80")):
        raise CheckpointError(f"{path} has an unknown suffix", f"Allowed: {', '.join(WEIGHT_SUFFIXES)}.")
    return start[_HEADER_LENGTH:] == b"{"


def _read_safetensors(file: BinaryIO, path: Path, prefix: str) -> Weights:
    """Read a file into one buffer, which the tensors share; with a prefix, each tensor into its own."""
    size = os.fstat(file.fileno()).st_size
    try:
        length = int.from_bytes(file.read(_HEADER_LENGTH), "little")
        if not 0 < length <= min(size, _LARGEST_HEADER):
            raise ValueError(f"its header has {length} bytes")  # noqa: TRY301
        header = parse_json(file.read(length).decode())
        with safe_open(path, framework="pt", device="cpu"):  # checks types, shapes and places
            pass
        start = _HEADER_LENGTH + length
        metadata = header.pop("__metadata__", None) or {}
        file.seek(0)
        if prefix:
            digest = sha256_of_file(file)
            named = {key: entry for key, entry in header.items() if key.startswith(prefix)}
            tensors = {key: _tensor_alone(file, start, entry) for key, entry in named.items()}
        else:
            content = bytearray(size)
            file.readinto(content)  # type: ignore[attr-defined]
            tensors = {key: _tensor(content, start, entry) for key, entry in header.items()}
            digest = sha256(content).hexdigest()
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is not a safetensors file, or is damaged: {first_line(error)}", _AGAIN
        ) from error
    text = metadata.get(METADATA_KEY)
    document = None if text is None else parse_document(text, str(path), "format_version", FORMAT_VERSION)
    return Weights(tensors, document, Source("file", str(path), digest))


def _tensor_alone(file: BinaryIO, start: int, entry: Mapping[str, Any]) -> Tensor:
    begin, end = entry["data_offsets"]
    content = bytearray(end - begin)
    file.seek(start + begin)
    file.readinto(content)  # type: ignore[attr-defined]
    return _tensor(content, 0, {**entry, "data_offsets": [0, end - begin]})


def _tensor(content: bytearray, start: int, entry: Mapping[str, Any]) -> Tensor:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"the type {entry['dtype']} is not supported")
    dtype, (begin, end) = _DTYPES[entry["dtype"]], entry["data_offsets"]
    if begin == end:
        return torch.empty(entry["shape"], dtype=dtype)
    count = (end - begin) // dtype.itemsize
    found = torch.frombuffer(content, dtype=dtype, count=count, offset=start + begin).reshape(entry["shape"])
    return found.clone() if found.data_ptr() % dtype.itemsize else found


def _read_torch(file: BinaryIO, path: Path) -> tuple[Any, str]:
    damaged = f"{path} is not a PyTorch weights file, or is damaged"
    try:
        _check_archive(file, path)
        file.seek(0)
        digest = sha256_of_file(file)
        file.seek(0)
        # Some checkpoints (DeiT, UMT) hold their options, which are plain data; their code is not imported.
        allowed = torch.serialization.safe_globals([argparse.Namespace, *((OrderedDict, name) for name in _OPTIONS)])
        with warnings.catch_warnings(), allowed:
            warnings.simplefilter("ignore")  # of sparse tensors, which are refused
            return torch.load(file, map_location="cpu", weights_only=True), digest
    except (CheckpointError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        # "Unsupported global", "unsupported GLOBAL posix.system whose module is blocked", "unsupported class"
        if "global" in str(error).lower() or "class" in str(error):
            raise CheckpointError(
                f"{path} holds Python objects in addition to weights, which could run code when loaded",
                "Save only the weights: torch.save(model.state_dict(), ...), or as safetensors.",
            ) from error
        raise CheckpointError(damaged) from error
    except Exception as error:  # damaged files raise errors of many kinds
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # torch seeks to an invalid place
            raise
        reason = first_line(error)
        raise CheckpointError(damaged if "weights_only" in reason else f"{damaged}: {reason}", _AGAIN) from error


def _check_archive(file: BinaryIO, path: Path) -> None:
    """Refuse a TorchScript file, and members that torch.save does not write: torch takes pickles of any size."""
    if file.read(4) != b"PK\x03\x04":
        return
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(member.filename.endswith("/constants.pkl") for member in members):
            raise CheckpointError(
                f"{path} is a TorchScript program, not a weights file",
                "Save the weights of the model: torch.save(model.state_dict(), ...).",
            )
        others = sum(member.file_size for member in members if "/data/" not in member.filename)
        if others > LARGEST_DOCUMENT:
            raise CheckpointError(f"{path} holds {others} bytes besides tensors, more than {LARGEST_DOCUMENT}")
        if sum(member.compress_size for member in members) > os.fstat(file.fileno()).st_size:
            raise CheckpointError(f"{path} is damaged: its members are larger than the file")
        check_members(archive)


def check_members(archive: zipfile.ZipFile) -> None:
    """Raise ValueError for a compressed member, which torch does not write, and BadZipFile for a wrong checksum."""
    for member in archive.infolist():
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"the member {member.filename!r} is compressed")
        if member.CRC:  # torch.save can be told to leave it out
            with archive.open(member) as stream:  # checks it
                while stream.read(_READ_BYTES):
                    pass


def _read_index(path: Path) -> dict[str, str]:
    """The file of each tensor."""
    try:
        index: dict[str, str] = parse_json(read_text(path))["weight_map"]
        names = sorted(set(index.values()))
        foreign = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not the index of a checkpoint: {first_line(error)}") from error
    if foreign or not names:
        raise CheckpointError(f"{path} must name .safetensors files in its own folder: {first_names(foreign)}")
    return index


def _read_shards(path: Path, which: WeightsKind | None, prefix: str) -> Weights:
    """The tensors of all files that an index names. The hash is that of the hashes of the files."""
    index = _read_index(path)
    tensors: dict[str, Tensor] = {}
    digest = sha256()
    for name in sorted(set(index.values())):
        shard = _read_file(path.with_name(name), which, prefix)
        named = {key for key, file in index.items() if file == name and key.startswith(prefix)}
        if named != shard.tensors.keys():
            keys = sorted(named ^ shard.tensors.keys())
            raise CheckpointError(f"{path}: the index and {name} do not agree on {first_names(keys)}", _AGAIN)
        tensors |= shard.tensors
        digest.update(f"{name} {shard.source.sha256}\n".encode("utf-8", "surrogatepass"))
    return Weights(tensors, None, Source("file", str(path), digest.hexdigest()))
