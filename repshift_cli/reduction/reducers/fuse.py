"""Fusing: all dropped tokens become one, which stands for the background."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from repshift_cli.ops.merging import unit_range
from repshift_cli.ops.tokens import gather_tokens, put_at, split_top, with_prefix
from repshift_cli.reduction.reducers.base import Merged, Merger


class Fuse(Merger):
    """All dropped tokens are merged into the least important kept one (EViT, arXiv 2202.07800, section 3.2).

    It becomes their mean, weighted by the score. The token count is that of pruning.

    Attributes:
        carry: whether a token that was fused at an earlier site is merged into the next fused one, weighted by its
            size, so that there is never more than one; else it is scored like any other.
    """

    kind: ClassVar[str] = "fuse"

    carry: bool = False

    def merge(  # noqa: PLR0917
        self, tokens: Tensor, sizes: Tensor, scores: Tensor, count: int, prefix: int, seen: Mapping[str, Tensor]
    ) -> Merged:
        patch_sizes = sizes[:, prefix:]
        ranks = scores.masked_fill(patch_sizes > 1, -torch.inf) if self.carry else scores
        keep, drop = split_top(ranks, ranks.shape[1] - count)
        best_of_rest = keep.gather(1, ranks.gather(1, keep).argmin(dim=1, keepdim=True))
        together = torch.cat((best_of_rest, drop), dim=1)
        weights = _weights(scores, patch_sizes).gather(1, together).unsqueeze(2)
        wide = torch.promote_types(tokens.dtype, torch.float32)
        fused = (gather_tokens(tokens, together + prefix).to(wide) * weights).sum(1) / weights.sum(1)

        index = with_prefix(keep, prefix)
        at = prefix + (keep < best_of_rest).sum(dim=1, keepdim=True)
        kept = put_at(gather_tokens(tokens, index), at, fused.to(tokens.dtype))
        total = patch_sizes.gather(1, together).sum(dim=1, keepdim=True)
        new_sizes = put_at(sizes.gather(1, index).unsqueeze(2), at, total).squeeze(2)
        return Merged(kept, new_sizes, keep, drop, (at - prefix).expand_as(drop))


def _weights(scores: Tensor, sizes: Tensor) -> Tensor:
    """Positive weights that grow with the score, from 0.001 for the lowest to 1 for the highest, times size."""
    return sizes * (0.001 + 0.999 * unit_range(scores))
