"""Token layout of a model: sites, grids and windows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, cast

__all__ = [
    "After",
    "Grid",
    "Layout",
    "PatchGrid",
    "SiteInfo",
    "Window",
]


After = Literal["block", "attention"]
"""What of a block has been computed when its tokens are reduced: all of it, or its attention."""


Grid = tuple[int, int]
"""Rows and columns."""


@dataclass(frozen=True)
class Window:
    """A convolution or a pooling, which reads a map through a window and may change its size; per axis.

    Attributes:
        name: of the module.
        ceil: whether a last window that sticks out counts too.
    """

    name: str
    kernel: Grid
    stride: Grid = (1, 1)
    padding: Grid = (0, 0)
    dilation: Grid = (1, 1)
    ceil: bool = False

    def output(self, grid: Grid) -> Grid:
        """Rows and columns that come out; below 1 where the window does not fit."""
        return (self._side(0, grid[0]), self._side(1, grid[1]))

    def least(self) -> Grid:
        """The smallest map on which every tap of the window reads the map somewhere, and not padding alone.

        (For a stride of one; with a longer one some tap may still miss a map of this size.)
        """
        reach = ((d * (k - 1) - p + 1) for k, d, p in zip(self.kernel, self.dilation, self.padding, strict=True))
        return cast(Grid, tuple(max(1, side) for side in reach))

    def _side(self, axis: int, side: int) -> int:
        room = side + 2 * self.padding[axis] - self.dilation[axis] * (self.kernel[axis] - 1) - 1
        if room < 0:
            return 0
        count = room // self.stride[axis] + 1
        # as torch: a window more, unless it would begin in the padding behind the map
        more = self.ceil and room % self.stride[axis] and count * self.stride[axis] < side + self.padding[axis]
        return count + bool(more)


@dataclass(frozen=True)
class SiteInfo:
    """A place where tokens can go: after the block `name`, which is the `layer`-th from 0.

    Attributes:
        windows: what the map goes through from the site before (or the input) to this one.
    """

    name: str
    layer: int
    windows: tuple[Window, ...] = ()


@dataclass(frozen=True)
class PatchGrid:
    """How the patches lie in the input.

    Attributes:
        rows, columns: of patches; patch `i` is in row `i // columns`.
        height, width: of one patch, in pixels.
        frames: of a clip, each with all these rows: patches are counted frame by frame, as if the frames stood one
            below the other; None for an image.
    """

    rows: int
    columns: int
    height: int
    width: int
    frames: int | None = None

    @property
    def lines(self) -> int:
        """Rows of all frames together."""
        return self.rows * (self.frames or 1)

    @property
    def patches(self) -> int:
        """Number of patches."""
        return self.lines * self.columns


@dataclass(frozen=True)
class Layout:
    """What a family tells of a model for one input size.

    Attributes:
        family: the family's name.
        prefix_tokens: class, distillation and register tokens, which never go.
        patch_tokens: tokens that stand for a place in the input; where their number changes from layer to layer,
            those at the first site.
        class_token: whether the first prefix token is a class token.
        sites: in the order of the forward pass.
        map_size: rows and columns of the input where tokens form a feature map, from which only whole rows and
            columns can go; None where they are a sequence.
        tail: what the map goes through after the last site.
        barred: blocks that are no sites, with the reason.
    """

    family: str
    prefix_tokens: int
    patch_tokens: int
    class_token: bool
    sites: tuple[SiteInfo, ...]
    map_size: Grid | None = None
    tail: tuple[Window, ...] = ()
    barred: Mapping[str, str] = field(default_factory=dict)

    def grids(self, kept: Mapping[int, Grid] | None = None) -> Iterator[tuple[SiteInfo, Grid]]:
        """Each site with the map that reaches it, given what is kept at the layers before; for feature maps."""
        grid = self.map_size or (1, self.patch_tokens)
        for site in self.sites:
            for window in site.windows:
                grid = window.output(grid)
            yield site, grid
            grid = (kept or {}).get(site.layer, grid)

    def tokens(self, kept: Mapping[int, Grid] | None = None) -> dict[int, int]:
        """Tokens that reach the site of each layer, prefix tokens included; for feature maps."""
        return {site.layer: self.prefix_tokens + math.prod(grid) for site, grid in self.grids(kept)}
