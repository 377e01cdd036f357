"""Captions and questions of video benchmarks, read from annotation files in UMT's format."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from repshift_cli.data.catalog import DATA_DIR_VARIABLE
from repshift_cli.data.dataset import even_indices
from repshift_cli.data.video.dataset import VideoFiles, Videos
from repshift_cli.data.video.decode import find_video
from repshift_cli.errors import DataError, UsageError
from repshift_cli.utils.files import read_text, sha256_of
from repshift_cli.utils.ranges import check_ranges
from repshift_cli.utils.suggest import nearest

Task = Literal["retrieval", "qa"]

_LARGEST_FILE = 2**27
"""Bytes; the largest annotations of these benchmarks have some tens of millions."""

_SIZE_TOLERANCE = 0.02
"""Relative difference from the published sizes that is accepted without a note: some videos are no longer available."""

_TEXT_LENGTH = 32
"""Tokens, the default of UMT's fine-tuning."""

_ROW_HINT = (
    'Rows are {"video": NAME, "caption": TEXT or [TEXT, ...]} or {"video": NAME, "question": TEXT, "answer": TEXT}.'
)


@dataclass(frozen=True)
class Protocol:
    """How a benchmark is evaluated, as in UMT's configurations.

    Attributes:
        name: of the benchmark.
        kind: retrieval or question answering.
        split: which part of the benchmark is used.
        annotations: possible names of the annotation file, in order of preference.
        folders: possible names of the folder of videos, in order of preference.
        videos, texts: the usual number of videos and of captions or questions; None if unknown.
        answers: possible names of the list of answers.
        paragraph: whether the captions of a row are joined to one text.
        text_length: tokens at which UMT's fine-tuning truncates a text.
        first_seconds: use only the start of a video; None for all of it.
    """

    name: str
    kind: Task
    split: str
    annotations: tuple[str, ...]
    folders: tuple[str, ...]
    videos: int
    texts: int | None
    answers: tuple[str, ...] = ()
    paragraph: bool = False
    text_length: int = _TEXT_LENGTH
    first_seconds: float | None = None


_MSRVTT = ("MSRVTT_Videos", "msrvtt_videos", "TestVideo", "MSRVTT/videos/all", "videos/all", "msrvtt_2fps_224")
_MSVD = ("MSVD_Videos", "msvd_videos", "YouTubeClips", "msvd_2fps_224")
_ANET = ("ANet_320p_fps30/val", "activitynet_videos", "anet_videos", "activity_net_2fps_360")
_DIDEMO = ("DiDeMo", "didemo_videos", "didemo_2fps_360_trimed30")
_LSMDC = ("LSMDC", "lsmdc_videos")
_SSV2 = ("20bn-something-something-v2", "ssv2_video", "ssv2_videos", "ssv2_2fps_360")
_MSRVTT_ANSWERS = ("msrvtt_qa_answer_list.json",)
_MSVD_ANSWERS = ("msvd_qa_answer_list.json",)

_ALL = (
    Protocol("msrvtt", "retrieval", "1k-A test", ("msrvtt_ret_test1k.json", "msrvtt_test1k.json"), _MSRVTT, 1000, 1000),
    Protocol("msvd", "retrieval", "test", ("msvd_ret_test.json", "msvd_test.json"), _MSVD, 670, 27763, text_length=64),
    Protocol(
        "activitynet",
        "retrieval",
        "val1",
        ("anet_ret_val_1.json", "anet_ret_val.json"),
        _ANET,
        4917,
        4917,
        paragraph=True,
        text_length=150,
    ),
    Protocol(
        "didemo",
        "retrieval",
        "test",
        ("didemo_ret_test.json",),
        _DIDEMO,
        1003,
        1003,
        paragraph=True,
        text_length=64,
        first_seconds=30.0,
    ),
    Protocol("lsmdc", "retrieval", "test", ("lsmdc_ret_test_1000.json",), _LSMDC, 1000, 1000, text_length=96),
    Protocol("ssv2-label", "retrieval", "val", ("ssv2_ret_label_val_small.json",), _SSV2, 2088, None, text_length=25),
    Protocol(
        "ssv2-template", "retrieval", "val", ("ssv2_ret_template_val_small.json",), _SSV2, 2088, 174, text_length=25
    ),
    Protocol(
        "msrvtt-qa", "qa", "test", ("msrvtt_qa_test.json",), _MSRVTT, 2990, 72821, _MSRVTT_ANSWERS, text_length=25
    ),
    Protocol("msvd-qa", "qa", "test", ("msvd_qa_test.json",), _MSVD, 520, 13157, _MSVD_ANSWERS, text_length=25),
)

