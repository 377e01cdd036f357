"""Open the captions or questions for a video-text evaluation: a benchmark, annotation files or built-in scenes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from repshift_cli.data.builtin import moving_shapes
from repshift_cli.data.catalog import DEFAULT_SCENES, is_dataset_name
from repshift_cli.data.video.annotations import (
    PROTOCOLS,
    QaSet,
    Question,
    RetrievalSet,
    Task,
    clean_text,
    open_video_text,
)
from repshift_cli.data.video.dataset import VideoScenes
from repshift_cli.errors import UsageError

BUILTIN_DATASETS: Mapping[str, Task] = {"builtin:shapes": "retrieval", "builtin:shapes-qa": "qa"}

_QUESTIONS_PER_SCENE = 2
_TASK_NAMES: Mapping[Task, str] = {"retrieval": "retrieval", "qa": "question answering"}
_CONTENT: Mapping[Task, str] = {"retrieval": "captions", "qa": "questions"}


@dataclass(frozen=True)
class DatasetOptions:
    """The dataset options of the command line; see `open_video_text`.

    Attributes:
        dataset: a benchmark, one of `BUILTIN_DATASETS`, or None for the user's own annotations.
        seed: random seed of the built-in scenes.
    """

    dataset: str | None = None
    annotations: Path | None = None
    videos: Path | None = None
    answers: Path | None = None
    data_dir: Path | None = None
    paragraph: bool | None = None
    limit: int | None = None
    seed: int = 0


def is_video_dataset(name: str) -> bool:
    """Whether this is the name of a dataset of videos with texts."""
    return name in BUILTIN_DATASETS or name in PROTOCOLS


def open_data(options: DatasetOptions, task: Task, model: str) -> RetrievalSet | QaSet:
    """Open the videos and texts for a model of this task and name.

    Raises:
        UsageError: the dataset has images or is for the other task, or an option is not for this dataset.
        DataError: as `open_video_text`.
    """
    name = options.dataset
    if name is None:
        return _open_files(options, task, model)
    if name in BUILTIN_DATASETS:
        _check_task(BUILTIN_DATASETS[name], task, name, model)
        _check_builtin(name, options)
        return _captioned_scenes(name, options) if task == "retrieval" else _scenes_with_questions(name, options)
    if name in PROTOCOLS:
        _check_task(PROTOCOLS[name].kind, task, name, model)
    else:
        _refuse_images(name, model)
    return _open_files(options, task, model)


def _refuse_images(name: str, model: str) -> None:
    path = Path(name).expanduser()
    if is_dataset_name(name) or path.is_absolute() or "/" in name or path.exists():
        raise UsageError(
            f"{model} takes clips, but {name} is not a dataset of videos with texts",
            f"Name one of {', '.join((*BUILTIN_DATASETS, *PROTOCOLS))}, or give --annotations FILE with --videos DIR.",
        )


def _check_task(found: Task, task: Task, where: object, model: str) -> None:
    if found != task:
        raise UsageError(
            f"{model} is a model for {_TASK_NAMES[task]}, but {where} holds {_CONTENT[found]}",
            f"Give a dataset with {_CONTENT[task]}, or a checkpoint for {_TASK_NAMES[found]}.",
        )


def _check_builtin(name: str, options: DatasetOptions) -> None:
    for field in ("annotations", "videos", "answers", "data_dir", "paragraph"):
        if getattr(options, field) is not None:
            option = f"--{field.replace('_', '-')}"
            raise UsageError(f"{option} is not used by {name}, whose scenes are generated", f"Leave {option} out.")


def _captioned_scenes(name: str, options: DatasetOptions) -> RetrievalSet:
    scenes = moving_shapes.scenes(options.limit or DEFAULT_SCENES, moving_shapes.TEST_SEED + options.seed)
    return RetrievalSet(
        name=name,
        description=f"{name}: {len(scenes)} test scenes with a caption each, seed {options.seed}",
        videos=VideoScenes(tuple(scenes)),
        captions=tuple(clean_text(moving_shapes.caption(scene)) for scene in scenes),
        videos_of_caption=tuple((index,) for index in range(len(scenes))),
    )


def _scenes_with_questions(name: str, options: DatasetOptions) -> QaSet:
    count = options.limit or DEFAULT_SCENES * _QUESTIONS_PER_SCENE
    scenes = moving_shapes.scenes(-(-count // _QUESTIONS_PER_SCENE), moving_shapes.TEST_SEED + options.seed)
    questions = [
        Question(index, *pair) for index, scene in enumerate(scenes) for pair in moving_shapes.two_questions(scene)
    ]
    return QaSet(
        name=name,
        description=f"{name}: {count} questions about {len(scenes)} test scenes, seed {options.seed}",
        videos=VideoScenes(tuple(scenes)),
        questions=tuple(questions[:count]),
        answers=moving_shapes.ANSWERS,
    )


def _open_files(options: DatasetOptions, task: Task, model: str) -> RetrievalSet | QaSet:
    if options.dataset is None and options.data_dir is not None:
        raise UsageError("--data-dir needs the name of a benchmark", "Add --dataset, or --videos DIR.")
    if task == "retrieval" and options.answers is not None:
        raise UsageError(f"--answers is not used by {model}, a model for retrieval", "Leave --answers out.")
    if task == "qa" and options.paragraph is not None:
        raise UsageError("--paragraph is not used for questions", "Leave --paragraph out.")
    data = open_video_text(
        options.dataset,
        annotations=options.annotations,
        videos=options.videos,
        answers=options.answers,
        limit=options.limit,
        data_dir=options.data_dir,
        paragraph=options.paragraph,
    )
    assert data.annotations is not None
    _check_task("qa" if isinstance(data, QaSet) else "retrieval", task, data.annotations.path, model)
    return data
