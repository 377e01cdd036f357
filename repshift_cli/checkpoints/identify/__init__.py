"""Tell from the names and shapes of its tensors which model a set of weights belongs to, one kind of model per file.

Names and shapes give depth, widths, classes and what else a model shows. A registered model whose tensors agree one by
one gives the rest: heads, activation, preprocessing. Where several agree and would compute different things, the user
has to say which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from repshift_cli.checkpoints.identify import cnn, umt, vim, vit
from repshift_cli.checkpoints.identify.building import UMT, VIM, build_on_meta, check_heads, create, size_args
from repshift_cli.checkpoints.identify.identity import Identity, shapes, supported
from repshift_cli.checkpoints.identify.names import canonical_name, encoder_name, is_model_name, model_names
from repshift_cli.checkpoints.identify.vit import VitShape
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import CheckpointError, RepshiftError

__all__ = [
    "UMT",
    "VIM",
    "Clips",
    "Identity",
    "VitShape",
    "build_on_meta",
    "canonical_name",
    "check_heads",
    "create",
    "encoder_name",
    "identify",
    "is_model_name",
    "model_names",
    "supported",
]

_CHANNELS = 3
"""Pictures are read as RGB."""

_FIRST_CONVOLUTIONS = (
    "patch_embed.proj.weight",
    "conv1.weight",
    "conv1.0.weight",
    "stem.weight",
    "stem.0.weight",
    "stem.conv.weight",
    "downsample_layers.0.0.weight",
)


def identify(
    tensors: Mapping[str, Tensor],
    where: str,
    model_name: str | None,
    heads: int | None,
    hint: str,
    *,
    args: Mapping[str, Any] | None = None,
    fallback: str | None = None,
    img_size: int | None = None,
    clips: Clips | None = None,
) -> Identity:
    """Find the model that the weights belong to.

    Args:
        tensors: weights as the file has them.
        where: the file, for messages.
        model_name: the model's name, where the user or the file tells it.
        heads: attention heads, where the user tells them.
        hint: the file's name, which may name one of several that fit.
        args: what the builder of `model_name` is known to need.
        fallback: the name that a recipe gives: goes before a guess if the tensors fit it, else is ignored.
        img_size: side of the image, where the user tells it. Only used where it tells something of the model.
        clips: what the user tells of the clips that a video model takes.

    Raises:
        CheckpointError: no model that is known fits, or several do; or the heads are not those of `model_name`.
        UsageError: the weights cannot be those of a model for images of `img_size`.
    """
    _check_channels(tensors, where)
    told = _Told(heads, img_size, clips or Clips())
    if model_name:
        return _named(canonical_name(model_name), tensors, where, args or {}, told)[0]
    if fallback and (identity := _fallback(canonical_name(fallback), tensors, where, told)):
        return identity
    if umt.recognises(tensors):
        return umt.identify(tensors, where, heads=told.heads, img_size=told.img_size, **asdict(told.clips))
    if vim.recognises(tensors):
        return vim.identify(tensors, where, heads, img_size)
    if kind := cnn.kind_of(tensors):
        return cnn.identify(kind, tensors, where, heads, hint)
    return vit.identify(tensors, where, heads, hint)


@dataclass(frozen=True)
class Clips:
    """What a user can tell of the clips of a video model.

    Attributes:
        frames: of one clip.
        checkpoint_frames: that the weights were trained on, where positions are to be interpolated in time.
    """

    frames: int | None = None
    checkpoint_frames: int | None = None


@dataclass(frozen=True)
class _Told:
    """What the user tells beside the name of the model."""

    heads: int | None
    img_size: int | None
    clips: Clips


def _named(
    name: str, tensors: Mapping[str, Tensor], where: str, given: Mapping[str, Any], told: _Told
) -> tuple[Identity, nn.Module]:
    """Somebody says which model it is: only sizes and classes are read off the weights."""
    if name in vim.MODELS:
        identity = vim.named(name, tensors, where, given, told.img_size)
        model = build_on_meta(name, identity.args, where, tensors)
    elif name in umt.MODELS:
        identity = umt.identify(
            tensors, where, heads=told.heads, img_size=told.img_size, **asdict(told.clips), name=name
        )
        model = build_on_meta(UMT, identity.args, where, tensors)
    else:
        model = build_on_meta(name, given, where, tensors)
        read = size_args(model, tensors)
        args = {**given, **read}
        if read:
            model = build_on_meta(name, args, where, tensors)
        notes = [f"{key} {value} is read off the weights" for key, value in read.items()]
        native = cnn.native_keys(vit.native_keys(tensors, model), model)
        identity = Identity(name, name, args, Preprocessing.of_model(model), native, notes)
    check_heads(model, name, told.heads, where)
    return identity, model


def _fallback(name: str, tensors: Mapping[str, Tensor], where: str, told: _Told) -> Identity | None:
    """The model that a recipe names, where the weights fit it one by one."""
    try:
        identity, model = _named(name, tensors, where, {}, told)
    except RepshiftError:
        return None
    if shapes(model.state_dict()) != shapes(identity.tensors):
        return None
    identity.notes.insert(0, f"taken for {name}, which the recipe names: the tensors fit it")
    return identity


def _check_channels(tensors: Mapping[str, Tensor], where: str) -> None:
    for key in _FIRST_CONVOLUTIONS:
        weight = tensors.get(key)
        if weight is not None and weight.ndim == 4 and weight.shape[1] != _CHANNELS:  # noqa: PLR2004 (a convolution's)
            raise CheckpointError(
                f"{where}: {_CHANNELS} input channels are supported, these weights take {weight.shape[1]}"
            )
