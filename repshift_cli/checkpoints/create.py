"""Build a model by name and arguments. The arguments can come from a file and are not trusted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from repshift_cli.checkpoints.identify.names import is_model_name
from repshift_cli.errors import CheckpointError, first_line
from repshift_cli.models import umt, vim

VIM = "vim"
"""The architecture of a Vim whose shape has no name."""

UMT = "umt"
"""The architecture of a UMT. Its sizes are in the arguments."""


_DEPTHS = ("depth", "layers", "blocks")
"""Arguments with these words are numbers of blocks, in all or per stage."""

REFUSED_ARGS = frozenset(
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
"""Arguments of `timm.create_model` that read or download files, or build another kind of module."""


def is_architecture(name: str | None) -> bool:
    """Whether `create` can build this architecture."""
    return name in (None, VIM, UMT) or is_model_name(name)


def create(name: str | None, args: Mapping[str, Any], where: str) -> nn.Module:
    """Build a model without weights: by its registered name, a Vim ("vim"), a UMT ("umt") or one of timm's ViTs (None).

    Raises:
        CheckpointError: `args` would make timm read or download files.
        Exception: any, from a builder that does not take `args`.
    """
    import timm
    from timm.models.vision_transformer import VisionTransformer

    if refused := sorted(REFUSED_ARGS & args.keys()):
        raise CheckpointError(
            f"{where}: unsupported model arguments {', '.join(refused)}",
            "Only arguments that shape the model are allowed, such as img_size or num_heads.",
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
    """Build a model for these tensors on the meta device, without memory.

    Args:
        label: the model in messages; default its name.

    Raises:
        CheckpointError: it cannot be built.
    """
    label = label or str(name)
    check_depth(args, tensors, label, where)
    try:
        with on_meta():
            return create(name, args, where)
    except CheckpointError:
        raise
    except Exception as error:  # builders raise errors of every kind for unknown arguments
        raise CheckpointError(f"{where}: {label} cannot be built: {str(error) or type(error).__name__}") from error


def check_runs(model: nn.Module, shape: Sequence[int], label: str, where: str) -> None:
    """Run a model on the meta device: some arguments, such as heads, do not show in the shapes of the tensors.

    Raises:
        CheckpointError: it does not take an input of this shape.
    """
    try:
        with torch.no_grad():
            model.eval()(torch.empty(1, *shape, device="meta"))
    except Exception as error:  # as above
        raise CheckpointError(f"{where}: {label} cannot run: {first_line(error)}") from error


def check_depth(args: Mapping[str, Any], tensors: Mapping[str, Tensor], label: str, where: str) -> None:
    """Refuse more blocks than tensors: such a model takes long to build and cannot fit."""
    for key, value in args.items():
        if isinstance(value, Mapping):
            check_depth(value, tensors, label, where)
            continue
        if not any(word in key for word in _DEPTHS):
            continue
        counts = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
        blocks = sum(count for count in counts if isinstance(count, int | float))
        if tensors and blocks > len(tensors):
            raise CheckpointError(
                f"{where}: {label} cannot be built: {key} {value} means {blocks} blocks, "
                f"but there are only {len(tensors)} tensors"
            )


class _WithoutValues(TorchFunctionMode):
    """Skip operations that only fill tensors. They have no effect on meta, but take most of the time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        filled = args[0] if args else kwargs.get("tensor")
        if name.endswith("_") and not name.endswith("__") and isinstance(filled, Tensor):
            return filled
        return func(*args, **kwargs)


@contextmanager
def on_meta() -> Iterator[None]:
    """Build modules on the meta device, without memory and without computing values."""
    with torch.device("meta"), _WithoutValues():
        yield


@lru_cache(maxsize=256)
def _built(name: str, args: tuple[tuple[str, Any], ...]) -> nn.Module:
    with on_meta():
        return create(name, dict(args), name)


def quickly_on_meta(name: str, args: Mapping[str, Any]) -> nn.Module:
    """As `build_on_meta`, for a registered model and trusted arguments. Models are shared: do not change them."""
    given = tuple(args.items())
    try:
        hash(given)
    except TypeError:  # a list
        return _built.__wrapped__(name, given)
    return _built(name, given)
