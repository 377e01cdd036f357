"""Which tokens are alike, and how some flow into others: the arithmetic that merging reducers share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from repshift_cli.tokens import gather_tokens

__all__ = ["Pairs", "flow", "key_features", "nearest", "pair"]


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
    # the length of a source changes all its products alike, so only targets have to be brought to length one
    return (sources @ _unit(targets).mT).argmax(dim=-1)


def key_features(keys: Tensor) -> Tensor:
    """What ToMe compares tokens by: the mean of their keys over the heads, `[B, heads, T, d]` to `[B, T, d]`."""
    return keys.mean(dim=1)


def flow(  # noqa: PLR0917 (tensors and their indices)
    tokens: Tensor, sizes: Tensor, index: Tensor, sources: Tensor, targets: Tensor, shares: Tensor
) -> tuple[Tensor, Tensor]:
    """Gather some tokens, and let others flow into them: each becomes the mean of all that it then stands for.

    Tokens that nothing flows into stay as they are, to the bit.

    Args:
        tokens: `[B, T, C]`.
        sizes: `[B, T]`, how many tokens each stands for.
        index: int64 `[B, K]`, the tokens that stay.
        sources: int64 `[B, D]`, the tokens that flow.
        targets: int64 `[B, D]`, the place in `index` of the token that each flows into.
        shares: `[B, D]`, how much of a token each source counts.

    Returns:
        Tokens `[B, K, C]`, in float32 at least inside, and their sizes `[B, K]`.
    """
    new_sizes = sizes.gather(1, index).scatter_add(1, targets, shares)
    kept = gather_tokens(tokens, index)
    wide = torch.promote_types(tokens.dtype, torch.float32)
    rows = _rows(targets, index.shape[1])
    flat = kept.to(wide).flatten(0, 1)
    # the mean as a step from the target towards the source: so only rows that something flows into are touched
    apart = gather_tokens(tokens, sources).to(wide).flatten(0, 1) - flat.index_select(0, rows)
    steps = (shares / new_sizes.gather(1, targets)).to(wide).flatten().unsqueeze(1)
    # whole rows of the flattened batch: on the CPU this is 2 to 3 times faster than `scatter_add` channel by channel;
    # `flat` is a fresh copy that no gradient needs, so the sum may go where it stands
    flat.index_add_(0, rows, apart * steps)
    return flat.unflatten(0, index.shape).to(tokens.dtype), new_sizes


def _unit(tokens: Tensor) -> Tensor:
    """Each token brought to length one; the norm is taken in float32 at least, where it cannot overflow."""
    wide = torch.promote_types(tokens.dtype, torch.float32)
    return functional.normalize(tokens.to(wide), dim=-1).to(tokens.dtype)


def _rows(places: Tensor, count: int) -> Tensor:
    """`[B, D]` places among `count` rows of each image, as places in the flattened batch."""
    return (places + (torch.arange(places.shape[0], device=places.device) * count).unsqueeze(1)).flatten()