PROTOCOLS: Mapping[str, Protocol] = MappingProxyType({protocol.name: protocol for protocol in _ALL})
"""Benchmarks by name."""


class Annotations(NamedTuple):
    """An annotation file and its SHA-256."""

    path: Path
    sha256: str


class Question(NamedTuple):
    """A question about `videos[video]` of its set, and the right answer as written."""

    video: int
    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class VideoTextSet:
    """Videos with captions or questions.

    Attributes:
        name: of the benchmark, or of the annotation file.
        description: one line for the user.
        videos: those that exist.
        missing: names in the annotations for which there is no file.
        notes: remarks for the user.
        protocol: of a benchmark; None for other annotations.
        annotations: None for built-in scenes.
    """

    name: str
    description: str
    videos: Videos
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    protocol: Protocol | None = None
    annotations: Annotations | None = None

    @property
    def text_length(self) -> int:
        """Tokens at which a text is truncated."""
        return self.protocol.text_length if self.protocol else _TEXT_LENGTH


@dataclass(frozen=True, kw_only=True)
class RetrievalSet(VideoTextSet):
    """Videos and captions; each caption belongs to one or more videos, a video may have none.

    Equal captions in different rows are different captions, as in UMT: only the video of its own row is right.

    Attributes:
        captions: cleaned texts; one that is only punctuation is empty, as in UMT.
        videos_of_caption: for each caption the indices of its videos, ascending, never empty.
    """

    captions: tuple[str, ...]
    videos_of_caption: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class QaSet(VideoTextSet):
    """Questions about videos, and all possible answers as written."""

    questions: tuple[Question, ...]
    answers: tuple[str, ...]


def clean_text(text: str) -> str:
    """Clean a caption or question as for UMT's training: lower case, without punctuation."""
    text = re.sub(r"[,.'!?\"()*#:;~]", "", text.lower())
    text = text.replace("-", " ").replace("/", " ").replace("<person>", "person")
    return re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")


def open_video_text(
    name: str | None = None,
    *,
    annotations: Path | None = None,
    videos: Path | None = None,
    answers: Path | None = None,
    limit: int | None = None,
    data_dir: Path | None = None,
    paragraph: bool | None = None,
) -> RetrievalSet | QaSet:
    """Open a benchmark or the user's own annotations; rows with a `question` make a `QaSet`.

    Args:
        name: one of `PROTOCOLS`; None for the user's own annotations.
        annotations: a JSON list of rows, or JSON lines. Default: the protocol's file in `data_dir`.
        videos: the folder that names in the annotations are relative to. Default: the protocol's folder in `data_dir`.
        answers: a JSON list of the possible answers. Default: the protocol's file, else the answers in the annotations.
        limit: use at most this many existing videos with all their captions, or questions, evenly spaced.
        data_dir: the folder of the benchmark, or its parent folder. Default: the environment variable
            REPSHIFT_DATA_DIR.
        paragraph: whether the captions of a row are joined to one text. Default: as in the protocol, else False.

    Raises:
        DataError: a file or folder is unknown, missing or invalid; invalid rows are named.
        UsageError: the limit is not positive, or neither a name nor annotations with videos are given.
    """
    check_ranges(limit=limit)
    annotations, videos, answers = (path and path.expanduser() for path in (annotations, videos, answers))
    try:
        files = _locate(name, annotations, videos, answers, data_dir)
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error
    values = _read_rows(files.annotations)
    has_questions = isinstance(values[0], dict) and "question" in values[0]
    _check_kind(files, has_questions)
    rows = [_Row.of(files.annotations, number, row) for number, row in enumerate(values)]
    if has_questions:
        return _questions(files, rows, limit)
    if paragraph is None:
        paragraph = files.protocol is not None and files.protocol.paragraph
    return _captions(files, rows, limit, paragraph)


