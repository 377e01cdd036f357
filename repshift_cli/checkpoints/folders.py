"""Model folders: their files, and which of them may be replaced."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repshift_cli.checkpoints.loaded import LoadedModel
from repshift_cli.checkpoints.weights import FORMAT_VERSION, INDEX_SUFFIX, Weights
from repshift_cli.errors import CheckpointError, OutputError, UsageError
from repshift_cli.utils.documents import parse_document, parse_json
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


def stored_document(weights: Weights, config: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
    """Our document in the metadata of the weights, else in the configuration at `path`, else None.

    Other tools keep the configuration when they write the weights again without metadata. Raises CheckpointError if
    the document is damaged, of a newer version, or has recovered weights, which are for the weights before.
    """
    if weights.document is not None or config.get(OWNER) is None:
        return weights.document
    found = parse_document(json.dumps(config[OWNER]), str(path), "format_version", FORMAT_VERSION)
    if found.get("recovered"):
        raise CheckpointError(
            f"{path}: another tool wrote the weights again, and --recover was for the weights before",
            f"Remove the key {OWNER!r} from it to open the dense model.",
        )
    return found


def write_config(path: Path, config: Mapping[str, Any], loaded: LoadedModel, document: Mapping[str, Any]) -> None:
    """Write a configuration with our document, and copy the other small files of the folder that was read.

    Raises:
        OutputError: a file cannot be written.
    """
    # the arguments of the model are in the configuration and not repeated in the document
    args = {key: value for key, value in loaded.description.args.items() if key == "tower"}
    stored = {**document, "model": {**loaded.description.to_dict(), "args": args}}
    if "recovered" in document:
        stored["recovered"] = {**document["recovered"], "values": ""}  # they are in the metadata of the weights
    content = json.dumps({**config, OWNER: stored}, indent=2, allow_nan=False)
    try:
        path.write_text(f"{content}\n", encoding="utf-8")
        if loaded.source.origin == "folder" and loaded.source.path:
            _copy_small_files(Path(loaded.source.path), path)
    except OSError as error:
        raise OutputError(f"cannot write {path.parent}: {error.strerror or error}") from error


def copy_weights(source: Path, folder: Path) -> None:
    """Copy the safetensors of a model folder as they are; raises OutputError if that fails."""
    try:
        for path in sorted(source.iterdir()):
            if path.name.endswith((".safetensors", INDEX_SUFFIX)) and path.is_file():
                shutil.copyfile(path, folder / path.name)
    except OSError as error:
        raise OutputError(f"cannot copy the weights of {source}: {error.strerror or error}") from error


def _copy_small_files(source: Path, config: Path) -> None:
    """Copy the files that are not weights, exports, code or hidden, such as those of a tokenizer, beside `config`."""
    for path in sorted(source.iterdir()):
        name = path.name.lower()
        if path.name == config.name or name.startswith(".") or name.endswith((*_NOT_COPIED, ".index.json")):
            continue
        try:
            with open_file(path, _LARGEST_COPY) as file, (config.parent / path.name).open("wb") as copy:
                shutil.copyfileobj(file, copy)
        except InvalidFile:  # a folder, or a large file
            continue
