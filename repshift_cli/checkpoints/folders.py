"""Model folders: their files, and which of them may be replaced."""

from __future__ import annotations

import shutil
from collections.abc import Container
from pathlib import Path
from typing import Any

from repshift_cli.errors import CheckpointError, UsageError
from repshift_cli.utils.documents import parse_json
from repshift_cli.utils.files import EXPORT_SUFFIXES, WEIGHT_SUFFIXES, InvalidFile, check_output, open_file, read_text

OWNER = "repshift"
"""Key of our metadata in a configuration."""

_CONFIGS = ("config.json", "open_clip_config.json")
_WEIGHTS = ("model.safetensors", "open_clip_model.safetensors")

_NOT_COPIED = (*WEIGHT_SUFFIXES, *EXPORT_SUFFIXES, ".h5", ".msgpack", ".gguf", ".ot", ".npz", ".pkl", ".py", ".pyc")
"""Weights, exports and code."""

_LARGEST_COPY = 1 << 26


def check_folder(output: Path, force: bool) -> None:
    """Check before the work that a model folder can be written.

    Raises:
        UsageError: it exists and `force` is false, or it holds a model that this tool did not write.
        OutputError: as `utils.files.check_output`.
    """
    check_output(output, force, is_folder=True)
    held = [name for name in (*_CONFIGS, *_WEIGHTS) if (output / name).exists()]
    if held and not any(_is_ours(output / name) for name in _CONFIGS):
        raise UsageError(
            f"{output} has a {held[0]} that repshift did not write, so it is not replaced",
            "Choose another name with -o, or remove it yourself.",
        )


def _is_ours(config: Path) -> bool:
    try:
        found = parse_json(read_text(config))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and OWNER in found


def read_config(path: Path) -> dict[str, Any]:
    """A configuration, which is a JSON object; raises CheckpointError if it is missing or damaged."""
    try:
        config = parse_json(read_text(path))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return config


def copy_small_files(source: Path, folder: Path, without: Container[str]) -> None:
    """Copy the files of a model folder that are not weights, exports, code or hidden, such as those of a tokenizer.

    Args:
        without: names that are not copied.
    """
    for path in sorted(source.iterdir()):
        name = path.name.lower()
        if path.name in without or name.startswith(".") or name.endswith((*_NOT_COPIED, ".index.json")):
            continue
        try:
            with open_file(path, _LARGEST_COPY) as file, (folder / path.name).open("wb") as copy:
                shutil.copyfileobj(file, copy)
        except InvalidFile:  # a folder, or a large file
            continue
