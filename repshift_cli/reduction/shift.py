"""The shift test: whether anything behind a block depends on the place of its lines in the map.

It is the permute test of networks of feature maps. A convolution needs its neighbours, so lines are not permuted:
behind a block the map is rolled by some rows and columns, and every convolution and pooling pads with the lines of the
other side of the map. Then the outputs must equal those of the map that is not rolled. If they do not, the model has a
table of positions, windows or a layer of fixed size, and would run with fewer lines and be wrong. Random weights are
enough.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from repshift_cli.models.tensor_model import library_model
from repshift_cli.reduction.families.base import Site
from repshift_cli.reduction.families.transformer import as_function

_STRIDE = 64
"""In pixels, of the last map or a multiple of it; the map is rolled by as much."""

_SIDE = 3 * _STRIDE


class _Around(TorchFunctionMode):
    """Pad with the lines of the other side of the map, so that `n` lines become `n / stride`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "pad" and args[0].ndim == 4 and len(args[1]) == 4:  # noqa: PLR2004
            value = args[3] if len(args) > 3 else kwargs.get("value")  # noqa: PLR2004
            return func(*args, **kwargs) if value == 1 else args[0]  # ones are added to the channels
        if name not in ("conv2d", "max_pool2d", "avg_pool2d") or args[0].shape[2:] == (1, 1):
            return func(*args, **kwargs)
        found, *rest = args
        if name == "conv2d":
            names = ("weight", "bias", "stride", "padding", "dilation", "groups")
        else:
            names = ("kernel_size", "stride", "padding", *(("dilation",) if name == "max_pool2d" else ()), "ceil_mode")
        given = {**dict(zip(names, rest, strict=False)), **kwargs, "padding": 0}
        kernel = given["weight"].shape[2:] if name == "conv2d" else given["kernel_size"]
        strides = given.get("stride") or (1 if name == "conv2d" else kernel)
        for axis in (0, 1):
            size, stride, dilation = (_side(value, axis) for value in (kernel, strides, given.get("dilation", 1)))
            extra = max(dilation * (size - 1) + 1 - stride, 0)
            side = found.shape[axis + 2]
            lines = torch.arange(-(extra // 2), side + extra - extra // 2, device=found.device) % side
            found = found.index_select(axis + 2, lines)
        given.pop("ceil_mode", None)
        return func(found, **given)


@torch.no_grad()
def shift_difference(model: nn.Module, site: Site, channels: int = 3) -> float:
    """The largest difference of the outputs, relative to their largest value, with the map rolled behind a site.

    Computed by a copy in float64, in eval mode.
    """
    found: list[Tensor] = []
    images = torch.randn(2, channels, _SIDE, _SIDE, generator=torch.Generator().manual_seed(site.layer))
    for rolled in (False, True):
        copied = as_function(copy.deepcopy(model)).double().eval()
        if rolled:
            library_model(copied).get_submodule(site.name).register_forward_hook(_roll)
        with _Around():
            found.append(copied(images.double()))
    expected, output = found
    return float((output - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def _roll(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    lines = math.ceil(output.shape[2] * _STRIDE / _SIDE)
    return output.roll((lines, lines), (2, 3))


def _side(value: Any, axis: int) -> int:
    return value if isinstance(value, int) else int(value[axis if len(value) > 1 else 0])
