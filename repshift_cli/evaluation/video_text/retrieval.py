"""Retrieval between videos and texts: by similarity, and by a matching score for the best of each query."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from repshift_cli.errors import DataError, ModelError, UsageError
from repshift_cli.evaluation.common import Skipped, alternate_order, check_finite, explain_out_of_memory, per_second
from repshift_cli.evaluation.video_text.ranking import (
    RankStats,
    RetrievalModel,
    Scores,
    matching_scores,
    rank_stats,
    ranking_order,
    ranks,
    similarity,
)
from repshift_cli.evaluation.video_text.token_store import GIB, TokenStore
from repshift_cli.measure.device import wait_for
from repshift_cli.utils.progress import Progress

__all__ = [
    "Agreement",
    "ClipBatch",
    "Directions",
    "RetrievalEvaluation",
    "RetrievalScore",
    "Texts",
    "evaluate_retrieval",
]


_TOKENS_RANK = 3  # dimensions of tokens and hidden states: [B, N, D]


@dataclass(frozen=True)
class ClipBatch:
    """What was read of some videos.

    Attributes:
        indices: of the videos that were read.
        video: `[b, T, 3, H, W]` in the order of `indices`; None where none was read.
        broken: videos that could not be read, with the reason.
    """

    indices: Sequence[int]
    video: Tensor | None
    broken: Sequence[tuple[int, str]] = ()


@dataclass(frozen=True)
class Texts:
    """The captions.

    Attributes:
        ids, mask: int64 `[S, L]`.
        video_of_caption: for each caption the indices of its videos, at least one.
    """

    ids: Tensor
    mask: Tensor
    video_of_caption: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Directions:
    """Both ways to ask. UMT writes `img_*` for text to video and `txt_*` for video to text."""

    text_to_video: RankStats
    video_to_text: RankStats


@dataclass(frozen=True)
class Agreement:
    """Share (0 to 1) of the queries that two models answer with the same first place."""

    text_to_video: float
    video_to_text: float


@dataclass(frozen=True)
class RetrievalScore:
    """What one model reached.

    Attributes:
        videos, captions: that took part.
        vtc: by similarity alone.
        matching: by the matching score of the best `rerank_k` of each query; None without re-ranking. What lies
            behind the first `rerank_k` is in no order, so R@K above it and the median and mean rank say little there.
        tokens: for each video, behind the encoder.
        seconds: time in the video encoder alone, for all videos.
        matching_seconds: time to match all pairs, copies of tokens included; None without re-ranking.
    """

    videos: int
    captions: int
    vtc: Directions
    matching: Directions | None
    tokens: int
    seconds: float
    matching_seconds: float | None

    @property
    def videos_per_s(self) -> float:
        """Videos per second of encoder time: no decoding, no copying."""
        return per_second(self.videos, self.seconds)


@dataclass(frozen=True)
class RetrievalEvaluation:
    """The outcome for all models of a run.

    Attributes:
        dataset: name of the dataset.
        videos, captions: that took part, for every model.
        skipped: videos that could not be read.
        captions_left_out: captions that went with them, because none of their videos is left.
        rerank_k: how many of each query were matched at most; None without re-ranking.
        scores: by the name of the model.
        vtc_agreement: by similarity, where there are two models; else None.
        matching_agreement: by the matching score, where there are two models and re-ranking; else None.
        tokens_where: where the vision tokens waited for re-ranking; None without it.
        token_bytes: how large they were, for all models together.
        text_bytes: of the states of the captions, which wait in memory; models with one text encoder share them.
        seconds: from the first text to the last result, decoding and all models included.
    """

    dataset: str
    videos: int
    captions: int
    skipped: tuple[Skipped, ...]
    captions_left_out: int
    rerank_k: int | None
    scores: Mapping[str, RetrievalScore]
    vtc_agreement: Agreement | None
    matching_agreement: Agreement | None
    tokens_where: Literal["memory", "disk"] | None
    token_bytes: int
    text_bytes: int
    seconds: float


def evaluate_retrieval(
    models: Mapping[str, RetrievalModel],
    clips: Iterable[ClipBatch],
    texts: Texts,
    *,
    dataset: str,
    videos: int,
    sample_id: Callable[[int], str],
    batch_size: int,
    device: torch.device | str,
    dtype: torch.dtype,
    strict: bool,
    progress: Progress,
    rerank_k: int | None = 128,
    pair_batch: int = 32,
    token_bytes: int = 2 * GIB,
    spill_to: Path | None = None,
) -> RetrievalEvaluation:
    """Look for the video of each text and for the text of each video, with every model on the same decoded clips.

    Args:
        models: by name. They are set to eval mode and moved to `device` and `dtype` in place.
        clips: every video once, in any order, read while this runs.
        texts: the captions.
        dataset: its name.
        videos: how many videos `clips` has, broken ones included.
        sample_id: what a video is called, by its index.
        batch_size: captions at a time, and for the message when memory runs out.
        strict: stop at the first video that cannot be read, instead of leaving it and its captions out.
        rerank_k: how many of each query are matched, in each direction; None to leave re-ranking out. Then no vision
            token is kept.
        pair_batch: pairs of video and text at a time, in re-ranking.
        token_bytes: vision tokens of all models together may take so much memory while they wait for re-ranking; more
            goes into temporary files. They are kept as they are, so it makes no difference to the result.
        spill_to: folder for those files; the system's where None.

    Raises:
        DataError: no video, a caption that belongs to a video that is not among the clips, or (`strict`) a video that
            cannot be read.
        ModelError: a model does not return tensors of the forms that `RetrievalModel` says.
        CheckFailed: a model returns values that are not finite.
        UsageError: not enough memory for the batch.
        OutputError: not enough space for the temporary files.
    """
    if len(texts.ids) != len(texts.video_of_caption):
        raise ValueError(f"{len(texts.video_of_caption)} lists of videos for {len(texts.ids)} captions")
    if rerank_k is not None and rerank_k < 1:
        raise UsageError(f"{rerank_k} candidates of each query cannot be ranked", "Take 1 or more.")
    device = torch.device(device)
    for model in models.values():
        model.to(device=device, dtype=dtype)
        model.eval()
    started = time.perf_counter()
    store = TokenStore(videos, token_bytes, spill_to) if rerank_k is not None else None
    with torch.inference_mode(), closing(store) if store is not None else nullcontext():
        with explain_out_of_memory(f"{batch_size} videos"):
            encoder = _TextEncoder(texts, batch_size, device, progress, keep_states=store is not None)
            sides = {name: _Side(name, model, encoder.captions(name, model)) for name, model in models.items()}
            gallery = _Gallery(videos, sample_id, strict)
            _encode_clips(sides, clips, gallery, store, device=device, dtype=dtype, progress=progress)
        truth = _Truth.of(texts.video_of_caption, gallery, dataset)
        results = {
            name: _score(
                side,
                truth,
                store,
                rerank_k=rerank_k,
                pair_batch=pair_batch,
                device=device,
                progress=progress,
            )
            for name, side in sides.items()
        }
        return RetrievalEvaluation(
            dataset=dataset,
            videos=len(gallery.rows),
            captions=len(truth.captions),
            skipped=tuple(gallery.skipped),
            captions_left_out=len(texts.ids) - len(truth.captions),
            rerank_k=rerank_k,
            scores={name: result.score for name, result in results.items()},
            vtc_agreement=_agreement([result.vtc_first for result in results.values()]),
            matching_agreement=_agreement([result.matching_first for result in results.values()]),
            tokens_where=None if store is None else store.where,
            token_bytes=0 if store is None else store.bytes,
            text_bytes=encoder.bytes,
            seconds=time.perf_counter() - started,
        )


class _Gallery:
    """The videos that were read: which row each has."""

    def __init__(self, videos: int, sample_id: Callable[[int], str], strict: bool) -> None:
        self.videos = videos
        self.sample_id = sample_id
        self.strict = strict
        self.rows: dict[int, int] = {}
        self.broken: set[int] = set()
        self.skipped: list[Skipped] = []

    def note(self, batch: ClipBatch) -> int:
        """Take a batch in, and say which row its first video has."""
        for index, reason in batch.broken:
            if self.strict:
                raise DataError(f"{self.sample_id(index)} cannot be read: {reason}")
            self.broken.add(index)
            self.skipped.append(Skipped(self.sample_id(index), reason))
        start = len(self.rows)
        self.rows.update({index: start + place for place, index in enumerate(batch.indices)})
        if len(self.rows) != start + len(batch.indices) or len(self.rows) > self.videos:
            raise ValueError(f"a video came twice, or more than {self.videos} came")
        return start


@dataclass(frozen=True)
class _Truth:
    """What belongs together, among what is left.

    Attributes:
        captions: those that are left.
        videos_of: for each of them the rows of its videos.
        asking: the rows of the videos that have a caption: without one, a video is a candidate and no query.
        captions_of: for each of those the places in `captions`.
    """

    captions: list[int]
    videos_of: list[list[int]]
    asking: list[int]
    captions_of: list[list[int]]

    @staticmethod
    def of(video_of_caption: Sequence[Sequence[int]], gallery: _Gallery, dataset: str) -> _Truth:
        if not gallery.rows:
            first = gallery.skipped[0] if gallery.skipped else None
            raise DataError(
                f"none of the {len(gallery.skipped)} videos of {dataset} can be read",
                f"The first: {first.sample}: {first.reason}" if first else None,
            )
        captions: list[int] = []
        videos_of: list[list[int]] = []
        captions_of: dict[int, list[int]] = {}
        for caption, its_videos in enumerate(video_of_caption):
            unknown = [index for index in its_videos if index not in gallery.rows and index not in gallery.broken]
            if unknown or not its_videos:
                raise DataError(f"caption {caption} of {dataset} belongs to no video that is among the clips")
            left = [gallery.rows[index] for index in its_videos if index in gallery.rows]
            if not left:
                continue
            for row in left:
                captions_of.setdefault(row, []).append(len(captions))
            captions.append(caption)
            videos_of.append(left)
        if not captions:
            raise DataError(f"no caption of {dataset} belongs to a video that can be read")
        asking = sorted(captions_of)
        return _Truth(captions, videos_of, asking, [captions_of[row] for row in asking])


class _Captions(NamedTuple):
    """What a model makes of all captions: embeddings `[S, E]`, states `[S, L, D']` (None if nothing asks) and mask."""

    embeddings: Tensor
    states: Tensor | None
    mask: Tensor


@dataclass
class _Side:
    """One model and what it made so far; video is `[b, F, E]` each."""

    name: str
    model: RetrievalModel
    captions: _Captions
    video: list[Tensor] = field(default_factory=list)
    form: tuple[int, ...] | None = None
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        return self.form[0] if self.form else 0


@dataclass(frozen=True)
class _Result:
    """The score of a model, and the first places that it gave: text to video, video to text."""

    score: RetrievalScore
    vtc_first: tuple[Tensor, Tensor] | None
    matching_first: tuple[Tensor, Tensor] | None


class _TextEncoder:
    """Encodes the captions once for all models that share a text encoder, as a model and its dense self do."""

    def __init__(
        self, texts: Texts, batch_size: int, device: torch.device, progress: Progress, *, keep_states: bool
    ) -> None:
        self._texts = texts
        self._batch_size = batch_size
        self._device = device
        self._progress = progress
        self._keep_states = keep_states
        self._known: dict[int, _Captions] = {}

    @property
    def bytes(self) -> int:
        """Of the states that are kept."""
        return sum(each.states.nbytes for each in self._known.values() if each.states is not None)

    def captions(self, name: str, model: RetrievalModel) -> _Captions:
        key = id(getattr(model, "text_encoder", model))
        if key not in self._known:
            self._known[key] = self._encode(name, model)
        return self._known[key]

    def _encode(self, name: str, model: RetrievalModel) -> _Captions:
        texts, embeddings, kept, row = self._texts, [], None, 0
        with self._progress.task("texts", len(texts.ids)) as task:
            for ids, mask in zip(texts.ids.split(self._batch_size), texts.mask.split(self._batch_size), strict=True):
                states = model.encode_text(ids.to(self._device), mask.to(self._device))
                if states.dim() != _TOKENS_RANK or tuple(states.shape[:2]) != tuple(ids.shape):
                    raise ModelError(f"{name}: the texts {tuple(ids.shape)} become {tuple(states.shape)}")
                embeddings.append(check_finite(name, model.project_text(states)).float().cpu())
                if self._keep_states:
                    if kept is None:  # all at once: joining parts would hold them twice
                        kept = torch.empty(len(texts.ids), *states.shape[1:], dtype=states.dtype)
                    kept[row : row + len(ids)] = states
                row += len(ids)
                task.advance(len(ids))
        return _Captions(torch.cat(embeddings), kept, texts.mask.cpu())


def _encode_clips(
    sides: Mapping[str, _Side],
    clips: Iterable[ClipBatch],
    gallery: _Gallery,
    store: TokenStore | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> None:
    with progress.task("videos", gallery.videos) as task:
        turn = 0
        for batch in clips:
            row = gallery.note(batch)
            if batch.video is not None and len(batch.indices) > 0:
                video = batch.video.to(device=device, dtype=dtype)
                if turn == 0:
                    # The first pass pays for memory pools and kernel selection; it is not part of the speed.
                    first = {name: _tokens(side, video, len(batch.indices), device) for name, side in sides.items()}
                    if store is not None:
                        store.open(first)
                    for side in sides.values():
                        side.seconds = 0.0
                    del first
                for name in alternate_order(list(sides), turn):
                    tokens = _tokens(sides[name], video, len(batch.indices), device)
                    sides[name].video.append(_projected(sides[name], tokens))
                    if store is not None:
                        store.put(name, row, tokens)
                turn += 1
            task.advance(len(batch.indices) + len(batch.broken))


def _tokens(side: _Side, video: Tensor, count: int, device: torch.device) -> Tensor:
    """The tokens `[count, N, D]` of a batch; every batch must have the same N and D."""
    wait_for(device)
    started = time.perf_counter()
    tokens = side.model.encode_video(video)
    wait_for(device)
    side.seconds += time.perf_counter() - started
    if tokens.dim() != _TOKENS_RANK or len(tokens) != count:
        raise ModelError(f"{side.name}: the videos {tuple(video.shape)} become {tuple(tokens.shape)}")
    form = tuple(tokens.shape[1:])
    if side.form not in (None, form):
        raise ModelError(f"{side.name}: videos become {form} tokens and channels, and {side.form} before")
    side.form = form
    return tokens


def _projected(side: _Side, tokens: Tensor) -> Tensor:
    """The projection `[b, F, E]` of tokens, float32 on the CPU."""
    projected = check_finite(side.name, side.model.project_video(tokens)).float().cpu()
    width = side.captions.embeddings.shape[-1]
    if projected.dim() != _TOKENS_RANK or len(projected) != len(tokens) or projected.shape[-1] != width:
        raise ModelError(f"{side.name}: videos are projected to {tuple(projected.shape)}, texts to [., {width}]")
    return projected


def _score(
    side: _Side,
    truth: _Truth,
    store: TokenStore | None,
    *,
    rerank_k: int | None,
    pair_batch: int,
    device: torch.device,
    progress: Progress,
) -> _Result:
    """Rank all queries by one model, by similarity and, with a store, by the matching score."""
    video, captions = torch.cat(side.video), _those_of(side.captions, truth.captions)
    sim = similarity(video, captions.embeddings)
    by_similarity = Scores(text_to_video=sim.T, video_to_text=sim)
    by_match, seconds = None, None
    if store is not None and rerank_k is not None and captions.states is not None:
        started = time.perf_counter()
        by_match = matching_scores(
            side.model,
            sim,
            captions.states,
            captions.mask,
            store.of(side.name, len(video)),
            k=rerank_k,
            pair_batch=pair_batch,
            device=device,
            progress=progress,
            label=f"match {side.name}",
        )
        seconds = time.perf_counter() - started
    score = RetrievalScore(
        videos=len(video),
        captions=len(truth.captions),
        vtc=_directions(by_similarity, truth),
        matching=None if by_match is None else _directions(by_match, truth),
        tokens=side.tokens,
        seconds=side.seconds,
        matching_seconds=seconds,
    )
    return _Result(score, _first(by_similarity, truth), None if by_match is None else _first(by_match, truth))


def _those_of(captions: _Captions, rows: Sequence[int]) -> _Captions:
    """Without the captions of videos that could not be read; where there are none such, without a copy."""
    if len(rows) == len(captions.embeddings):
        return captions
    kept = torch.tensor(rows)
    states = None if captions.states is None else captions.states[kept]
    return _Captions(captions.embeddings[kept], states, captions.mask[kept])


def _directions(scores: Scores, truth: _Truth) -> Directions:
    return Directions(
        text_to_video=rank_stats(ranks(scores.text_to_video, truth.videos_of)),
        video_to_text=rank_stats(ranks(scores.video_to_text[truth.asking], truth.captions_of)),
    )


def _first(scores: Scores, truth: _Truth) -> tuple[Tensor, Tensor]:
    """The first place of every query, in both directions."""
    return ranking_order(scores.text_to_video)[:, 0], ranking_order(scores.video_to_text[truth.asking])[:, 0]


def _agreement(firsts: Sequence[tuple[Tensor, Tensor] | None]) -> Agreement | None:
    if len(firsts) != 2 or firsts[0] is None or firsts[1] is None:  # noqa: PLR2004
        return None
    (text, video), (other_text, other_video) = firsts[0], firsts[1]
    return Agreement(
        text_to_video=float((text == other_text).double().mean()),
        video_to_text=float((video == other_video).double().mean()),
    )
