"""timm's Vision Transformers.

Shapes give width, depth, patch, classes, prefix tokens, layer scale, and the image size if it is square. Registered
models with the same tensors give heads, activation, pooling and preprocessing, if all of them compute the same. A note
lists what is assumed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from torch import Tensor, nn

from repshift_cli.checkpoints.create import build_on_meta, quickly_on_meta
from repshift_cli.checkpoints.identify.cnn import names_digest
from repshift_cli.checkpoints.identify.computation import computation
from repshift_cli.checkpoints.identify.identity import Fitting, Identity, best_fit, shapes, supported
from repshift_cli.checkpoints.identify.sizes import HEAD_SIZE, check_divides, grid, head_count, size_args
from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import CheckpointError
from repshift_cli.reduction.families.base import find
from repshift_cli.utils.suggest import first_names

MODULES = ("vision_transformer", "deit", "eva")
"""timm's files of models with such tensors. Those of `eva.py` add rotary positions, which have no tensors."""

HYBRIDS = ("vision_transformer_hybrid", "vitamin")
"""Those of models with a convolutional network in the patch embedding."""

_OTHER_HEADS = {192: (6, 12)}
"""By width: heads of models outside of timm. ViT-Tiny has 3, 6 or 12."""


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
    fc_norm: bool
    distilled: bool
    head_size: int

    def args(self, heads: int) -> dict[str, Any]:
        """Arguments of the builder."""
        args = {**asdict(self), "num_heads": heads}
        return {key: value for key, value in args.items() if key not in ("distilled", "head_size")}


