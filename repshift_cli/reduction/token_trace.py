"""Where each kept token and map line came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repshift_cli.planning.layout import Grid, Window

__all__ = [
    "MapState",
    "TokenState",
]


@dataclass
class TokenState:
    """What is known of the patch tokens on their way through the model.

    Attributes:
        index: int64 `[B, N]`, the original place of each patch token that is left.
    """

    index: Tensor

    @classmethod
    def start(cls, batch: int, patches: int, device: torch.device) -> TokenState:
        """Before the first site: all tokens at their own place."""
        return cls(torch.arange(patches, device=device).expand(batch, patches))

    def keep(self, index: Tensor, grid: Grid | None = None) -> TokenState:
        """After a site that kept the tokens at `index` (int64 `[B, K]`)."""
        return TokenState(self.index.gather(1, index))

    def through(self, windows: Sequence[Window]) -> TokenState:
        """A sequence passes no windows."""
        return self


@dataclass
class MapState:
    """What is known of the rows and columns of a feature map on their way through the model.

    Attributes:
        rows, columns: int64 `[B, h]` and `[B, w]`, the place of each line that is left, on the map that the dense model
            has here.
        dense: the size of that map.
    """

    rows: Tensor
    columns: Tensor
    dense: Grid

    @classmethod
    def start(cls, batch: int, grid: Grid, device: torch.device) -> MapState:
        """All lines of a map at their own place."""
        rows, columns = (torch.arange(side, device=device).expand(batch, side) for side in grid)
        return cls(rows, columns, grid)

    @property
    def index(self) -> Tensor:
        """int64 `[B, h * w]`, places of the positions that are left, row-major on the dense map."""
        return (self.rows.unsqueeze(2) * self.dense[1] + self.columns.unsqueeze(1)).flatten(1)

    def keep(self, index: Tensor, grid: Grid | None = None) -> MapState:
        """After a site that kept the `grid` of positions at `index` (int64 `[B, rows * columns]`)."""
        assert grid is not None
        width = self.columns.shape[1]
        at = index.unflatten(1, grid)
        rows, columns = self.rows.gather(1, at[:, :, 0] // width), self.columns.gather(1, at[:, 0] % width)
        return MapState(rows, columns, self.dense)

    def through(self, windows: Sequence[Window]) -> MapState:
        """After convolutions and poolings: each line that comes out stands for the one in the middle of its window."""
        state = self
        for window in windows:
            dense = window.output(state.dense)
            lines = (_middle_lines(state.rows, window, 0), _middle_lines(state.columns, window, 1))
            rows, columns = (line.clamp(max=side - 1) for line, side in zip(lines, dense, strict=True))
            state = MapState(rows, columns, dense)
        return state


def _middle_lines(lines: Tensor, window: Window, axis: int) -> Tensor:
    """Places on the dense map behind the window, int64 `[B, n]`, of the lines that come out of it along one axis."""
    side, stride = lines.shape[1], window.stride[axis]
    sides = (side, side)
    middle = window.dilation[axis] * (window.kernel[axis] - 1) // 2 - window.padding[axis]
    count = window.output(sides)[axis]
    taken = (torch.arange(count, device=lines.device) * stride + middle).clamp(0, side - 1)
    # with little padding the middle of the first window lies steps inside the map, and comes out as line 0
    return lines[:, taken] // stride - middle // stride
