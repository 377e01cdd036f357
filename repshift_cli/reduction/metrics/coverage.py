"""Coverage by similarity: a token is dropped if a more important token is near to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, StrictFloat
from torch import Tensor

from repshift_cli.ops.merging import unit_length
from repshift_cli.reduction.metrics.base import SiteContext, Tap
from repshift_cli.reduction.metrics.wrapper import Wrapper

_ROWS = 512
_WEIGHTS = (0.5, 0.0, 1.0, 2.0)
_TINY = 1e-6


class Coverage(Wrapper):
    """`log(1 - c_i) + weight z(s_i)`: c_i is the largest cosine of token i to a token with a larger score s of `of`.

    The distance to the nearest token of higher rank is that of clustering by density peaks (Rodriguez and Laio 2014).
    So a dropped token has a similar one of higher rank, and a region that is like no other keeps its best token, where
    a plain score drops whole regions.

    Attributes:
        weight: of the score, standardised within each image, beside the distance.
    """

    kind: ClassVar[str] = "coverage"

    weight: Annotated[StrictFloat, Field(ge=0, le=100)] | None = None

    def taps(self) -> frozenset[Tap]:
        return self.inner.taps() | {"block_output"}

    def macs(self, tokens: int, site: SiteContext) -> int:
        return self.inner.macs(tokens, site) + (tokens - site.prefix) ** 2 * site.width

    def choices(self) -> tuple[dict[str, Any], ...]:
        return tuple({"weight": weight} for weight in (_WEIGHTS if self.weight is None else (self.weight,)))

    def rescore(self, scores: Tensor, seen: Mapping[str, Tensor], site: SiteContext) -> Tensor:
        features = unit_length(seen["block_output"][:, site.prefix :])
        parts = zip(features.split(_ROWS, dim=1), scores.split(_ROWS, dim=1), strict=True)
        nearest = torch.cat([_nearest_above(part, own, features, scores) for part, own in parts], dim=1)
        centred = scores - scores.mean(dim=1, keepdim=True)
        standard = centred / centred.square().mean(dim=1, keepdim=True).sqrt().clamp_min(_TINY)
        weight = _WEIGHTS[0] if self.weight is None else self.weight
        return (1.0 - nearest).clamp_min(_TINY).log() + weight * standard


def _nearest_above(rows: Tensor, own: Tensor, others: Tensor, scores: Tensor) -> Tensor:
    """The largest cosine of each row to a token with a larger score, -1 without one: float32 `[B, R]`."""
    alike = (rows @ others.mT).float()
    return alike.masked_fill(scores.unsqueeze(1) <= own.unsqueeze(2), -1.0).amax(dim=-1)
