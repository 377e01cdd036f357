"""Merging: each dropped token is averaged into the most similar kept token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor

from repshift_cli.ops.merging import key_features, merge_into, nearest
from repshift_cli.ops.tokens import gather_tokens, split_top, with_prefix
from repshift_cli.reduction.reducers.base import Dims, Merged, Merger


class Merge(Merger):
    """The score decides which tokens are dropped; similarity decides which kept token each is merged into.

    Compared is the stream at the site (`hidden`), or the mean of the keys over the heads (`keys`), which has fewer
    channels.
    """

    kind: ClassVar[str] = "merge"

    similarity: Literal["hidden", "keys"] = "hidden"

    def taps(self) -> frozenset[str]:
        return frozenset({"attention_key"}) if self.similarity == "keys" else frozenset()

    def merge(  # noqa: PLR0917
        self, tokens: Tensor, sizes: Tensor, scores: Tensor, count: int, prefix: int, seen: Mapping[str, Tensor]
    ) -> Merged:
        keep, drop = split_top(scores, scores.shape[1] - count)
        index, others = with_prefix(keep, prefix), drop + prefix
        kept, sources = gather_tokens(tokens, index), gather_tokens(tokens, others)
        if self.similarity == "keys":
            features = key_features(seen["attention_key"])
            targets = nearest(gather_tokens(features, others), gather_tokens(features, keep + prefix))
        else:
            targets = nearest(sources, kept[:, prefix:])
        merged, new_sizes = merge_into(kept, sizes.gather(1, index), sources, sizes.gather(1, others), targets + prefix)
        return Merged(merged, new_sizes, keep, drop, targets)

    def macs(self, patches: int, dropped: int, dims: Dims) -> int:
        return dropped * (patches - dropped) * (dims.head if self.similarity == "keys" else dims.width)
