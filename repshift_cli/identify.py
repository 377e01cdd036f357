"""Tell from the names and shapes of its tensors which timm model a set of weights belongs to.

The shape gives width, depth, patch, image size, classes, prefix tokens, layer scale and pooling. A registered timm
model whose tensors agree one by one gives the rest: heads, activation, preprocessing. Where several agree and would
compute different things, the user has to say which.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from repshift_cli.errors import CheckpointError
from repshift_cli.preprocessing import Preprocessing

__all__ = ["Identity", "VitShape", "check_heads", "create", "identify"]

_HEAD_SIZE = 64
"""Channels per head in nearly every ViT (Dosovitskiy et al. 2021, table 1)."""

_CHANNELS = 3
"""Pictures are read as RGB."""

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

_OTHER_KINDS = {
    "layer1.0.conv1.weight": "a ResNet",
    "stages.0.blocks.0.conv_dw.weight": "a ConvNeXt",
    "layers.0.mixer.A_log": "a Vision Mamba",
    "layers.0.blocks.0.attn.relative_position_bias_table": "a Swin Transformer, whose windows need the whole grid",
    "vit.embeddings.cls_token": "a ViT of the transformers library",
    "vision_encoder.patch_embed.proj.weight": "a video-text model (UMT)",
    "visual.proj": "an OpenAI CLIP model",
}


@dataclass
class Identity:
    """A model that fits the weights.

    Attributes:
        name: what people call it.
        architecture: timm name, or None for a shape that timm has no name for.
        args: what the builder needs beside the name.
        preprocessing: the evaluation transform.
        tensors: the weights under the model's own keys.
        notes: what was assumed.
    """

    name: str
    architecture: str | None
    args: dict[str, Any]
    preprocessing: Preprocessing
    tensors: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class VitShape:
    """What the tensors of a ViT tell."""

    width: int
    depth: int
    patch: tuple[int, int]
    channels: int
    image: tuple[int, int]
    classes: int
    class_token: bool
    registers: int
    distilled: bool
    no_embed_class: bool
    pooling: str
    layer_scale: bool
    pre_norm: bool
    qk_norm: int
    qkv_bias: bool
    hidden: int


def identify(
    tensors: Mapping[str, Tensor],
    where: str,
    model_name: str | None,
    heads: int | None,
    hint: str,
    *,
    args: Mapping[str, Any] | None = None,
    fallback: str | None = None,
) -> Identity:
    """Find the model that the weights belong to.

    Args:
        tensors: weights as the file has them.
        where: the file, for messages.
        model_name: the model's timm name, where the user or the file tells it.
        heads: attention heads, where the user tells them.
        hint: the file's name, which may name one of several that fit.
        args: what the builder of `model_name` is known to need.
        fallback: the timm name that a recipe gives: goes before a guess if the tensors fit it, else is ignored.

    Raises:
        CheckpointError: no model that is known fits, or several do; or the heads are not those of `model_name`.
    """
    _check_channels(tensors, where)
    if model_name:
        return _named(model_name, tensors, where, args or {}, heads)[0]
    if fallback and (identity := _fallback(fallback, tensors, where, heads)):
        return identity
    try:
        shape = _read_shape(tensors, where)
    except IndexError:
        raise CheckpointError(f"{where}: a tensor has fewer dimensions than it has in a Vision Transformer") from None
    fitting = _registered(shape, tensors)
    if heads is not None:
        fitting = {name: found for name, found in fitting.items() if _head_count(found[0]) == heads}
    if fitting:
        return _choose(fitting, tensors, where, hint)
    return _unregistered(shape, tensors, where, heads)


def create(name: str | None, args: Mapping[str, Any], where: str) -> nn.Module:
    """Build a model of timm without weights; without a name, a `VisionTransformer` from `args` alone.

    Raises:
        CheckpointError: `args`, which may come from a file, would make timm read or download something.
        Exception: of any kind, from timm, where `args` are not those of the model.
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
    model: nn.Module = timm.create_model(name, pretrained=False, **args)
    return model


