"""`repshift eval` for video-text models."""

from __future__ import annotations

from dataclasses import dataclass
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
from repshift_cli.cli.torchrun import refuse_torchrun
from repshift_cli.errors import UsageError

if TYPE_CHECKING:
    from repshift_cli.checkpoints.artifact import Opened
    from repshift_cli.cli.evaluate_zero_shot import ZeroShotOptions
    from repshift_cli.data.video.annotations import Task
    from repshift_cli.utils.progress import Progress


_DEFAULT_RERANK_K = 128
IMAGE_BATCH, VIDEO_BATCH = 64, 8


@dataclass(frozen=True)
class EvalOptions:
    """Options that models of images and of videos share.

    `settings` are the arguments that `classification.evaluate` and `video_text.settings.VideoSettings` have in common.
    `name` is the first model, `against` are names of baselines, and `several` is whether there are other models or
    baselines.
    """

    name: str
    dataset: str | None
    data_dir: Path | None
    order: str | None
    limit: int | None
    seed: int
    compare_dense: bool
    resume: Path | None
    predictions: tuple[Path, ...]
    force: bool
    json: bool
    settings: dict[str, Any]
    zero_shot: ZeroShotOptions | None = None
    against: tuple[str, ...] = ()
    several: bool = False


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


def refuse_videos(model: str, dataset: str | None, options: VideoOptions, takes: str) -> None:
    """Raise a UsageError for a dataset or an option of video-text models, for a model that takes something else."""
    from repshift_cli.evaluation.video_text.data import is_video_dataset

    hint = f"Give a video-text model, or a dataset of labelled {takes.removeprefix('labelled ')}."
    if dataset is not None and is_video_dataset(dataset):
        raise UsageError(f"{model} takes {takes}, but {dataset} is a dataset of videos with texts", hint)
    if options.given:
        raise UsageError(f"{options.given[0]} is not used by {model}, which takes {takes}", hint)


def _rerank_k(options: VideoOptions, task: Task, model: str) -> int | None:
    """How many candidates of each query are re-ranked; None for none."""
    if task == "qa":
        for option, value in (("--rerank", options.rerank), ("--rerank-k", options.rerank_k)):
            if value is not None:
                raise UsageError(f"{option} is not used by {model}, a model for question answering")
        return None
    if options.rerank is False and options.rerank_k is not None:
        raise UsageError(f"--rerank-k {options.rerank_k} contradicts --no-rerank", "Leave one of them out.")
    return None if options.rerank is False else options.rerank_k or _DEFAULT_RERANK_K


def evaluate_videos(opened: Opened, given: EvalOptions, video: VideoOptions, screen: Progress) -> None:
    """Evaluate a video-text model and print the result."""
    from repshift_cli.evaluation.video_text.data import DatasetOptions
    from repshift_cli.evaluation.video_text.evaluate import open_evaluation
    from repshift_cli.evaluation.video_text.models import task_of, video_models_of
    from repshift_cli.evaluation.video_text.retrieval import RetrievalEvaluation
    from repshift_cli.evaluation.video_text.settings import VideoSettings

    images = {"--resume": given.resume, "--save-predictions": given.predictions, "--class-order": given.order}
    for option, value in images.items():
        if value:
            raise UsageError(f"{option} is for image models, and {given.name} takes videos", "Leave it out.")
    refuse_torchrun("evaluating videos")
    models = video_models_of(opened, given.compare_dense, given.name)
    settings = given.settings | {
        "batch_size": given.settings["batch_size"] or VIDEO_BATCH,
        "workers": given.settings["workers"] or 0,
        "rerank_k": _rerank_k(video, task_of(opened.loaded.model), given.name),
    }
    evaluation = open_evaluation(
        opened,
        models,
        given.name,
        data_options=DatasetOptions(
            given.dataset,
            video.annotations,
            video.videos,
            video.answers,
            given.data_dir,
            video.paragraph,
            given.limit,
            given.seed,
        ),
        vocabulary=video.vocab,
        pooling=None if video.pooling is None else video.pooling.value,
        settings=VideoSettings(**settings),
        progress=screen,
    )
    data, tokenizer, pooling = evaluation.data, evaluation.tokenizer, evaluation.pooling
    macs = zip(models, (opened.macs, opened.dense_macs), strict=False)
    costs = {model: EncoderCost(count, evaluation.attention[model]) for model, count in macs}
    for note in data.notes:
        screen.note(note)
    list_names("videos of the annotations are missing and were left out (--strict stops)", data.missing)
    if not given.json:
        announce_videos(opened, data, pooling, tokenizer)
    result, padded = evaluation.run(screen)
    left_out = report_left_out(data, result.skipped, padded)
    if isinstance(result, RetrievalEvaluation):
        found = retrieval_document(result, costs, left_out)
        if not given.json:
            show_retrieval(result, costs)
    else:
        found = answers_document(result, costs, left_out)
        if not given.json:
            show_answers(result, costs)
    if given.json:
        inputs = inputs_document(evaluation.preprocessing, tokenizer)
        found = {**dataset_document(given.name, data, evaluation.task), **found, **inputs}
        ui.result.keep(found | ({} if pooling is None else {"pooling": pooling}))
