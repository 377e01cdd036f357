"""The L2 norm of a token after the block, a baseline that is independent of the layer's change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from repshift_cli.reduction.metrics.base import Metric, Polarity, SiteContext, Tap, norms


class TokenNorm(Metric):
    """`||x_i||_2` of the stream after the block."""

    kind: ClassVar[str] = "token_norm"

    polarity: Polarity | None = "largest"

    def taps(self) -> frozenset[Tap]:
        return frozenset({"block_output"})

    def score(self, seen: Mapping[str, Tensor], site: SiteContext) -> Tensor:
        return norms(seen["block_output"])[:, site.prefix :]