def recognises(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these can be the weights of a ViT."""
    return "patch_embed.proj.weight" in tensors and _count_blocks(tensors) > 0


@dataclass(frozen=True)
class _Registered:
    """A model of timm, built with one block.

    Attributes:
        block, others: shapes of the tensors of the block, and names of all others, see `_parts`.
        plain: whether it is a `VisionTransformer`.
        supported: whether a family accepts it.
        heads: of its attention.
        computes: what the block computes besides its tensors.
    """

    name: str
    block: dict[str, tuple[int, ...]]
    others: frozenset[str]
    plain: bool
    supported: bool
    heads: int | None
    computes: str


def identify(  # noqa: PLR0917
    tensors: Mapping[str, Tensor],
    where: str,
    options: LoadOptions,
    hint: str,
    size: tuple[int, int] | None = None,
    given: Mapping[str, Any] | None = None,
) -> Identity:
    """Find the ViT that the weights belong to; errors as `match.identify`.

    Args:
        size: of the images, if it is known.
        given: builder arguments, which take precedence over what the tensors show.
    """
    given, heads = given or {}, options.heads
    models = alike(tensors, HYBRIDS if _is_hybrid(tensors) else MODULES)
    if models and not any(model.supported for model in models):
        names = first_names([model.name for model in models])
        raise CheckpointError(f"{where}: these tensors are those of {names}, which is not supported", supported())
    fits = fitting(models, tensors, where, size, given)
    if heads is not None:
        fits = {name: found for name, found in fits.items() if head_count(found[0]) == heads}
    if fits:
        identity, model = choose(fits, tensors, where, hint)
    else:
        try:
            shape = _read_shape(tensors, where, size)
        except IndexError:
            raise CheckpointError(f"{where}: a tensor has too few dimensions for a Vision Transformer") from None
        identity, model = _unregistered(shape, tensors, where, heads, given, models)
    known = {**given, **({"num_heads": heads} if heads else {}), **({"img_size": size} if size else {})}
    identity.notes.append(_assumptions(model, known))
    return identity


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
        fc_norm="fc_norm.weight" in tensors,
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


def _parts(tensors: Mapping[str, Tensor]) -> tuple[dict[str, tuple[int, ...]], frozenset[str]]:
    """Shapes of the first block, and names of the tensors outside of blocks, without what a user changes.

    These are the classifier, and the pooling over the mean, before which the norm has another name.
    """
    block = {key: tuple(value.shape) for key, value in tensors.items() if key.startswith("blocks.0.")}
    names = (key for key in tensors if not key.startswith(("blocks.", "head", "mask_token")))
    return block, frozenset(
        key.replace("fc_norm.", "norm.", 1).replace("register_tokens", "reg_token") for key in names
    )


@cache
def registered(modules: tuple[str, ...], width: int | None = None, digest: str | None = None) -> list[_Registered]:
    """The models of some of timm's files, of one width or with one `names_digest` of `_parts`."""
    import timm
    from timm.models.vision_transformer import VisionTransformer

    found, known = [], stored()
    for name in (name for module in modules for name in timm.list_models(module=module)):
        its_width, its_digest = known.get(name, (width, digest))
        if (width is not None and its_width != width) or (digest is not None and its_digest != digest):
            continue
        for args in ({"depth": 1}, {}):  # a few models have arguments for each block
            with suppress(Exception):
                model: Any = quickly_on_meta(name, args)
                parts = _parts(model.state_dict())
                computes = computation(model.blocks[0])
                plain, heads = isinstance(model, VisionTransformer), head_count(model)
                found.append(_Registered(name, *parts, plain, find(model) is not None, heads, computes))
                break
    return found


@cache
def stored() -> dict[str, tuple[int, str]]:
    """Width and `names_digest` of models by name, so that others need not be built (`scripts/timm_widths.py`)."""
    text = files("repshift_cli").joinpath("assets/timm_widths.json").read_text("utf-8")
    found: dict[str, tuple[int, str]] = json.loads(text)
    return found


def alike(tensors: Mapping[str, Tensor], modules: tuple[str, ...]) -> list[_Registered]:
    """Models of timm's files with this block and these other names; else with these names, if none is plain."""
    block, others = _parts(tensors)
    width = block.get("blocks.0.norm1.weight", (None,))[0]
    if same := [model for model in registered(modules, width) if (model.block, model.others) == (block, others)]:
        return same
    models = registered(modules, digest=names_digest([*block, *others]))
    named = [model for model in models if model.others == others and model.block.keys() == block.keys()]
    return [] if any(model.plain for model in named) else named


def _is_hybrid(tensors: Mapping[str, Tensor]) -> bool:
    return any(key.startswith("patch_embed.backbone.") for key in tensors)


def fitting(
    models: list[_Registered],
    tensors: Mapping[str, Tensor],
    where: str,
    size: tuple[int, int] | None,
    given: Mapping[str, Any],
) -> Fitting:
    """The models with exactly these tensors, at the image size, classes and pooling of the weights."""
    fits: Fitting = {}
    for name in (model.name for model in models):
        # it does not take the arguments, or has another number of prefix tokens
        with suppress(Exception):
            model: Any = quickly_on_meta(name, given)
            if len(model.blocks) != _count_blocks(tensors):
                continue
            args = size_args(model, tensors, where, size, given)
            if args:
                model = quickly_on_meta(name, {**given, **args})
            if shapes(model.state_dict()) == shapes(native_keys(tensors, model)):
                fits[name] = (model, {**given, **args})
    return fits


def choose(fits: Fitting, tensors: Mapping[str, Tensor], where: str, hint: str) -> tuple[Identity, nn.Module]:
    """The model in the name of the file, else the one with the shortest name, if all compute the same."""
    name = best_fit(fits, where, hint, plain="vit_")
    model, args = fits[name]
    preprocessing = Preprocessing.of_model(model)
    notes = [f"detected {name} from tensor names and shapes"]
    others = [other for other in fits if Preprocessing.of_model(fits[other][0]) != preprocessing]
    if others and name not in hint:
        notes.append(
            f"other models have the same tensors and another preprocessing, such as {', '.join(others[:3])}: "
            "choose with --model"
        )
    return Identity(name, name, args, preprocessing, native_keys(tensors, model), notes), model


def _unregistered(  # noqa: PLR0917
    shape: _Shape,
    tensors: Mapping[str, Tensor],
    where: str,
    heads: int | None,
    given: Mapping[str, Any],
    alike: list[_Registered],
) -> tuple[Identity, nn.Module]:
    """A ViT whose shape no timm model has; its block computes what those of all models with such blocks compute."""
    if shape.distilled or _is_hybrid(tensors):
        kind = "distilled" if shape.distilled else "hybrid"
        raise CheckpointError(f"{where}: a {kind} ViT of unknown shape", "Name the model with --model.")
    kept = {key: value for key, value in tensors.items() if key != "mask_token"}
    count = given.get("num_heads") or heads or _heads(shape, where, alike)
    args = {**shape.args(check_divides(count, shape.embed_dim, where)), **given}
    model: Any = build_on_meta(None, args, where, tensors)
    computes = computation(model.blocks[0])
    others = {
        other.computes: other.name
        for other in reversed(alike)
        if not other.plain or (other.heads == count and other.computes != computes)
    }
    if others and not given.keys() & {"act_layer", "norm_layer"}:
        raise CheckpointError(
            f"{where}: no timm model has these shapes, and those with such blocks compute something else than a plain "
            f"ViT: {first_names(list(others.values()))}",
            "Name one with --model, and what differs with --model-args, such as depth=8 or global_pool=avg.",
        )
    name = f"ViT of width {shape.embed_dim}, depth {shape.depth}, patch {shape.patch_size[0]}"
    notes = [f"no timm model has these shapes: built as a {name} with {count} heads"]
    return Identity(name, None, args, _imagenet_preprocessing(shape), kept, notes), model


def _heads(shape: _Shape, where: str, alike: list[_Registered]) -> int:
    """The number by convention, if registered models with such blocks, or else of this width, have no other."""
    width, count = shape.embed_dim, shape.embed_dim // shape.head_size
    models = registered(MODULES, width)
    alike = alike or [model for model in models if model.block.get("blocks.0.norm1.weight") == (width,)]
    common = {model.heads for model in alike if model.heads} | set(_OTHER_HEADS.get(width, ()))
    if width % shape.head_size == 0 and (shape.qk_norm or common <= {count}):
        return count
    possible = [count for count in range(1, 33) if width % count == 0 and width // count >= 16]  # noqa: PLR2004
    usual = f" Common: {', '.join(map(str, sorted(common)))}." if common else ""
    raise CheckpointError(
        f"{where}: unknown number of attention heads for width {width}",
        f"Give --heads. Allowed: {', '.join(map(str, possible))}.{usual}",
    )


def _assumptions(model: Any, known: Mapping[str, Any]) -> str:
    """A note on what the tensors do not show and nothing else says."""
    height, width = model.patch_embed.img_size
    activation = next((type(part.act).__name__ for part in model.modules() if hasattr(part, "act")), "unknown")
    pooling = model.global_pool or "no"
    parts = {
        "num_heads": f"{head_count(model) or 'unknown'} heads",
        "act_layer": f"activation {activation}",
        "global_pool": f"{pooling} pooling",
        "img_size": f"images of {height}x{width}",
    }
    if not hasattr(model, "rope"):
        parts["rope"] = "no rotary positions"
    assumed = ", ".join(text for key, text in parts.items() if key not in known)
    return (
        f"assumed, since tensors do not show it: {assumed}. If the model has others, its results "
        "are wrong: name it with --model, or give --heads, --img-size HxW, --model-args (such as global_pool=avg)"
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
