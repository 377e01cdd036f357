"""Attention of the class token to each patch: one row of the attention map, so fused attention stays enabled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from repshift_cli.reduction.metrics.base import Metric, Polarity, SiteContext, Tap


class ClassAttention(Metric):
    """`softmax(q_class K^T / sqrt(d))`, averaged over the heads (EViT, arXiv 2202.07800, equation 3).

    Only the class query is multiplied with the keys, which costs N d per head. Without a class token it is the mean of
    the patch queries.
    """

    kind: ClassVar[str] = "class_attention"

    polarity: Polarity | None = "largest"

    def taps(self) -> frozenset[Tap]:
        return frozenset({"attention_query", "attention_key"})

    def score(self, seen: Mapping[str, Tensor], site: SiteContext) -> Tensor:
        queries, keys = seen["attention_query"], seen["attention_key"]
        query = queries[:, :, :1] if site.class_token else queries[:, :, site.prefix :].mean(dim=2, keepdim=True)
        logits = (query @ keys.transpose(-2, -1)).float() * queries.shape[-1] ** -0.5
        return logits.softmax(dim=-1)[:, :, 0, site.prefix :].mean(dim=1)

    def macs(self, tokens: int, site: SiteContext) -> int:
        return tokens * site.attention_channels
