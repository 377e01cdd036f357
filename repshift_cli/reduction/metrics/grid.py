"""Even coverage: tokens are dropped by their position alone, spread evenly over the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from repshift_cli.reduction.metrics.base import Metric, SiteContext, Tap

_STEPS = (0.7548776662, 0.5698402910, 0.6180339887)
"""For columns and rows the powers 1 / p and 1 / p^2 of the plastic number p, for frames the golden ratio."""


class Grid(Metric):
    """The fractional part of `a column + b row + c frame`, the same at every site and for every image.

    With a and b from the additive recurrence R2 (Roberts 2018, "The unreasonable effectiveness of quasirandom
    sequences"), the positions above any threshold cover the image evenly, also after earlier sites. A baseline that
    leaves no region empty, where `random` does.
    """

    kind: ClassVar[str] = "grid"

    polarity: Literal["largest"] | None = "largest"

    def taps(self) -> frozenset[Tap]:
        return frozenset({"patch_place"})

    def score(self, seen: Mapping[str, Tensor], site: SiteContext) -> Tensor:
        places = seen["patch_place"]
        total = torch.zeros_like(places, dtype=torch.float32)
        for axis, step in zip(reversed(coordinates(places, site.grid)), _STEPS, strict=False):
            total = total + axis * step
        return total - total.floor()


def coordinates(places: Tensor, grid: tuple[int, ...]) -> list[Tensor]:
    """The index of each position along each axis of the grid, all of the shape of `places`: `(frame,) row, column`."""
    found: list[Tensor] = []
    for side in reversed(grid):
        found.insert(0, places % side)
        places = places // side
    return found
