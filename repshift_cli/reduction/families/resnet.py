"""timm's convolutional networks of residual blocks: ResNet, ConvNeXt and RegNet.

A convolution needs a grid, so whole rows and columns of the feature map go, after blocks whose input and output have
one shape: there the shift of each position is what the block did to it. What is kept is a smaller dense map in the
memory format of the whole one, so all that follows really gets smaller.
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

from repshift_cli.errors import UsageError
from repshift_cli.ops.tokens import keep_lines
from repshift_cli.planning.layout import Grid, Layout, SiteInfo, Window
from repshift_cli.planning.plan import Plan, PlanSite
from repshift_cli.reduction.families.base import Family, Reduce, Site, Stream

__all__ = ["ResidualCNN"]

_SHORTCUTS: dict[type[nn.Module], str] = {
    BasicBlock: "downsample",
    Bottleneck: "downsample",
    RegNetBottleneck: "downsample",
    PreBottleneck: "downsample",
    ConvNeXtBlock: "shortcut",
}
"""The blocks that are known, and under which name each has what its shortcut goes through."""

_SEQUENCES = (nn.Sequential, ConvNormAct, Mlp, GlobalResponseNormMlp)
"""Modules that run their parts in the order in which they have them."""

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
"""Where the modules without weights are defined that leave the size of a map as it is."""

_LONG_SIDE = 64
_GATES = (SEModule, EffectiveSEModule, EcaModule)


class _Map(Stream):
    """A feature map `[B, C, H, W]`; its positions are the tokens, row by row."""

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
    """A view `[B, H * W, C]`: token by token in memory where the map is channels-last."""
    return value.flatten(2).mT


class ResidualCNN(Family):
    """ResNet (basic and bottleneck blocks), ConvNeXt and RegNet."""

    name: ClassVar[str] = "resnet"
    covers: ClassVar[str] = "timm's ResNet, ResNeXt, Wide ResNet, ConvNeXt and RegNet"
    shows: ClassVar[frozenset[str]] = frozenset()
    format_version: ClassVar[int] = 2

    def accepts(self, model: nn.Module) -> bool:
        return isinstance(model, ResNet | ConvNeXt | RegNet)

    def refusal(self, model: Any) -> str | None:
        try:
            pieces = _pieces(model)
            for piece in pieces:
                piece.windows()
            odd = next((piece.name for piece in pieces if not piece.ways_agree()), None)
        except _NotKnownError as error:
            return str(error)
        if odd is not None:
            return f"path and shortcut of {odd} come out with different sizes on maps with an odd number of lines"
        if not any(piece.barred is None for piece in pieces if piece.block):
            return "none of its blocks has an input and an output of one shape"
        pooling = getattr(model, "global_pool", None) or getattr(model.head, "global_pool", None)
        if getattr(pooling, "pool_type", "avg") == "":
            return "it was built without global pooling, and returns a map whose size would change"
        return None

    def layout(self, model: Any) -> Layout:
        sites: list[SiteInfo] = []
        windows: list[Window] = []
        barred: dict[str, str] = {}
        for piece in _pieces(model):
            windows += piece.windows()
            if piece.barred is None:
                sites.append(SiteInfo(piece.name, piece.layer, tuple(windows)))
                windows = []
            elif piece.block:
                barred[piece.name] = barred[str(piece.layer)] = piece.barred
        size = _input_size(model)
        _check_size(size, [*(window for site in sites for window in site.windows), *windows])
        return Layout(
            family=self.name,
            prefix_tokens=0,
            patch_tokens=math.prod(_passed(size, sites[0].windows)),
            class_token=False,
            sites=tuple(sites),
            map_size=size,
            tail=tuple(windows),
            barred=barred,
        )

    def sites(self, model: Any) -> list[Site]:
        missing = {"*": "a residual block of convolutions has neither attention nor an MLP on a stream of tokens"}
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
            grid = piece.output(grid)
            if piece.barred is None:
                grid = kept.get(piece.layer, grid)
        return total + _head_macs(model)


@dataclass(frozen=True)
class _Piece:
    """A stretch of the network, in the order of the forward pass.

    Attributes:
        name: as the model names the module.
        layer: index among the blocks, -1 for what is no block.
        path: the modules that the map goes through.
        shortcut: what it goes through on its way around them, if anything.
        barred: why nothing can go after it; None for a site.
    """

    name: str
    module: nn.Module
    layer: int
    path: tuple[nn.Module, ...]
    shortcut: nn.Module | None
    barred: str | None

    @property
    def block(self) -> bool:
        """Whether it is a residual block."""
        return self.layer >= 0

    def windows(self) -> list[Window]:
        """What shrinks the map or reads beyond one position of it, on the path."""
        return [step for step, _ in self._steps(self.path) if step is not None]

    def output(self, grid: Grid) -> Grid:
        """The map that comes out."""
        return self._output(self.path, grid)

    def ways_agree(self) -> bool:
        """Whether path and shortcut, if there is one, give maps of one size, whatever the size that goes in.

        Raises:
            _NotKnownError: a part of it is of a kind that is not known.
        """
        if self.shortcut is None:
            return True
        sides = range(_LONG_SIDE, _LONG_SIDE + 8)  # every rest that strides up to 8 can leave
        return all(self._output(self.path, (n, n)) == self._output(self._around, (n, n)) for n in sides)

    def macs(self, grid: Grid) -> int:
        """Multiply-accumulates on the path and on the shortcut."""
        return self._macs(self.path, grid) + self._macs(self._around, grid)

    @property
    def channels(self) -> int:
        """Channels of the map that comes out."""
        leaves = [leaf for _, leaf in self._steps(self.path) if isinstance(leaf, nn.Conv2d | nn.Linear)]
        last = leaves[-1]
        return last.out_channels if isinstance(last, nn.Conv2d) else last.out_features

    @property
    def _around(self) -> tuple[nn.Module, ...]:
        return (self.shortcut,) if self.shortcut is not None else ()

    def _output(self, modules: Iterable[nn.Module], grid: Grid) -> Grid:
        for window, _ in self._steps(modules):
            grid = window.output(grid) if window is not None else grid
        return grid

    def _macs(self, modules: Iterable[nn.Module], grid: Grid) -> int:
        total = channels = 0
        for window, leaf in self._steps(modules):
            grid = window.output(grid) if window is not None else grid
            channels = leaf.out_channels if isinstance(leaf, nn.Conv2d) else channels
            total += _leaf_macs(leaf, grid, channels)
        return total

    def _steps(self, modules: Iterable[nn.Module]) -> Iterator[tuple[Window | None, nn.Module]]:
        for module in modules:
            for leaf in _leaves(module, self.name):
                yield _window(leaf, self.name), leaf


class _NotKnownError(Exception):
    """A part of the model whose effect on a map of another size is not known."""


def _pieces(model: Any) -> list[_Piece]:
    """The whole network up to the head.

    Raises:
        _NotKnownError: it has a block of a kind that is not known.
    """
    pieces: list[_Piece] = []
    layer = 0
    for name, module in _stretches(model):
        if type(module) in _SHORTCUTS:
            pieces.append(_block(name, module, layer))
            layer += 1
        elif isinstance(module, nn.Sequential | nn.Identity | ConvNormAct) or not list(module.children()):
            pieces.append(_Piece(name, module, -1, (module,), None, "it is no block"))
        else:
            known = ", ".join(dict.fromkeys(kind.__name__ for kind in _SHORTCUTS))
            raise _NotKnownError(f"{name} is a {type(module).__name__}, which is not known (known blocks: {known})")
    return pieces


def _stretches(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Stem, blocks and what lies between them, by name."""
    if isinstance(model, ResNet):
        yield from _named(model, "conv1", "bn1", "act1", "maxpool")
        for stage in ("layer1", "layer2", "layer3", "layer4"):
            yield from _children(model, stage)
    elif isinstance(model, ConvNeXt):
        yield from _named(model, "stem")
        for index in range(len(model.stages)):
            yield from _named(model, f"stages.{index}.downsample")
            yield from _children(model, f"stages.{index}.blocks")
        yield from _named(model, "norm_pre")
    else:
        yield from _named(model, "stem")
        for stage in ("s1", "s2", "s3", "s4"):
            yield from _children(model, stage)
        yield from _named(model, "final_conv")


