"""Evaluate a video-text model on a dataset, by retrieval or question answering."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from repshift_cli.checkpoints.artifact import Opened
from repshift_cli.data.loader import Batch, BatchLoader, cut_batches
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.data.video.annotations import QaSet, RetrievalSet, Task, VideoTextSet
from repshift_cli.data.video.dataset import Videos
from repshift_cli.data.video.tokenizer import Tokenizer
from repshift_cli.errors import DataError
from repshift_cli.evaluation.video_text.answering import AnswerEvaluation, AnswerList, QuestionBatch, evaluate_answers
from repshift_cli.evaluation.video_text.data import DatasetOptions, open_data
from repshift_cli.evaluation.video_text.models import choose_pooling, observe_attention, open_tokenizer, ready, task_of
from repshift_cli.evaluation.video_text.retrieval import RetrievalEvaluation, evaluate_retrieval
from repshift_cli.evaluation.video_text.settings import VideoSettings
from repshift_cli.models.umt import Pooling
from repshift_cli.utils.progress import Progress

_LONGEST_ANSWER = 5  # tokens, as in UMT's fine-tuning
_PAIRS_PER_VIDEO, _ANSWERS_PER_VIDEO = 4, 16
"""Pairs per batch for each video per batch: pairs run through few layers, and answers do not attend to videos."""


@dataclass(frozen=True)
class VideoEvaluation:
    """Models and a dataset, ready to run.

    Attributes:
        models: `UmtRetrieval` or `UmtAnswering`, or `DenseVideoView` of one, by name.
        pooling: of the videos; None for question answering.
        attention: kernel of the video encoder of each model.
    """

    models: Mapping[str, Any]
    task: Task
    data: VideoTextSet
    preprocessing: Preprocessing
    tokenizer: Tokenizer
    pooling: Pooling | None
    attention: Mapping[str, str]
    settings: VideoSettings

    def run(self, progress: Progress) -> tuple[RetrievalEvaluation | AnswerEvaluation, tuple[str, ...]]:
        """Returns and errors as `retrieve` or `answer`."""
        inputs: dict[str, Any] = {"preprocessing": self.preprocessing, "tokenizer": self.tokenizer}
        inputs |= {"settings": self.settings, "progress": progress}
        if isinstance(self.data, RetrievalSet):
            return retrieve(self.models, self.data, **inputs)
        assert isinstance(self.data, QaSet)
        return answer(self.models, self.data, **inputs)


def open_evaluation(
    opened: Opened,
    models: Mapping[str, Any],
    name: str,
    *,
    data_options: DatasetOptions,
    vocabulary: Path | None,
    pooling: Pooling | None,
    settings: VideoSettings,
    progress: Progress,
) -> VideoEvaluation:
    """Open the dataset and the tokenizer, and observe the attention kernels.

    Args:
        models: as `video_models_of`.
        name: of the checkpoint, for messages.
        pooling: None for that of the model.

    Raises:
        RepshiftError: as `choose_pooling`, `open_data` and `open_tokenizer`, or (`strict`) a video is missing.
    """
    task = task_of(opened.loaded.model)
    pooling = choose_pooling(opened, pooling)
    data = open_data(data_options, task, name)
    check_missing(data, settings)
    tokenizer = open_tokenizer(vocabulary, opened, data)
    preprocessing = opened.loaded.description.preprocessing
    return VideoEvaluation(
        models,
        task,
        data,
        preprocessing,
        tokenizer,
        pooling=pooling if task == "retrieval" else None,
        attention=observe_attention(models, preprocessing, settings, progress),
        settings=settings,
    )


def retrieve(
    models: Mapping[str, Any],
    data: RetrievalSet,
    *,
    preprocessing: Preprocessing,
    tokenizer: Tokenizer,
    settings: VideoSettings,
    progress: Progress,
) -> tuple[RetrievalEvaluation, tuple[str, ...]]:
    """Retrieve the videos of each caption and the captions of each video.

    Args:
        models: `UmtRetrieval` or `DenseVideoView`, by name, with the same clip shape and tokenizer.

    Returns:
        The result, and the videos with fewer frames than a clip, whose last frame is repeated.

    Raises:
        RepshiftError: as `evaluate_retrieval`; also PyAV is not installed.
    """
    padded: list[str] = []
    texts = tokenizer.texts(data.captions, min(data.text_length, _positions(models)))
    with ready(models, settings):
        result = evaluate_retrieval(
            models,
            _batches(data.videos, preprocessing, settings, padded, progress),
            texts,
            data.videos_of_caption,
            dataset=data.name,
            videos=len(data.videos),
            sample_id=data.videos.sample_id,
            settings=settings,
            progress=progress,
            pair_batch=_PAIRS_PER_VIDEO * settings.batch_size,
        )
    return result, tuple(padded)


def answer(
    models: Mapping[str, Any],
    data: QaSet,
    *,
    preprocessing: Preprocessing,
    tokenizer: Tokenizer,
    settings: VideoSettings,
    progress: Progress,
) -> tuple[AnswerEvaluation, tuple[str, ...]]:
    """Answer all questions; each video is decoded and encoded once for all its questions.

    Arguments, returns and errors as `retrieve`, with `UmtAnswering` and `evaluate_answers`.
    """
    padded: list[str] = []
    batches = _batches(data.videos, preprocessing, settings, padded, progress)
    answers = tokenizer.answers(data.answers, min(_LONGEST_ANSWER, _positions(models)))
    with ready(models, settings):
        result = evaluate_answers(
            models,
            _question_batches(data, batches, tokenizer, min(data.text_length, _positions(models))),
            AnswerList(data.answers, answers.ids, answers.mask),
            dataset=data.name,
            questions=len(data.questions),
            sample_id=lambda index: data.videos.sample_id(data.questions[index].video),
            settings=settings,
            progress=progress,
            pair_batch=_ANSWERS_PER_VIDEO * settings.batch_size,
        )
    return result, tuple(padded)


def _positions(models: Mapping[str, Any]) -> int:
    """Tokens of the longest text that the models take."""
    positions: int = next(iter(models.values())).text.positions
    return positions


def check_missing(data: VideoTextSet, settings: VideoSettings) -> None:
    """Raise a DataError that names the first missing video, if `strict` is set and there is one."""
    if settings.strict and data.missing:
        raise DataError(
            f"{len(data.missing)} videos of {data.name} are missing, the first is {data.missing[0]}",
            "Without --strict they are left out.",
        )


def _batches(
    videos: Videos, preprocessing: Preprocessing, settings: VideoSettings, padded: list[str], progress: Progress
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
    data: QaSet, batches: Iterator[Batch], tokenizer: Tokenizer, longest: int
) -> Iterator[QuestionBatch]:
    """For each batch of videos, all questions about them."""
    questions_of: list[list[int]] = [[] for _ in range(len(data.videos))]
    for index, question in enumerate(data.questions):
        questions_of[question.video].append(index)
    for batch in batches:
        pairs = [(index, place) for place, video in enumerate(batch.indices) for index in questions_of[video]]
        questions = [data.questions[index] for index, _ in pairs]
        texts = tokenizer.texts([question.question for question in questions], longest)
        yield QuestionBatch(
            indices=[index for index, _ in pairs],
            video=batch.pixels,
            ids=texts.ids,
            mask=texts.mask,
            answers=[question.answer for question in questions],
            broken=[(index, reason) for video, reason in batch.broken for index in questions_of[video]],
            video_of=[place for _, place in pairs],
        )
