"""The L2 norm of a token after the block, a baseline that asks nothing of the layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.linalg import vector_norm

from repshift_cli.metrics.base import Metric, Polarity, SiteContext, Tap

__all__ = ["TokenNorm"]


class TokenNorm(Metric):
    """`||x_i||_2` of the stream after the block."""

    kind: ClassVar[str] = "token_norm"

    polarity: Polarity | None = "largest"

    def taps(self) -> frozenset[Tap]:
        return frozenset({"block_output"})

    def score(self, seen: Mapping[str, Tensor], site: SiteContext) -> Tensor:
        return vector_norm(seen["block_output"][:, site.prefix :], dim=-1, dtype=torch.float32)
