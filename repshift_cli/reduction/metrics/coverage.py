"""Coverage: a token is dropped only if a more important token is near to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field, StrictFloat
from torch import Tensor
from torch.nn import functional

from repshift_cli.reduction.metrics.base import SiteContext
from repshift_cli.reduction.metrics.fitted import Fitted


class Coverage(Fitted):
    """`log(1 - c_i) + importance z_i`, where c_i is the largest cosine of token i to a token with a larger z.

    z is the fitted score `w x_i`, standardised within the image. The distance to the nearest token of higher rank is
    that of clustering by density peaks (Rodriguez and Laio 2014): every dropped token has a similar one of higher rank,
    and a region that looks like no other keeps its best token. A plain score drops whole regions.
    """

    kind: ClassVar[str] = "coverage"

    importance: Annotated[StrictFloat, Field(ge=0.0, le=10.0)] = 0.5

    def score(self, seen: Mapping[str, Tensor], site: SiteContext) -> Tensor:
        rank = super().score(seen, site)
        patches = functional.normalize(seen["block_output"][:, site.prefix :].float(), dim=-1)
        higher = rank.unsqueeze(1) > rank.unsqueeze(2)
        alike = (patches @ patches.mT).masked_fill(~higher, -1.0).amax(dim=-1)
        standard = (rank - rank.mean(dim=1, keepdim=True)) / rank.std(dim=1, keepdim=True, correction=0).clamp_min(
            1e-12
        )
        return (1.0 - alike).clamp_min(1e-6).log() + self.importance * standard

    def macs(self, tokens: int, attention_channels: int) -> int:
        return tokens * tokens * attention_channels
