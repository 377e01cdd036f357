"""`repshift eval` for video-text models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repshift_cli.cli import ui
from repshift_cli.cli.options import Pooling
from repshift_cli.cli.show.video_text import (
    EncoderCost,
    announce_videos,
    answers_document,
    dataset_document,
    inputs_document,
    list_names,
    report_left_out,
    retrieval_document,
    show_answers,
    show_retrieval,
)
from repshift_cli.errors import UsageError

if TYPE_CHECKING:
    from repshift_cli.checkpoints.artifact import Opened
    from repshift_cli.data.video.annotations import Task
    from repshift_cli.evaluation.video_text.data import DatasetOptions
    from repshift_cli.evaluation.video_text.settings import VideoSettings
    from repshift_cli.utils.progress import Progress


_DEFAULT_RERANK_K = 128


@dataclass(frozen=True)
class VideoOptions:
    """Options for video-text models only; None if one is not given."""

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
        """The names of the options that are given."""
        return [f"--{name.replace('_', '-')}" for name, value in vars(self).items() if value is not None]


def refuse_videos(model: str, dataset: str | None, options: VideoOptions) -> None:
    """Raise a UsageError for a dataset of videos or an option of video-text models, for a model of images."""
    from repshift_cli.evaluation.video_text.data import is_video_dataset

    hint = "Give a video-text model, or a dataset of labelled images."
    if dataset is not None and is_video_dataset(dataset):
        raise UsageError(f"{model} takes images, but {dataset} is a dataset of videos", hint)
    if options.given:
        raise UsageError(f"{options.given[0]} is not used by {model}, which takes images", hint)


def _rerank_k(options: VideoOptions, task: Task, model: str) -> int | None:
    """How many candidates of each query are re-ranked; None for none.

    Raises:
        UsageError: an option is for retrieval, or contradicts another.
    """
    if task == "qa":
        for option, value in (("--rerank", options.rerank), ("--rerank-k", options.rerank_k)):
            if value is not None:
                raise UsageError(f"{option} is not used by {model}, a model for question answering")
        return None
    if options.rerank is False and options.rerank_k is not None:
        raise UsageError(f"--rerank-k {options.rerank_k} contradicts --no-rerank", "Leave one of them out.")
    return None if options.rerank is False else options.rerank_k or _DEFAULT_RERANK_K


def run(
    opened: Opened,
    models: Mapping[str, Any],
    name: str,
    *,
    data_options: DatasetOptions,
    options: VideoOptions,
    settings: VideoSettings,
    progress: Progress,
    json: bool,
) -> None:
    """Evaluate and print.

    Args:
        opened: the checkpoint.
        models: to evaluate, by name; the requested model first, then its dense model.
        name: of the checkpoint, as the user gave it.
        settings: `rerank_k` is taken from `options`.
        json: print one document instead of tables.
    """
    from repshift_cli.evaluation.video_text.evaluate import open_evaluation
    from repshift_cli.evaluation.video_text.models import task_of
    from repshift_cli.evaluation.video_text.retrieval import RetrievalEvaluation

    evaluation = open_evaluation(
        opened,
        models,
        name,
        data_options=data_options,
        vocabulary=options.vocab,
        pooling=None if options.pooling is None else options.pooling.value,
        settings=replace(settings, rerank_k=_rerank_k(options, task_of(opened.loaded.model), name)),
        progress=progress,
    )
    data, tokenizer, pooling = evaluation.data, evaluation.tokenizer, evaluation.pooling
    macs = zip(models, (opened.macs, opened.dense_macs), strict=False)
    costs = {model: EncoderCost(count, evaluation.attention[model]) for model, count in macs}
    for note in data.notes:
        progress.note(note)
    list_names("videos of the annotations are missing and were left out (--strict stops)", data.missing)
    if not json:
        announce_videos(opened, data, pooling, tokenizer)
    result, padded = evaluation.run(progress)
    left_out = report_left_out(data, result.skipped, padded)
    if isinstance(result, RetrievalEvaluation):
        found = retrieval_document(result, costs, left_out)
        if not json:
            show_retrieval(result, costs)
    else:
        found = answers_document(result, costs, left_out)
        if not json:
            show_answers(result, costs)
    if json:
        inputs = inputs_document(evaluation.preprocessing, tokenizer)
        found = {**dataset_document(name, data, evaluation.task), **found, **inputs}
        ui.print_json(found | ({} if pooling is None else {"pooling": pooling}))