@dataclass(frozen=True)
class _Files:
    """The files of a set."""

    name: str
    annotations: Path
    videos: Path
    answers: Path | None
    protocol: Protocol | None

    def common_fields(self, videos: Iterable[Path]) -> dict[str, Any]:
        """What sets of both kinds have."""
        first_seconds = self.protocol.first_seconds if self.protocol else None
        return {
            "name": self.name,
            "videos": VideoFiles(tuple(videos), first_seconds),
            "protocol": self.protocol,
            "annotations": Annotations(self.annotations, sha256_of(self.annotations)),
        }


def _locate(
    name: str | None, annotations: Path | None, videos: Path | None, answers: Path | None, data_dir: Path | None
) -> _Files:
    """Complete the given paths with those that the protocol has in the data folder."""
    if name is None:
        if annotations is None or videos is None:
            raise UsageError(
                "neither a benchmark nor annotations with videos are given",
                f"Give --annotations FILE with --videos DIR, or a benchmark: {', '.join(PROTOCOLS)}.",
            )
        return _Files(annotations.stem, annotations, _checked_folder(videos), answers, None)
    if name not in PROTOCOLS:
        hint = f"{nearest(name.lower(), PROTOCOLS)}Known: {', '.join(PROTOCOLS)}."
        raise DataError(f"there is no video benchmark {name!r}", hint)
    protocol = PROTOCOLS[name]
    roots = _roots(protocol, data_dir)
    if not roots and (annotations is None or videos is None):
        raise DataError(
            f"the benchmark {name} needs a folder",
            f"Name it: --data-dir PATH, or {DATA_DIR_VARIABLE}; it holds {protocol.annotations[0]} and the videos. "
            "Or give --annotations FILE with --videos DIR.",
        )
    annotations = annotations or _first_file(roots, protocol.annotations)
    if annotations is None:
        raise DataError(
            f"there are no annotations of {name} in {roots[-1]}",
            f"Put UMT's file there, {' or '.join(protocol.annotations)}, or name one: --annotations FILE.",
        )
    if videos is None:
        folders = (root / folder for root in roots for folder in (*protocol.folders, "videos"))
        videos = next((folder for folder in folders if folder.is_dir()), roots[0])
    answers = answers or _first_file(roots, protocol.answers)
    return _Files(name, annotations, _checked_folder(videos), answers, protocol)


def _roots(protocol: Protocol, data_dir: Path | None) -> list[Path]:
    """Folders to search: the benchmark's own folder before the data folder."""
    value = data_dir or os.environ.get(DATA_DIR_VARIABLE)
    if not value:
        return []
    outer = Path(value).expanduser()
    if not outer.is_dir():
        raise DataError(
            f"the folder {outer} does not exist", f"It should hold {protocol.annotations[0]} and the videos."
        )
    # questions are about the videos of the retrieval benchmark
    names = dict.fromkeys((protocol.name, protocol.name.partition("-")[0]))
    return [*(outer / name for name in names if (outer / name).is_dir()), outer]


def _first_file(roots: Sequence[Path], names: Iterable[str]) -> Path | None:
    parts = (".", "anno_downstream", "annotations", "anno", "anno/anno_downstream")
    paths = (root / part / name for name in names for root in roots for part in parts)
    return next((path for path in paths if path.is_file()), None)


def _checked_folder(path: Path) -> Path:
    if not path.is_dir():
        raise DataError(f"the folder of videos {path} does not exist", "Name the right one: --videos DIR.")
    return path


def _check_kind(files: _Files, has_questions: bool) -> None:
    if files.protocol and has_questions != (files.protocol.kind == "qa"):
        expected, found = ("captions", "questions") if has_questions else ("questions", "captions")
        raise DataError(f"{files.name} needs {expected}, but {files.annotations} holds {found}", _ROW_HINT)
    if files.answers and not has_questions:
        raise UsageError(f"--answers {files.answers} is not used: {files.annotations} holds captions")


