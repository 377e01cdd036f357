"""Captions and questions of a video-text evaluation, with their videos."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from repshift_cli.data.builtin import moving_shapes
from repshift_cli.data.catalog import DEFAULT_SCENES, is_dataset_name
from repshift_cli.data.video.annotations import PROTOCOLS, Protocol, QaSet, RetrievalSet, clean_text, open_video_text
from repshift_cli.data.video.dataset import VideoFiles, Videos, VideoScenes
from repshift_cli.errors import UsageError
from repshift_cli.utils.files import sha256_of

__all__ = [
    "BUILTIN_DATASETS",
    "LONGEST_ANSWER",
    "Annotations",
    "CaptionData",
    "Question",
    "QuestionData",
    "Task",
    "VideoData",
    "Wanted",
    "is_video_dataset",
    "open_data",
]


Task = Literal["retrieval", "qa"]


BUILTIN_DATASETS: Mapping[str, Task] = {"builtin:shapes": "retrieval", "builtin:shapes-qa": "qa"}


_QUESTIONS_PER_SCENE = 2


_LONGEST_TEXT, LONGEST_ANSWER = 32, 5  # tokens, as UMT is fine-tuned


_NAMES: Mapping[Task, str] = {"retrieval": "retrieval", "qa": "question answering"}


_CONTENT: Mapping[Task, str] = {"retrieval": "captions", "qa": "questions"}


class Annotations(NamedTuple):
    """Which file told what belongs together."""

    path: Path
    sha256: str


class Question(NamedTuple):
    """A question about the video of this number, and the right answer."""

    video: int
    question: str
    answer: str


@dataclass(frozen=True)
class VideoData:
    """What a dataset of videos is to an evaluation.

    Attributes:
        name: of the dataset.
        description: one line for people.
        videos: those that are there.
        annotations: None for built-in scenes.
        protocol: of the benchmark; None for others.
        missing: videos that the annotations name and that are not there.
        notes: what the user should know.
    """

    name: str
    description: str
    videos: Videos
    annotations: Annotations | None = None
    protocol: Protocol | None = None
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def text_length(self) -> int:
        """Tokens at which a text is cut off."""
        return self.protocol.text_length if self.protocol else _LONGEST_TEXT


@dataclass(frozen=True)
class CaptionData(VideoData):
    """Videos with captions; for each caption the numbers of its videos."""

    captions: tuple[str, ...] = ()
    videos_of_caption: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class QuestionData(VideoData):
    """Videos with questions, and all answers that can be given."""

    questions: tuple[Question, ...] = ()
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """What the user says of the dataset; see `open_video_text`.

    Attributes:
        dataset: a benchmark, one of `BUILTIN_DATASETS`, or None for annotations of one's own.
        seed: which built-in scenes are drawn.
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
    """Whether a name belongs to a dataset of videos with texts."""
    return name in BUILTIN_DATASETS or name in PROTOCOLS


def open_data(wanted: Wanted, task: Task, what: str) -> CaptionData | QuestionData:
    """Find the videos and texts.

    Args:
        wanted: what the user says.
        task: what the model is for.
        what: how the model is called, for messages.

    Raises:
        UsageError: the dataset is one of pictures, is for the other task, or an option has no meaning for it.
        DataError: as `open_video_text`.
    """
    name = wanted.dataset
    if name is None:
        return _from_files(wanted, task, what)
    if not is_video_dataset(name):
        _refuse_pictures(name, what)
    if name in BUILTIN_DATASETS:
        _check_task(BUILTIN_DATASETS[name], task, name, what)
        _check_builtin(name, wanted)
        return _scenes_with_captions(name, wanted) if task == "retrieval" else _scenes_with_questions(name, wanted)
    if name in PROTOCOLS:
        _check_task(PROTOCOLS[name].kind, task, name, what)
    return _from_files(wanted, task, what)


def _refuse_pictures(name: str, what: str) -> None:
    path = Path(name).expanduser()
    if is_dataset_name(name) or path.is_absolute() or "/" in name or path.exists():
        raise UsageError(
            f"{what} takes clips, and {name} is no dataset of videos with texts",
            f"Name one of {', '.join((*BUILTIN_DATASETS, *PROTOCOLS))}, or give --annotations FILE with --videos DIR.",
        )


