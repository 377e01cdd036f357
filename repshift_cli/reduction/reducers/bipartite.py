"""Bipartite soft matching (ToMe): the most similar tokens are merged, independent of the score."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from repshift_cli.ops.merging import key_features, merge_into, pair
from repshift_cli.ops.tokens import gather_tokens, with_prefix
from repshift_cli.reduction.reducers.base import Dims, Merged, Merger


class Bipartite(Merger):
    """Token merging (ToMe, arXiv 2210.09461, section 3), after the block. The score is not used.

    Tokens are compared by the mean of their keys over the heads. Counted from the first token of the sequence, those
    at even positions are sources and those at odd positions are targets; prefix tokens are neither.
    """

    kind: ClassVar[str] = "bipartite"
    scored: ClassVar[bool] = False

    def taps(self) -> frozenset[str]:
        return frozenset({"attention_key"})

    def merge(  # noqa: PLR0917
        self, tokens: Tensor, sizes: Tensor, scores: Tensor, count: int, prefix: int, seen: Mapping[str, Tensor]
    ) -> Merged:
        return match(tokens, sizes, key_features(seen["attention_key"]), count, prefix)

    def most(self, patches: int) -> int:
        return patches // 2

    def macs(self, patches: int, dropped: int, dims: Dims) -> int:
        return (patches // 2) * (patches - patches // 2) * dims.head


def match(tokens: Tensor, sizes: Tensor, features: Tensor, count: int, prefix: int = 0) -> Merged:
    """Merge the `count` sources, at most N // 2, that are most similar to a target.

    `tokens` are `[B, prefix + N, C]`, `sizes` `[B, prefix + N]`; `features` `[B, prefix + N, D]` are compared.

    Returns prefix tokens, then the remaining sources, then the targets. With prefix tokens the sources are in order;
    without, the most similar come first, as in the authors' code: the sources at the next site depend on it.
    """
    batch, total, _ = tokens.shape
    if not 0 <= count <= (total - prefix) // 2:
        raise ValueError(f"of {total - prefix} patch tokens 0 to {(total - prefix) // 2} can merge, not {count}")
    first = prefix % 2  # position of the first source among the patches
    pairs = pair(features[:, prefix + first :: 2], features[:, prefix + 1 - first :: 2], count)
    kept = pairs.kept.sort(dim=-1).values if prefix else pairs.kept
    goals = torch.arange(1 - first, total - prefix, 2, device=tokens.device).expand(batch, -1)
    places = torch.cat((2 * kept + first, goals), dim=1)
    sources, targets = 2 * pairs.sources + first, pairs.targets + kept.shape[1]
    index = with_prefix(places, prefix)
    merged, new_sizes = merge_into(
        gather_tokens(tokens, index),
        sizes.gather(1, index),
        gather_tokens(tokens, sources + prefix),
        sizes.gather(1, sources + prefix),
        targets + prefix,
    )
    return Merged(merged, new_sizes, places, sources, targets)
