"""vid-TLDR: tokens flow into the one that is most like them, as strongly as they are salient."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from repshift_cli.plan import After
from repshift_cli.reducers.base import Merged, Merger
from repshift_cli.tokens import gather_tokens

__all__ = ["Pairs", "VidTLDR", "merge", "merge_weighted", "pair", "saliency"]


class VidTLDR(Merger):
    """Saliency-aware token merging (vid-TLDR, arXiv 2403.13347) between attention and MLP."""

    kind: ClassVar[str] = "vid_tldr"
    after: ClassVar[After] = "attention"

    def merge(self, tokens: Tensor, sizes: Tensor, scores: Tensor, count: int) -> Merged:
        return merge(tokens, sizes, scores, count)

    def most(self, tokens: int) -> int:
        return tokens // 2

    def macs(self, tokens: int, channels: int) -> int:
        return (tokens - tokens // 2) * (tokens // 2) * channels


class Pairs(NamedTuple):
    """Who merges with whom: tokens at even places are sources, those at odd places are targets.

    Attributes:
        sources: int64 `[B, count]`, among the even tokens, those that merge, the surest first.
        targets: int64 `[B, count]`, among the odd tokens, the one that each of them merges into.
        kept: int64 `[B, ceil(N / 2) - count]`, among the even tokens, those that stay, ascending.
    """

    sources: Tensor
    targets: Tensor
    kept: Tensor


def saliency(scores: Tensor) -> Tensor:
    """What a score says of the weight that a token keeps (vid-TLDR, arXiv 2403.13347).

    Brought to 0..1, then what lies above the mean, divided by its maximum: tokens below the mean have no weight at all,
    and the best one has weight 1. A rise or a stretch of all scores changes nothing.

    Args:
        scores: float `[B, N]`, large for important tokens.

    Returns:
        `[B, N]`, from 0 to 1; all 0 in a row of equal scores.
    """
    tiny = torch.finfo(scores.dtype).tiny
    low, high = scores.amin(dim=1, keepdim=True), scores.amax(dim=1, keepdim=True)
    scaled = (scores - low) / (high - low).clamp(min=tiny)
    above = (scaled - scaled.mean(dim=1, keepdim=True)).clamp(min=0)
    return above / above.amax(dim=1, keepdim=True).clamp(min=tiny)


def pair(tokens: Tensor, count: int) -> Pairs:
    """The `count` even tokens that are most like an odd one (bipartite soft matching, ToMe, arXiv 2210.09461).

    Alike is what has a large cosine; the scores have no say. Among equals the lower place goes first.

    Args:
        tokens: `[B, N, C]`.
        count: how many to merge, at most N // 2.
    """
    wide = torch.promote_types(tokens.dtype, torch.float32)
    # the product runs in the precision of the tokens, as the rest of the model; only their norms might overflow there
    unit = functional.normalize(tokens.to(wide), dim=-1).to(tokens.dtype)
    alike, nearest = (unit[:, ::2] @ unit[:, 1::2].mT).max(dim=-1)
    order = alike.sort(dim=-1, descending=True, stable=True).indices
    sources = order[:, :count]
    return Pairs(sources, nearest.gather(1, sources), order[:, count:].sort(dim=-1).values)


def merge(tokens: Tensor, sizes: Tensor, scores: Tensor, count: int) -> Merged:
    """Let `count` tokens flow into others.

    Args:
        tokens: `[B, N, C]`.
        sizes: float32 `[B, N]`, how many tokens each stands for, all positive.
        scores: float32 `[B, N]`, large for important tokens.
        count: how many tokens disappear, at most N // 2.

    Returns:
        The even tokens that stay, in order, then all odd ones. With `count` 0 everything stays as and where it is.

    Raises:
        ValueError: more tokens shall disappear than there are targets.
    """
    return merge_weighted(tokens, sizes, saliency(scores), count)


def merge_weighted(tokens: Tensor, sizes: Tensor, weights: Tensor, count: int) -> Merged:
    """`merge` with the saliency at hand.

    A target becomes the mean of itself and its sources, by size. The size of a source is first multiplied by its
    weight, so one without weight just goes, and the sum of the sizes falls by what the weights leave out.

    Args:
        tokens, sizes, count: as for `merge`.
        weights: float `[B, N]`, from 0 to 1; only those of the sources matter.
    """
    batch, total, _ = tokens.shape
    if not 0 <= count <= total // 2:
        raise ValueError(f"of {total} tokens 0 to {total // 2} can merge, not {count}")
    if count == 0:
        return Merged(tokens, sizes, torch.arange(total, device=tokens.device).expand(batch, -1))
    pairs = pair(tokens, count)
    odd = torch.arange(1, total, 2, device=tokens.device).expand(batch, -1)
    index = torch.cat((2 * pairs.kept, odd), dim=1)
    places = pairs.targets + pairs.kept.shape[1]  # of the targets, among the tokens that are left

    shares = (sizes * weights.to(sizes.dtype)).gather(1, 2 * pairs.sources)
    merged_sizes = sizes.gather(1, index).scatter_add(1, places, shares)
    sums = _add_rows(
        _scaled(gather_tokens(tokens, index), sizes.gather(1, index)),
        places,
        _scaled(gather_tokens(tokens, 2 * pairs.sources), shares),
    )
    return Merged((sums / merged_sizes.unsqueeze(2)).to(tokens.dtype), merged_sizes, index)


def _scaled(tokens: Tensor, factors: Tensor) -> Tensor:
    """Each token times its factor, in float32 at least: sums of many in half precision would lose the last bits."""
    return tokens * factors.unsqueeze(2).to(torch.promote_types(tokens.dtype, torch.float32))


def _add_rows(tokens: Tensor, places: Tensor, added: Tensor) -> Tensor:
    """`[B, K, C]`, with row `i` of `added` (`[B, count, C]`) added at `places[:, i]`.

    On the CPU always in the same order; on a GPU the order, and so the last bit, is up to the hardware.
    """
    batch, left, _ = tokens.shape
    rows = places + (torch.arange(batch, device=places.device) * left).unsqueeze(1)
    # whole rows of the flattened batch: on the CPU this is 2 to 3 times faster than `scatter_add` channel by channel
    return tokens.flatten(0, 1).index_add(0, rows.flatten(), added.flatten(0, 1)).unflatten(0, (batch, left))
