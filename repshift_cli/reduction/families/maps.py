"""Networks of feature maps: convolutions, and attention or gates over the whole map.

A convolution needs a grid, so whole rows and columns of the feature map are dropped, after blocks whose input and
output have the same shape: there each position has a shift. The result is a smaller dense map in the same memory
format, so all later layers compute less. `map_trace` finds out what a network does with its maps; this file says which
of its modules are blocks.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple, cast
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from repshift_cli.errors import UsageError
from repshift_cli.models.tensor_model import library_model
from repshift_cli.ops.tokens import keep_lines
from repshift_cli.planning.layout import Grid, Layout, SiteInfo, Window
from repshift_cli.planning.plan import Plan, PlanSite
from repshift_cli.reduction.families.base import Family, Site
from repshift_cli.reduction.families.transformer import as_function
from repshift_cli.reduction.map_trace import Block, MapTrace, UnsupportedError, block_names, trace
from repshift_cli.reduction.stream import Reduce, Stream

_BLOCKS = {
    "blocks.*.*": "ConvMixer EfficientNet GhostNet MobileNetV3 RepGhostNet",
    "stages.*.*": "ByobNet NormFreeNet StarNet LCNetV2",
    "stages.*.blocks.*": "EdgeNeXt EfficientVit FasterNet FastVit HighPerfGpuNet IFormer MetaFormer MetaNeXt RepVit "
    "ResNetV2 SHViT SwiftFormer VovNet",
    "layers.*.blocks.*": "FocalNet",
    "layer*.*": "SENet",
    "block*": "Xception",
}
"""Where the blocks are in timm's classes; `*` is one part of a name. Each class passes the shift test."""

_LONG_SIDE = 64


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


class MapFamily(Family):
    """Networks whose blocks are found by name, and whose maps are found by a trace."""

    shows: ClassVar[frozenset[str]] = frozenset()

    def accepts(self, model: nn.Module) -> bool:
        return self.blocks(model) is not None

    @abstractmethod
    def blocks(self, model: Any) -> str | None:
        """The pattern of the names of blocks; None for a model of another kind."""

    def refusal(self, model: Any) -> str | None:
        try:
            network = self._network(model)
            sites = network.sites
            if not sites:
                return network.no_site()
            for side in range(_LONG_SIDE, _LONG_SIDE + 16):  # every remainder for strides up to 16
                network.trace.grids(_input_size(model), {site.layer: (side, side) for site in sites})
        except UnsupportedError as error:
            return str(error)
        return None

    def layout(self, model: Any) -> Layout:
        network, size = self._network(model), _input_size(model)
        start, sites = 0, []
        for block in network.sites:
            sites.append(SiteInfo(block.name, block.layer, tuple(network.trace.windows(start, block.exit))))
            start = block.exit
        tail = network.trace.windows(start, network.trace.last_map())
        _check_size(size, [*(window for site in sites for window in site.windows), *tail])
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
            tail=tuple(tail),
            barred=network.barred,
        )

    def sites(self, model: Any) -> list[Site]:
        missing = {"*": "a residual block of convolutions has neither attention nor an MLP"}
        inner = library_model(model)
        return [
            Site(block.name, block.layer, inner.get_submodule(block.name), {}, missing, width=block.channels)
            for block in self._network(model).sites
        ]

    def stream(self, model: Any) -> Stream:
        return _Map()

    def macs(self, model: Any, plan: Plan | None) -> int:
        return self._network(model).trace.macs(_input_size(model), plan.grids_kept if plan else {})

    def _network(self, model: Any) -> _Network:
        pattern = self.blocks(model)
        assert pattern is not None
        parts = list(model.modules())[1:]
        found = _TRACED.get(model)
        if found is None or not _same(found.parts, parts):
            found = _TRACED[model] = _Network.of(trace(as_function(model), block_names(pattern)), parts)
        return found


class MapNetwork(MapFamily):
    """Other networks of timm, by the name of the class."""

    name: ClassVar[str] = "maps"
    covers: ClassVar[str] = (
        "timm's EfficientNet, MobileNet, ByobNet, NFNet, ResNetV2, MetaFormer, FastViT and other CNNs"
    )
    format_version: ClassVar[int] = 5

    def blocks(self, model: Any) -> str | None:
        if not type(model).__module__.startswith("timm.models."):
            return None
        return next((where for where, names in _BLOCKS.items() if type(model).__name__ in names.split()), None)


class _Network(NamedTuple):
    """What the trace of a model gives, and the modules that it was made of."""

    trace: MapTrace
    sites: list[Block]
    barred: dict[str, str]
    parts: list[nn.Module]

    @classmethod
    def of(cls, traced: MapTrace, parts: list[nn.Module]) -> _Network:
        sites: list[Block] = []
        barred: dict[str, str] = {}
        for block in traced.blocks:
            reason = traced.barred(block)
            if reason is None:
                sites.append(block)
            else:
                barred[block.name] = barred[str(block.layer)] = reason
        return cls(traced, sites, barred, parts)

    def no_site(self) -> str:
        """Why there is no site."""
        reasons = list(self.barred.values())
        if not reasons:
            return "it has no blocks"
        return (
            f"nothing can be dropped after any of its blocks, for most of them since {max(reasons, key=reasons.count)}"
        )


def _same(before: list[nn.Module], now: list[nn.Module]) -> bool:
    return len(before) == len(now) and all(one is other for one, other in zip(before, now, strict=True))


_TRACED: WeakKeyDictionary[nn.Module, _Network] = WeakKeyDictionary()


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


def _input_size(model: Any) -> Grid:
    """The image size in the model's configuration; the weights fit any size."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    _, height, width = config.get("input_size") or (3, 224, 224)
    return int(height), int(width)
