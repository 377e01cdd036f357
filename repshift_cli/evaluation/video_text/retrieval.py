"""Retrieval between videos and captions: ranks by similarity, then by a matching score for the best of each query."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from repshift_cli.data.loader import Batch
from repshift_cli.data.video.tokenizer import TextBatch
from repshift_cli.errors import ModelError
from repshift_cli.evaluation.common import Skipped, alternate_order, check_finite, explain_out_of_memory, per_second
from repshift_cli.evaluation.video_text.encoding import (
    TOKEN_DIMS,
    encode_timed,
    nothing_readable,
    prepare,
    skipped_of,
)
from repshift_cli.evaluation.video_text.ranking import (
    CorrectAnswers,
    Directions,
    RankStats,
    RetrievalModel,
    matching_scores,
    rank_queries,
    similarity,
)
from repshift_cli.evaluation.video_text.settings import VideoSettings
from repshift_cli.evaluation.video_text.token_store import GIB, TokenStore
from repshift_cli.utils.progress import Progress


@dataclass(frozen=True)
class RetrievalScore:
    """The result of one model.

    Attributes:
        vtc: ranks by similarity alone.
        matching: ranks by the matching score of the best `rerank_k` of each query; None without re-ranking. Candidates
            behind the first `rerank_k` are unordered, so R@K above it and the median and mean rank mean little.
        tokens: per video, after the encoder.
        seconds: in the video encoder alone, for all videos.
        matching_seconds: for matching all pairs, with copies of tokens; None without re-ranking.
    """

    videos: int
    vtc: Directions[RankStats]
    matching: Directions[RankStats] | None
    tokens: int
    seconds: float
    matching_seconds: float | None

    @property
    def videos_per_s(self) -> float:
        """Videos per second of encoder time, without decoding and copying."""
        return per_second(self.videos, self.seconds)


@dataclass(frozen=True)
class RetrievalEvaluation:
    """The result of all models.

    Attributes:
        videos, captions: number that every model was evaluated on.
        captions_left_out: captions of which no video is readable.
        rerank_k: candidates of each query that were matched at most; None without re-ranking.
        vtc_agreement, matching_agreement: share (0 to 1) of queries for which both models have the same first
            candidate by similarity or matching score; None unless there are two models.
        tokens_where: where vision tokens were kept for re-ranking; None without it.
        token_bytes: their size, of all models.
        text_bytes: size of the hidden states of the captions, in memory. Models with one text encoder share them.
        seconds: from the first caption to the last result, with decoding, of all models.
    """

    dataset: str
    videos: int
    captions: int
    skipped: tuple[Skipped, ...]
    captions_left_out: int
    rerank_k: int | None
    scores: Mapping[str, RetrievalScore]
    vtc_agreement: Directions[float] | None
    matching_agreement: Directions[float] | None
    tokens_where: Literal["memory", "disk"] | None
    token_bytes: int
    text_bytes: int
    seconds: float


def evaluate_retrieval(
    models: Mapping[str, RetrievalModel],
    clips: Iterable[Batch],
    texts: TextBatch,
    videos_of_caption: Sequence[Sequence[int]],
    *,
    dataset: str,
    videos: int,
    sample_id: Callable[[int], str],
    settings: VideoSettings,
    progress: Progress,
    pair_batch: int = 32,
    token_bytes: int = 2 * GIB,
    spill_to: Path | None = None,
) -> RetrievalEvaluation:
    """Retrieve the videos of each caption and the captions of each video, with every model on the same decoded clips.

    Args:
        models: by name. They are set to eval mode and moved to the device and dtype in place.
        clips: every video once, in any order; read lazily.
        texts: the captions, `[S, L]`.
        videos_of_caption: for each caption the indices of its videos, at least one.
        videos: number of videos in `clips`, unreadable ones included.
        pair_batch: pairs of video and text per batch of re-ranking.
        token_bytes: limit on the memory for vision tokens that are kept for re-ranking, of all models. Beyond it they
            are kept in temporary files in `spill_to`, with the same result.

    Raises:
        DataError: no video is readable, a caption has no video among the clips, or (`strict`) a video is unreadable.
        ModelError: an output of a model has another shape than in `RetrievalModel`.
        CheckFailed: a model returns values that are not finite.
        UsageError: there is not enough memory for the batch.
        OutputError: there is not enough space for the temporary files.
    """
    rerank_k = settings.rerank_k
    prepare(models, settings)
    started = time.perf_counter()
    store = TokenStore(videos, token_bytes, spill_to) if rerank_k is not None else None
    with torch.inference_mode(), closing(store) if store is not None else nullcontext():
        with explain_out_of_memory(f"{settings.batch_size} videos"):
            captions = _captions_of_models(models, texts, settings, progress)
            encoders = {name: _Encoder(name, model, captions[name]) for name, model in models.items()}
            gallery = _Gallery()
            with progress.task("videos", videos) as task:
                for batch in clips:
                    gallery.skipped += skipped_of(batch.broken, sample_id, settings.strict)
                    first_row = gallery.add(batch)
                    if batch.pixels is not None and len(batch.indices) > 0:
                        _encode_batch(encoders, batch.pixels, first_row, store, settings)
                    task.advance(len(batch.indices) + len(batch.broken))
        if not gallery.rows:
            problem = f"none of the {len(gallery.skipped)} videos of {dataset} can be read"
            raise nothing_readable(problem, gallery.skipped)
        correct = CorrectAnswers.of(videos_of_caption, gallery.rows, gallery.broken, dataset)
        results = [
            _score(encoder, correct, store, settings, pair_batch, progress=progress) for encoder in encoders.values()
        ]
    states = {id(each.states): each.states.nbytes for each in captions.values() if each.states is not None}
    return RetrievalEvaluation(
        dataset=dataset,
        videos=len(gallery.rows),
        captions=len(correct.captions),
        skipped=tuple(gallery.skipped),
        captions_left_out=len(texts.ids) - len(correct.captions),
        rerank_k=rerank_k,
        scores=dict(zip(encoders, (result.score for result in results), strict=True)),
        vtc_agreement=_agreement([result.vtc_first for result in results]),
        matching_agreement=_agreement([result.matching_first for result in results]),
        tokens_where=None if store is None else store.where,
        token_bytes=0 if store is None else store.bytes,
        text_bytes=sum(states.values()),
        seconds=time.perf_counter() - started,
    )


@dataclass
class _Gallery:
    """The row of each readable video in the embeddings."""

    rows: dict[int, int] = field(default_factory=dict)
    broken: set[int] = field(default_factory=set)
    skipped: list[Skipped] = field(default_factory=list)

    def add(self, batch: Batch) -> int:
        """Returns the row of the first video of the batch."""
        self.broken.update(index for index, _ in batch.broken)
        start = len(self.rows)
        self.rows.update({index: start + place for place, index in enumerate(batch.indices)})
        if len(self.rows) != start + len(batch.indices):
            raise ValueError("a video occurs twice")
        return start


class _Captions(NamedTuple):
    """Encoded captions: embeddings `[S, E]`, hidden states `[S, L, D']` (None without re-ranking) and mask `[S, L]`."""

    embeddings: Tensor
    states: Tensor | None
    mask: Tensor

    def select(self, rows: Sequence[int]) -> _Captions:
        """Some captions; no copy if these are all."""
        if len(rows) == len(self.embeddings):
            return self
        kept = torch.tensor(rows)
        return _Captions(self.embeddings[kept], None if self.states is None else self.states[kept], self.mask[kept])


def _captions_of_models(
    models: Mapping[str, RetrievalModel], texts: TextBatch, settings: VideoSettings, progress: Progress
) -> dict[str, _Captions]:
    """By model name. Models with one text encoder, as a compressed and its dense model, share the result."""
    by_encoder: dict[int, _Captions] = {}
    captions = {}
    for name, model in models.items():
        key = id(getattr(model, "text_encoder", model))
        if key not in by_encoder:
            by_encoder[key] = _encode_captions(name, model, texts, settings, progress)
        captions[name] = by_encoder[key]
    return captions


def _encode_captions(
    name: str, model: RetrievalModel, texts: TextBatch, settings: VideoSettings, progress: Progress
) -> _Captions:
    embeddings, kept, row = [], None, 0
    size, device = settings.batch_size, settings.device
    with progress.task("texts", len(texts.ids)) as task:
        for ids, mask in zip(texts.ids.split(size), texts.mask.split(size), strict=True):
            states = model.encode_text(ids.to(device), mask.to(device))
            if states.dim() != TOKEN_DIMS or tuple(states.shape[:2]) != tuple(ids.shape):
                shape = tuple(states.shape)
                raise ModelError(f"{name}: the hidden states of texts {tuple(ids.shape)} have shape {shape}")
            embeddings.append(check_finite(name, model.project_text(states)).float().cpu())
            if settings.rerank_k is not None:
                if kept is None:  # allocated at once: torch.cat of parts would need twice the memory
                    kept = torch.empty(len(texts.ids), *states.shape[1:], dtype=states.dtype)
                kept[row : row + len(ids)] = states
            row += len(ids)
            task.advance(len(ids))
    return _Captions(torch.cat(embeddings), kept, texts.mask.cpu())


@dataclass
class _Encoder:
    """One model, its captions and the projections `[b, F, E]` of the videos so far."""

    name: str
    model: RetrievalModel
    captions: _Captions
    video: list[Tensor] = field(default_factory=list)
    token_shape: tuple[int, ...] | None = None
    seconds: float = 0.0

    def encode(self, video: Tensor, device: torch.device) -> Tensor:
        tokens, seconds = encode_timed(self.name, self.model, video, device)
        shape = tuple(tokens.shape[1:])
        if self.token_shape not in (None, shape):
            raise ModelError(f"{self.name}: a video has {shape} tokens and channels, earlier ones {self.token_shape}")
        self.token_shape = shape
        self.seconds += seconds
        return tokens

    def project(self, tokens: Tensor) -> Tensor:
        """The projection `[b, F, E]` of tokens, float32 on the CPU."""
        projected = check_finite(self.name, self.model.project_video(tokens)).float().cpu()
        width = self.captions.embeddings.shape[-1]
        if projected.dim() != TOKEN_DIMS or len(projected) != len(tokens) or projected.shape[-1] != width:
            shape = tuple(projected.shape)
            raise ModelError(f"{self.name}: projected videos have shape {shape}, projected texts [., {width}]")
        return projected


def _encode_batch(
    encoders: Mapping[str, _Encoder], video: Tensor, row: int, store: TokenStore | None, settings: VideoSettings
) -> None:
    device = settings.device
    video = video.to(device=device, dtype=settings.dtype)
    if row == 0:
        # Warm-up, not timed: the first pass allocates memory pools and selects kernels.
        first = {name: encoder.encode(video, device) for name, encoder in encoders.items()}
        if store is not None:
            store.open(first)
        del first
        for encoder in encoders.values():
            encoder.seconds = 0.0
    batches = len(next(iter(encoders.values())).video)
    for name in alternate_order(list(encoders), batches):
        tokens = encoders[name].encode(video, device)
        encoders[name].video.append(encoders[name].project(tokens))
        if store is not None:
            store.put(name, row, tokens)


class _Result(NamedTuple):
    """The score of a model, and the first candidate of each query."""

    score: RetrievalScore
    vtc_first: Directions[Tensor]
    matching_first: Directions[Tensor] | None


def _score(
    encoder: _Encoder,
    correct: CorrectAnswers,
    store: TokenStore | None,
    settings: VideoSettings,
    pair_batch: int,
    *,
    progress: Progress,
) -> _Result:
    """Rank the candidates of all queries by similarity and, with a store, by the matching score."""
    video, captions = torch.cat(encoder.video), encoder.captions.select(correct.captions)
    sim = similarity(video, captions.embeddings)
    vtc, vtc_first = rank_queries(Directions(text_to_video=sim.T, video_to_text=sim), correct)
    matching, matching_first, seconds = None, None, None
    if store is not None and settings.rerank_k is not None and captions.states is not None:
        started = time.perf_counter()
        scores = matching_scores(
            encoder.model,
            sim,
            captions.states,
            captions.mask,
            store.get(encoder.name, len(video)),
            k=settings.rerank_k,
            pair_batch=pair_batch,
            device=settings.device,
            progress=progress,
            label=f"match {encoder.name}",
        )
        seconds = time.perf_counter() - started
        matching, matching_first = rank_queries(scores, correct)
    tokens = encoder.token_shape[0] if encoder.token_shape else 0
    return _Result(
        RetrievalScore(len(video), vtc, matching, tokens, encoder.seconds, seconds), vtc_first, matching_first
    )


def _agreement(firsts: Sequence[Directions[Tensor] | None]) -> Directions[float] | None:
    if len(firsts) != 2 or firsts[0] is None or firsts[1] is None:  # noqa: PLR2004
        return None
    pairs = zip(vars(firsts[0]).values(), vars(firsts[1]).values(), strict=True)
    return Directions(*(float((one == other).double().mean()) for one, other in pairs))