def check_heads(model: nn.Module, name: str, heads: int | None, where: str) -> None:
    """Refuse the user's number of heads where what the model is has another.

    Raises:
        CheckpointError: naming both.
    """
    count = _head_count(model)
    if heads is not None and count is not None and heads != count:
        raise CheckpointError(f"{where}: {name} has {count} attention heads, not {heads}", "Leave --heads out.")


def _head_count(model: nn.Module) -> int | None:
    counts = (getattr(part, "num_heads", None) for part in model.modules())
    return next((count for count in counts if isinstance(count, int)), None)


def _check_channels(tensors: Mapping[str, Tensor], where: str) -> None:
    patches = tensors.get("patch_embed.proj.weight")
    if patches is not None and patches.ndim == 4 and patches.shape[1] != _CHANNELS:  # noqa: PLR2004 (a convolution's)
        raise CheckpointError(
            f"{where}: {_CHANNELS} input channels are supported, these weights take {patches.shape[1]}"
        )


def _fallback(name: str, tensors: Mapping[str, Tensor], where: str, heads: int | None) -> Identity | None:
    """The model that a recipe names, where the weights fit it one by one."""
    try:
        identity, model = _named(name, tensors, where, {}, heads)
    except CheckpointError:
        return None
    if _shapes(model.state_dict()) != _shapes(identity.tensors):
        return None
    identity.notes.insert(0, f"taken for {name}, which the recipe names: the tensors fit it")
    return identity


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in tensors.items()}


def _named(
    name: str, tensors: Mapping[str, Tensor], where: str, given: Mapping[str, Any], heads: int | None
) -> tuple[Identity, nn.Module]:
    """Somebody says which model it is: only image size and classes are read off the weights."""
    try:
        default = _on_meta(name, given, where)
        read = _size_args(default, tensors)
        args = {**given, **read}
        model = _on_meta(name, args, where) if read else default
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{where}: {name} cannot be built: {error}") from error
    check_heads(model, name, heads, where)
    notes = [f"{key} {value} is read off the weights" for key, value in read.items()]
    return Identity(name, name, args, Preprocessing.of_model(model), _native_keys(tensors, model), notes), model


