"""timm's Vision Transformers.

Shapes give width, depth, patch, image size, classes, prefix tokens, layer scale and pooling. A registered model with
the same tensors gives heads, activation and preprocessing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from repshift_cli.checkpoints.create import quickly_on_meta
from repshift_cli.checkpoints.identify.identity import Fitting, Identity, best_fit, shapes, supported
from repshift_cli.checkpoints.identify.sizes import HEAD_SIZE, check_divides, grid, head_count, size_args
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import CheckpointError


@dataclass(frozen=True)
class _Shape:
    """What the tensors of a ViT show: arguments of `VisionTransformer`, and two more.

    Attributes:
        distilled: whether there is a distillation token.
        head_size: channels per head.
    """

    img_size: list[int]
    patch_size: list[int]
    in_chans: int
    num_classes: int
    embed_dim: int
    depth: int
    mlp_ratio: float
    qkv_bias: bool
    qk_norm: bool
    init_values: float | None
    class_token: bool
    reg_tokens: int
    no_embed_class: bool
    pre_norm: bool
    global_pool: str
    distilled: bool
    head_size: int

    def args(self, heads: int) -> dict[str, Any]:
        """Arguments of the builder."""
        args = {**asdict(self), "num_heads": heads}
        return {key: value for key, value in args.items() if key not in ("distilled", "head_size")}


def recognises(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these can be the weights of a ViT."""
    return "patch_embed.proj.weight" in tensors and _count_blocks(tensors) > 0


def identify(
    tensors: Mapping[str, Tensor], where: str, heads: int | None, hint: str, size: tuple[int, int] | None = None
) -> Identity:
    """Find the ViT that the weights belong to, for images of a `size` if it is known; errors as `match.identify`."""
    try:
        shape = _read_shape(tensors, where, size)
    except IndexError:
        raise CheckpointError(f"{where}: a tensor has too few dimensions for a Vision Transformer") from None
    fitting = _registered(shape, tensors, where)
    if heads is not None:
        fitting = {name: found for name, found in fitting.items() if head_count(found[0]) == heads}
    if fitting:
        return _choose(fitting, tensors, where, hint)
    return _unregistered(shape, tensors, where, heads)


