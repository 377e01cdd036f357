"""Similarity, ranks and recall of video-text retrieval."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from repshift_cli.errors import ModelError
from repshift_cli.evaluation.common import check_finite, explain_out_of_memory
from repshift_cli.utils.progress import Progress

__all__ = [
    "RankStats",
    "RetrievalModel",
    "Scores",
    "matching_scores",
    "rank_stats",
    "ranking_order",
    "ranks",
    "similarity",
]


NOT_MATCHED = -100.0
"""The matching score of a pair that was not among the best by similarity, as in UMT."""


class RetrievalModel(Protocol):
    """A module that compares videos with texts, cheaply by `project_*` and pair by pair by `match`."""

    def encode_video(self, video: Tensor) -> Tensor:
        """`[B, T, 3, H, W]` to tokens `[B, N, D]`, as many for every video."""
        ...

    def project_video(self, tokens: Tensor) -> Tensor:
        """`[B, N, D]` to `[B, F, E]`, of length 1 for each frame; one frame where all tokens are pooled."""
        ...

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """int64 `[B, L]` each, to hidden states `[B, L, D']` of the layers below fusion."""
        ...

    def project_text(self, hidden: Tensor) -> Tensor:
        """`[B, L, D']` to `[B, E]`, of length 1."""
        ...

    def match(self, hidden: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        """The raw matching logits `[n]` of n texts `[n, L, D']`, `[n, L]` with one video `[1, N, D]`."""
        ...

    def to(self, *, device: torch.device, dtype: torch.dtype) -> object:
        """As of `nn.Module`."""
        ...

    def eval(self) -> object:
        """As of `nn.Module`."""
        ...


@dataclass(frozen=True)
class Scores:
    """One score for each query and candidate, float32 on the CPU.

    Attributes:
        text_to_video: `[S, V]`; texts are the queries.
        video_to_text: `[V, S]`; videos are the queries.
    """

    text_to_video: Tensor
    video_to_text: Tensor


@dataclass(frozen=True)
class RankStats:
    """Where the right answers stand.

    Attributes:
        r1, r5, r10: percent of the queries with a right answer among the first 1, 5, 10.
        median_rank, mean_rank: of the best right answer, 1 is the first place.
        queries: how many there were.
    """

    r1: float
    r5: float
    r10: float
    median_rank: float
    mean_rank: float
    queries: int


def similarity(video: Tensor, text: Tensor) -> Tensor:
    """Mean over the frames of their cosines with a text.

    Args:
        video: `[V, F, E]`, of length 1 for each frame.
        text: `[S, E]`, of length 1.

    Returns:
        float32 `[V, S]`.
    """
    # The mean of the products is the product with the mean; [V, F, S] is never held.
    return video.float().mean(dim=1) @ text.float().T


def ranks(scores: Tensor, truths: Sequence[Sequence[int]]) -> Tensor:
    """The place of the best right answer of each query, 0 for the first.

    Places are those of a stable descending sort: among equal scores the lower index comes first, whether it is right or
    not. So a model that scores everything alike is not rewarded, and the batch size does not decide.

    Args:
        scores: `[Q, G]`, without NaN.
        truths: for each query the indices of its right answers, at least one.

    Returns:
        int64 `[Q]`, from 0 to `G - 1`.

    Raises:
        ValueError: another number of queries, or a query without a right answer in the gallery.
    """
    queries, gallery = scores.shape
    if len(truths) != queries:
        raise ValueError(f"{len(truths)} lists of right answers for {queries} queries")
    if not all(len(right) > 0 and all(0 <= one < gallery for one in right) for right in truths):
        raise ValueError(f"every query needs right answers, from 0 to {gallery - 1}")
    order = ranking_order(scores)
    places = torch.empty_like(order).scatter_(1, order, torch.arange(gallery).expand_as(order))
    rows = torch.tensor([row for row, right in enumerate(truths) for _ in right], dtype=torch.int64)
    columns = torch.tensor([one for right in truths for one in right], dtype=torch.int64)
    best = torch.full((queries,), gallery, dtype=torch.int64)
    return best.scatter_reduce(0, rows, places[rows, columns], "amin")


def rank_stats(places: Tensor) -> RankStats:
    """Sum up what `ranks` returns: int64 `[Q]`, `Q > 0`."""
    first_is_one = [place + 1 for place in places.tolist()]
    count = len(first_is_one)

    def within(top: int) -> float:
        return 100.0 * sum(place <= top for place in first_is_one) / count

    return RankStats(
        within(1), within(5), within(10), float(statistics.median(first_is_one)), sum(first_is_one) / count, count
    )


def matching_scores(
    model: RetrievalModel,
    sim: Tensor,
    hidden: Tensor,
    mask: Tensor,
    tokens: Tensor,
    *,
    k: int,
    pair_batch: int,
    device: torch.device | str,
    progress: Progress,
    label: str = "match",
) -> Scores:
    """The matching score of the best `k` candidates of each query, in both directions.

    A pair that both directions ask for is matched once. Pairs go video by video: its tokens are copied to the device
    once, and its keys and values serve many texts.

    Args:
        model: on `device`, in eval mode.
        sim: `[V, S]` on the CPU; among equal similarities the lower index is chosen.
        hidden, mask: `[S, L, D']` and `[S, L]` of all texts, on any device.
        tokens: `[V, N, D]` of all videos, on any device, or mapped from a file.
        k: how many candidates of each query; all, where the gallery has no more.
        pair_batch: pairs at a time.

    Returns:
        Raw logits; `NOT_MATCHED` elsewhere.

    Raises:
        ModelError: the model does not return one number for each pair.
        CheckFailed: it returns numbers that are not finite.
        UsageError: not enough memory for the pairs.
    """
    for_video, for_text = _best(sim, k), _best(sim.T, k).T
    pairs = int((for_video | for_text).sum())
    scores = torch.full(tuple(sim.shape), NOT_MATCHED)
    with (
        torch.inference_mode(),
        explain_out_of_memory(f"{pair_batch} pairs of video and text"),
        progress.task(label, pairs) as task,
    ):
        for video, wanted in enumerate(for_video | for_text):
            seen = tokens[video : video + 1].to(device)
            for texts in wanted.nonzero().squeeze(1).split(pair_batch):
                logits = model.match(
                    hidden[texts.to(hidden.device)].to(device), mask[texts.to(mask.device)].to(device), seen
                )
                if tuple(logits.shape) != (len(texts),):
                    raise ModelError(f"{label}: {tuple(logits.shape)} is returned where ({len(texts)},) is expected")
                scores[video, texts] = check_finite(label, logits).float().cpu()
                task.advance(len(texts))
    return Scores(
        text_to_video=scores.where(for_text, NOT_MATCHED).T.contiguous(),
        video_to_text=scores.where(for_video, NOT_MATCHED),
    )


def ranking_order(scores: Tensor) -> Tensor:
    """Candidates `[Q, G]` from the best on; among equal ones the lower index first."""
    return scores.argsort(dim=1, descending=True, stable=True)


def _best(scores: Tensor, k: int) -> Tensor:
    """bool `[Q, G]`: the best `k` of each row."""
    return torch.zeros(tuple(scores.shape), dtype=torch.bool).scatter_(1, ranking_order(scores)[:, :k], True)
