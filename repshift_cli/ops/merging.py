"""Similarity of tokens, and merging by size: functions that the merging reducers share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from repshift_cli.ops.tokens import add_at, gather_tokens


class Pairs(NamedTuple):
    """Sources and the targets that they are merged into, the most similar first.

    `sources` and `targets` are int64 `[B, count]`; `kept`, int64 `[B, S - count]`, are the other sources.
    """

    sources: Tensor
    targets: Tensor
    kept: Tensor


def pair(sources: Tensor, targets: Tensor, count: int) -> Pairs:
    """The `count` sources most similar to a target (bipartite soft matching, ToMe, arXiv 2210.09461, section 3).

    Similarity is the cosine of `[B, S, C]` and `[B, T, C]`; of equals the lower index comes first.
    """
    alike, place = (unit_length(sources) @ unit_length(targets).mT).max(dim=-1)
    order = alike.sort(dim=-1, descending=True, stable=True).indices
    chosen = order[:, :count]
    return Pairs(chosen, place.gather(1, chosen), order[:, count:])


def nearest(sources: Tensor, targets: Tensor) -> Tensor:
    """The target with the largest cosine to each source: `[B, S, C]` and `[B, T, C]` to int64 `[B, S]`."""
    # the length of a source scales all its products, so only that of the targets matters
    if targets.dtype in (torch.float16, torch.bfloat16):  # products of long vectors might overflow
        return (sources @ unit_length(targets).mT).argmax(dim=-1)
    lengths = torch.linalg.vector_norm(targets, dim=-1).clamp_min(torch.finfo(targets.dtype).tiny)
    return ((sources @ targets.mT) / lengths.unsqueeze(1)).argmax(dim=-1)


def key_features(keys: Tensor) -> Tensor:
    """The features of ToMe: the mean of the keys over the heads, `[B, heads, T, d]` to `[B, T, d]`."""
    return keys.mean(dim=1)


def unit_range(scores: Tensor) -> Tensor:
    """Each row scaled to 0..1, `[B, N]`; all 0 in a row of equal scores."""
    low, high = scores.amin(dim=1, keepdim=True), scores.amax(dim=1, keepdim=True)
    return (scores - low) / (high - low).clamp_min(torch.finfo(scores.dtype).tiny)


def merge_into(kept: Tensor, sizes: Tensor, sources: Tensor, shares: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Merge tokens into others, each of which becomes the size-weighted mean; the rest stay bit-identical.

    Args:
        kept, sizes: `[B, K, C]`, the remaining tokens, and `[B, K]`, how many each stands for; their memory may be used
            for the result.
        sources, shares: `[B, D, C]`, the tokens to merge, and `[B, D]`, the size with which each counts.
        targets: int64 `[B, D]`, the index in `kept` that each is merged into.

    Returns tokens `[B, K, C]`, computed in float32 or wider, and their sizes `[B, K]`.
    """
    new_sizes = add_at(sizes.unsqueeze(2).clone(), targets, shares.unsqueeze(2)).squeeze(2)
    wide = torch.promote_types(kept.dtype, torch.float32)
    tokens = kept.to(wide)
    # the mean as a step from the target towards the source, so that only rows of targets change
    differences = sources.to(wide) - gather_tokens(tokens, targets)
    steps = (shares / new_sizes.gather(1, targets)).to(wide).unsqueeze(2)
    return add_at(tokens, targets, differences * steps).to(kept.dtype), new_sizes


def unit_length(tokens: Tensor) -> Tensor:
    """Each token normalised to length one; the norm is computed in float32 or wider, so that it does not overflow."""
    wide = torch.promote_types(tokens.dtype, torch.float32)
    return functional.normalize(tokens.to(wide), dim=-1).to(tokens.dtype)
