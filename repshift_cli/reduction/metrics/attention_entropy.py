"""Entropy of each token's attention. It needs the whole attention map, which fused attention does not compute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from repshift_cli.reduction.metrics.base import Metric, Polarity, SiteContext, Tap


class AttentionEntropy(Metric):
    """Negative entropy `sum_j a_ij log a_ij` of the attention of token i (vid-TLDR, arXiv 2403.13347).

    a is `softmax(q k^T / sqrt(d))`, averaged over the heads; j runs over all tokens, the prefix included. Salient
    tokens attend to few tokens: their entropy is low, and the score is large.
    """

    kind: ClassVar[str] = "attention_entropy"

    polarity: Polarity | None = "largest"

    def taps(self) -> frozenset[Tap]:
        return frozenset({"attention_query", "attention_key"})

    def score(self, seen: Mapping[str, Tensor], site: SiteContext) -> Tensor:
        return sharpness(mean_attention(seen["attention_query"], seen["attention_key"]))[:, site.prefix :]

    def macs(self, tokens: int, site: SiteContext) -> int:
        return tokens * tokens * site.attention_channels


def mean_attention(queries: Tensor, keys: Tensor) -> Tensor:
    """The attention map averaged over the heads, float32 `[B, T, T]`, from `[B, heads, T, d]`; each row sums to 1."""
    batch, heads, tokens, channels = queries.shape
    total = torch.zeros(batch, tokens, tokens, dtype=torch.float32, device=queries.device)
    # head by head: all maps at once take `heads` times the memory, 350 MB for one clip of 2352 tokens
    for query, key in zip(queries.unbind(1), keys.unbind(1), strict=True):
        total += ((query @ key.mT).float() * channels**-0.5).softmax(dim=-1)
    return total / heads


def sharpness(attention: Tensor) -> Tensor:
    """`sum_j a_ij log a_ij` of each row, with `0 log 0 = 0`: `[B, T, T]` to `[B, T]`, from `-log T` to 0."""
    return torch.special.xlogy(attention, attention).sum(dim=-1)