def _size_args(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """How image size and number of classes of the weights differ from the model's own."""
    args: dict[str, Any] = {}
    head = tensors.get("head.weight", tensors.get("fc.weight"))
    classes = head.shape[0] if head is not None and head.ndim > 1 else 0
    if classes != getattr(model, "num_classes", classes):
        args["num_classes"] = classes
    position, own = tensors.get("pos_embed"), getattr(model, "pos_embed", None)
    if position is None or not isinstance(own, Tensor) or position.ndim != own.ndim:
        return args
    if position.shape[1] != own.shape[1]:
        without_place = own.shape[1] - model.patch_embed.num_patches
        side = math.isqrt(max(position.shape[1] - without_place, 0))
        args["img_size"] = side * model.patch_embed.patch_size[0]
    return args


def _on_meta(name: str, args: Mapping[str, Any], where: str) -> nn.Module:
    with torch.device("meta"):
        return create(name, args, where)


def _native_keys(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights under timm's keys, where a file has those of DINOv2's authors or of OpenCLIP around a timm model."""
    foreign = "mask_token" in tensors or any(key.startswith("visual.trunk.") for key in tensors)
    if foreign:
        from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

        if isinstance(model, VisionTransformer):
            converted: dict[str, Tensor] = checkpoint_filter_fn(dict(tensors), model)
            return converted
    return dict(tensors)


def _read_shape(tensors: Mapping[str, Tensor], where: str) -> VitShape:
    patches, blocks = tensors.get("patch_embed.proj.weight"), _count_blocks(tensors)
    if patches is None or patches.ndim != 4 or not blocks:  # noqa: PLR2004 (a convolution's weight)
        raise _unknown(tensors, where)
    width = patches.shape[0]
    class_token = "cls_token" in tensors
    distilled = "dist_token" in tensors
    registers = next((tensors[key].shape[1] for key in ("reg_token", "register_tokens") if key in tensors), 0)
    prefix = int(class_token) + int(distilled) + registers
    grid, no_embed_class = _grid(tensors, prefix, where)
    head, hidden = tensors.get("head.weight"), tensors.get("blocks.0.mlp.fc2.weight")
    norm = tensors.get("blocks.0.attn.q_norm.weight")
    return VitShape(
        width=width,
        depth=blocks,
        patch=(patches.shape[2], patches.shape[3]),
        channels=patches.shape[1],
        image=(grid * patches.shape[2], grid * patches.shape[3]),
        classes=head.shape[0] if head is not None else 0,
        class_token=class_token,
        registers=registers,
        distilled=distilled,
        no_embed_class=no_embed_class,
        pooling=_pooling(tensors, class_token),
        layer_scale="blocks.0.ls1.gamma" in tensors,
        pre_norm="norm_pre.weight" in tensors,
        qk_norm=norm.shape[0] if norm is not None else 0,
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
        hidden=hidden.shape[1] if hidden is not None else 4 * width,
    )


def _count_blocks(tensors: Mapping[str, Tensor]) -> int:
    found = {int(match[1]) for key in tensors if (match := re.match(r"blocks\.(\d{1,4})\.", key))}
    return len(found) if found == set(range(len(found))) else 0


def _grid(tensors: Mapping[str, Tensor], prefix: int, where: str) -> tuple[int, bool]:
    """Side of the patch grid, and whether prefix tokens have no position of their own."""
    position = tensors.get("pos_embed")
    if position is None or position.ndim != 3:  # noqa: PLR2004 ([1, tokens, channels])
        raise CheckpointError(
            f"{where}: without a position table the image size cannot be told", "Say which model it is with --model."
        )
    length = position.shape[1]
    # DINOv2's authors give the class token a position and the registers none; timm then gives none a position.
    for without in dict.fromkeys((prefix, 0, 1)):
        side = math.isqrt(max(length - without, 0))
        if side and side * side == length - without:
            return side, without != prefix
    raise CheckpointError(
        f"{where}: {length} positions and {prefix} prefix tokens make no square grid",
        "Say which model it is with --model.",
    )


def _pooling(tensors: Mapping[str, Tensor], class_token: bool) -> str:
    if any(key.startswith("attn_pool.") for key in tensors):
        return "map"
    if "fc_norm.weight" in tensors or not class_token:
        return "avg"
    return "token"


def _registered(shape: VitShape, tensors: Mapping[str, Tensor]) -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """timm's models whose tensors agree with these one by one; those made for another image size only if need be."""
    import timm

    known = (name for module in ("vision_transformer", "deit") for name in timm.list_models(module=module))
    names = [name for name in known if _may_fit(name.split("_"), shape)]
    sized = [name for name in names if str(shape.image[0]) in name.split("_")]
    return _agreeing(sized, shape, tensors) or _agreeing([name for name in names if name not in sized], shape, tensors)


def _may_fit(parts: list[str], shape: VitShape) -> bool:
    """Whether a timm name can be that of this shape, so that only a few models need to be built and compared."""
    registers = next((int(part[3:]) for part in parts if re.fullmatch(r"reg\d+", part)), 0)
    attention_pooled = ("siglip" in parts or "map" in parts) and "gap" not in parts
    return (
        f"patch{shape.patch[0]}" in parts
        and ("distilled" in parts) == shape.distilled
        and registers == shape.registers
        and attention_pooled == (shape.pooling == "map")
        and ("gap" not in parts or shape.pooling == "avg")
        and ("clip" in parts) == shape.pre_norm
    )


def _agreeing(
    names: list[str], shape: VitShape, tensors: Mapping[str, Tensor]
) -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    fitting = {}
    # nothing is computed on meta, yet going through the initialisation there takes ten times longer than building
    skip = {"weight_init": "skip"}
    for name in names:
        model = _on_meta(name, skip, name)
        if len(getattr(model, "blocks", ())) != shape.depth or getattr(model, "embed_dim", 0) != shape.width:
            continue
        args = _size_args(model, tensors)
        if args:
            model = _on_meta(name, args | skip, name)
        if _shapes(model.state_dict()) == _shapes(_native_keys(tensors, model)):
            fitting[name] = (model, args)
    return fitting


def _choose(
    fitting: dict[str, tuple[nn.Module, dict[str, Any]]], tensors: Mapping[str, Tensor], where: str, hint: str
) -> Identity:
    """One of the models that fit: the one the file is named after, else the plainest, if all compute the same."""
    hinted = [name for name in fitting if hint and (hint in name or name in hint)]
    names = sorted(hinted or fitting, key=lambda name: ("img_size" in fitting[name][1], len(name), name))
    # vit_* before deit_* of the same length class: the family's own name is the plainest
    names.sort(key=lambda name: ("img_size" in fitting[name][1], not hinted and not name.startswith("vit_")))
    if len({repr(fitting[name][0]) for name in names}) > 1:
        raise CheckpointError(
            f"{where}: several models have exactly these tensors but compute different things: {', '.join(names)}",
            "Say which it is with --model.",
        )
    name = names[0]
    model, args = fitting[name]
    preprocessing = Preprocessing.of_model(model)
    notes = [f"taken for {name} by its tensors ({_head_count(model) or 'unknown'} heads by its convention)"]
    others = [other for other in fitting if Preprocessing.of_model(fitting[other][0]) != preprocessing]
    if others and name not in hint:
        notes.append(
            f"its preprocessing is assumed too; {', '.join(others[:3])} with the same tensors has another: "
            "say so with --model if that is what the file holds"
        )
    return Identity(name, name, args, preprocessing, _native_keys(tensors, model), notes)


def _unregistered(shape: VitShape, tensors: Mapping[str, Tensor], where: str, heads: int | None) -> Identity:
    """A ViT of a shape that timm has no name for."""
    if shape.distilled:
        raise CheckpointError(f"{where}: a distilled ViT of an unknown shape", "Say which model it is with --model.")
    count = heads or _heads(shape, where)
    if shape.width % count:
        raise CheckpointError(f"{where}: {count} heads do not divide a width of {shape.width}")
    args = _vit_args(shape, count)
    name = f"ViT of width {shape.width}, depth {shape.depth}, patch {shape.patch[0]}"
    notes = [f"no timm model has these shapes: built as a {name} with {count} heads"]
    notes.append("its preprocessing is not told: ImageNet mean and std, bicubic, crop 0.9 are assumed")
    kept = {key: value for key, value in tensors.items() if key != "mask_token"}
    return Identity(name, None, args, _imagenet_preprocessing(shape), kept, notes)


def _heads(shape: VitShape, where: str) -> int:
    size = shape.qk_norm or _HEAD_SIZE
    if shape.width % size == 0:
        return shape.width // size
    possible = [count for count in range(1, 33) if shape.width % count == 0 and shape.width // count >= 16]  # noqa: PLR2004
    raise CheckpointError(
        f"{where}: the number of attention heads cannot be told for a width of {shape.width}",
        f"Give --heads; possible are {', '.join(map(str, possible))}.",
    )


def _vit_args(shape: VitShape, heads: int) -> dict[str, Any]:
    return {
        "img_size": list(shape.image),
        "patch_size": list(shape.patch),
        "in_chans": shape.channels,
        "num_classes": shape.classes,
        "embed_dim": shape.width,
        "depth": shape.depth,
        "num_heads": heads,
        "mlp_ratio": shape.hidden / shape.width,
        "qkv_bias": shape.qkv_bias,
        "qk_norm": bool(shape.qk_norm),
        "init_values": 1e-5 if shape.layer_scale else None,
        "class_token": shape.class_token,
        "reg_tokens": shape.registers,
        "no_embed_class": shape.no_embed_class,
        "pre_norm": shape.pre_norm,
        "global_pool": shape.pooling,
    }


def _imagenet_preprocessing(shape: VitShape) -> Preprocessing:
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    height, width = shape.image
    return Preprocessing(
        (shape.channels, height, width), tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD), "bicubic", 0.9
    )


def _unknown(tensors: Mapping[str, Tensor], where: str) -> CheckpointError:
    for key, kind in _OTHER_KINDS.items():
        if key in tensors:
            return CheckpointError(
                f"{where} looks like {kind}, which is not supported", "Supported are timm's Vision Transformers."
            )
    keys = ", ".join(list(tensors)[:5])
    return CheckpointError(
        f"{where}: the tensors are those of no model that is known (the first are {keys})",
        "Supported are timm's Vision Transformers. If it is one under other names, say which with --model.",
    )
