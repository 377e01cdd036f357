"""A part of a larger model of transformers, such as the vision tower of a language model.

Its configuration is a part of `config.json`, and its tensors are those under one prefix. Only these are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from repshift_cli.checkpoints.folders import OWNER
from repshift_cli.checkpoints.loaded import LoadedModel
from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.checkpoints.weights import INDEX_SUFFIX, Source, Weights, read_names, read_weights
from repshift_cli.errors import CheckpointError, OutputError, UsageError
from repshift_cli.utils.suggest import nearest

_CONFIG = "_config"
ALONE = "A name with .safetensors writes the tower alone."
_EMBEDDINGS = ("embeddings.patch_embedding.weight", "embeddings.patch_embeddings.projection.weight")
"""The first tensors of a tower."""


def tower_of_folder(config: Mapping[str, Any], options: LoadOptions, where: str) -> str | None:
    """The name of the tower to load: that of the user, else the one that was compressed."""
    stored = config.get(OWNER)
    for key in ("model", "args", "tower"):
        stored = stored.get(key) if isinstance(stored, Mapping) else None
    known = stored if isinstance(stored, str) else None
    if options.tower and known and options.tower != known:
        raise UsageError(f"--tower {options.tower}: the compressed tower of {where} is {known}", "Leave --tower out.")
    return options.tower or known


def tower_config(config: Mapping[str, Any], tower: str, where: str) -> dict[str, Any]:
    """The configuration of a part, with its class; raises UsageError if there is none of this name."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    parts = {
        key.removesuffix(_CONFIG): value
        for key, value in config.items()
        if key.endswith(_CONFIG) and isinstance(value, dict) and "model_type" in value
    }
    if tower not in parts:
        hint = f"Its parts: {', '.join(sorted(parts))}." if parts else "It has no parts: leave --tower out."
        raise UsageError(f"--tower {tower}: {where} has no part of this name", nearest(tower, parts) + hint)
    kind = MODEL_MAPPING_NAMES.get(str(parts[tower]["model_type"]))
    return {**parts[tower], "architectures": [kind if isinstance(kind, str) else parts[tower]["model_type"]]}


def check_tower(folder: Path, loaded: LoadedModel) -> None:
    """Raise OutputError unless the weights of a tower are those of its folder, which are copied as they are."""
    stored = read_tower(folder, loaded.description.args["tower"], LoadOptions()).tensors
    for key, value in loaded.tensors.items():
        if key not in stored or not torch.equal(stored[key].float(), value.float()):
            raise OutputError(f"{key} is not as in {folder}, whose weights would be written", ALONE)


def read_tower(folder: Path, tower: str, options: LoadOptions) -> Weights:
    """The tensors of a tower, under its own keys.

    Raises:
        CheckpointError: the folder has no safetensors, or the tensors of the tower are not found in them.
    """
    files = [folder / name for name in ("model.safetensors", f"model{INDEX_SUFFIX}") if (folder / name).is_file()]
    if not files:
        raise CheckpointError(f"{folder} has no model.safetensors", "Towers are read from safetensors only.")
    names = read_names(files[0])
    found = {name.removesuffix(end) for name in names for end in _EMBEDDINGS if name.endswith(end)}
    prefixes = [prefix for prefix in found if tower in prefix] or sorted(found)
    if len(prefixes) != 1 or not prefixes[0]:
        listed = ", ".join(sorted({name.partition(".")[0] for name in names}))
        raise CheckpointError(f"{folder}: the tensors of the tower {tower} are not found. Its tensors are in {listed}")
    weights = read_weights(files[0], options.weights, prefixes[0])
    weights.tensors = {key.removeprefix(prefixes[0]): value for key, value in weights.tensors.items()}
    weights.source = Source("folder", str(folder), weights.source.sha256)
    return weights
