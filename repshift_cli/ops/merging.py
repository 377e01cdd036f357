"""Which tokens are alike, and how tokens are merged into others: the arithmetic that merging reducers share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from repshift_cli.ops.tokens import add_at, gather_tokens

__all__ = ["Pairs", "key_features", "merge_into", "nearest", "pair", "unit_range"]


class Pairs(NamedTuple):
    """Who merges with whom, when every second token is a source and the others are targets.

    Attributes:
        sources: int64 `[B, count]`, among the sources, those that merge, the surest first.
        targets: int64 `[B, count]`, among the targets, the one that each of them merges into.
        kept: int64 `[B, S - count]`, among the S sources, those that stay, the most alike first.
    """

    sources: Tensor
    targets: Tensor
    kept: Tensor


def pair(sources: Tensor, targets: Tensor, count: int) -> Pairs:
    """The `count` sources that are most like a target (bipartite soft matching, ToMe, arXiv 2210.09461, section 3).

    Alike is what has a large cosine. Among equals the lower place goes first.

    Args:
        sources: `[B, S, C]`.
        targets: `[B, T, C]`.
        count: how many to merge, at most S.
    """
    alike, place = (_unit(sources) @ _unit(targets).mT).max(dim=-1)
    order = alike.sort(dim=-1, descending=True, stable=True).indices
    chosen = order[:, :count]
    return Pairs(chosen, place.gather(1, chosen), order[:, count:])


def nearest(sources: Tensor, targets: Tensor) -> Tensor:
    """The target with the largest cosine to each source: `[B, S, C]` and `[B, T, C]` to int64 `[B, S]`."""
    # the length of a source changes all its products alike, so only that of the targets has to be divided out
    if targets.dtype in (torch.float16, torch.bfloat16):  # where products of long vectors might overflow
        return (sources @ _unit(targets).mT).argmax(dim=-1)
    lengths = torch.linalg.vector_norm(targets, dim=-1).clamp_min(torch.finfo(targets.dtype).tiny)
    return ((sources @ targets.mT) / lengths.unsqueeze(1)).argmax(dim=-1)


def key_features(keys: Tensor) -> Tensor:
    """What ToMe compares tokens by: the mean of their keys over the heads, `[B, heads, T, d]` to `[B, T, d]`."""
    return keys.mean(dim=1)


def unit_range(scores: Tensor) -> Tensor:
    """Each row brought to 0..1, `[B, N]`; all 0 in a row of equal scores."""
    low, high = scores.amin(dim=1, keepdim=True), scores.amax(dim=1, keepdim=True)
    return (scores - low) / (high - low).clamp_min(torch.finfo(scores.dtype).tiny)


def merge_into(kept: Tensor, sizes: Tensor, sources: Tensor, shares: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Merge tokens into others, each of which becomes the size-weighted mean.

    Tokens that nothing flows into stay as they are, to the bit.

    Args:
        kept: `[B, K, C]`, the tokens that stay; their memory may be used for the result.
        sizes: `[B, K]`, how many tokens each of them stands for.
        sources: `[B, D, C]`, the tokens to merge.
        shares: `[B, D]`, how much of a token each of those counts.
        targets: int64 `[B, D]`, the place among `kept` that each flows into.

    Returns:
        Tokens `[B, K, C]`, computed in float32 at least, and their sizes `[B, K]`.
    """
    new_sizes = add_at(sizes.unsqueeze(2).clone(), targets, shares.unsqueeze(2)).squeeze(2)
    wide = torch.promote_types(kept.dtype, torch.float32)
    tokens = kept.to(wide)
    # the mean as a step from the target towards the source: so only rows that something flows into are touched
    apart = sources.to(wide) - gather_tokens(tokens, targets)
    steps = (shares / new_sizes.gather(1, targets)).to(wide).unsqueeze(2)
    return add_at(tokens, targets, apart * steps).to(kept.dtype), new_sizes


def _unit(tokens: Tensor) -> Tensor:
    """Each token brought to length one; the norm is taken in float32 at least, where it cannot overflow."""
    wide = torch.promote_types(tokens.dtype, torch.float32)
    return functional.normalize(tokens.to(wide), dim=-1).to(tokens.dtype)
