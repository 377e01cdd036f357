"""Coverage: the best token of each window stays, so that no region of the image is emptied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, StrictInt
from torch import Tensor

from repshift_cli.ops.merging import unit_range
from repshift_cli.reduction.metrics.base import SiteContext, Tap
from repshift_cli.reduction.metrics.grid import coordinates
from repshift_cli.reduction.metrics.wrapper import Wrapper

_WINDOWS = (2, 3, 4)


class Stratified(Wrapper):
    """The rank by the score `of` within windows of the patch grid: first the best of each, then the seconds, etc.

    Tokens of the same rank are ordered by `of`. Windows are of the original positions, so a window that has lost tokens
    at an earlier site keeps the others longer.

    Attributes:
        window: rows and columns of a window.
    """

    kind: ClassVar[str] = "stratified"

    window: Annotated[StrictInt, Field(ge=2, le=64)] | None = None

    def taps(self) -> frozenset[Tap]:
        return self.inner.taps() | {"patch_place"}

    def choices(self) -> tuple[dict[str, Any], ...]:
        return tuple({"window": window} for window in (_WINDOWS if self.window is None else (self.window,)))

    def rescore(self, scores: Tensor, seen: Mapping[str, Tensor], site: SiteContext) -> Tensor:
        windows = _windows(seen["patch_place"], site.grid, self.window or _WINDOWS[0])
        return unit_range(scores) / 2 - ranks_within(scores, windows)


def ranks_within(scores: Tensor, groups: Tensor) -> Tensor:
    """How many tokens of the same group are better: float `[B, N]` and int64 `[B, N]` to float32 `[B, N]`.

    Of equal scores the lower index is better.
    """
    own, other = scores.unsqueeze(2), scores.unsqueeze(1)
    here = torch.arange(scores.shape[1], device=scores.device)
    better = (other > own) | ((other == own) & (here < here.unsqueeze(1)))
    return (better & (groups.unsqueeze(1) == groups.unsqueeze(2))).sum(dim=2).float()


def _windows(places: Tensor, grid: tuple[int, ...], side: int) -> Tensor:
    """The index of the window of each position; the windows of each frame are its own."""
    *frames, row, column = coordinates(places, grid)
    found = row // side * grid[-1] + column // side
    return found + frames[0] * (grid[-2] * grid[-1]) if frames else found
