"""Vision Mamba (Vim) under the keys of its authors.

The tensors give nearly all sizes. The supported forms are those that the authors trained; others are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from repshift_cli.checkpoints.create import VIM, build_on_meta
from repshift_cli.checkpoints.identify.identity import Identity
from repshift_cli.checkpoints.identify.sizes import check_heads
from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import CheckpointError, UsageError
from repshift_cli.models.vim import CONV_WIDTH, MODELS, VisionMamba

_FIRST = "layers.0.mixer."
_SIZE = 224
"""Image size of the authors' training."""

_EXPAND = 2
_HINT = "Supported are Vim's bidirectional models (bimambav2) with class token and position table."


@dataclass(frozen=True)
class _Shape:
    """Sizes that the tensors of a Vim give."""

    embed_dim: int
    depth: int
    d_state: int
    patch_size: int
    class_token: str
    num_classes: int

    def class_tokens(self) -> int:
        return 2 if self.class_token == "double" else 1  # noqa: S105 (not a password)


def recognises(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of a Vim of any form."""
    return f"{_FIRST}A_log" in tensors


def identify(tensors: Mapping[str, Tensor], where: str, options: LoadOptions) -> Identity:
    """Find the Vim that the weights belong to; errors as `match.identify`."""
    shape, side = _read(tensors, where)
    size, stride, certain = _size(side, shape.patch_size, None, options, where)
    full = {**asdict(shape), "img_size": size, "stride": stride}
    name, architecture, args = _name_and_args(full)
    model = build_on_meta(architecture, args, where, tensors, name)
    check_heads(model, name, options.heads, where)
    notes = [f"detected {name} from tensor names and shapes", _assumed(shape)]
    if not certain:
        notes.append(
            f"assumed that {side}x{side} positions mean images of {size}x{size} with stride {stride} (--img-size)"
        )
    return Identity(name, architecture, args, Preprocessing.of_model(model), dict(tensors), notes)


def named(
    name: str, tensors: Mapping[str, Tensor], where: str, given: Mapping[str, Any], options: LoadOptions
) -> Identity:
    """The named Vim; only sizes and number of classes are read from the weights."""
    if not recognises(tensors):
        raise CheckpointError(f"{where}: the weights do not fit {name}: missing: {_FIRST}A_log")
    shape, side = _read(tensors, where)
    own = _defaults() | MODELS[name] | dict(given)
    for key in ("stride", "patch_size"):
        if not ((isinstance(own[key], int) and own[key] > 0) or (key == "stride" and own[key] is None)):
            raise CheckpointError(f"{where}: invalid {key}={own[key]!r}: must be at least 1")
    size, _, _ = _size(side, shape.patch_size, own["stride"] or own["patch_size"], options, where)
    found = {"num_classes": shape.num_classes, "class_token": shape.class_token, "img_size": size}
    read = {key: value for key, value in found.items() if own[key] != value}
    args = {**given, **read}
    model = build_on_meta(name, args, where, tensors)
    notes = [f"{key} {value} is read from the weights" for key, value in read.items()]
    return Identity(name, name, args, Preprocessing.of_model(model), dict(tensors), [*notes, _assumed(shape)])


def _assumed(shape: _Shape) -> str:
    place = "the class token in the middle" if shape.class_tokens() == 1 else "the mean of both class tokens"
    return f"assumed, as in the authors' models: {place}, both directions averaged (div2)"


def _defaults() -> dict[str, Any]:
    return dict(VisionMamba.__init__.__kwdefaults__ or {})


def _name_and_args(full: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """Name, architecture and arguments: of one of `MODELS` with any image size and classes, else all arguments."""
    for name, model in MODELS.items():
        own = _defaults() | model
        own["stride"] = own["stride"] or own["patch_size"]
        other = {key: value for key, value in full.items() if own[key] != value}
        if other.keys() <= {"num_classes", "img_size"}:
            return name, name, other
    name = f"Vim of width {full['embed_dim']}, depth {full['depth']}, patch {full['patch_size']}"
    return name, VIM, full


def _read(tensors: Mapping[str, Tensor], where: str) -> tuple[_Shape, int]:
    try:
        _check_form(tensors, where)
        return _read_shape(tensors, where)
    except KeyError as error:
        raise CheckpointError(f"{where}: it looks like a Vision Mamba without {error.args[0]}", _HINT) from None
    except (IndexError, ValueError):
        raise CheckpointError(f"{where}: a tensor has the wrong number of dimensions for a Vim") from None


def _check_form(tensors: Mapping[str, Tensor], where: str) -> None:
    first = {key.removeprefix(_FIRST): value for key, value in tensors.items() if key.startswith(_FIRST)}
    width, inner = first["out_proj.weight"].shape
    taps, rank = first["conv1d.weight"].shape[-1], first["dt_proj.weight"].shape[1]
    reasons = {
        "it reads the tokens in one direction only (there is no A_b_log)": "A_b_log" not in first,
        "both directions share one convolution, bimamba v1 (there is no conv1d_b)": "conv1d_b.weight" not in first,
        "it has LayerNorm where RMSNorm is supported (there is a norm.bias)": bool(
            {"norm_f.bias", "layers.0.norm.bias"} & tensors.keys()
        ),
        "it has rotary positions (rope), which depend on the place of a token": any("rope" in key for key in tensors),
        "it has no class token": not _class_token(tensors),
        "it has no position table (pos_embed)": "pos_embed" not in tensors,
        f"its convolution reads {taps} tokens, where {CONV_WIDTH} are supported": taps != CONV_WIDTH,
        f"it widens {width} channels to {inner}, where {_EXPAND * width} are supported (expand {_EXPAND})": (
            inner != _EXPAND * width
        ),
        "its projections in and out have a bias": bool({"in_proj.bias", "out_proj.bias"} & first.keys()),
        f"its steps have rank {rank}, where {math.ceil(width / 16)} is supported (dt_rank, width / 16)": (
            rank != math.ceil(width / 16)
        ),
    }
    for reason, found in reasons.items():
        if found:
            raise CheckpointError(f"{where} looks like a Vision Mamba that is not supported: {reason}", _HINT)


def _class_token(tensors: Mapping[str, Tensor]) -> str | None:
    if "cls_token" in tensors:
        return "middle"
    return "double" if {"cls_token_head", "cls_token_tail"} <= tensors.keys() else None


def _read_shape(tensors: Mapping[str, Tensor], where: str) -> tuple[_Shape, int]:
    width, _, height, breadth = tensors["patch_embed.proj.weight"].shape
    _, length, _ = tensors["pos_embed"].shape
    _, d_state = tensors[f"{_FIRST}A_log"].shape
    layers = {key.split(".")[1] for key in tensors if key.startswith("layers.") and key.endswith(".mixer.A_log")}
    head = tensors.get("head.weight")
    if height != breadth:
        raise CheckpointError(f"{where}: its patches of {height}x{breadth} are not square, which is not supported")
    if not (width and height and d_state):
        raise CheckpointError(f"{where}: invalid width {width}, patch {height} or state {d_state}: must be at least 1")
    classes = head.shape[0] if head is not None else 0
    shape = _Shape(width, len(layers), d_state, height, str(_class_token(tensors)), classes)
    patches = length - shape.class_tokens()
    side = math.isqrt(max(patches, 0))
    if side < 1 or side * side != patches:
        raise CheckpointError(
            f"{where}: {length} positions and {shape.class_tokens()} class tokens make no square grid",
            "Only square images are supported.",
        )
    return shape, side


def _size(side: int, patch: int, stride: int | None, options: LoadOptions, where: str) -> tuple[int, int, bool]:
    """Image size, stride, and whether both are certain.

    Args:
        stride: of the named model, if there is a name.
        options: with the image size that the user gives.
    """
    wanted = options.size.square(where) if options.size else None
    strides = [stride] if stride else [each for each in (patch, patch // 2) if each]
    if wanted is not None:
        fits = [each for each in strides if _image(side, patch, each) == wanted]
        if not fits and stride is None and side > 1 and (wanted - patch) % (side - 1) == 0:
            fits = [each for each in [(wanted - patch) // (side - 1)] if 0 < each <= patch]
        if not fits:
            sizes = ", ".join(f"{_image(side, patch, each)} (stride {each})" for each in strides)
            raise UsageError(
                f"--img-size {wanted}: {where} has {side * side} positions ({side}x{side}) for patches of {patch}",
                f"Allowed: {sizes}. Leave --img-size out, or resize the position table first.",
            )
        return wanted, fits[0], True
    for each in strides:
        if _image(side, patch, each) == _SIZE:
            return _SIZE, each, False
    return _image(side, patch, strides[0]), strides[0], stride is not None


def _image(side: int, patch: int, stride: int) -> int:
    return (side - 1) * stride + patch
