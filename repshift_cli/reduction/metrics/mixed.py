"""Importance less redundancy."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StrictFloat
from torch import Tensor

from repshift_cli.reduction.metrics.base import SiteContext, Tap
from repshift_cli.reduction.metrics.redundancy import Margin, Redundancy
from repshift_cli.reduction.metrics.wrapper import Wrapper

_WEIGHTS = (1.0, 0.5, 2.0)
_TINY = 1e-12


class Mixed(Wrapper):
    """`z(s_i) - weight z(E_i)`: the score s of `of` and the energy E of `redundancy`, standardised within each image.

    Attributes:
        weight: with a large one at early sites and a small one at late sites, redundant tokens go first and unimportant
            ones later.
        similarity, margin: as of `redundancy`.
    """

    kind: ClassVar[str] = "mixed"

    weight: Annotated[StrictFloat, Field(ge=0, le=100)] | None = None
    similarity: Literal["hidden", "keys"] = "hidden"
    margin: Margin = 0.6

    def model_post_init(self, context: Any, /) -> None:
        super().model_post_init(context)
        _ = self.redundancy

    def taps(self) -> frozenset[Tap]:
        return self.inner.taps() | self.redundancy.taps()

    def macs(self, tokens: int, site: SiteContext) -> int:
        return self.inner.macs(tokens, site) + self.redundancy.macs(tokens, site)

    def choices(self) -> tuple[dict[str, Any], ...]:
        return tuple({"weight": weight} for weight in (_WEIGHTS if self.weight is None else (self.weight,)))

    def rescore(self, scores: Tensor, seen: Mapping[str, Tensor], site: SiteContext) -> Tensor:
        weight = _WEIGHTS[0] if self.weight is None else self.weight
        return _standardised(scores) - weight * _standardised(self.redundancy.score(seen, site))

    @cached_property
    def redundancy(self) -> Redundancy:
        """The energy with the options of this score."""
        return Redundancy(similarity=self.similarity, margin=self.margin)


def _standardised(scores: Tensor) -> Tensor:
    """Each row with mean 0 and standard deviation 1, `[B, N]`; all 0 in a row of equal scores."""
    centred = scores - scores.mean(dim=1, keepdim=True)
    return centred / centred.square().mean(dim=1, keepdim=True).sqrt().clamp_min(_TINY)