def _check_task(there: Task, task: Task, where: object, what: str) -> None:
    if there != task:
        raise UsageError(
            f"{what} is a model for {_NAMES[task]}, but {where} holds {_CONTENT[there]}",
            f"Give a dataset with {_CONTENT[task]}, or a checkpoint for {_NAMES[there]}.",
        )


def _check_builtin(name: str, wanted: Wanted) -> None:
    for option in ("annotations", "videos", "answers", "data_dir", "paragraph"):
        if getattr(wanted, option) is not None:
            told = option.replace("_", "-")
            raise UsageError(f"--{told} has no meaning for {name}, which is drawn", f"Leave --{told} out.")


def _scenes_with_captions(name: str, wanted: Wanted) -> CaptionData:
    scenes = moving_shapes.scenes(wanted.limit or DEFAULT_SCENES, moving_shapes.TEST_SEED + wanted.seed)
    return CaptionData(
        name,
        f"{name}: {len(scenes)} test scenes with a caption each, seed {wanted.seed}",
        VideoScenes(tuple(scenes)),
        captions=tuple(clean_text(moving_shapes.caption(scene)) for scene in scenes),
        videos_of_caption=tuple((index,) for index in range(len(scenes))),
    )


def _scenes_with_questions(name: str, wanted: Wanted) -> QuestionData:
    count = wanted.limit or DEFAULT_SCENES * _QUESTIONS_PER_SCENE
    scenes = moving_shapes.scenes(-(-count // _QUESTIONS_PER_SCENE), moving_shapes.TEST_SEED + wanted.seed)
    asked = [Question(index, *one) for index, scene in enumerate(scenes) for one in moving_shapes.two_questions(scene)]
    return QuestionData(
        name,
        f"{name}: {count} questions about {len(scenes)} test scenes, seed {wanted.seed}",
        VideoScenes(tuple(scenes)),
        questions=tuple(asked[:count]),
        answers=moving_shapes.ANSWERS,
    )


def _from_files(wanted: Wanted, task: Task, what: str) -> CaptionData | QuestionData:
    if wanted.dataset is None and wanted.data_dir is not None:
        raise UsageError("--data-dir has no meaning without the name of a benchmark", "Add --dataset, or --videos DIR.")
    if task == "retrieval" and wanted.answers is not None:
        raise UsageError(f"--answers has no meaning for {what}, a model for retrieval", "Leave --answers out.")
    if task == "qa" and wanted.paragraph is not None:
        raise UsageError("--paragraph has no meaning for questions", "Leave it out.")
    found = open_video_text(
        wanted.dataset,
        annotations=wanted.annotations,
        videos=wanted.videos,
        answers=wanted.answers,
        limit=wanted.limit,
        data_dir=wanted.data_dir,
        paragraph=wanted.paragraph,
    )
    assert found.annotations is not None
    _check_task("qa" if isinstance(found, QaSet) else "retrieval", task, found.annotations, what)
    told_by = Annotations(found.annotations, sha256_of(found.annotations))
    return _questions_of(found, told_by) if isinstance(found, QaSet) else _captions_of(found, told_by)


def _captions_of(found: RetrievalSet, annotations: Annotations) -> CaptionData:
    return CaptionData(
        found.name,
        found.description,
        VideoFiles(found.videos, found.protocol.first_seconds if found.protocol else None),
        annotations,
        found.protocol,
        found.missing,
        found.notes,
        found.captions,
        found.videos_of_caption,
    )


def _questions_of(found: QaSet, annotations: Annotations) -> QuestionData:
    places = {path: place for place, path in enumerate(dict.fromkeys(item.video for item in found.items))}
    return QuestionData(
        found.name,
        found.description,
        VideoFiles(tuple(places), found.protocol.first_seconds if found.protocol else None),
        annotations,
        found.protocol,
        found.missing,
        found.notes,
        tuple(Question(places[item.video], item.question, item.answer) for item in found.items),
        found.answers,
    )
