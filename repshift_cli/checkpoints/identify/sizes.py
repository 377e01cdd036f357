"""Sizes that the tensors of a checkpoint give or that the user must say: classes, image size and attention heads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from repshift_cli.checkpoints.options import ImageSize
from repshift_cli.errors import CheckpointError
from repshift_cli.models.tensor_model import TensorModel
from repshift_cli.reduction.families.transformer import tower_of

HEAD_SIZE = 64
"""Channels per head in nearly every ViT (Dosovitskiy et al. 2021, table 1)."""

_HEADS = (
    *("head.weight", "fc.weight", "head.fc.weight", "visual.head.proj.weight", "visual.head.mlp.fc2.weight"),
    *("classifier.weight", "head.fc.fc2.weight", "head.l.weight", "last_linear.weight", "head.head.l.weight"),
    *("head.conv.weight",),
)
"""Keys of the classifier."""


def class_count(tensors: Mapping[str, Tensor]) -> int:
    """Number of classes of the head, 0 without a head."""
    head = next((tensors[key] for key in _HEADS if key in tensors), None)
    return head.shape[0] if head is not None and head.ndim > 1 else 0


def size_args(
    model: Any,
    tensors: Mapping[str, Tensor],
    where: str,
    size: tuple[int, int] | None = None,
    given: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Builder arguments for image size, classes and pooling of the weights, if they differ from the model's.

    Args:
        size: of the images, where the file or the user gives it. Without one, images are square.
        given: arguments that the model was built with, which stay.

    Raises:
        CheckpointError: the position table fits no square images, nor the given size.
    """
    args = _pooling_args(model, tensors, given or {})
    if (count := class_count(tensors)) != getattr(model, "num_classes", count):
        args["num_classes"] = count
    position, own = tensors.get("pos_embed"), getattr(model, "pos_embed", None)
    if position is None or not isinstance(own, Tensor) or position.ndim != own.ndim:
        return args
    (height, width), now = model.patch_embed.patch_size, tuple(model.patch_embed.grid_size)
    wanted = (size[0] // height, size[1] // width) if size else now
    if position.shape[1] != own.shape[1] or wanted != now:
        prefix = own.shape[1] - model.patch_embed.num_patches
        rows, columns, _ = grid(position.shape[1], (prefix, 1), (height, width), size, where)  # see `vit._grid`
        if (rows, columns) != now:
            found = size if size and (rows, columns) == wanted else (rows * height, columns * width)
            args["img_size"] = ImageSize(*found).argument
    return args


def _pooling_args(model: Any, tensors: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for the norm of the weights: a ViT that pools over all tokens has it behind the pooling, or not."""
    from timm.models.vision_transformer import VisionTransformer

    behind = "fc_norm.weight" in tensors
    if not isinstance(model, VisionTransformer) or behind == ("fc_norm.weight" in model.state_dict()):
        return {}
    if "global_pool" in given:
        return {"fc_norm": given.get("fc_norm", behind)}
    return {"global_pool": "avg"} if behind else {}


def grid(
    length: int, prefixes: Iterable[int], patch: Sequence[int], size: tuple[int, int] | None, where: str
) -> tuple[int, int, int]:
    """Rows and columns of the patches of a position table, and its number of prefix tokens.

    Args:
        length: of the table.
        prefixes: possible numbers of prefix tokens, the likely one first.
        patch: height and width of a patch.
        size: of the images; a table that does not have it is taken for that of square images.

    Raises:
        CheckpointError: no grid fits, or it has one patch.
    """
    counts = list(dict.fromkeys(prefixes))
    if size is not None:
        rows, columns = size[0] // patch[0], size[1] // patch[1]
        for prefix in counts:
            if rows * columns == length - prefix > 1:
                return rows, columns, prefix
    for prefix in counts:
        side = math.isqrt(max(length - prefix, 0))
        if side > 1 and side * side == length - prefix:
            return side, side, prefix
    height, width = patch
    raise CheckpointError(
        f"{where}: {length} positions and {counts[0]} prefix tokens make no square grid"
        + (f", nor one of {size[0]}x{size[1]} pixels" if size else ""),
        f"Give --img-size HEIGHTxWIDTH (multiples of {height} and {width}).",
    )


def check_heads(model: nn.Module, name: str, heads: int | None, where: str) -> None:
    """Raise CheckpointError if the model has another number of heads than the user says."""
    count = head_count(model)
    if heads is None or heads == count:
        return
    has = "no attention heads" if count is None else f"{count} attention heads, not {heads}"
    raise CheckpointError(f"{where}: {name} has {has}", "Leave --heads out.")


def head_count(model: nn.Module) -> int | None:
    """Attention heads of the model, None if it has none."""
    if isinstance(model, TensorModel) and (tower := tower_of(model)):
        return tower.heads
    counts = (getattr(part, "num_heads", None) for part in model.modules())
    return next((count for count in counts if isinstance(count, int)), None)


def check_divides(heads: int, width: int, where: str) -> int:
    """Return the number of heads, or raise CheckpointError if it does not divide the width."""
    if width % heads:
        raise CheckpointError(f"{where}: {heads} heads do not divide a width of {width}")
    return heads
