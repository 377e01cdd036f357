"""Write and read compressed checkpoints.

A compressed checkpoint is one `.safetensors`: the tensors of the dense model under their own keys, so that any other
tool opens it as that model, and in the metadata a JSON document that says how to let the tokens go. Loading replays
the plan; nothing is decided again.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from repshift_cli.checkpoints.identify import Clips
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.checkpoints.loaded import LoadedModel
from repshift_cli.checkpoints.weights import FORMAT_VERSION, METADATA_KEY
from repshift_cli.errors import CheckpointError, OutputError, RecipeError
from repshift_cli.planning.plan import Plan
from repshift_cli.planning.recipe import Recipe
from repshift_cli.reduction.compressed_model import CompressedModel, attach
from repshift_cli.reduction.families.base import match
from repshift_cli.utils.files import atomic_output

__all__ = [
    "FORMAT_VERSION",
    "Opened",
    "attach_loaded",
    "load",
    "make_document",
    "open_model",
    "save",
    "separated",
    "stored_plan",
]


_FAMILY_VERSIONS = {"timm_vit": 1, "resnet": 2, "vim": 2, "umt": 3}
_PART_VERSIONS = {"fuse": 4, "merge": 4, "bipartite": 4, "fitted": 4, "vid_tldr": 3, "attention_entropy": 3}
"""The first version whose readers know the plans of a family, and a reducer or a metric; others are as old as 1."""


@dataclass
class Opened:
    """A model that is ready to run, dense or compressed.

    Attributes:
        loaded: the dense model and what is known of it.
        compressed: the same model with its plan attached, None for a dense checkpoint.
    """

    loaded: LoadedModel
    compressed: CompressedModel | None

    @property
    def module(self) -> nn.Module:
        """What to run."""
        return self.compressed if self.compressed is not None else self.loaded.model

    @property
    def macs(self) -> int:
        """Multiply-accumulates per image of `module`."""
        return self.compressed.macs() if self.compressed is not None else self.dense_macs

    @property
    def dense_macs(self) -> int:
        """Multiply-accumulates per image of the dense model."""
        return match(self.loaded.model).macs(self.loaded.model, None)

    @property
    def reduced(self) -> bool:
        """Whether tokens go in `module`."""
        return self.compressed is not None


def open_model(
    name: str | Path,
    model_name: str | None = None,
    heads: int | None = None,
    img_size: int | None = None,
    *,
    clips: Clips | None = None,
) -> Opened:
    """Load any model: a compressed checkpoint with its plan at work, or a dense one.

    Args:
        name, model_name, heads, img_size, clips: as for `checkpoint.load`.

    Raises:
        CheckpointError: as `checkpoint.load`; also a compressed checkpoint that is damaged or from a newer version.
        UsageError: as `checkpoint.load`.
    """
    loaded = load_checkpoint(name, model_name, heads, img_size, clips=clips)
    plan = stored_plan(loaded)
    try:
        return Opened(loaded, attach_loaded(loaded, plan) if plan else None)
    except RecipeError as error:
        raise CheckpointError(f"{loaded.source.path}: its plan is damaged: {error.message}") from error


def attach_loaded(loaded: LoadedModel, plan: Plan) -> CompressedModel:
    """Attach a plan to a loaded model, and keep the preprocessing beside it; errors as `attach`."""
    compressed = attach(loaded.model, plan)
    compressed.preprocessing = loaded.description.preprocessing
    return compressed


def load(path: str | Path) -> CompressedModel:
    """Load a compressed checkpoint as a model that is ready to run.

    Raises:
        CheckpointError: it cannot be read, or is a dense checkpoint.
    """
    opened = open_model(path)
    if opened.compressed is None:
        raise CheckpointError(f"{path} is a dense checkpoint", "Compress it first, or load it with timm.")
    return opened.compressed


def stored_plan(loaded: LoadedModel) -> Plan | None:
    """The plan in the metadata of a checkpoint, None for a dense one.

    Raises:
        CheckpointError: the plan cannot be.
    """
    document = loaded.document
    if document is None or not {"plan", "format_version"} & document.keys():
        return None
    where = loaded.source.path or "the checkpoint"
    try:
        return Plan.model_validate(document.get("plan"))
    except ValidationError as error:
        raise CheckpointError(f"{where}: its plan is damaged: {error.errors()[0]['msg']}") from error


def make_document(
    loaded: LoadedModel, plan: Plan, recipe: Recipe, calibration: Mapping[str, Any] | None, measured: Mapping[str, Any]
) -> dict[str, Any]:
    """The JSON document of a compressed checkpoint."""
    import timm

    from repshift_cli.version import __version__

    source = loaded.source
    return {
        "format_version": _version_of(plan),
        "repshift_version": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": loaded.description.to_dict(),
        "plan": plan.model_dump(mode="json"),
        "recipe": {"name": recipe.place.name, "text": recipe.text},
        "source": {
            "origin": source.origin,
            "name": Path(source.path).name if source.path else None,
            "sha256": source.sha256,
        },
        "calibration": calibration,
        "measured": dict(measured),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
    }


def _version_of(plan: Plan) -> int:
    """The first version whose readers know all that stands in a plan."""
    kinds = {plan.reducer.kind, *(site.metric.kind for site in plan.sites)}
    family = _FAMILY_VERSIONS.get(plan.family, FORMAT_VERSION)
    return max(family, *(_PART_VERSIONS.get(kind, 1) for kind in kinds))


def save(path: Path, loaded: LoadedModel, document: Mapping[str, Any], force: bool = False) -> None:
    """Write a compressed checkpoint; nothing half-written ever stands under `path`.

    Raises:
        UsageError: the file exists and `force` is off.
        OutputError: it cannot be written.
    """
    metadata = {"format": "pt", METADATA_KEY: json.dumps(document, allow_nan=False)}
    tensors = separated(loaded.tensors)
    with atomic_output(path, force) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:
            raise OutputError(f"cannot write {path}: {error}", "Nothing was left under its name.") from error


def separated(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors contiguous and each in memory of its own, as safetensors wants them (tied weights are copied)."""
    apart: dict[str, Tensor] = {}
    places: set[int] = set()
    for key, value in tensors.items():
        place = value.untyped_storage().data_ptr()
        apart[key] = value.clone() if place in places else value.contiguous()
        places.add(place)
    return apart
