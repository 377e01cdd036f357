"""Similarity, ranks and recall of video-text retrieval."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from repshift_cli.errors import DataError, ModelError
from repshift_cli.evaluation.common import check_finite, explain_out_of_memory
from repshift_cli.evaluation.video_text.encoding import VideoModel
from repshift_cli.utils.progress import Progress

_Value = TypeVar("_Value")

NOT_MATCHED = -100.0
"""The matching score of a pair that is not among the best by similarity, as in UMT."""


class RetrievalModel(VideoModel, Protocol):
    """A module that compares videos with texts: fast by `project_*`, and pair by pair by `match`."""

    def project_video(self, tokens: Tensor) -> Tensor:
        """`[B, N, D]` to `[B, F, E]`, of norm 1 for each frame; F is 1 if all tokens are pooled."""

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """int64 `[B, L]` each, to hidden states `[B, L, D']` below the fusion layers."""

    def project_text(self, hidden: Tensor) -> Tensor:
        """`[B, L, D']` to `[B, E]`, of norm 1."""

    def match(self, hidden: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        """The raw matching logits `[n]` of n texts `[n, L, D']`, `[n, L]` with one video `[1, N, D]`."""


@dataclass(frozen=True)
class Directions(Generic[_Value]):
    """A value for each direction. UMT names them `img_*` (text to video) and `txt_*` (video to text)."""

    text_to_video: _Value
    video_to_text: _Value


@dataclass(frozen=True)
class RankStats:
    """Ranks of the right answers.

    Attributes:
        r1, r5, r10: recall, percent of the queries with a right answer among the first 1, 5, 10.
        median_rank, mean_rank: of the best right answer, counted from 1.
        queries: their number.
    """

    r1: float
    r5: float
    r10: float
    median_rank: float
    mean_rank: float
    queries: int


@dataclass(frozen=True)
class CorrectAnswers:
    """The correct answers among readable videos.

    Attributes:
        captions: indices of captions with a readable video.
        videos_of: for each of them the rows of its videos.
        queries: rows of videos with a caption; a video without one is a candidate, but not a query.
        captions_of: for each of those the positions in `captions`.
    """

    captions: list[int]
    videos_of: list[list[int]]
    queries: list[int]
    captions_of: list[list[int]]

    @staticmethod
    def of(
        videos_of_caption: Sequence[Sequence[int]], rows_of: Mapping[int, int], broken: Set[int], dataset: str
    ) -> CorrectAnswers:
        """Find the correct answers.

        Args:
            videos_of_caption: for each caption the indices of its videos.
            rows_of: the row of each readable video.
            broken: the unreadable videos.

        Raises:
            DataError: a caption has no video, or none has a readable one.
        """
        captions: list[int] = []
        videos_of: list[list[int]] = []
        captions_of: dict[int, list[int]] = {}
        for caption, videos in enumerate(videos_of_caption):
            if not videos or any(index not in rows_of and index not in broken for index in videos):
                raise DataError(f"caption {caption} of {dataset} has no video among the clips")
            rows = [rows_of[index] for index in videos if index in rows_of]
            if rows:
                for row in rows:
                    captions_of.setdefault(row, []).append(len(captions))
                captions.append(caption)
                videos_of.append(rows)
        if not captions:
            raise DataError(f"no caption of {dataset} has a video that can be read")
        queries = sorted(captions_of)
        return CorrectAnswers(captions, videos_of, queries, [captions_of[row] for row in queries])


def similarity(video: Tensor, text: Tensor) -> Tensor:
    """Mean cosine of the frames of each video with each text.

    Args:
        video: `[V, F, E]`, of norm 1 for each frame.
        text: `[S, E]`, of norm 1.

    Returns:
        float32 `[V, S]`.
    """
    # The mean of the products is the product with the mean, which avoids [V, F, S].
    return video.float().mean(dim=1) @ text.float().T


def ranks(scores: Tensor, truths: Sequence[Sequence[int]]) -> Tensor:
    """The rank of the best right answer of each query, counted from 0.

    Ranks are those of a stable descending sort: among equal scores the lower index comes first, right or wrong. So
    constant scores get no advantage.

    Args:
        scores: `[Q, G]`, without NaN.
        truths: for each query the indices of its right answers, at least one.

    Returns:
        int64 `[Q]`, from 0 to `G - 1`.
    """
    queries, gallery = scores.shape
    order = ranking_order(scores)
    places = torch.empty_like(order).scatter_(1, order, torch.arange(gallery).expand_as(order))
    rows = torch.tensor([row for row, right in enumerate(truths) for _ in right], dtype=torch.int64)
    columns = torch.tensor([one for right in truths for one in right], dtype=torch.int64)
    best = torch.full((queries,), gallery, dtype=torch.int64)
    return best.scatter_reduce(0, rows, places[rows, columns], "amin")


def rank_stats(found: Tensor) -> RankStats:
    """Statistics of the output of `ranks`, int64 `[Q]`, `Q > 0`."""
    from_1 = [rank + 1 for rank in found.tolist()]
    count = len(from_1)
    r1, r5, r10 = (100.0 * sum(rank <= top for rank in from_1) / count for top in (1, 5, 10))
    return RankStats(r1, r5, r10, float(statistics.median(from_1)), sum(from_1) / count, count)


def rank_queries(
    scores: Directions[Tensor], correct: CorrectAnswers
) -> tuple[Directions[RankStats], Directions[Tensor]]:
    """Rank statistics, and the first candidate of each query."""
    video_to_text = scores.video_to_text[correct.queries]
    stats = Directions(
        text_to_video=rank_stats(ranks(scores.text_to_video, correct.videos_of)),
        video_to_text=rank_stats(ranks(video_to_text, correct.captions_of)),
    )
    return stats, Directions(ranking_order(scores.text_to_video)[:, 0], ranking_order(video_to_text)[:, 0])


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
) -> Directions[Tensor]:
    """Matching scores of the best `k` candidates of each query, in both directions.

    Each pair is matched once. Pairs are grouped by video: its tokens are copied to the device once, and its keys and
    values are shared by many texts.

    Args:
        model: on `device`, in eval mode.
        sim: `[V, S]` on the CPU; among equal similarities the lower index is chosen.
        hidden, mask: `[S, L, D']` and `[S, L]` of all texts, on any device.
        tokens: `[V, N, D]` of all videos, on any device, or mapped from a file.
        k: number of candidates of each query; all if the gallery has fewer.
        pair_batch: pairs per batch.

    Returns:
        Raw logits, float32 `[S, V]` (text to video) and `[V, S]` on the CPU; `NOT_MATCHED` elsewhere.

    Raises:
        ModelError: the model does not return one logit per pair.
        CheckFailed: it returns values that are not finite.
        UsageError: there is not enough memory for the pairs.
    """
    for_video, for_text = _best(sim, k), _best(sim.T, k).T
    pairs = int((for_video | for_text).sum())
    scores = torch.full(tuple(sim.shape), NOT_MATCHED)
    with (
        torch.inference_mode(),
        explain_out_of_memory(f"{pair_batch} pairs of video and text"),
        progress.task(label, pairs) as task,
    ):
        for video, candidates in enumerate(for_video | for_text):
            video_tokens = tokens[video : video + 1].to(device)
            for texts in candidates.nonzero().squeeze(1).split(pair_batch):
                states, states_mask = hidden[texts.to(hidden.device)], mask[texts.to(mask.device)]
                logits = model.match(states.to(device), states_mask.to(device), video_tokens)
                if tuple(logits.shape) != (len(texts),):
                    raise ModelError(f"{label}: the logits have shape {tuple(logits.shape)}, not ({len(texts)},)")
                scores[video, texts] = check_finite(label, logits).float().cpu()
                task.advance(len(texts))
    return Directions(
        text_to_video=scores.where(for_text, NOT_MATCHED).T.contiguous(),
        video_to_text=scores.where(for_video, NOT_MATCHED),
    )


def ranking_order(scores: Tensor) -> Tensor:
    """Candidates `[Q, G]`, best first; among equal scores the lower index first."""
    return scores.argsort(dim=1, descending=True, stable=True)


def _best(scores: Tensor, k: int) -> Tensor:
    """bool `[Q, G]`: the best `k` of each row."""
    return torch.zeros(tuple(scores.shape), dtype=torch.bool).scatter_(1, ranking_order(scores)[:, :k], True)
