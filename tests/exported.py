"""Tiny compressed checkpoints of each family, and their exports."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from paths import VECTORS
from tiny_cnn import line_plan, tiny_cnn
from torch import Tensor

from repshift_cli.checkpoints import artifact
from repshift_cli.checkpoints.artifact import Opened
from repshift_cli.checkpoints.loaded import LoadedModel, ModelDescription
from repshift_cli.checkpoints.weights import Source
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.export.job import Exported, export
from repshift_cli.export.request import Request
from repshift_cli.planning.recipe import Recipe
from repshift_cli.reduction.compressed_model import attach
from repshift_cli.reduction.families.base import match
from repshift_cli.reduction.plans import resolve_for, with_defaults
from repshift_cli.utils.progress import Silent

__all__ = ["CNN_ARGS", "FAMILIES", "VECTORS", "export_to", "inputs_for", "open_family", "reduced_vit", "stored"]

FAMILIES = ("timm_vit", "resnet", "vim", "umt")

CNN_ARGS: dict[str, Any] = {"num_classes": 4, "channels": [8, 8, 8, 8], "layers": [2, 1, 1, 1]}
_STORED = {"timm_vit": 1, "vim": 2, "umt": 3}
_SIDE = 48


def stored(version: int) -> Path:
    """The stored checkpoint of a format version."""
    return VECTORS / f"artifact_v{version}.safetensors"


def open_family(family: str) -> Opened:
    """A tiny compressed model of a family; the caller may move it."""
    return artifact.open_model(stored(_STORED[family])) if family in _STORED else _cnn()


def _cnn() -> Opened:
    model = tiny_cnn("resnet18", (_SIDE, _SIDE), **CNN_ARGS)
    description = ModelDescription("resnet18", "resnet18", CNN_ARGS, Preprocessing.of_model(model))
    recipe = Recipe.parse("version: 1\nmetric: {kind: token_norm}\nlayers: [{layer: layer1.1, keep_grid: [10, 9]}]\n")
    plan = line_plan(model, "[{layer: layer1.1, keep_grid: [10, 9]}]", "{kind: token_norm}")
    loaded = LoadedModel(model, description, Source("object", None, None), dict(model.state_dict()))
    loaded.document = artifact.make_document(loaded, plan, recipe, None, {})
    return Opened(loaded, artifact.attach_loaded(loaded, plan))


def reduced_vit(reducer: str = "{kind: prune}", metric: str = "{kind: token_norm}") -> Opened:
    """The tiny ViT with another reducer or metric."""
    opened = open_family("timm_vit")
    assert opened.compressed is not None
    model = opened.compressed.detach()
    text = f"version: 1\nmetric: {metric}\nreducer: {reducer}\nlayers: [{{layer: 0, drop_ratio: 0.3}}]\n"
    sites = {site.name: site for site in match(model).sites(model)}
    plan = with_defaults(resolve_for(model, Recipe.parse(text)), sites)
    return Opened(opened.loaded, attach(model, plan))


def inputs_for(opened: Opened, count: int = 3, seed: int = 0) -> Tensor:
    """Random inputs of the shape of the model."""
    shape = opened.loaded.description.preprocessing.shape
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def export_to(opened: Opened, target: str, output: Path, **options: Any) -> Exported:
    """Export without progress output."""
    return export(opened, Request(target, output, **options), Silent())


@cache
def expected() -> dict[str, Tensor]:
    """Inputs and outputs of the stored checkpoints."""
    from safetensors.torch import load_file

    return load_file(VECTORS / "artifacts_expected.safetensors")
