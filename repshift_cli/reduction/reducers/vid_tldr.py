"""vid-TLDR: tokens are merged into the most similar one, weighted by saliency."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from repshift_cli.ops.merging import merge_into, pair, unit_range
from repshift_cli.ops.tokens import gather_tokens
from repshift_cli.planning.layout import After
from repshift_cli.reduction.reducers.base import Dims, Merged, Merger


class VidTLDR(Merger):
    """Saliency-aware token merging (vid-TLDR, arXiv 2403.13347) between attention and MLP."""

    kind: ClassVar[str] = "vid_tldr"
    after: ClassVar[After] = "attention"
    pooled_by_size: ClassVar[bool] = False  # the authors' models pool by a plain mean

    def merge(  # noqa: PLR0917
        self, tokens: Tensor, sizes: Tensor, scores: Tensor, count: int, prefix: int, seen: Mapping[str, Tensor]
    ) -> Merged:
        patches = merge(tokens[:, prefix:], sizes[:, prefix:], scores, count)
        if not prefix:
            return patches
        front = (tokens[:, :prefix], sizes[:, :prefix])
        return Merged(torch.cat((front[0], patches[0]), 1), torch.cat((front[1], patches[1]), 1), *patches[2:])

    def most(self, patches: int) -> int:
        return patches // 2

    def macs(self, patches: int, dropped: int, dims: Dims) -> int:
        return (patches - patches // 2) * (patches // 2) * dims.width


def saliency(scores: Tensor) -> Tensor:
    """The weight of each token in a merge, from scores `[B, N]` (vid-TLDR, arXiv 2403.13347).

    Scores are scaled to 0..1, the mean is subtracted, negative values are set to 0, and the maximum is scaled to 1; a
    row of equal scores is all 0. Shifting the scores or scaling them by a positive factor changes nothing.
    """
    scaled = unit_range(scores)
    above = (scaled - scaled.mean(dim=1, keepdim=True)).clamp(min=0)
    return above / above.amax(dim=1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


def merge(tokens: Tensor, sizes: Tensor, scores: Tensor, count: int) -> Merged:
    """Merge `count` tokens, at most N // 2, into others.

    Args:
        tokens, sizes: `[B, N, C]`, and float32 `[B, N]`, how many tokens each stands for, all positive.
        scores: float32 `[B, N]`, large for important tokens.

    Returns the remaining even tokens, in order, then all odd ones. With `count` 0, the tokens unchanged.
    """
    return merge_weighted(tokens, sizes, saliency(scores), count)


def merge_weighted(tokens: Tensor, sizes: Tensor, weights: Tensor, count: int) -> Merged:
    """`merge` with given weights `[B, N]`, from 0 to 1, in place of scores; only those of the sources matter.

    A target becomes the mean of itself and its sources, weighted by size. The size of a source is first multiplied by
    its weight: a source of weight 0 is dropped, and the sum of all sizes shrinks.
    """
    batch, total, _ = tokens.shape
    if not 0 <= count <= total // 2:
        raise ValueError(f"of {total} tokens 0 to {total // 2} can merge, not {count}")
    if count == 0:
        places = torch.arange(total, device=tokens.device).expand(batch, -1)
        return Merged(tokens, sizes, places, places[:, :0], places[:, :0])
    pairs = pair(tokens[:, ::2], tokens[:, 1::2], count)
    kept = pairs.kept.sort(dim=-1).values
    odd = torch.arange(1, total, 2, device=tokens.device).expand(batch, -1)
    index = torch.cat((2 * kept, odd), dim=1)
    shares = (sizes * weights.to(sizes.dtype)).gather(1, 2 * pairs.sources)
    targets = pairs.targets + kept.shape[1]
    merged, merged_sizes = merge_into(
        gather_tokens(tokens, index),
        sizes.gather(1, index),
        gather_tokens(tokens, 2 * pairs.sources),
        shares,
        targets,
    )
    return Merged(merged, merged_sizes, index, 2 * pairs.sources, targets)
