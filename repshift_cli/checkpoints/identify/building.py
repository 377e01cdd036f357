"""Build a model by its name and arguments, which may come from a file and are not trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from repshift_cli.errors import CheckpointError
from repshift_cli.models import umt, vim

__all__ = [
    "UMT",
    "VIM",
    "build_on_meta",
    "check_heads",
    "classes",
    "create",
    "head_count",
    "quickly_on_meta",
    "size_args",
]

VIM = "vim"
"""The architecture of a Vim of a shape that has no name."""

UMT = "umt"
"""The architecture of a UMT, whose sizes stand in the arguments."""

_HEADS = ("head.weight", "fc.weight", "head.fc.weight", "visual.head.proj.weight", "visual.head.mlp.fc2.weight")
"""Where models keep their classifier."""

_DEPTHS = ("depth", "layers", "blocks")
"""Arguments with these words say how many blocks are built, in all or in each stage."""

_NOT_FOR_FILES = frozenset(
    {
        "cache_dir",
        "checkpoint_path",
        "exportable",
        "feature_cfg",
        "features_only",
        "kwargs_filter",
        "no_jit",
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "pretrained_filter_fn",
        "pretrained_model_args",
        "pretrained_strict",
        "pruned",
        "scriptable",
    }
)
"""Arguments of `timm.create_model` that read or download something, or give another kind of module."""


def create(name: str | None, args: Mapping[str, Any], where: str) -> nn.Module:
    """Build a model without weights: by its registered name, a Vim ("vim"), a UMT ("umt") or a ViT of timm's (None).

    Raises:
        CheckpointError: `args`, which may come from a file, would make timm read or download something.
        Exception: of any kind, from the builder, where `args` are not those of the model.
    """
    import timm
    from timm.models.vision_transformer import VisionTransformer

    if refused := sorted(_NOT_FOR_FILES & args.keys()):
        raise CheckpointError(
            f"{where}: the arguments of the model hold {', '.join(refused)}, which no checkpoint may set",
            "Only arguments that shape the model are taken, such as img_size or num_heads.",
        )
    if name is None:
        return VisionTransformer(**args)
    if name == VIM:
        return vim.VisionMamba(**args)
    if name in vim.MODELS:
        return vim.create(name, **args)
    if name == UMT:
        return umt.build(**args)
    if name in umt.MODELS:
        return umt.create(name, **args)
    model: nn.Module = timm.create_model(name, pretrained=False, **args)
    return model


def build_on_meta(
    name: str | None, args: Mapping[str, Any], where: str, tensors: Mapping[str, Tensor], label: str = ""
) -> nn.Module:
    """Build a model that is to hold these tensors, without memory of its own.

    Args:
        label: what to call the model in messages, where not by its name.

    Raises:
        CheckpointError: it cannot be built.
    """
    label = label or str(name)
    _check_depth(args, tensors, label, where)
    try:
        with torch.device("meta"):
            return create(name, args, where)
    except CheckpointError:
        raise
    except Exception as error:  # builders raise of every kind where arguments are not theirs
        raise CheckpointError(f"{where}: {label} cannot be built: {_told(error)}") from error


def _told(error: Exception) -> str:
    return str(error) or type(error).__name__


def _check_depth(args: Mapping[str, Any], tensors: Mapping[str, Tensor], label: str, where: str) -> None:
    """Every block holds tensors: a model of more blocks than those would take long to build only to be refused."""
    for key, value in args.items():
        if isinstance(value, Mapping):
            _check_depth(value, tensors, label, where)
            continue
        if not any(word in key for word in _DEPTHS):
            continue
        counts = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
        blocks = sum(count for count in counts if isinstance(count, int | float))
        if tensors and blocks > len(tensors):
            raise CheckpointError(
                f"{where}: {label} cannot be built: {key} {value} asks for {blocks} blocks, "
                f"but there are only {len(tensors)} tensors"
            )


class _WithoutValues(TorchFunctionMode):
    """Leaves out what only fills tensors: nothing is computed on meta, yet going through it takes most of the time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        filled = args[0] if args else kwargs.get("tensor")
        if name.endswith("_") and not name.endswith("__") and isinstance(filled, Tensor):
            return filled
        return func(*args, **kwargs)


def quickly_on_meta(name: str, args: Mapping[str, Any]) -> nn.Module:
    """As `build_on_meta`, for a registered model with arguments that are its own."""
    with torch.device("meta"), _WithoutValues():
        return create(name, args, name)


def classes(tensors: Mapping[str, Tensor]) -> int:
    """How many classes the weights have a head for, 0 where there is no head."""
    head = next((tensors[key] for key in _HEADS if key in tensors), None)
    return head.shape[0] if head is not None and head.ndim > 1 else 0


def size_args(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """How image size and number of classes of the weights differ from the model's own."""
    args: dict[str, Any] = {}
    if (count := classes(tensors)) != getattr(model, "num_classes", count):
        args["num_classes"] = count
    position, own = tensors.get("pos_embed"), getattr(model, "pos_embed", None)
    if position is None or not isinstance(own, Tensor) or position.ndim != own.ndim:
        return args
    if position.shape[1] != own.shape[1]:
        without_place = own.shape[1] - model.patch_embed.num_patches
        side = math.isqrt(max(position.shape[1] - without_place, 0))
        args["img_size"] = side * model.patch_embed.patch_size[0]
    return args


def check_heads(model: nn.Module, name: str, heads: int | None, where: str) -> None:
    """Refuse the user's number of heads where what the model is has another.

    Raises:
        CheckpointError: naming both.
    """
    count = head_count(model)
    if heads is None or heads == count:
        return
    has = "no attention heads" if count is None else f"{count} attention heads, not {heads}"
    raise CheckpointError(f"{where}: {name} has {has}", "Leave --heads out.")


def head_count(model: nn.Module) -> int | None:
    """Attention heads of the model, None where it has none."""
    counts = (getattr(part, "num_heads", None) for part in model.modules())
    return next((count for count in counts if isinstance(count, int)), None)
