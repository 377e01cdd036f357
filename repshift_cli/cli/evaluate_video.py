"""`repshift eval` for models of video and text: what is measured, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repshift_cli.cli.options import Pooling
from repshift_cli.cli.show.video_text import (
    Run,
    announce_videos,
    answers_document,
    input_numbers,
    left_out_numbers,
    list_names,
    origin_numbers,
    report_broken,
    retrieval_document,
    show_answers,
    show_retrieval,
)
from repshift_cli.errors import UsageError

if TYPE_CHECKING:
    from repshift_cli.data.video.tokenizer import Tokenizer
    from repshift_cli.evaluation.video_text.answering import AnswerEvaluation
    from repshift_cli.evaluation.video_text.data import CaptionData, QuestionData, Task, Wanted
    from repshift_cli.evaluation.video_text.retrieval import RetrievalEvaluation
    from repshift_cli.utils.progress import Progress


__all__ = [
    "VideoOptions",
    "refuse",
    "run",
]


_RERANK_K = 128


@dataclass(frozen=True)
class VideoOptions:
    """Options that only models for video and text have; None where one is not given."""

    annotations: Path | None
    videos: Path | None
    answers: Path | None
    vocab: Path | None
    rerank: bool | None
    rerank_k: int | None
    paragraph: bool | None
    pooling: Pooling | None

    @property
    def given(self) -> list[str]:
        """The names of those that are given."""
        return [f"--{name.replace('_', '-')}" for name, value in vars(self).items() if value is not None]


def refuse(model: str, dataset: str | None, told: VideoOptions) -> None:
    """Refuse videos and all options about them, for a model of pictures.

    Raises:
        UsageError: naming the first that has no meaning.
    """
    from repshift_cli.evaluation.video_text.data import is_video_dataset

    hint = "Give a model for video and text, or a dataset of labelled pictures."
    if dataset is not None and is_video_dataset(dataset):
        raise UsageError(f"{model} takes single pictures, and {dataset} is a dataset of videos", hint)
    if told.given:
        raise UsageError(f"{told.given[0]} has no meaning for {model}, which takes single pictures", hint)


def run(job: Run, wanted: Wanted, told: VideoOptions, screen: Progress, json: bool) -> None:
    """Evaluate and print.

    Args:
        job: without re-ranking, which is among the options.
        wanted: the dataset.
        told: the options of the user.
        json: print one document instead of tables.
    """
    from repshift_cli.cli import ui
    from repshift_cli.evaluation.video_text.data import CaptionData, open_data
    from repshift_cli.evaluation.video_text.evaluate import (
        check_missing,
        choose_pooling,
        observe_attention,
        open_tokenizer,
        task_of,
    )

    opened = job.opened
    task = task_of(opened.loaded.model)
    job = replace(job, settings=replace(job.settings, rerank_k=_rerank_k(told, task, job.name)))
    pooling = choose_pooling(opened, None if told.pooling is None else told.pooling.value)
    data = open_data(wanted, task, job.name)
    check_missing(data, job.settings)
    tokenizer = open_tokenizer(told.vocab, opened, data)
    attention = observe_attention(job.models, opened.loaded.description.preprocessing, job.settings, screen)
    job = replace(job, attention=attention)
    for note in data.notes:
        screen.note(note)
    list_names("videos of the annotations are missing and were left out (--strict stops)", data.missing)
    if not json:
        announce_videos(opened, data, pooling if task == "retrieval" else None, tokenizer)
    if isinstance(data, CaptionData):
        found = {**_retrieve(job, data, tokenizer, screen, show=not json), "pooling": pooling}
    else:
        found = _answer(job, data, tokenizer, screen, show=not json)
    if json:
        ui.print_json(found)


def _retrieve(job: Run, data: CaptionData, tokenizer: Tokenizer, screen: Progress, show: bool) -> dict[str, Any]:
    from repshift_cli.evaluation.video_text.evaluate import retrieve

    result, padded = retrieve(job.models, data, settings=job.settings, progress=screen, **_reading(job, tokenizer))
    broken = _reported(result, padded)
    if show:
        show_retrieval(result, job)
    return {
        **origin_numbers(job, data, "retrieval"),
        "videos": result.videos,
        "captions": result.captions,
        "captions_left_out": result.captions_left_out,
        **left_out_numbers(data, broken, padded),
        **retrieval_document(result, job),
        **input_numbers(job, tokenizer),
    }


def _answer(job: Run, data: QuestionData, tokenizer: Tokenizer, screen: Progress, show: bool) -> dict[str, Any]:
    from repshift_cli.evaluation.video_text.evaluate import answer

    result, padded = answer(job.models, data, settings=job.settings, progress=screen, **_reading(job, tokenizer))
    broken = _reported(result, padded)
    if show:
        show_answers(result, job)
    return {
        **origin_numbers(job, data, "qa"),
        "questions": result.questions,
        "questions_left_out": len(result.skipped),
        **left_out_numbers(data, broken, padded),
        **answers_document(result, job),
        **input_numbers(job, tokenizer),
    }


def _reading(job: Run, tokenizer: Tokenizer) -> dict[str, Any]:
    """How the models read clips and texts, as the scorers of both tasks ask for it."""
    loaded = job.opened.loaded
    model: Any = loaded.model
    return {
        "preprocessing": loaded.description.preprocessing,
        "tokenizer": tokenizer,
        "positions": model.text.positions,
    }


def _reported(result: RetrievalEvaluation | AnswerEvaluation, padded: Sequence[str]) -> dict[str, str]:
    """Tell which videos were left out or padded; returns the reason for each one that was left out."""
    broken = {entry.sample: entry.reason for entry in result.skipped}
    report_broken(broken, padded)
    return broken


def _rerank_k(told: VideoOptions, task: Task, name: str) -> int | None:
    """How many of each query are re-ranked; None for none.

    Raises:
        UsageError: there is nothing to re-rank.
    """
    if task == "qa":
        for option, value in (("--rerank", told.rerank), ("--rerank-k", told.rerank_k)):
            if value is not None:
                raise UsageError(f"{option} has no meaning for {name}, a model for question answering")
        return None
    if told.rerank is False and told.rerank_k is not None:
        raise UsageError(f"--rerank-k {told.rerank_k} has no meaning with --no-rerank", "Leave one of them out.")
    return None if told.rerank is False else told.rerank_k or _RERANK_K
