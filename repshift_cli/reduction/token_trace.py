"""Original positions of the kept tokens. A sequence counts as a feature map of one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repshift_cli.planning.layout import Grid, Window


@dataclass
class MapState:
    """The rows and columns of a feature map between two sites.

    They are int64 `[B, h]` and `[B, w]`, positions on the dense model's map there, which has the size `dense`.
    """

    rows: Tensor
    columns: Tensor
    dense: Grid

    @classmethod
    def start(cls, batch: int, grid: Grid, device: torch.device) -> MapState:
        """All lines of a map."""
        rows, columns = (torch.arange(side, device=device).expand(batch, side) for side in grid)
        return cls(rows, columns, grid)

    @property
    def index(self) -> Tensor:
        """int64 `[B, h * w]`, the remaining positions, row-major on the dense map."""
        return (self.rows.unsqueeze(2) * self.dense[1] + self.columns.unsqueeze(1)).flatten(1)

    def keep(self, index: Tensor, grid: Grid | None = None) -> MapState:
        """After a site that kept the positions at `index`, int64 `[B, rows * columns]`; None for one row."""
        width = self.columns.shape[1]
        at = index.unflatten(1, grid or (1, index.shape[1]))
        rows, columns = self.rows.gather(1, at[:, :, 0] // width), self.columns.gather(1, at[:, 0] % width)
        return MapState(rows, columns, self.dense)

    def through(self, windows: Sequence[Window]) -> MapState:
        """After convolutions and poolings: each output line stands for the line in the middle of its window."""
        state = self
        for window in windows:
            dense = window.output(state.dense)
            lines = (_middle_lines(state.rows, window, 0), _middle_lines(state.columns, window, 1))
            rows, columns = (line.clamp(max=side - 1) for line, side in zip(lines, dense, strict=True))
            state = MapState(rows, columns, dense)
        return state


def _middle_lines(lines: Tensor, window: Window, axis: int) -> Tensor:
    """The lines `[B, side]` of one axis before the window to those after it, int64 `[B, n]`, on the dense map there."""
    side, stride = lines.shape[1], window.stride[axis]
    middle = window.dilation[axis] * (window.kernel[axis] - 1) // 2 - window.before(axis, side)
    count = window.output((side, side))[axis]
    taken = (torch.arange(count, device=lines.device) * stride + middle).clamp(0, side - 1)
    # with little padding the middle of the first window lies inside the map, and is line 0 of the output
    return lines[:, taken] // stride - middle // stride
