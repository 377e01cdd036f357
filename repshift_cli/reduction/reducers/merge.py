"""Merging: each dropped token is averaged into the most similar kept token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, StrictFloat
from torch import Tensor

from repshift_cli.ops.merging import key_features, merge_into, mutual_first, nearest, nearest_with_cosine
from repshift_cli.ops.tokens import gather_tokens, split_top, with_prefix
from repshift_cli.reduction.reducers.base import Dims, Merged, Merger


class Merge(Merger):
    """The score decides which tokens are dropped; similarity decides which kept token each is merged into.

    Attributes:
        similarity: compares the stream at the site (`hidden`), or the mean of the keys over the heads (`keys`), which
            has fewer channels.
        match: `mutual` drops the less important tokens of mutual nearest pairs before all others, the most similar
            first; a pair merges unless so many tokens are dropped that both are.
        floor: cosine below which a dropped token is not merged: neither its value nor its size is kept. For `mutual`
            also that below which two tokens are no pair. None merges all.
    """

    kind: ClassVar[str] = "merge"

    similarity: Literal["hidden", "keys"] = "hidden"
    match: Literal["score", "mutual"] = "score"
    floor: Annotated[StrictFloat, Field(ge=-1, le=1)] | None = None

    def taps(self) -> frozenset[str]:
        return frozenset({"attention_key"}) if self.similarity == "keys" else frozenset()

    def merge(  # noqa: PLR0917
        self, tokens: Tensor, sizes: Tensor, scores: Tensor, count: int, prefix: int, seen: Mapping[str, Tensor]
    ) -> Merged:
        features = key_features(seen["attention_key"]) if self.similarity == "keys" else tokens
        if self.match == "mutual":
            scores = mutual_first(scores, features[:, prefix:], -1.0 if self.floor is None else self.floor)
        keep, drop = split_top(scores, scores.shape[1] - count)
        index, others = with_prefix(keep, prefix), drop + prefix
        kept, sources = gather_tokens(tokens, index), gather_tokens(tokens, others)
        compared = (sources, kept[:, prefix:])
        if self.similarity == "keys":
            compared = (gather_tokens(features, others), gather_tokens(features, keep + prefix))
        shares = sizes.gather(1, others)
        if self.floor is None:
            targets = nearest(*compared)
        else:
            targets, alike = nearest_with_cosine(*compared)
            shares = shares * (alike >= self.floor)
        merged, new_sizes = merge_into(kept, sizes.gather(1, index), sources, shares, targets + prefix)
        return Merged(merged, new_sizes, keep, drop, targets)

    def macs(self, patches: int, dropped: int, dims: Dims) -> int:
        products = dropped * (patches - dropped) + (patches**2 if self.match == "mutual" else 0)
        return products * (dims.head if self.similarity == "keys" else dims.width)
