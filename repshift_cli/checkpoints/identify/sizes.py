"""Sizes that the tensors of a checkpoint give or that the user must say: classes, image size and attention heads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from repshift_cli.errors import CheckpointError

HEAD_SIZE = 64
"""Channels per head in nearly every ViT (Dosovitskiy et al. 2021, table 1)."""

_HEADS = ("head.weight", "fc.weight", "head.fc.weight", "visual.head.proj.weight", "visual.head.mlp.fc2.weight")
"""Keys of the classifier."""


def class_count(tensors: Mapping[str, Tensor]) -> int:
    """Number of classes of the head, 0 without a head."""
    head = next((tensors[key] for key in _HEADS if key in tensors), None)
    return head.shape[0] if head is not None and head.ndim > 1 else 0


def size_args(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Builder arguments for the image size and number of classes of the weights, if they differ from the model's."""
    args: dict[str, Any] = {}
    if (count := class_count(tensors)) != getattr(model, "num_classes", count):
        args["num_classes"] = count
    position, own = tensors.get("pos_embed"), getattr(model, "pos_embed", None)
    if position is None or not isinstance(own, Tensor) or position.ndim != own.ndim:
        return args
    if position.shape[1] != own.shape[1]:
        prefix = own.shape[1] - model.patch_embed.num_patches
        side = math.isqrt(max(position.shape[1] - prefix, 0))
        args["img_size"] = side * model.patch_embed.patch_size[0]
    return args


def check_heads(model: nn.Module, name: str, heads: int | None, where: str) -> None:
    """Raise CheckpointError if the model has another number of heads than the user says."""
    count = head_count(model)
    if heads is None or heads == count:
        return
    has = "no attention heads" if count is None else f"{count} attention heads, not {heads}"
    raise CheckpointError(f"{where}: {name} has {has}", "Leave --heads out.")


def head_count(model: nn.Module) -> int | None:
    """Attention heads of the model, None if it has none."""
    counts = (getattr(part, "num_heads", None) for part in model.modules())
    return next((count for count in counts if isinstance(count, int)), None)


def check_divides(heads: int, width: int, where: str) -> int:
    """Return the number of heads, or raise CheckpointError if it does not divide the width."""
    if width % heads:
        raise CheckpointError(f"{where}: {heads} heads do not divide a width of {width}")
    return heads
