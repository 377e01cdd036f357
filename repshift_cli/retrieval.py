"""Retrieval between videos and texts: by similarity, and by a matching score for the best of each query."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from repshift_cli.errors import DataError, ModelError, OutputError, UsageError
from repshift_cli.evaluate import Skipped, explained_memory, finite, in_turn, per_second
from repshift_cli.measure import wait_for
from repshift_cli.progress import Progress

__all__ = [
    "Agreement",
    "ClipBatch",
    "Directions",
    "RankStats",
    "RetrievalEvaluation",
    "RetrievalModel",
    "RetrievalScore",
    "Scores",
    "Texts",
    "evaluate_retrieval",
    "matching_scores",
    "rank_stats",
    "ranks",
    "similarity",
]

NOT_MATCHED = -100.0
"""The matching score of a pair that was not among the best by similarity, as in UMT."""

_GIB = 1024**3
_TOKENS_RANK = 3  # dimensions of tokens and hidden states: [B, N, D]


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
    order = _order(scores)
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
        explained_memory(f"{pair_batch} pairs of video and text"),
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
                scores[video, texts] = finite(label, logits).float().cpu()
                task.advance(len(texts))
    return Scores(
        text_to_video=scores.where(for_text, NOT_MATCHED).T.contiguous(),
        video_to_text=scores.where(for_video, NOT_MATCHED),
    )


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
    token_bytes: int = 2 * _GIB,
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
    store = _Store(videos, token_bytes, spill_to) if rerank_k is not None else None
    with torch.inference_mode(), closing(store) if store is not None else nullcontext():
        with explained_memory(f"{batch_size} videos"):
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


class _Store:
    """Vision tokens of every model, `[V, N, D]` on the CPU: in memory if all fit, else in files mapped into it."""

    def __init__(self, videos: int, budget: int, spill_to: Path | None) -> None:
        self.videos = videos
        self.budget = budget
        self.spill_to = spill_to
        self.where: Literal["memory", "disk"] = "memory"
        self.bytes = 0
        self._tokens: dict[str, Tensor] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def open(self, first: Mapping[str, Tensor]) -> None:
        """Make room, for all videos, by the tokens `[b, N, D]` of the first batch.

        Raises:
            OutputError: there is not enough space for the files.
        """
        self.bytes = sum(self.videos * tokens[0].nbytes for tokens in first.values())
        if self.bytes > self.budget:
            self.where = "disk"
            self._make_folder()
        for number, (name, tokens) in enumerate(first.items()):
            self._tokens[name] = self._room(f"{number}.tokens", (self.videos, *tokens.shape[1:]), tokens.dtype)

    def put(self, name: str, row: int, tokens: Tensor) -> None:
        """Keep `[b, N, D]` as the rows from `row` on."""
        self._tokens[name][row : row + len(tokens)] = tokens.cpu()

    def of(self, name: str, count: int) -> Tensor:
        """The first `count` rows."""
        return self._tokens[name][:count]

    def close(self) -> None:
        """Let the tokens go, and the files with them."""
        self._tokens.clear()  # first: a mapped file cannot be removed everywhere
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _make_folder(self) -> None:
        self._folder = tempfile.TemporaryDirectory(
            prefix="repshift-tokens-", dir=self.spill_to, ignore_cleanup_errors=True
        )
        # Asked beforehand: running out of space under a mapped file ends the process, without an error to catch.
        free = shutil.disk_usage(self._folder.name).free
        if free < self.bytes:
            raise OutputError(
                f"the vision tokens of {self.videos} videos take {self.bytes / _GIB:.1f} GiB, but "
                f"{Path(self._folder.name).parent} has {free / _GIB:.1f} GiB left",
                "Set TMPDIR to a folder with more space, or leave re-ranking out.",
            )

    def _room(self, file: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self._folder is None:
            return torch.empty(shape, dtype=dtype)
        size = torch.Size(shape).numel()
        return torch.from_file(str(Path(self._folder.name) / file), shared=True, size=size, dtype=dtype).view(shape)


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
                embeddings.append(finite(name, model.project_text(states)).float().cpu())
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
    store: _Store | None,
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
                for name in in_turn(list(sides), turn):
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
    projected = finite(side.name, side.model.project_video(tokens)).float().cpu()
    width = side.captions.embeddings.shape[-1]
    if projected.dim() != _TOKENS_RANK or len(projected) != len(tokens) or projected.shape[-1] != width:
        raise ModelError(f"{side.name}: videos are projected to {tuple(projected.shape)}, texts to [., {width}]")
    return projected


def _score(
    side: _Side,
    truth: _Truth,
    store: _Store | None,
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
    return _order(scores.text_to_video)[:, 0], _order(scores.video_to_text[truth.asking])[:, 0]


def _agreement(firsts: Sequence[tuple[Tensor, Tensor] | None]) -> Agreement | None:
    if len(firsts) != 2 or firsts[0] is None or firsts[1] is None:  # noqa: PLR2004
        return None
    (text, video), (other_text, other_video) = firsts[0], firsts[1]
    return Agreement(
        text_to_video=float((text == other_text).double().mean()),
        video_to_text=float((video == other_video).double().mean()),
    )


def _order(scores: Tensor) -> Tensor:
    """Candidates `[Q, G]` from the best on; among equal ones the lower index first."""
    return scores.argsort(dim=1, descending=True, stable=True)


def _best(scores: Tensor, k: int) -> Tensor:
    """bool `[Q, G]`: the best `k` of each row."""
    return torch.zeros(tuple(scores.shape), dtype=torch.bool).scatter_(1, _order(scores)[:, :k], True)
