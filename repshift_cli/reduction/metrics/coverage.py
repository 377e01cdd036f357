"""Coverage: a token is dropped if a more important token is similar to it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, StrictFloat, field_validator
from torch import Tensor

from repshift_cli.errors import RecipeError
from repshift_cli.ops.merging import unit_length
from repshift_cli.planning.recipe import ComponentSpec
from repshift_cli.reduction.metrics.base import Metric, SiteContext, Tap, build_metric

_ROWS = 512
"""Rows of the similarity map at a time: 2352 tokens would have a map of 22 MB per image."""

_TINY = 1e-6


class Coverage(Metric):
    """`log(1 - c_i) + weight z(s_i)`: c_i is the largest cosine of token i to a token with a larger score s.

    The distance to the nearest token of higher rank is that of clustering by density peaks (Rodriguez and Laio 2014).
    A dropped token has a similar one of higher rank. A region that is like no other keeps its best token, where a plain
    score drops whole regions.

    Attributes:
        of: the score s as in a recipe; its open fields are chosen or fitted as usual.
        weight: of s, standardised within each image, beside the distance.
    """

    kind: ClassVar[str] = "coverage"
    pairwise: ClassVar[bool] = True

    of: ComponentSpec = ComponentSpec(kind="fitted")
    weight: Annotated[StrictFloat, Field(ge=0, le=100)] = 0.5
    polarity: Literal["largest"] | None = "largest"

    @field_validator("of")
    @classmethod
    def _check_metric(cls, of: ComponentSpec) -> ComponentSpec:
        if of.kind == cls.kind:
            raise ValueError("should be another score")
        try:
            build_metric(of)
        except RecipeError as error:
            raise ValueError(" ".join([error.message.partition(": ")[2], error.hint or ""]).strip()) from None
        return of

    def model_post_init(self, context: Any, /) -> None:
        _ = self.inner  # `torch.compile` does not trace how it is built

    @cached_property
    def inner(self) -> Metric:
        """The score `of`."""
        return build_metric(self.of)

    def taps(self) -> frozenset[Tap]:
        return self.inner.taps() | {"block_output"}

    def score(self, seen: Mapping[str, Tensor], site: SiteContext) -> Tensor:
        scores = self.inner.score(seen, site)
        scores = scores if self.inner.keeps_largest else -scores
        features = unit_length(seen["block_output"][:, site.prefix :])
        parts = [slice(first, first + _ROWS) for first in range(0, scores.shape[1], _ROWS)]
        rows = [_nearest_above(features[:, part], scores[:, part], features, scores) for part in parts]
        nearest = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
        centred = scores - scores.mean(dim=1, keepdim=True)
        standard = centred / centred.square().mean(dim=1, keepdim=True).sqrt().clamp_min(_TINY)
        return (1.0 - nearest).clamp_min(_TINY).log() + self.weight * standard

    def macs(self, tokens: int, site: SiteContext) -> int:
        return self.inner.macs(tokens, site) + (tokens - site.prefix) ** 2 * site.width

    def on(self, device: torch.device) -> Metric:
        placed = self.inner.on(device)
        if placed is self.inner:
            return self
        moved = self.model_copy()
        vars(moved)["inner"] = placed
        return moved

    @property
    def open(self) -> bool:
        return self.inner.open

    @property
    def channels(self) -> int | None:
        return self.inner.channels

    def variants(self) -> tuple[Metric, ...]:
        return tuple(self.around(variant.spec()) for variant in self.inner.variants())

    def with_defaults(self) -> Metric:
        return self.around(self.inner.with_defaults().spec())

    def around(self, score: ComponentSpec) -> Coverage:
        """The same with another score."""
        return Coverage(of=score, weight=self.weight)

    def __str__(self) -> str:
        return f"{self.kind} ({self.inner}, {self.weight})"


def _nearest_above(rows: Tensor, own: Tensor, others: Tensor, scores: Tensor) -> Tensor:
    """The largest cosine of each row to a token with a larger score, -1 without one: float32 `[B, R]`."""
    alike = (rows @ others.mT).float()
    return alike.masked_fill(scores.unsqueeze(1) <= own.unsqueeze(2), -1.0).amax(dim=-1)
