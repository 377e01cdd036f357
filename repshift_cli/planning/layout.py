"""Token layout of a model: sites, grids and windows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, cast

After = Literal["block", "attention"]
"""Tokens are reduced after the whole block, or after its attention."""

Grid = tuple[int, int]
"""Rows and columns."""


@dataclass(frozen=True)
class Window:
    """A convolution or a pooling, by axis; with `ceil` a last, incomplete window counts.

    With `same` the padding depends on the size of the map, so that the output has `ceil(side / stride)` lines.
    """

    name: str
    kernel: Grid
    stride: Grid = (1, 1)
    padding: Grid = (0, 0)
    dilation: Grid = (1, 1)
    ceil: bool = False
    same: bool = False

    def output(self, grid: Grid) -> Grid:
        """Rows and columns of the output; below 1 if the window does not fit."""
        return (self._side(0, grid[0]), self._side(1, grid[1]))

    def least(self) -> Grid:
        """The smallest map on which, at stride 1, every tap of the kernel reads more than padding."""
        axes = zip(self.kernel, self.dilation, self.padding, strict=True)
        reach = (d * (k - 1) - (d * (k - 1) // 2 if self.same else p) + 1 for k, d, p in axes)
        return cast(Grid, tuple(max(1, side) for side in reach))

    def before(self, axis: int, side: int) -> int:
        """Lines of padding before the first line of a map with `side` lines."""
        if not self.same:
            return self.padding[axis]
        reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        return max((-(-side // self.stride[axis]) - 1) * self.stride[axis] + reach - side, 0) // 2

    def _side(self, axis: int, side: int) -> int:
        if self.same:
            return -(-side // self.stride[axis])
        room = side + 2 * self.padding[axis] - self.dilation[axis] * (self.kernel[axis] - 1) - 1
        if room < 0:
            return 0
        count = room // self.stride[axis] + 1
        # as in torch: one window more, unless it would begin in the padding
        more = self.ceil and room % self.stride[axis] and count * self.stride[axis] < side + self.padding[axis]
        return count + bool(more)


@dataclass(frozen=True)
class SiteInfo:
    """A place where tokens can be removed: after the block `name`, which has the index `layer`.

    `windows` lie between the previous site (or the input) and this one.
    """

    name: str
    layer: int
    windows: tuple[Window, ...] = ()


@dataclass(frozen=True)
class PatchGrid:
    """How the patches lie in the input: rows and columns, and height and width of one patch in pixels.

    Patch `i` is in row `i // columns`. A clip has `frames`, each with all these rows: patches are counted frame by
    frame, as if the frames stood one below the other.
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
    """The tokens and sites of a model for one input size.

    Attributes:
        family: the family's name.
        prefix_tokens: class, distillation and register tokens, which are always kept.
        patch_tokens: tokens of positions in the input; if their number changes from layer to layer, those at the
            first site.
        class_token: whether the first prefix token is a class token.
        sites: in the order of the forward pass.
        map_size: rows and columns of the input if tokens form a feature map, of which only whole rows and columns can
            be dropped; None for a sequence.
        tail: the windows after the last site.
        barred: blocks that are not sites, with the reason.
    """

    family: str
    prefix_tokens: int
    patch_tokens: int
    class_token: bool
    sites: tuple[SiteInfo, ...]
    map_size: Grid | None = None
    tail: tuple[Window, ...] = ()
    barred: Mapping[str, str] = field(default_factory=dict)

    @property
    def blocks(self) -> int:
        """Number of blocks, also of those that are no sites."""
        barred = (int(name) for name in self.barred if name.isdigit())
        return 1 + max((*(site.layer for site in self.sites), *barred))

    def grids(self, kept: Mapping[int, Grid] | None = None) -> Iterator[tuple[SiteInfo, Grid]]:
        """Each site with the size of the map there, given the sizes kept at earlier layers; for feature maps."""
        grid = self.map_size or (1, self.patch_tokens)
        for site in self.sites:
            for window in site.windows:
                grid = window.output(grid)
            yield site, grid
            grid = (kept or {}).get(site.layer, grid)

    def tokens(self, kept: Mapping[int, Grid] | None = None) -> dict[int, int]:
        """Tokens at the site of each layer, prefix tokens included; for feature maps."""
        return {site.layer: self.prefix_tokens + math.prod(grid) for site, grid in self.grids(kept)}


def shape_text(shape: tuple[int, ...]) -> str:
    """A shape as text: `14x14`."""
    return "x".join(map(str, shape))