def _read_rows(path: Path) -> list[Any]:
    """The rows of a JSON list, or of a file with one JSON value per line."""
    text = _read_text(path)
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        # not splitlines(), which also splits at characters that are allowed in a JSON text
        lines = [line for line in text.split("\n") if line.strip()]
        rows: Any = [_parse(line, _row_name(path, number)) for number, line in enumerate(lines)]
    else:
        rows = _parse(text, str(path))
    if not isinstance(rows, list):
        raise DataError(f"{path} is not a list of rows, but {_kind(rows)}", _ROW_HINT)
    if not rows:
        raise DataError(f"{path} has no rows", _ROW_HINT)
    return rows


def _read_text(path: Path) -> str:
    try:
        return read_text(path, _LARGEST_FILE, "utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not JSON: it is not UTF-8 text", _ROW_HINT) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise DataError(f"{where} cannot be read: it is nested too deeply", _ROW_HINT) from error
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}", _ROW_HINT) from error


def _row_name(path: Path, row: int) -> str:
    return f"{path}, row {row} (counted from 0)"


def _kind(value: object) -> str:
    names = {dict: "a mapping", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


@dataclass(frozen=True)
class _Row:
    """One row of annotations; values are checked when they are read."""

    where: str
    values: dict[str, Any]

    @classmethod
    def of(cls, path: Path, number: int, values: object) -> _Row:
        where = _row_name(path, number)
        if not isinstance(values, dict):
            raise DataError(f"{where} is not a mapping, but {_kind(values)}", _ROW_HINT)
        return cls(where, values)

    def error(self, problem: str) -> DataError:
        return DataError(f"{self.where}: {problem}", _ROW_HINT)

    def text(self, key: str) -> str:
        return self._checked(key, self._value(key))

    def texts(self, key: str) -> list[str]:
        """The text, or the list of texts."""
        value = self._value(key)
        values = value if isinstance(value, list) else [value]
        if not values:
            raise self.error(f"{key!r} is an empty list")
        return [self._checked(key, text) for text in values]

    def _value(self, key: str) -> Any:
        if key not in self.values:
            near = get_close_matches(key, [str(name) for name in self.values], n=1)
            raise self.error(f"there is no {key!r}" + (f", but {near[0]!r}" if near else ""))
        return self.values[key]

    def _checked(self, key: str, value: object) -> str:
        if not isinstance(value, str):
            raise self.error(f"{key!r} is {_kind(value)}, not a text")
        if not value.strip():
            raise self.error(f"{key!r} is empty")
        if any("\ud800" <= character <= "\udfff" for character in value):  # tokenizers raise an error without context
            raise self.error(f"{key!r} has half of a surrogate pair")
        return value


@dataclass
class _VideoIndex:
    """The videos that annotations name. Each is looked up once and numbered in order of first appearance."""

    folder: Path
    numbers: dict[Path, int] = field(default_factory=dict)
    found: dict[str, Path | None] = field(default_factory=dict)

    def find(self, row: _Row, name: str) -> int | None:
        """The number of a video; None if it is missing."""
        if name not in self.found:
            try:
                path = self.found[name] = find_video(self.folder, name)
            except DataError as error:
                raise row.error(error.message) from error
            if path is not None:
                self.numbers.setdefault(path, len(self.numbers))
        path = self.found[name]
        return None if path is None else self.numbers[path]

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(name for name, path in self.found.items() if path is None)

    def check(self, annotations: Path) -> list[Path]:
        """The paths of the videos, unless all are missing."""
        if not self.numbers:
            raise DataError(
                f"none of the {len(self.found)} videos of {annotations} is in {self.folder}: "
                f"{', '.join(list(self.found)[:3])}, ...",
                "Name the folder that holds them: --videos DIR.",
            )
        return list(self.numbers)


def _captions(files: _Files, rows: Sequence[_Row], limit: int | None, paragraph: bool) -> RetrievalSet:
    index = _VideoIndex(files.videos)
    captions: list[tuple[str, set[int]]] = []
    total = 0
    for row in rows:
        numbers = {number for name in row.texts("video") if (number := index.find(row, name)) is not None}
        texts = [" ".join(row.texts("caption"))] if paragraph else row.texts("caption")
        total += len(texts)
        captions += [(clean_text(text), numbers) for text in texts if numbers]
    paths = index.check(files.annotations)
    notes = _size_notes(files.protocol, len(paths) + len(index.missing), total, "captions")
    if empty := sum(not text for text, _ in captions):
        notes += (f"{empty} captions are empty without their punctuation; they are used all the same, as in UMT",)
    kept = even_indices(len(paths), limit or len(paths))
    renumbered = {old: new for new, old in enumerate(kept)}
    left = [(text, numbers & renumbered.keys()) for text, numbers in captions if numbers & renumbered.keys()]
    return RetrievalSet(
        **files.common_fields(paths[number] for number in kept),
        description=f"{files.name}: {len(kept)} videos, {len(left)} captions",
        captions=tuple(text for text, _ in left),
        videos_of_caption=tuple(tuple(renumbered[number] for number in sorted(numbers)) for _, numbers in left),
        missing=index.missing,
        notes=notes,
    )


def _questions(files: _Files, rows: Sequence[_Row], limit: int | None) -> QaSet:
    index = _VideoIndex(files.videos)
    questions: list[Question] = []
    right_answers: set[str] = set()
    for row in rows:
        question, answer = clean_text(row.text("question")), row.text("answer")
        right_answers.add(answer)
        number = index.find(row, row.text("video"))
        if number is not None:
            questions.append(Question(number, question, answer))
    paths = index.check(files.annotations)
    answers, notes = _answers(files, right_answers)
    kept = [questions[place] for place in even_indices(len(questions), limit or len(questions))]
    if unlisted := sum(question.answer not in answers for question in kept):
        notes += (f"the answers of {unlisted} of {len(kept)} questions are not in the list of answers: they are wrong",)
    notes += _size_notes(files.protocol, len(paths) + len(index.missing), len(rows), "questions")
    renumbered = {old: new for new, old in enumerate(dict.fromkeys(question.video for question in kept))}
    return QaSet(
        **files.common_fields(paths[number] for number in renumbered),
        description=f"{files.name}: {len(kept)} questions about {len(renumbered)} videos, {len(answers)} answers",
        questions=tuple(question._replace(video=renumbered[question.video]) for question in kept),
        answers=tuple(answers),
        missing=index.missing,
        notes=notes,
    )


def _answers(files: _Files, right_answers: Iterable[str]) -> tuple[dict[str, None], tuple[str, ...]]:
    """The possible answers, in order, and notes about them."""
    if files.answers is None:
        answers = dict.fromkeys(sorted(right_answers))
        note = f"no list of answers is given: the model chooses among the {len(answers)} right answers"
        return answers, (note,)
    values = _parse(_read_text(files.answers), str(files.answers))
    if not isinstance(values, list) or not values:
        raise DataError(f"{files.answers} is not a list of answers", 'It should be ["yes", "no", ...].')
    for number, value in enumerate(values):
        if not isinstance(value, str) or not value.strip():
            problem = "an empty text" if isinstance(value, str) else _kind(value)
            raise DataError(f"{_row_name(files.answers, number)} is not an answer, but {problem}")
    return dict.fromkeys(values), ()


def _size_notes(protocol: Protocol | None, videos: int, texts: int, what: str) -> tuple[str, ...]:
    """Notes if the annotations have far more or fewer videos or texts than the benchmark."""
    if protocol is None:
        return ()
    counts = ((videos, protocol.videos, "videos"), (texts, protocol.texts, what))
    return tuple(
        f"the annotations name {found} {things}; {protocol.name} ({protocol.split}) has about {usual}"
        for found, usual, things in counts
        if usual is not None and abs(found - usual) > _SIZE_TOLERANCE * usual
    )
