"""open_clip models whose image tower is a model of timm, such as SigLIP: its own family does the work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from repshift_cli.models.tensor_model import library_model, library_of_class
from repshift_cli.planning.layout import Layout, PatchGrid
from repshift_cli.planning.plan import Plan
from repshift_cli.reduction.families.base import (
    ATTENTION_TENSORS,
    Family,
    LastBlockParts,
    Site,
    TensorEdit,
    weight_count,
)
from repshift_cli.reduction.families.maps import MapFamily, MapNetwork
from repshift_cli.reduction.families.resnet import ResidualCNN
from repshift_cli.reduction.families.timm_vit import TimmViT
from repshift_cli.reduction.stream import Stream

_FAMILIES: tuple[Family, ...] = (TimmViT(), ResidualCNN(), MapNetwork())


class OpenClipTimm(Family):
    """open_clip's `TimmModel`, alone or in a whole CLIP; what a spec describes belongs to `Transformer`."""

    name: ClassVar[str] = "open_clip_timm"
    covers: ClassVar[str] = "open_clip models with one of these models of timm as image tower"
    shows: ClassVar[frozenset[str]] = ATTENTION_TENSORS
    format_version: ClassVar[int] = 5

    def accepts(self, model: nn.Module) -> bool:
        tower = _tower(model)
        return tower is not None and any(family.accepts(tower[1].trunk) for family in _FAMILIES)

    def refusal(self, model: nn.Module) -> str | None:
        _, tower, family = _parts(model)
        if hasattr(tower.head, "pool"):
            return "its head pools all positions of the map by attention"
        size = (getattr(tower.trunk, "pretrained_cfg", None) or {}).get("input_size", (0, 0, 0))[1:]
        if isinstance(family, MapFamily) and tuple(size) != tuple(tower.image_size):
            return f"its trunk is described for images of {size} and the model for {tuple(tower.image_size)}"
        return family.refusal(tower.trunk)

    def layout(self, model: nn.Module) -> Layout:
        name, tower, family = _parts(model)
        found = family.layout(tower.trunk)
        sites = tuple(replace(site, name=f"{name}.{site.name}") for site in found.sites)
        barred = {key if key.isdigit() else f"{name}.{key}": why for key, why in found.barred.items()}
        return replace(found, family=self.name, sites=sites, barred=barred)

    def sites(self, model: nn.Module) -> list[Site]:
        name, tower, family = _parts(model)
        return [replace(site, name=f"{name}.{site.name}") for site in family.sites(tower.trunk)]

    def stream(self, model: nn.Module) -> Stream:
        _, tower, family = _parts(model)
        return family.stream(tower.trunk)

    def restore_refusal(self, model: nn.Module) -> str | None:
        _, tower, family = _parts(model)
        return family.restore_refusal(tower.trunk)

    def reads_class_token(self, model: nn.Module) -> bool:
        _, tower, family = _parts(model)
        return family.reads_class_token(tower.trunk)

    def last_block(self, model: nn.Module) -> LastBlockParts | str:
        _, tower, family = _parts(model)
        return family.last_block(tower.trunk)

    def merge_refusal(self, model: nn.Module, restore: bool = False) -> str | None:
        _, tower, family = _parts(model)
        return family.merge_refusal(tower.trunk, restore)

    def use_proportional_attention(
        self, model: nn.Module, stream: Stream
    ) -> tuple[list[TensorEdit], Callable[[], None]]:
        _, tower, family = _parts(model)
        return family.use_proportional_attention(tower.trunk, stream)

    def macs(self, model: nn.Module, plan: Plan | None) -> int:
        _, tower, family = _parts(model)
        return family.macs(tower.trunk, plan) + weight_count(tower.head)

    def patch_grid(self, model: nn.Module) -> PatchGrid:
        _, tower, family = _parts(model)
        return family.patch_grid(tower.trunk)


def _tower(model: nn.Module) -> tuple[str, Any] | None:
    """The `TimmModel` in a model, with its path."""
    inner = library_model(model)
    if library_of_class(inner) != "open_clip":
        return None
    return next(((name, part) for name, part in inner.named_modules() if type(part).__name__ == "TimmModel"), None)


def _parts(model: nn.Module) -> tuple[str, Any, Family]:
    """The path of timm's model, the `TimmModel` around it, and its family."""
    found = _tower(model)
    assert found is not None
    name, tower = found
    family = next(family for family in _FAMILIES if family.accepts(tower.trunk))
    return f"{name}.trunk".removeprefix("."), tower, family
