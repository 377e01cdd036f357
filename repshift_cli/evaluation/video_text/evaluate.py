"""Evaluate a video-text model on a dataset: from annotations and video files to the scorers of both tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repshift_cli.checkpoints.artifact import Opened
from repshift_cli.data.builtin import moving_shapes
from repshift_cli.data.loader import Batch, BatchLoader, cut_batches
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.data.video.dataset import Videos
from repshift_cli.data.video.tokenizer import Tokenizer
from repshift_cli.errors import DataError, ModelError, UsageError
from repshift_cli.evaluation.video_text.answering import AnswerEvaluation, AnswerList, QuestionBatch, evaluate_answers
from repshift_cli.evaluation.video_text.data import (
    BUILTIN_DATASETS,
    LONGEST_ANSWER,
    CaptionData,
    QuestionData,
    Task,
    VideoData,
)
from repshift_cli.evaluation.video_text.retrieval import ClipBatch, RetrievalEvaluation, Texts, evaluate_retrieval
from repshift_cli.measure.attention_kernel import observed_attention
from repshift_cli.models.attention_mode import AttentionMode, attention_mode, auto_note
from repshift_cli.models.umt import Pooling, UmtAnswering, UmtModel, UmtRetrieval
from repshift_cli.reduction.compressed_model import CompressedModel
from repshift_cli.utils.progress import Progress

__all__ = [
    "DenseSelf",
    "Settings",
    "answer",
    "check_missing",
    "choose_pooling",
    "observe_attention",
    "open_tokenizer",
    "retrieve",
    "task_of",
]


_MODELS_OF_SHAPES = "umt-shapes"


_PAIRS_PER_VIDEO, _ANSWERS_PER_VIDEO = 4, 16
"""Pairs at a time for each video at a time: pairs run through few layers, and answers see no video."""


@dataclass(frozen=True)
class Settings:
    """How an evaluation runs.

    Attributes:
        batch_size: videos at a time, and questions.
        workers: processes that decode beside this one; 0 decodes in this one.
        strict: stop at the first video that is missing or cannot be read.
        rerank_k: how many candidates of each query are matched; None to leave that out, and for questions.
        attention: what is to compute the attention of the video encoder.
    """

    batch_size: int
    device: torch.device
    dtype: torch.dtype
    workers: int = 0
    strict: bool = False
    rerank_k: int | None = None
    attention: AttentionMode = "auto"


class DenseSelf:
    """The original of a compressed model, on the same weights, for a scorer."""

    def __init__(self, compressed: CompressedModel) -> None:
        self.compressed = compressed

    def encode_video(self, video: Tensor) -> Tensor:
        """`[B, T, 3, H, W]` to all tokens, `[B, N, C]`."""
        with self.compressed.dense() as dense:
            tokens: Tensor = dense.encode_video(video)  # type: ignore[operator]
            return tokens

    def __getattr__(self, name: str) -> Any:
        # nothing behind the tokens is hooked
        return getattr(self.compressed.model, name)


def task_of(model: nn.Module) -> Task:
    """What a model was trained for.

    Raises:
        ModelError: it is no model for video and text.
    """
    if isinstance(model, UmtRetrieval):
        return "retrieval"
    if isinstance(model, UmtAnswering):
        return "qa"
    raise ModelError("the model takes clips, but is neither for retrieval nor for question answering")


def choose_pooling(opened: Opened, pooling: Pooling | None) -> Pooling:
    """Set the pooling of a dense model for retrieval where the user says one, and tell which is used.

    Raises:
        UsageError: there is no choice.
    """
    model = opened.loaded.model
    assert isinstance(model, UmtModel)
    if pooling is None:
        return model.pooling
    if task_of(model) == "qa":
        raise UsageError(f"--pooling {pooling}: question answering pools nothing", "Leave the option out.")
    if opened.compressed is not None:
        raise UsageError(
            f"--pooling {pooling}: a compressed model has no whole frames to pool, so it and its dense self pool all "
            "tokens that are left",
            "Leave the option out, or give the dense checkpoint.",
        )
    model.pooling = pooling
    return pooling


def open_tokenizer(vocabulary: Path | None, opened: Opened, data: VideoData) -> Tokenizer:
    """The tokenizer of a model: by the user's file, or the one of the built-in models.

    Raises:
        UsageError: no file is given, and the model is not built in.
        DataError: it is not the vocabulary of this model.
    """
    model, name = opened.loaded.model, opened.loaded.description.name
    assert isinstance(model, UmtModel)
    if vocabulary is not None:
        tokenizer = Tokenizer(vocabulary.expanduser())
    elif data.name in BUILTIN_DATASETS or name.startswith(_MODELS_OF_SHAPES):
        with moving_shapes.vocabulary_file() as path:
            tokenizer = Tokenizer(path)
    else:
        raise UsageError(
            f"{name} needs its vocabulary to read texts",
            "Add --vocab vocab.txt; the authors' UMT uses that of bert-base-uncased.",
        )
    tokenizer.check_fits(model.text.vocabulary, name)
    return tokenizer


@torch.inference_mode()
def observe_attention(
    models: Mapping[str, Any], preprocessing: Preprocessing, settings: Settings, progress: Progress
) -> dict[str, str]:
    """What computes attention in the video encoder of each model, seen on one empty clip.

    The models are moved to the device and dtype of the settings.

    Returns:
        By the names of the models; values as `measure.observed_attention`.

    Raises:
        UsageError: attention cannot be computed as the settings ask.
    """
    clip = torch.zeros(1, *preprocessing.shape, device=settings.device, dtype=settings.dtype)
    with _ready(models, settings):
        for note in {note for module in _modules(models) if (note := auto_note(module, settings.attention))}:
            progress.note(note)
        return {name: observed_attention(model.encode_video, clip) for name, model in models.items()}


@contextmanager
def _ready(models: Mapping[str, Any], settings: Settings) -> Iterator[None]:
    """The models where and how they are to run."""
    with ExitStack() as switched:
        for module in _modules(models):
            module.to(device=settings.device, dtype=settings.dtype)
            switched.enter_context(attention_mode(module, settings.attention))
        yield


def _modules(models: Mapping[str, Any]) -> list[nn.Module]:
    """Each once; the dense self of a model is the model itself."""
    parts = (model.compressed.model if isinstance(model, DenseSelf) else model for model in models.values())
    return list({id(part): part for part in parts if isinstance(part, nn.Module)}.values())


def retrieve(
    models: Mapping[str, Any],
    data: CaptionData,
    *,
    preprocessing: Preprocessing,
    tokenizer: Tokenizer,
    positions: int,
    settings: Settings,
    progress: Progress,
) -> tuple[RetrievalEvaluation, tuple[str, ...]]:
    """Look for the video of each caption and for the caption of each video.

    Args:
        models: by name, all for the same clips and texts; see `RetrievalModel`.
        positions: the longest text that they take.

    Returns:
        The outcome, and the videos with fewer frames than a clip has.

    Raises:
        RepshiftError: as `evaluate_retrieval`; also PyAV is not installed, or (`strict`) a video is missing.
    """
    check_missing(data, settings)
    padded: list[str] = []
    clips = (
        ClipBatch(batch.indices, batch.pixels, batch.broken)
        for batch in _batches(data.videos, preprocessing, settings, padded, progress)
    )
    texts = tokenizer.texts(data.captions, min(data.text_length, positions))
    with _ready(models, settings):
        result = evaluate_retrieval(
            models,
            clips,
            Texts(texts.ids, texts.mask, data.videos_of_caption),
            dataset=data.name,
            videos=len(data.videos),
            sample_id=data.videos.sample_id,
            batch_size=settings.batch_size,
            device=settings.device,
            dtype=settings.dtype,
            strict=settings.strict,
            progress=progress,
            rerank_k=settings.rerank_k,
            pair_batch=_PAIRS_PER_VIDEO * settings.batch_size,
        )
    return result, tuple(padded)


def answer(
    models: Mapping[str, Any],
    data: QuestionData,
    *,
    preprocessing: Preprocessing,
    tokenizer: Tokenizer,
    positions: int,
    settings: Settings,
    progress: Progress,
) -> tuple[AnswerEvaluation, tuple[str, ...]]:
    """Ask all questions; each video is decoded and encoded once, however many are about it.

    Arguments, returns and errors as `retrieve`, with `AnsweringModel` and `evaluate_answers`.
    """
    check_missing(data, settings)
    padded: list[str] = []
    batches = _batches(data.videos, preprocessing, settings, padded, progress)
    answers = tokenizer.answers(data.answers, min(LONGEST_ANSWER, positions))
    with _ready(models, settings):
        result = evaluate_answers(
            models,
            _question_batches(data, batches, tokenizer, min(data.text_length, positions)),
            AnswerList(data.answers, answers.ids, answers.mask),
            dataset=data.name,
            questions=len(data.questions),
            sample_id=lambda index: data.videos.sample_id(data.questions[index].video),
            batch_size=settings.batch_size,
            device=settings.device,
            dtype=settings.dtype,
            strict=settings.strict,
            progress=progress,
            pair_batch=_ANSWERS_PER_VIDEO * settings.batch_size,
        )
    return result, tuple(padded)


def check_missing(data: VideoData, settings: Settings) -> None:
    """Refuse annotations of videos that are not there, where `strict` is on.

    Raises:
        DataError: naming the first.
    """
    if settings.strict and data.missing:
        raise DataError(
            f"{len(data.missing)} videos of {data.name} are missing, the first is {data.missing[0]}",
            "Without --strict they are left out.",
        )


def _batches(
    videos: Videos, preprocessing: Preprocessing, settings: Settings, padded: list[str], progress: Progress
) -> Iterator[Batch]:
    """All videos in order; the names of those that were padded are added to `padded`."""
    loader = BatchLoader(
        partial(videos.load, preprocessing, preprocessing.transform()),
        videos.sample_id,
        cut_batches(len(videos), settings.batch_size),
        workers=settings.workers,
        pinned=settings.device.type == "cuda",
        warn=progress.warn,
    )
    for batch in loader:
        padded += [videos.sample_id(index) for index in batch.padded]
        yield batch


def _question_batches(
    data: QuestionData, batches: Iterator[Batch], tokenizer: Tokenizer, longest: int
) -> Iterator[QuestionBatch]:
    """For each batch of videos all questions about them."""
    about: list[list[int]] = [[] for _ in range(len(data.videos))]
    for index, question in enumerate(data.questions):
        about[question.video].append(index)
    for batch in batches:
        asked = [(index, place) for place, video in enumerate(batch.indices) for index in about[video]]
        questions = [data.questions[index] for index, _ in asked]
        texts = tokenizer.texts([question.question for question in questions], longest)
        yield QuestionBatch(
            indices=[index for index, _ in asked],
            video=batch.pixels,
            ids=texts.ids,
            mask=texts.mask,
            answers=[question.answer for question in questions],
            broken=[(index, reason) for video, reason in batch.broken for index in about[video]],
            video_of=[place for _, place in asked],
        )
