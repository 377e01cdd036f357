"""Redundancy: tokens that are similar to many others are dropped first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, StrictFloat
from torch import Tensor
from torch.nn import functional

from repshift_cli.ops.merging import key_features, unit_length
from repshift_cli.reduction.metrics.base import Metric, Polarity, SiteContext, Tap

_ROWS = 512
"""Rows of the similarity map at a time: 2352 tokens would have a map of 22 MB per image."""

_MARGINS = (0.6, 0.9, 0.3, 0.0)

Margin = Annotated[StrictFloat, Field(ge=-1, le=1)]


class Redundancy(Metric):
    """The energy of PiToMe (arXiv 2405.16148, equation 4): `E_i = 1/N sum_j f(cos(x_i, x_j) - m)`.

    `f(d) = d` for similarities above the margin m, else `exp(d) - 1`, as in the authors' code; j runs over the patch
    tokens. The energy is large in large groups of similar tokens; the smallest are kept.

    Attributes:
        similarity: compares the stream after the block (`hidden`), or the mean of the keys over the heads (`keys`).
        margin: m. The authors' margin falls with the depth, from 0.9 to 0; calibration chooses one for each site.
    """

    kind: ClassVar[str] = "redundancy"
    pairwise: ClassVar[bool] = True

    similarity: Literal["hidden", "keys"] = "hidden"
    margin: Margin | None = None
    polarity: Polarity | None = "smallest"

    def taps(self) -> frozenset[Tap]:
        return frozenset({"attention_key" if self.similarity == "keys" else "block_output"})

    def score(self, seen: Mapping[str, Tensor], site: SiteContext) -> Tensor:
        found = key_features(seen["attention_key"]) if self.similarity == "keys" else seen["block_output"]
        features = unit_length(found[:, site.prefix :])
        firsts = range(0, features.shape[1], _ROWS)
        rows = [energy(features[:, first : first + _ROWS], features, self._margin) for first in firsts]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)

    def macs(self, tokens: int, site: SiteContext) -> int:
        return (tokens - site.prefix) ** 2 * (site.head if self.similarity == "keys" else site.width)

    def variants(self) -> tuple[Metric, ...]:
        margins = _MARGINS if self.margin is None else (self.margin,)
        return tuple(self.model_copy(update={"margin": margin}) for margin in margins)

    def with_defaults(self) -> Metric:
        return self.model_copy(update={"margin": self._margin})

    @property
    def _margin(self) -> float:
        return _MARGINS[0] if self.margin is None else self.margin


def energy(rows: Tensor, others: Tensor, margin: float) -> Tensor:
    """The mean over the others of the clipped similarity: unit vectors `[B, R, C]`, `[B, N, C]` to float32 `[B, R]`."""
    return functional.elu((rows @ others.mT).float() - margin).mean(dim=-1)
