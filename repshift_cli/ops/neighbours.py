"""Nearest neighbours of embeddings by cosine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

_MOST_SCORES = 1 << 24
"""Similarities in memory at a time."""


def unit(embeddings: Tensor) -> Tensor:
    """The embeddings `[N, C]` in float32 and of length one."""
    return normalize(embeddings.float(), dim=-1)


def recall_at(
    dense: Tensor, queries: Mapping[str, Tensor], index: Tensor, ks: Sequence[int], own: Tensor | None = None
) -> dict[str, dict[int, Tensor]]:
    """Share of the k nearest entries of the dense queries that other queries find among their first k.

    An entry that is as near to the dense query as its k-th neighbour is correct too, so that equal entries do not
    decide.

    Args:
        dense: `[N, C]`, the dense embeddings of the queries.
        queries: other embeddings of the same queries, each `[N, C]`.
        index: `[M, C]`, the dense embeddings to search.
        own: int64 `[N]`, the entry that is the query itself and is left out; -1 for none.

    Returns:
        By name and k, float32 `[N]`.
    """
    most, entries = max(ks), unit(index).T
    found: dict[str, dict[int, list[Tensor]]] = {name: {k: [] for k in ks} for name in queries}
    for rows in torch.arange(len(dense), device=dense.device).split(max(1, _MOST_SCORES // len(index))):
        wanted = _scores(dense[rows], entries, own, rows)
        nearest = wanted.topk(most, dim=1).values
        for name, given in queries.items():
            places = _scores(given[rows], entries, own, rows).topk(most, dim=1).indices
            similar = wanted.gather(1, places)
            for k in ks:
                found[name][k].append((similar[:, :k] >= nearest[:, k - 1 : k]).float().mean(dim=1))
    return {name: {k: torch.cat(parts) for k, parts in by_k.items()} for name, by_k in found.items()}


def _scores(queries: Tensor, entries: Tensor, own: Tensor | None, rows: Tensor) -> Tensor:
    scores = unit(queries) @ entries
    if own is not None:
        left_out = own[rows]
        known = (left_out >= 0).nonzero().squeeze(1)
        scores[known, left_out[known]] = -torch.inf
    return scores