def native_keys(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weights under timm's keys, converted from those of DINOv2's authors and of OpenCLIP around a timm model."""
    foreign = "mask_token" in tensors or any(key.startswith("visual.trunk.") for key in tensors)
    if foreign:
        from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

        if isinstance(model, VisionTransformer):
            converted: dict[str, Tensor] = checkpoint_filter_fn(dict(tensors), model)
            return converted
    return dict(tensors)


def _read_shape(tensors: Mapping[str, Tensor], where: str, size: tuple[int, int] | None) -> _Shape:
    patches, blocks = tensors.get("patch_embed.proj.weight"), _count_blocks(tensors)
    if patches is None or patches.ndim != 4 or not blocks or not patches.numel():  # noqa: PLR2004 (a convolution)
        raise _unknown(tensors, where)
    width, channels, *patch_size = patches.shape
    class_token, distilled = "cls_token" in tensors, "dist_token" in tensors
    registers = next((tensors[key].shape[1] for key in ("reg_token", "register_tokens") if key in tensors), 0)
    rows, columns, no_embed_class = _grid(tensors, class_token + distilled + registers, patch_size, size, where)
    head, hidden = tensors.get("head.weight"), tensors.get("blocks.0.mlp.fc2.weight")
    norm = tensors.get("blocks.0.attn.q_norm.weight")
    return _Shape(
        img_size=[rows * patch_size[0], columns * patch_size[1]],
        patch_size=patch_size,
        in_chans=channels,
        num_classes=head.shape[0] if head is not None else 0,
        embed_dim=width,
        depth=blocks,
        mlp_ratio=hidden.shape[1] / width if hidden is not None else 4.0,
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
        qk_norm=norm is not None,
        init_values=1e-5 if "blocks.0.ls1.gamma" in tensors else None,
        class_token=class_token,
        reg_tokens=registers,
        no_embed_class=no_embed_class,
        pre_norm="norm_pre.weight" in tensors,
        global_pool=_pooling(tensors, class_token),
        distilled=distilled,
        head_size=norm.shape[0] if norm is not None else HEAD_SIZE,
    )


def _count_blocks(tensors: Mapping[str, Tensor]) -> int:
    found = {int(match[1]) for key in tensors if (match := re.match(r"blocks\.(\d{1,4})\.", key))}
    return len(found) if found == set(range(len(found))) else 0


def _grid(
    tensors: Mapping[str, Tensor], prefix: int, patch: list[int], size: tuple[int, int] | None, where: str
) -> tuple[int, int, bool]:
    """Rows and columns of the patch grid, and whether prefix tokens have no positions."""
    position = tensors.get("pos_embed")
    if position is None or position.ndim != 3:  # noqa: PLR2004 ([1, tokens, channels])
        raise CheckpointError(f"{where}: unknown image size, since there is no position table", supported())
    # DINOv2's authors give a position to the class token but not to registers; timm then gives none to either.
    rows, columns, without = grid(position.shape[1], (prefix, 0, 1), patch, size, where)
    return rows, columns, without != prefix


def _pooling(tensors: Mapping[str, Tensor], class_token: bool) -> str:
    if any(key.startswith("attn_pool.") for key in tensors):
        return "map"
    if "fc_norm.weight" in tensors or not class_token:
        return "avg"
    return "token"


def _registered(shape: _Shape, tensors: Mapping[str, Tensor], where: str) -> Fitting:
    """timm's models with these tensors. Models for another image size are tried last."""
    import timm

    known = (name for module in ("vision_transformer", "deit") for name in timm.list_models(module=module))
    names = [name for name in known if _may_fit(name.split("_"), shape)]
    sized = [name for name in names if str(shape.img_size[0]) in name.split("_")]
    others = [name for name in names if name not in sized]
    return _agreeing(sized, shape, tensors, where) or _agreeing(others, shape, tensors, where)


def _may_fit(parts: list[str], shape: _Shape) -> bool:
    """Whether the parts of a timm name agree with the shape. Only such models are built and compared."""
    registers = next((int(part[3:]) for part in parts if re.fullmatch(r"reg\d+", part)), 0)
    attention_pooled = ("siglip" in parts or "map" in parts) and "gap" not in parts
    return (
        f"patch{shape.patch_size[0]}" in parts
        and ("distilled" in parts) == shape.distilled
        and registers == shape.reg_tokens
        and attention_pooled == (shape.global_pool == "map")
        and ("gap" not in parts or shape.global_pool == "avg")
        and ("clip" in parts) == shape.pre_norm
    )


def _agreeing(names: list[str], shape: _Shape, tensors: Mapping[str, Tensor], where: str) -> Fitting:
    fitting = {}
    skip = {"weight_init": "skip"}
    for name in names:
        model: Any = quickly_on_meta(name, skip)
        if len(getattr(model, "blocks", ())) != shape.depth or getattr(model, "embed_dim", 0) != shape.embed_dim:
            continue
        try:
            args = size_args(model, tensors, where, (shape.img_size[0], shape.img_size[1]))
        except CheckpointError:  # it has another number of prefix tokens
            continue
        if args:
            model = quickly_on_meta(name, args | skip)
        if shapes(model.state_dict()) == shapes(native_keys(tensors, model)):
            fitting[name] = (model, args)
    return fitting


def _choose(fitting: Fitting, tensors: Mapping[str, Tensor], where: str, hint: str) -> Identity:
    """The model in the name of the file, else the one with the shortest name, if all compute the same."""
    name = best_fit(fitting, where, hint, plain="vit_")
    model, args = fitting[name]
    preprocessing = Preprocessing.of_model(model)
    notes = [f"detected {name} from tensor names and shapes ({head_count(model) or 'unknown'} heads by convention)"]
    others = [other for other in fitting if Preprocessing.of_model(fitting[other][0]) != preprocessing]
    if others and name not in hint:
        notes.append(
            f"other models have the same tensors and another preprocessing, such as {', '.join(others[:3])}: "
            "choose with --model"
        )
    return Identity(name, name, args, preprocessing, native_keys(tensors, model), notes)


def _unregistered(shape: _Shape, tensors: Mapping[str, Tensor], where: str, heads: int | None) -> Identity:
    """A ViT whose shape no timm model has."""
    if shape.distilled:
        raise CheckpointError(f"{where}: a distilled ViT of unknown shape", "Name the model with --model.")
    kept = {key: value for key, value in tensors.items() if key != "mask_token"}
    count = check_divides(heads or _heads(shape, where), shape.embed_dim, where)
    name = f"ViT of width {shape.embed_dim}, depth {shape.depth}, patch {shape.patch_size[0]}"
    notes = [f"no timm model has these shapes: built as a {name} with {count} heads"]
    return Identity(name, None, shape.args(count), _imagenet_preprocessing(shape), kept, notes)


def _heads(shape: _Shape, where: str) -> int:
    if shape.embed_dim % shape.head_size == 0:
        return shape.embed_dim // shape.head_size
    possible = [count for count in range(1, 33) if shape.embed_dim % count == 0 and shape.embed_dim // count >= 16]  # noqa: PLR2004
    raise CheckpointError(
        f"{where}: unknown number of attention heads for width {shape.embed_dim}",
        f"Give --heads. Allowed: {', '.join(map(str, possible))}.",
    )


def _imagenet_preprocessing(shape: _Shape) -> Preprocessing:
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    height, width = shape.img_size
    return Preprocessing(
        (shape.in_chans, height, width), tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD), "bicubic", 0.9
    )


def _unknown(tensors: Mapping[str, Tensor], where: str) -> CheckpointError:
    keys = ", ".join(list(tensors)[:5])
    return CheckpointError(
        f"{where}: the tensors fit no known model (the first are {keys})",
        f"{supported()} If its keys are renamed, name the model with --model.",
    )
