"""Read tensors and metadata from safetensors and PyTorch files without running code from them."""

from __future__ import annotations

import argparse
import errno
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from repshift_cli.errors import CheckpointError, first_line
from repshift_cli.utils.documents import parse_json
from repshift_cli.utils.files import EXPORT_SUFFIXES, TORCH_SUFFIXES, WEIGHT_SUFFIXES, sha256_of

METADATA_KEY = "repshift"
"""Key of our JSON document in the metadata of a safetensors file (see docs/artifact.md)."""

FORMAT_VERSION = 4
"""Version of that document. Readers refuse newer ones. Increase it with any change that an older reader would miss."""

_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module")
_OPTIONS = ("utils.easydict.EasyDict", "easydict.EasyDict")
_PREFIXES = ("module.", "_orig_mod.")
_MOST_WRAPPERS = 8  # a pickle can hold a mapping that contains itself
_SHOWN_KEYS = 5


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
    """Content of a file: tensors, without wrappers and prefixes, and our document if there is one."""

    tensors: dict[str, Tensor]
    document: dict[str, Any] | None
    source: Source
    notes: list[str] = field(default_factory=list)


def read_weights(path: Path) -> Weights:
    """Read the tensors of a `.safetensors` or a PyTorch file, unwrapped (`model`, `state_dict`, `module.`, ...).

    Raises:
        CheckpointError: the file is missing, empty, damaged, exported, of an unknown kind, or a pickle with code.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file")
    try:
        if path.stat().st_size == 0:
            raise CheckpointError(f"{path} is empty")
        if path.suffix == ".safetensors":
            tensors, document = _read_safetensors(path)
            notes: list[str] = []
        elif path.suffix in TORCH_SUFFIXES:
            tensors, notes = _unwrap(_read_torch(path), path)
            document = None
        elif path.suffix in EXPORT_SUFFIXES:
            raise CheckpointError(
                f"{path} is an exported file, which only bench and eval can run",
                "Give the checkpoint that it was exported from.",
            )
        else:
            raise CheckpointError(f"{path} has an unknown suffix", f"Allowed: {', '.join(WEIGHT_SUFFIXES)}.")
        source = Source("file", str(path), sha256_of(path))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    return Weights(tensors, document, source, notes)


def first_names(words: list[str]) -> str:
    """Join the first few names for a message."""
    rest = len(words) - _SHOWN_KEYS
    return ", ".join(words[:_SHOWN_KEYS]) + (f" and {rest} more" if rest > 0 else "")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    try:
        with safe_open(path, framework="pt", device="cpu") as archive:
            metadata = archive.metadata() or {}
            tensors = {key: archive.get_tensor(key) for key in archive.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a safetensors file, or is damaged: {error}", "Copy or download it again."
        ) from error
    return _without_prefixes(tensors), _read_document(metadata.get(METADATA_KEY), path)


def _read_document(text: str | None, path: Path) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        document = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: its repshift metadata is damaged: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: its repshift metadata is damaged: not a mapping")
    version = document.get("format_version", FORMAT_VERSION)
    if not isinstance(version, int) or version < 1:
        raise CheckpointError(f"{path}: invalid metadata version {version!r}: must be at least 1")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} was written by a newer repshift (format {version}, supported up to {FORMAT_VERSION})",
            "Upgrade: pip install --upgrade repshift-cli. timm can open the file as a dense model.",
        )
    return document


def _read_torch(path: Path) -> Any:
    try:
        # Some checkpoints (DeiT, UMT) hold their options, which are plain data; their code is not imported.
        with torch.serialization.safe_globals([argparse.Namespace, *((OrderedDict, name) for name in _OPTIONS)]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # "Unsupported global", "unsupported GLOBAL posix.system whose module is blocked", "unsupported class"
        if "global" in str(error).lower() or "class" in str(error):
            raise CheckpointError(
                f"{path} holds Python objects in addition to weights, which could run code when loaded",
                "Save only the weights: torch.save(model.state_dict(), ...), or as safetensors.",
            ) from error
        raise CheckpointError(f"{path} is not a PyTorch weights file, or is damaged") from error
    except OSError as error:
        if error.errno == errno.EINVAL:  # torch seeks to an invalid place in a truncated file
            raise CheckpointError(f"{path} is not a PyTorch weights file, or is damaged") from error
        raise
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is not a PyTorch weights file, or is damaged: {first_line(error)}") from error


def _unwrap(content: Any, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Take the weights out of the mappings that training scripts write."""
    notes = []
    for _ in range(_MOST_WRAPPERS):
        wrapper = _wrapper_of(content)
        if wrapper is None:
            break
        if "ema" in wrapper:
            notes.append(f"{path.name}: averaged weights ({wrapper}) are used instead of the raw ones")
        content = content[wrapper]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a mapping of weights")
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors", f"Its keys: {first_names([str(key) for key in content])}.")
    return _without_prefixes(tensors), notes


def _wrapper_of(content: Any) -> str | None:
    """The first key of a wrapper that is not empty: unused averaged weights are None or empty."""
    if not isinstance(content, Mapping):
        return None
    return next((key for key in _WRAPPERS if isinstance(content.get(key), Mapping) and content[key]), None)


def _without_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the prefixes of wrapper modules, in any order and number."""
    while prefix := next(
        (each for each in _PREFIXES if tensors and all(key.startswith(each) for key in tensors)), None
    ):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors
