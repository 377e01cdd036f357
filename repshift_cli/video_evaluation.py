"""Evaluate a video-text model on a dataset: from annotations and video files to the scorers of both tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from repshift_cli import measure
from repshift_cli.answering import AnswerEvaluation, AnswerList, QuestionBatch, evaluate_answers
from repshift_cli.artifact import Opened
from repshift_cli.attach import CompressedModel
from repshift_cli.backends import AttentionMode, attention_mode, auto_note
from repshift_cli.data import DEFAULT_SCENES, is_dataset_name, moving_shapes, video_text
from repshift_cli.data.clips import scene_tensor
from repshift_cli.data.text import Tokenizer
from repshift_cli.data.video import UnreadableVideo, clip_tensor, read_clip
from repshift_cli.data.video_text import PROTOCOLS, Protocol, QaSet, RetrievalSet
from repshift_cli.errors import DataError, ModelError, RepshiftError, UsageError
from repshift_cli.files import sha256_of
from repshift_cli.models.umt import Pooling, UmtAnswering, UmtModel, UmtRetrieval
from repshift_cli.preprocessing import Preprocessing
from repshift_cli.progress import Progress
from repshift_cli.retrieval import ClipBatch, RetrievalEvaluation, Texts, evaluate_retrieval

__all__ = [
    "BUILTIN_DATASETS",
    "Annotations",
    "CaptionData",
    "DenseSelf",
    "Question",
    "QuestionData",
    "Settings",
    "Task",
    "VideoData",
    "Videos",
    "Wanted",
    "answer",
    "check_missing",
    "choose_pooling",
    "is_video_dataset",
    "observe_attention",
    "open_data",
    "open_tokenizer",
    "retrieve",
    "task_of",
]

Task = Literal["retrieval", "qa"]

BUILTIN_DATASETS: Mapping[str, Task] = {"builtin:shapes": "retrieval", "builtin:shapes-qa": "qa"}

_MODELS_OF_SHAPES = "umt-shapes"
_QUESTIONS_PER_SCENE = 2
_LONGEST_TEXT, _LONGEST_ANSWER = 32, 5  # tokens, as UMT is fine-tuned
_PAIRS_PER_VIDEO, _ANSWERS_PER_VIDEO = 4, 16
"""Pairs at a time for each video at a time: pairs run through few layers, and answers see no video."""

_NAMES: Mapping[Task, str] = {"retrieval": "retrieval", "qa": "question answering"}
_CONTENT: Mapping[Task, str] = {"retrieval": "captions", "qa": "questions"}


class Videos(ABC):
    """Clips by number. Loader processes get a copy."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """The path or name of one video."""

    @abstractmethod
    def load(
        self, index: int, preprocessing: Preprocessing, transform: Callable[[Image.Image], Tensor]
    ) -> tuple[Tensor, bool]:
        """One clip, float32 `[T, C, H, W]`, and whether its last frame had to be repeated.

        Raises:
            UnreadableVideo: it cannot be decoded.
        """


@dataclass(frozen=True)
class _Files(Videos):
    paths: tuple[Path, ...]
    first_seconds: float | None

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def load(
        self, index: int, preprocessing: Preprocessing, transform: Callable[[Image.Image], Tensor]
    ) -> tuple[Tensor, bool]:
        clip = read_clip(self.paths[index], preprocessing.frames or 1, self.first_seconds)
        return clip_tensor(clip, transform), clip.padded


@dataclass(frozen=True)
class _Scenes(Videos):
    scenes: tuple[moving_shapes.Scene, ...]

    def __len__(self) -> int:
        return len(self.scenes)

    def name(self, index: int) -> str:
        return f"scene {index}"

    def load(
        self, index: int, preprocessing: Preprocessing, transform: Callable[[Image.Image], Tensor]
    ) -> tuple[Tensor, bool]:
        frames = moving_shapes.render(self.scenes[index], preprocessing.frames or 1, preprocessing.input_size[1])
        return scene_tensor(frames, transform), False


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


def is_video_dataset(name: str) -> bool:
    """Whether a name belongs to a dataset of videos with texts."""
    return name in BUILTIN_DATASETS or name in PROTOCOLS


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
        return {name: measure.observed_attention(model.encode_video, clip) for name, model in models.items()}


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
        ClipBatch(batch.indices, batch.video, batch.broken)
        for batch in _batches(data.videos, preprocessing, settings, padded)
    )
    texts = tokenizer.texts(data.captions, min(data.text_length, positions))
    with _ready(models, settings):
        result = evaluate_retrieval(
            models,
            clips,
            Texts(texts.ids, texts.mask, data.videos_of_caption),
            dataset=data.name,
            videos=len(data.videos),
            sample_id=data.videos.name,
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
    batches = _batches(data.videos, preprocessing, settings, padded)
    answers = tokenizer.answers(data.answers, min(_LONGEST_ANSWER, positions))
    with _ready(models, settings):
        result = evaluate_answers(
            models,
            _question_batches(data, batches, tokenizer, min(data.text_length, positions)),
            AnswerList(data.answers, answers.ids, answers.mask),
            dataset=data.name,
            questions=len(data.questions),
            sample_id=lambda index: data.videos.name(data.questions[index].video),
            batch_size=settings.batch_size,
            device=settings.device,
            dtype=settings.dtype,
            strict=settings.strict,
            progress=progress,
            pair_batch=_ANSWERS_PER_VIDEO * settings.batch_size,
        )
    return result, tuple(padded)


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
        _Scenes(tuple(scenes)),
        captions=tuple(video_text.clean_text(moving_shapes.caption(scene)) for scene in scenes),
        videos_of_caption=tuple((index,) for index in range(len(scenes))),
    )


def _scenes_with_questions(name: str, wanted: Wanted) -> QuestionData:
    count = wanted.limit or DEFAULT_SCENES * _QUESTIONS_PER_SCENE
    scenes = moving_shapes.scenes(-(-count // _QUESTIONS_PER_SCENE), moving_shapes.TEST_SEED + wanted.seed)
    asked = [Question(index, *one) for index, scene in enumerate(scenes) for one in moving_shapes.two_questions(scene)]
    return QuestionData(
        name,
        f"{name}: {count} questions about {len(scenes)} test scenes, seed {wanted.seed}",
        _Scenes(tuple(scenes)),
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
    found = video_text.open_video_text(
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
        _Files(found.videos, found.protocol.first_seconds if found.protocol else None),
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
        _Files(tuple(places), found.protocol.first_seconds if found.protocol else None),
        annotations,
        found.protocol,
        found.missing,
        found.notes,
        tuple(Question(places[item.video], item.question, item.answer) for item in found.items),
        found.answers,
    )


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


@dataclass
class _Sample:
    """A preprocessed clip, or why there is none."""

    index: int
    clip: Tensor | None = None
    padded: bool = False
    problem: RepshiftError | None = None


@dataclass
class _Batch:
    """What was read of some videos: float32 `[b, T, C, H, W]`, and what could not be read."""

    indices: list[int]
    video: Tensor | None
    padded: list[int]
    problems: list[tuple[int, RepshiftError]]

    @property
    def broken(self) -> list[tuple[int, str]]:
        return [(index, problem.reason) for index, problem in self.problems if isinstance(problem, UnreadableVideo)]

    def pin_memory(self) -> _Batch:
        """Called by the loader when the device copies faster from pinned memory."""
        if self.video is not None:
            self.video = self.video.pin_memory()
        return self


class _Prepared(TorchDataset[_Sample]):
    """The clips through the transform. What goes wrong in a loader process is reported, not raised there."""

    def __init__(self, videos: Videos, preprocessing: Preprocessing) -> None:
        self.videos = videos
        self.preprocessing = preprocessing
        self.transform = preprocessing.transform()

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> _Sample:
        try:
            clip, padded = self.videos.load(index, self.preprocessing, self.transform)
        except RepshiftError as problem:
            return _Sample(index, problem=problem)
        return _Sample(index, clip, padded)


def _collate(samples: Sequence[_Sample]) -> _Batch:
    clips = [sample.clip for sample in samples if sample.clip is not None]
    return _Batch(
        indices=[sample.index for sample in samples if sample.clip is not None],
        video=torch.stack(clips) if clips else None,
        padded=[sample.index for sample in samples if sample.padded],
        problems=[(sample.index, sample.problem) for sample in samples if sample.problem is not None],
    )


def _batches(videos: Videos, preprocessing: Preprocessing, settings: Settings, padded: list[str]) -> Iterator[_Batch]:
    """All videos in order; the names of those that were padded are added to `padded`."""
    loader = DataLoader(
        _Prepared(videos, preprocessing),
        batch_size=settings.batch_size,
        num_workers=settings.workers,
        collate_fn=_collate,
        pin_memory=settings.device.type == "cuda",
    )
    for batch in loader:
        for _, problem in batch.problems:
            if not isinstance(problem, UnreadableVideo):
                raise problem
        padded += [videos.name(index) for index in batch.padded]
        yield batch


def _question_batches(
    data: QuestionData, batches: Iterator[_Batch], tokenizer: Tokenizer, longest: int
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
            video=batch.video,
            ids=texts.ids,
            mask=texts.mask,
            answers=[question.answer for question in questions],
            broken=[(index, reason) for video, reason in batch.broken for index in about[video]],
            video_of=[place for _, place in asked],
        )
