"""Convolutional networks of residual blocks: timm's ResNet, ConvNeXt and RegNet, and torchvision's ResNet.

A convolution needs a grid, so whole rows and columns of the feature map are dropped, after blocks whose input and
output have the same shape: there each position has a shift. The result is a smaller dense map in the same memory
format, so all later layers compute less.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from timm.layers import (
    BatchNormAct2d,
    BlurPool2d,
    ConvNormAct,
    EcaModule,
    EffectiveSEModule,
    FrozenBatchNormAct2d,
    GlobalResponseNormMlp,
    Mlp,
    RmsNorm,
    RmsNorm2d,
    SEModule,
    SimpleNorm,
    SimpleNorm2d,
)
from timm.layers.grn import GlobalResponseNorm
from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from timm.models.regnet import Bottleneck as RegNetBottleneck
from timm.models.regnet import PreBottleneck, RegNet
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn
from torchvision.models import resnet as torchvision_resnet

from repshift_cli.errors import UsageError
from repshift_cli.ops.tokens import keep_lines
from repshift_cli.planning.layout import Grid, Layout, SiteInfo, Window
from repshift_cli.planning.plan import Plan, PlanSite
from repshift_cli.reduction.families.base import Family, Site, weight_count
from repshift_cli.reduction.stream import Reduce, Stream

_SHORTCUTS: dict[type[nn.Module], str] = {
    BasicBlock: "downsample",
    Bottleneck: "downsample",
    torchvision_resnet.BasicBlock: "downsample",
    torchvision_resnet.Bottleneck: "downsample",
    RegNetBottleneck: "downsample",
    PreBottleneck: "downsample",
    ConvNeXtBlock: "shortcut",
}
"""The supported blocks, and the name of the module on the shortcut of each."""

_RESNETS = (ResNet, torchvision_resnet.ResNet)

_SEQUENCES = (nn.Sequential, ConvNormAct, Mlp, GlobalResponseNormMlp)
"""Modules that run their children in order."""

_NORMS = (
    nn.BatchNorm2d,
    nn.SyncBatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    BatchNormAct2d,
    FrozenBatchNormAct2d,
    GlobalResponseNorm,
    RmsNorm,
    RmsNorm2d,
    SimpleNorm,
    SimpleNorm2d,
)
_BY_POSITION = (
    "torch.nn.modules.activation",
    "torch.nn.modules.dropout",
    "torch.nn.modules.linear",  # where Identity is
    "timm.layers.activations",
    "timm.layers.drop",
)
"""The modules in which torch and timm define layers without weights that keep the size of a map."""

_LONG_SIDE = 64
_GATES = (SEModule, EffectiveSEModule, EcaModule)


class _Map(Stream):
    """A feature map `[B, C, H, W]`; its positions are the tokens, row-major."""

    def shape(self, value: Tensor) -> tuple[int, ...]:
        return tuple(value.shape[2:])

    def block_input(self, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return _positions(args[0])

    def block_output(self, output: Tensor) -> Tensor:
        return _positions(output)

    def carried(self, carrier: Tensor) -> Tensor:
        return _positions(carrier)

    def choose(self, scores: Tensor, output: Tensor, planned: PlanSite) -> Tensor:
        return keep_lines(scores.unflatten(1, output.shape[2:]), cast(Grid, planned.grid_out))

    def reduce(self, output: Tensor, keep: Tensor, planned: PlanSite, reduce: Reduce) -> Tensor:
        return reduce(_positions(output), keep).mT.unflatten(2, cast(Grid, planned.grid_out))


def _positions(value: Tensor) -> Tensor:
    """A view `[B, H * W, C]`, token-major in memory if the map is channels-last."""
    return value.flatten(2).mT


class ResidualCNN(Family):
    """ResNet (basic and bottleneck blocks), ConvNeXt and RegNet."""

    name: ClassVar[str] = "resnet"
    covers: ClassVar[str] = "timm's ResNet, ResNeXt, Wide ResNet, ConvNeXt and RegNet, and torchvision's ResNet"
    shows: ClassVar[frozenset[str]] = frozenset()
    format_version: ClassVar[int] = 2

    def accepts(self, model: nn.Module) -> bool:
        return isinstance(model, (*_RESNETS, ConvNeXt, RegNet))

    def refusal(self, model: Any) -> str | None:
        try:
            pieces = _pieces(model)
        except _UnsupportedError as error:
            return str(error)
        if odd := next((piece.name for piece in pieces if not piece.sizes_agree()), None):
            return f"path and shortcut of {odd} have outputs of different sizes for maps with an odd number of lines"
        if not any(piece.barred is None for piece in pieces):
            return "none of its blocks has an input and an output of the same shape"
        pooling = getattr(model, "global_pool", None) or getattr(getattr(model, "head", None), "global_pool", None)
        if getattr(pooling, "pool_type", "avg") == "":
            return "it was built without global pooling, and the size of the map that it returns would change"
        return None

    def layout(self, model: Any) -> Layout:
        sites: list[SiteInfo] = []
        windows: list[Window] = []
        barred: dict[str, str] = {}
        for piece in _pieces(model):
            windows += [window for window, _ in piece.path if window is not None]
            if piece.barred is None:
                sites.append(SiteInfo(piece.name, piece.layer, tuple(windows)))
                windows = []
            elif piece.layer >= 0:
                barred[piece.name] = barred[str(piece.layer)] = piece.barred
        size = _input_size(model)
        _check_size(size, [*(window for site in sites for window in site.windows), *windows])
        grid = size
        for window in sites[0].windows:
            grid = window.output(grid)
        return Layout(
            family=self.name,
            prefix_tokens=0,
            patch_tokens=math.prod(grid),
            class_token=False,
            sites=tuple(sites),
            map_size=size,
            tail=tuple(windows),
            barred=barred,
        )

    def sites(self, model: Any) -> list[Site]:
        missing = {"*": "a residual block of convolutions has neither attention nor an MLP"}
        return [
            Site(piece.name, piece.layer, piece.module, {}, missing, width=piece.channels)
            for piece in _pieces(model)
            if piece.barred is None
        ]

    def stream(self, model: Any) -> Stream:
        return _Map()

    def macs(self, model: Any, plan: Plan | None) -> int:
        kept: Mapping[int, Grid] = plan.grids_kept if plan else {}
        grid, total = _input_size(model), 0
        for piece in _pieces(model):
            total += piece.macs(grid)
            grid = kept.get(piece.layer, _output(piece.path, grid))
        return total + weight_count(model.fc if isinstance(model, _RESNETS) else model.head)  # on one pooled position


_Steps = list[tuple[Window | None, nn.Module]]
"""The layers of a path in the order in which they run, each with what it does to the size of a map."""


@dataclass(frozen=True)
class _Piece:
    """A part of the network, in the order of the forward pass.

    Attributes:
        name: of the module in the model.
        layer: index among the residual blocks, -1 for other parts.
        shortcut: its layers; None without a shortcut, or for one that does nothing.
        barred: why nothing can be dropped after it; None for a site.
    """

    name: str
    module: nn.Module
    layer: int
    path: _Steps
    shortcut: _Steps | None
    barred: str | None

    def sizes_agree(self) -> bool:
        """Whether path and shortcut give maps of the same size for every input size."""
        sides = range(_LONG_SIDE, _LONG_SIDE + 8)  # every remainder for strides up to 8
        steps = self.shortcut
        return steps is None or all(_output(self.path, (n, n)) == _output(steps, (n, n)) for n in sides)

    def macs(self, grid: Grid) -> int:
        """Multiply-accumulates of path and shortcut."""
        return _macs(self.path, grid) + _macs(self.shortcut or [], grid)

    @property
    def channels(self) -> int:
        """Channels of the output map."""
        last = [leaf for _, leaf in self.path if isinstance(leaf, nn.Conv2d | nn.Linear)][-1]
        return last.out_channels if isinstance(last, nn.Conv2d) else last.out_features


def _steps(modules: Iterable[nn.Module], name: str) -> _Steps:
    return [(_window(leaf, name), leaf) for module in modules for leaf in _leaves(module, name)]


def _output(steps: _Steps, grid: Grid) -> Grid:
    """Size of the output map."""
    for window, _ in steps:
        grid = window.output(grid) if window is not None else grid
    return grid


def _macs(steps: _Steps, grid: Grid) -> int:
    total = channels = 0
    for window, leaf in steps:
        grid = window.output(grid) if window is not None else grid
        channels = leaf.out_channels if isinstance(leaf, nn.Conv2d) else channels
        total += _leaf_macs(leaf, grid, channels)
    return total


class _UnsupportedError(Exception):
    """A part of the model whose effect on a map of another size is unknown."""


def _pieces(model: Any) -> list[_Piece]:
    """The network up to the head."""
    pieces: list[_Piece] = []
    layer = 0
    for name in _names(model):
        module = model.get_submodule(name)
        if type(module) in _SHORTCUTS:
            pieces.append(_block(name, module, layer))
            layer += 1
        elif isinstance(module, nn.Sequential | nn.Identity | ConvNormAct) or not list(module.children()):
            pieces.append(_Piece(name, module, -1, _steps([module], name), None, "it is not a block"))
        else:
            known = ", ".join(dict.fromkeys(kind.__name__ for kind in _SHORTCUTS))
            raise _UnsupportedError(
                f"{name} is a {type(module).__name__}, which is not supported (supported blocks: {known})"
            )
    return pieces


def _names(model: Any) -> list[str]:
    """Names of stem, blocks and the modules between them."""

    def children(name: str) -> list[str]:
        return [f"{name}.{child}" for child, _ in model.get_submodule(name).named_children()]

    if isinstance(model, _RESNETS):
        blocks = [name for stage in ("layer1", "layer2", "layer3", "layer4") for name in children(stage)]
        return ["conv1", "bn1", "act1" if isinstance(model, ResNet) else "relu", "maxpool", *blocks]
    if isinstance(model, ConvNeXt):
        stages = [f"stages.{index}" for index in range(len(model.stages))]
        blocks = [name for stage in stages for name in (f"{stage}.downsample", *children(f"{stage}.blocks"))]
        return ["stem", *blocks, "norm_pre"]
    return ["stem", *(name for stage in ("s1", "s2", "s3", "s4") for name in children(stage)), "final_conv"]


def _block(name: str, module: nn.Module, layer: int) -> _Piece:
    side = _SHORTCUTS[type(module)]
    shortcut = getattr(module, side)
    path = _steps((part for child, part in module.named_children() if child != side), name)
    barred = around = None
    if shortcut is None and isinstance(module, RegNetBottleneck | PreBottleneck):
        barred = "it has no shortcut, so its output is not a changed version of its input"
    elif shortcut is not None and not isinstance(shortcut, nn.Identity):
        around = _steps([shortcut], name)
        barred = "its output differs in size or width from its input, so a position has no shift"
    return _Piece(name, module, layer, path, around, barred)


def _check_size(size: Grid, windows: Iterable[Window]) -> None:
    """Raise `UsageError` if images of this size shrink to nothing before the head."""
    grid = size
    for window in windows:
        grid = window.output(grid)
        if min(grid) < 1:
            raise UsageError(
                f"images of {size[0]}x{size[1]} are too small for this model: nothing is left at {window.name}",
                "Take larger images.",
            )


def _leaves(module: nn.Module, name: str) -> Iterator[nn.Module]:
    """The layers of a module in the order in which they run."""
    if isinstance(module, _SEQUENCES):
        for part in module.children():
            yield from _leaves(part, name)
    elif isinstance(module, _GATES + _NORMS) or not list(module.children()):
        yield module
    else:
        raise _UnsupportedError(f"a part of {name} is a {type(module).__name__}, which is not supported")


def _window(leaf: nn.Module, name: str) -> Window | None:
    """What a layer does to the size of a map; None if it works on each position alone.

    The exact types matter: subclasses in timm pad depending on the size of the map.
    """
    if type(leaf) in (nn.MaxPool2d, nn.AvgPool2d):
        pool: Any = leaf
        sizes = (_pair(pool.kernel_size), _pair(pool.stride), _pair(pool.padding), _pair(getattr(pool, "dilation", 1)))
        return Window(name, *sizes, pool.ceil_mode)
    if isinstance(leaf, BlurPool2d):
        before, after = leaf.padding[0], leaf.padding[-1]
        if before != after or leaf.pad_mode != "reflect":
            raise _UnsupportedError(f"{name} blurs with a padding that is not supported")
        return Window(name, _pair(leaf.filt_size), _pair(leaf.stride), _pair(before))
    if type(leaf) is nn.Conv2d:
        if isinstance(leaf.padding, str):
            raise _UnsupportedError(f"{name} has a convolution with the padding {leaf.padding!r}")
        window = Window(name, _pair(leaf.kernel_size), _pair(leaf.stride), _pair(leaf.padding), _pair(leaf.dilation))
        return None if window.kernel == window.stride == (1, 1) else window
    plain = type(leaf).__module__.startswith(_BY_POSITION) and not list(leaf.parameters(recurse=False))
    if plain or isinstance(leaf, (nn.Linear, *_NORMS, *_GATES)):
        return None
    raise _UnsupportedError(f"a part of {name} is a {type(leaf).__name__}, which is not supported")


def _pair(value: Any) -> Grid:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _leaf_macs(leaf: nn.Module, grid: Grid, channels: int) -> int:
    """Multiply-accumulates of a layer whose output map has this `grid` and these `channels`."""
    if isinstance(leaf, nn.Conv2d | nn.Linear):
        return math.prod(grid) * leaf.weight.numel()
    if isinstance(leaf, BlurPool2d):
        return math.prod(grid) * int(leaf.channels or channels) * math.prod(_pair(leaf.filt_size))
    if isinstance(leaf, _GATES):
        # gates run on the mean over the map
        return weight_count(leaf, nn.Conv2d) + channels * weight_count(leaf, nn.Conv1d)
    return 0


def _input_size(model: Any) -> Grid:
    """The image size in the model's configuration; the weights fit any size."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    _, height, width = config.get("input_size") or (3, 224, 224)
    return int(height), int(width)