def _named(model: nn.Module, *names: str) -> Iterator[tuple[str, nn.Module]]:
    return ((name, model.get_submodule(name)) for name in names)


def _children(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    return ((f"{name}.{child}", part) for child, part in model.get_submodule(name).named_children())


def _block(name: str, module: nn.Module, layer: int) -> _Piece:
    side = _SHORTCUTS[type(module)]
    shortcut = getattr(module, side)
    path = tuple(part for child, part in module.named_children() if child != side)
    barred = None
    if isinstance(shortcut, nn.Identity):
        shortcut = None
    elif shortcut is not None:
        barred = "its output has another size or width than its input, so a position has no shift"
    elif isinstance(module, RegNetBottleneck | PreBottleneck):
        barred = "it has no shortcut, so what comes out is no changed version of what went in"
    return _Piece(name, module, layer, path, shortcut, barred)


def _passed(grid: Grid, windows: Iterable[Window]) -> Grid:
    for window in windows:
        grid = window.output(grid)
    return grid


def _check_size(size: Grid, windows: Iterable[Window]) -> None:
    """Refuse images of which nothing reaches the head.

    Raises:
        UsageError: naming the module at which nothing is left.
    """
    grid = size
    for window in windows:
        grid = window.output(grid)
        if min(grid) < 1:
            raise UsageError(
                f"images of {size[0]}x{size[1]} are too small for this model: nothing is left at {window.name}",
                "Take larger images.",
            )


def _leaves(module: nn.Module, name: str) -> Iterator[nn.Module]:
    """The parts of a module in the order in which they run."""
    if isinstance(module, _SEQUENCES):
        for part in module.children():
            yield from _leaves(part, name)
    elif isinstance(module, _GATES + _NORMS) or not list(module.children()):
        yield module
    else:
        raise _NotKnownError(f"a part of {name} is a {type(module).__name__}, which is not known")


def _window(leaf: nn.Module, name: str) -> Window | None:
    """What a module without parts does to the size of a map; None where each position stays by itself."""
    if isinstance(leaf, nn.MaxPool2d | nn.AvgPool2d):
        dilation = _pair(getattr(leaf, "dilation", 1))
        window = Window(
            name, _pair(leaf.kernel_size), _pair(leaf.stride), _pair(leaf.padding), dilation, leaf.ceil_mode
        )
        _check_type(leaf, (nn.MaxPool2d, nn.AvgPool2d), name)
        return window
    if isinstance(leaf, BlurPool2d):
        before, after = leaf.padding[0], leaf.padding[-1]
        if before != after or leaf.pad_mode != "reflect":
            raise _NotKnownError(f"{name} pads in a way that is not known before it blurs")
        return Window(name, _pair(leaf.filt_size), _pair(leaf.stride), _pair(before))
    if isinstance(leaf, nn.Conv2d):
        _check_type(leaf, (nn.Conv2d,), name)
        if isinstance(leaf.padding, str):
            raise _NotKnownError(f"{name} has a convolution with the padding {leaf.padding!r}")
        window = Window(name, _pair(leaf.kernel_size), _pair(leaf.stride), _pair(leaf.padding), _pair(leaf.dilation))
        return None if window.kernel == window.stride == (1, 1) else window
    plain = type(leaf).__module__.startswith(_BY_POSITION) and not list(leaf.parameters(recurse=False))
    if plain or isinstance(leaf, (nn.Linear, *_NORMS, *_GATES)):
        return None
    raise _NotKnownError(f"a part of {name} is a {type(leaf).__name__}, which is not known")


def _check_type(leaf: nn.Module, known: tuple[type[nn.Module], ...], name: str) -> None:
    """Subclasses of timm pad to the size of the map, which a window does not tell."""
    if type(leaf) not in known:
        raise _NotKnownError(f"a part of {name} is a {type(leaf).__name__}, which is not known")


def _pair(value: Any) -> Grid:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _leaf_macs(leaf: nn.Module, grid: Grid, channels: int) -> int:
    """Multiply-accumulates of one module that gives a map of `grid` and `channels`."""
    if isinstance(leaf, nn.Conv2d | nn.Linear):
        return math.prod(grid) * leaf.weight.numel()
    if isinstance(leaf, BlurPool2d):
        return math.prod(grid) * int(leaf.channels or channels) * math.prod(_pair(leaf.filt_size))
    if isinstance(leaf, _GATES):
        # on the mean over the map, so its size does not matter
        return sum(_gate_macs(part, channels) for part in leaf.modules())
    return 0


def _gate_macs(part: nn.Module, channels: int) -> int:
    if isinstance(part, nn.Conv1d):
        return channels * part.weight.numel()
    return part.weight.numel() if isinstance(part, nn.Conv2d) else 0


def _head_macs(model: Any) -> int:
    """The classifier, on one pooled position."""
    head = model.fc if isinstance(model, ResNet) else model.head
    return sum(part.weight.numel() for part in head.modules() if isinstance(part, nn.Linear | nn.Conv2d))


def _input_size(model: Any) -> Grid:
    """Rows and columns of the image that the model is configured for; the weights fit any."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    _, height, width = config.get("input_size") or (3, 224, 224)
    return int(height), int(width)
