"""Videos with captions or questions: the benchmarks of video-text models, from annotations as UMT ships them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from repshift_cli.data.catalog import DATA_DIR_VARIABLE
from repshift_cli.data.dataset import even_indices
from repshift_cli.data.video.decode import find_video
from repshift_cli.errors import DataError, UsageError

__all__ = ["PROTOCOLS", "Protocol", "QaItem", "QaSet", "RetrievalSet", "clean_text", "open_video_text"]

_LARGEST_FILE = 2**30
"""Bytes; the largest annotations of these benchmarks have some tens of millions."""

_SIZE_TOLERANCE = 0.02
"""Copies of one benchmark differ by videos that are no longer to be had; beyond that share it is said."""

_ROW_HINT = (
    'Rows are {"video": NAME, "caption": TEXT or [TEXT, ...]} or {"video": NAME, "question": TEXT, "answer": TEXT}.'
)


@dataclass(frozen=True)
class Protocol:
    """How one benchmark is evaluated, as UMT's own configurations have it.

    Attributes:
        name: what `open_video_text` calls it.
        kind: which video belongs to a text, or which answer to a question.
        split: the part of the benchmark that is taken.
        annotations: names of its annotation file, the first that is there.
        folders: names of its folder of videos, the first that is there.
        videos, texts: about how many there are, captions or questions; None where that is not known.
        answers: names of the file of possible answers.
        paragraph: whether a list of captions is one text, its sentences in order, rather than many texts.
        text_length: tokens at which UMT's fine-tuning cuts a text off.
        first_seconds: only this part of a video is looked at; None for all.
    """

    name: str
    kind: Literal["retrieval", "qa"]
    split: str
    annotations: tuple[str, ...]
    folders: tuple[str, ...]
    videos: int
    texts: int | None
    answers: tuple[str, ...] = ()
    paragraph: bool = False
    text_length: int = 32
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
"""The benchmarks by name."""


@dataclass(frozen=True)
class RetrievalSet:
    """Videos and captions that belong together, each caption to one video or more, each video to one caption or more.

    Equal captions in different rows are different captions, as in UMT: only the video of its own row is right.

    Attributes:
        name: of the benchmark, or of the annotation file.
        videos: files or folders of frames that are there.
        captions: cleaned texts; one that is punctuation only is empty then, as in UMT.
        videos_of_caption: for each caption, the places in `videos` that are right; ascending, never empty.
        missing: names in the annotations that no file belongs to; captions of no other video are left out.
        notes: what the user should know.
        protocol: None for annotations of the user's own.
        annotations: the file that tells it.
    """

    name: str
    videos: tuple[Path, ...]
    captions: tuple[str, ...]
    videos_of_caption: tuple[tuple[int, ...], ...]
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    protocol: Protocol | None = None
    annotations: Path | None = None

    @property
    def captions_of_video(self) -> tuple[tuple[int, ...], ...]:
        """For each video, the places in `captions` that are right; ascending, never empty."""
        found: list[list[int]] = [[] for _ in self.videos]
        for caption, places in enumerate(self.videos_of_caption):
            for place in places:
                found[place].append(caption)
        return tuple(tuple(places) for places in found)

    @property
    def description(self) -> str:
        """One line for people."""
        return f"{self.name}: {len(self.videos)} videos, {len(self.captions)} captions"


@dataclass(frozen=True)
class QaItem:
    """One question about one video.

    Attributes:
        id: what the annotations call it; its row where they do not.
        video: a file or a folder of frames.
        question: cleaned text.
        answer: the right one, as written.
    """

    id: str
    video: Path
    question: str
    answer: str


@dataclass(frozen=True)
class QaSet:
    """Questions about videos, and the answers to choose from.

    Attributes:
        name: of the benchmark, or of the annotation file.
        items: the questions whose video is there.
        answers: all possible answers, as written.
        missing, notes, protocol, annotations: as in `RetrievalSet`.
    """

    name: str
    items: tuple[QaItem, ...]
    answers: tuple[str, ...]
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    protocol: Protocol | None = None
    annotations: Path | None = None

    @property
    def description(self) -> str:
        """One line for people."""
        videos = len({item.video for item in self.items})
        return f"{self.name}: {len(self.items)} questions about {videos} videos, {len(self.answers)} answers"


def clean_text(text: str) -> str:
    """A caption or question as UMT's text encoder was trained on it: lower case, without punctuation."""
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
    """Find a benchmark, or read annotations of one's own; rows with a `question` make a `QaSet`.

    Args:
        name: one of `PROTOCOLS`; None for annotations of one's own.
        annotations: a JSON list of rows, or one row per line; without it the protocol's file in `data_dir`.
        videos: the folder that the names in the annotations are relative to; without it the protocol's folder in
            `data_dir`.
        answers: a JSON list of the possible answers; without it the protocol's file, else those of the annotations.
        limit: at most so many of the videos that are there, evenly spaced, with all their captions; of questions, so
            many questions.
        data_dir: the folder of the benchmark, or one that holds it under its name; without it the environment
            variable REPSHIFT_DATA_DIR is asked.
        paragraph: whether a list of captions is one text; without it as the protocol says, else False.

    Raises:
        DataError: something is unknown, missing or damaged; of damaged annotations, file and row are named.
        UsageError: the limit is not positive, or what is given does not say where to look.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"the limit is {limit}", "Give the number of videos or questions to use, 1 or more.")
    annotations, videos, answers = (path and path.expanduser() for path in (annotations, videos, answers))
    source = _find(name, annotations, videos, answers, data_dir)
    rows = _read_rows(source.annotations)
    asks = isinstance(rows[0], dict) and "question" in rows[0]
    _check_kind(source, asks)
    if asks:
        return _questions(source, rows, limit)
    joined = paragraph if paragraph is not None else bool(source.protocol and source.protocol.paragraph)
    return _captions(source, rows, limit, joined)


@dataclass(frozen=True)
class _Source:
    """Where everything lies."""

    name: str
    annotations: Path
    videos: Path
    answers: Path | None
    protocol: Protocol | None


def _find(
    name: str | None, annotations: Path | None, videos: Path | None, answers: Path | None, data_dir: Path | None
) -> _Source:
    if name is None:
        if annotations is None or videos is None:
            raise UsageError(
                "neither a benchmark nor annotations with videos are given",
                f"Give --annotations FILE with --videos DIR, or a benchmark: {', '.join(PROTOCOLS)}.",
            )
        return _Source(annotations.stem, annotations, _folder(videos), answers, None)
    protocol = _protocol(name)
    roots = _roots(protocol, data_dir)
    if not roots and (annotations is None or videos is None):
        raise DataError(
            f"the benchmark {name} needs a folder",
            f"Name it: --data-dir PATH, or {DATA_DIR_VARIABLE}; it holds {protocol.annotations[0]} and the videos. "
            "Or give --annotations FILE with --videos DIR.",
        )
    return _Source(
        name,
        annotations or _first_file(protocol, roots),
        _folder(videos or _first_folder(protocol, roots)),
        answers or _first(roots, protocol.answers, Path.is_file),
        protocol,
    )


def _protocol(name: str) -> Protocol:
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    near = get_close_matches(name.lower(), PROTOCOLS, n=1, cutoff=0.5)
    guess = f"Did you mean {near[0]}? " if near else ""
    raise DataError(f"there is no video benchmark {name!r}", f"{guess}Known: {', '.join(PROTOCOLS)}.")


def _roots(protocol: Protocol, data_dir: Path | None) -> list[Path]:
    """Folders to look in, the benchmark's own before the one that holds several."""
    value = data_dir or os.environ.get(DATA_DIR_VARIABLE)
    if not value:
        return []
    outer = Path(value).expanduser()
    if not outer.is_dir():
        raise DataError(
            f"the folder {outer} does not exist", f"It should hold {protocol.annotations[0]} and the videos."
        )
    # questions are asked about the videos of the retrieval benchmark
    names = dict.fromkeys((protocol.name, protocol.name.partition("-")[0]))
    return [*(outer / name for name in names if (outer / name).is_dir()), outer]


def _first(roots: Sequence[Path], names: Iterable[str], test: Callable[[Path], bool]) -> Path | None:
    parts = (".", "anno_downstream", "annotations", "anno", "anno/anno_downstream")
    paths = (root / part / name for name in names for root in roots for part in parts)
    return next((path for path in paths if test(path)), None)


def _first_file(protocol: Protocol, roots: Sequence[Path]) -> Path:
    found = _first(roots, protocol.annotations, Path.is_file)
    if found is None:
        raise DataError(
            f"there are no annotations of {protocol.name} in {roots[-1]}",
            f"Put UMT's file there, {' or '.join(protocol.annotations)}, or name one: --annotations FILE.",
        )
    return found


def _first_folder(protocol: Protocol, roots: Sequence[Path]) -> Path:
    """The folder of videos by its name, else the benchmark's own folder."""
    names = (*protocol.folders, "videos")
    return next((root / name for root in roots for name in names if (root / name).is_dir()), roots[0])


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise DataError(f"the folder of videos {path} does not exist", "Name the right one: --videos DIR.")
    return path


def _check_kind(source: _Source, asks: bool) -> None:
    if source.protocol and asks != (source.protocol.kind == "qa"):
        wanted, there = ("questions", "captions") if not asks else ("captions", "questions")
        raise DataError(f"{source.name} is about {wanted}, but {source.annotations} holds {there}", _ROW_HINT)
    if source.answers and not asks:
        raise UsageError(f"{source.annotations} holds captions, so the answers {source.answers} have no meaning")


def _read_rows(path: Path) -> list[Any]:
    """The rows of a JSON list, or of one JSON value per line."""
    text = _read_text(path)
    lines = path.suffix.lower() in (".jsonl", ".ndjson")
    rows = [_parse(line, path, row) for row, line in enumerate(_lines(text))] if lines else _parse(text, path, None)
    if not isinstance(rows, list):
        raise DataError(f"{path} holds no list of rows, but {_kind(rows)}", _ROW_HINT)
    if not rows:
        raise DataError(f"{path} holds no rows", _ROW_HINT)
    return rows


def _lines(text: str) -> list[str]:
    # not splitlines(), which also breaks at characters that may stand in a JSON text
    return [line for line in text.split("\n") if line.strip()]


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise DataError(f"{path} is too large for annotations: {path.stat().st_size} bytes")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not JSON: it is no text in UTF-8", _ROW_HINT) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _parse(text: str, path: Path, row: int | None) -> Any:
    where = str(path) if row is None else _where(path, row)
    try:
        return json.loads(text)
    except RecursionError as error:
        raise DataError(f"{where} cannot be read: it is nested too deeply", _ROW_HINT) from error
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}", _ROW_HINT) from error


def _where(path: Path, row: int) -> str:
    return f"{path}, row {row} (counted from 0)"


def _kind(value: object) -> str:
    names = {dict: "a mapping", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


@dataclass(frozen=True)
class _Row:
    """One row of annotations, checked as it is read."""

    path: Path
    number: int
    values: dict[str, Any]

    @classmethod
    def of(cls, path: Path, number: int, values: object) -> _Row:
        if not isinstance(values, dict):
            raise DataError(f"{_where(path, number)} is no mapping, but {_kind(values)}", _ROW_HINT)
        return cls(path, number, values)

    def error(self, problem: str) -> DataError:
        return DataError(f"{_where(self.path, self.number)}: {problem}", _ROW_HINT)

    def get(self, key: str) -> Any:
        if key not in self.values:
            near = get_close_matches(key, [str(name) for name in self.values], n=1)
            raise self.error(f"there is no {key!r}" + (f", but {near[0]!r}" if near else ""))
        return self.values[key]

    def text(self, key: str) -> str:
        return self._checked(key, self.get(key))

    def texts(self, key: str) -> list[str]:
        value = self.get(key)
        values = value if isinstance(value, list) else [value]
        if not values:
            raise self.error(f"{key!r} is an empty list")
        return [self._checked(key, text) for text in values]

    def id(self) -> str:
        value = self.values.get("question_id", self.number)
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise self.error(f"'question_id' is {_kind(value)}, not a number or a text")
        return str(value)

    def find(self, folder: Path, name: str) -> Path | None:
        try:
            return find_video(folder, name)
        except DataError as error:
            raise self.error(error.message) from error

    def _checked(self, key: str, value: object) -> str:
        if not isinstance(value, str):
            raise self.error(f"{key!r} is {_kind(value)}, not a text")
        if not value.strip():
            raise self.error(f"{key!r} is empty")
        if any("\ud800" <= character <= "\udfff" for character in value):  # tokenizers end in an error of their own
            raise self.error(f"{key!r} has half a character in it")
        return value


@dataclass
class _Library:
    """The videos that annotations name, each looked up once, in the order of their first appearance."""

    folder: Path
    places: dict[Path, int] = field(default_factory=dict)
    known: dict[str, Path | None] = field(default_factory=dict)

    def find(self, row: _Row, name: str) -> Path | None:
        if name not in self.known:
            path = self.known[name] = row.find(self.folder, name)
            if path is not None:
                self.places.setdefault(path, len(self.places))
        return self.known[name]

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(name for name, path in self.known.items() if path is None)

    def check(self, annotations: Path) -> None:
        if not self.places:
            first = ", ".join(list(self.known)[:3])
            raise DataError(
                f"none of the {len(self.known)} videos of {annotations} is in {self.folder}: {first}, ...",
                "Name the folder that holds them: --videos DIR.",
            )


def _captions(source: _Source, rows: Sequence[object], limit: int | None, paragraph: bool) -> RetrievalSet:
    library = _Library(source.videos)
    captions: list[str] = []
    places: list[list[int]] = []
    total = 0
    for number, values in enumerate(rows):
        row = _Row.of(source.annotations, number, values)
        paths = [library.find(row, name) for name in row.texts("video")]
        texts = row.texts("caption")
        texts = [" ".join(texts)] if paragraph else texts
        total += len(texts)
        found = sorted({library.places[path] for path in paths if path is not None})
        if found:
            captions += [clean_text(text) for text in texts]
            places += [found] * len(texts)
    library.check(source.annotations)
    notes = _size_notes(source.protocol, len(library.places) + len(library.missing), total, "captions")
    if empty := captions.count(""):
        notes += (f"{empty} captions are empty without their punctuation; they are compared all the same, as UMT does",)
    whole = RetrievalSet(
        source.name,
        tuple(library.places),
        tuple(captions),
        tuple(tuple(found) for found in places),
        library.missing,
        notes,
        source.protocol,
        source.annotations,
    )
    return whole if limit is None else _limited(whole, limit)


def _limited(whole: RetrievalSet, limit: int) -> RetrievalSet:
    """Evenly spaced videos, and the captions that belong to one of them."""
    kept = even_indices(len(whole.videos), limit)
    new = {old: place for place, old in enumerate(kept)}
    pairs = [
        (caption, places)
        for caption, old in zip(whole.captions, whole.videos_of_caption, strict=True)
        if (places := tuple(new[place] for place in old if place in new))
    ]
    return RetrievalSet(
        whole.name,
        tuple(whole.videos[place] for place in kept),
        tuple(caption for caption, _ in pairs),
        tuple(places for _, places in pairs),
        whole.missing,
        whole.notes,
        whole.protocol,
        whole.annotations,
    )


def _questions(source: _Source, rows: Sequence[object], limit: int | None) -> QaSet:
    library = _Library(source.videos)
    items: list[QaItem] = []
    own: set[str] = set()
    for number, values in enumerate(rows):
        row = _Row.of(source.annotations, number, values)
        question, answer, id_ = clean_text(row.text("question")), row.text("answer"), row.id()
        own.add(answer)
        path = library.find(row, row.text("video"))
        if path is not None:
            items.append(QaItem(id_, path, question, answer))
    library.check(source.annotations)
    answers, notes = _answers(source, own)
    kept = items if limit is None else [items[place] for place in even_indices(len(items), limit)]
    notes += _unanswerable(kept, answers)
    notes += _size_notes(source.protocol, len(library.known), len(rows), "questions")
    return QaSet(source.name, tuple(kept), answers, library.missing, notes, source.protocol, source.annotations)


def _answers(source: _Source, own: set[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The answers to choose from, and what is to be said of them."""
    if source.answers is None:
        note = f"no list of answers is given: the model chooses among the {len(own)} right ones of the annotations"
        return tuple(sorted(own)), (note,)
    values = _parse(_read_text(source.answers), source.answers, None)
    if not isinstance(values, list) or not values:
        raise DataError(f"{source.answers} holds no list of answers", 'It should be ["yes", "no", ...].')
    for number, value in enumerate(values):
        if not isinstance(value, str) or not value.strip():
            problem = "an empty text" if isinstance(value, str) else _kind(value)
            raise DataError(f"{_where(source.answers, number)} is no answer, but {problem}")
    return tuple(dict.fromkeys(values)), ()


def _unanswerable(items: Sequence[QaItem], answers: Iterable[str]) -> tuple[str, ...]:
    known = set(answers)
    count = sum(item.answer not in known for item in items)
    if not count:
        return ()
    return (f"the answers of {count} of {len(items)} questions are not among those to choose from, so count as wrong",)


def _size_notes(protocol: Protocol | None, videos: int, texts: int, what: str) -> tuple[str, ...]:
    if protocol is None:
        return ()
    pairs = ((videos, protocol.videos, "videos"), (texts, protocol.texts, what))
    return tuple(
        f"the annotations name {found} {things}; {protocol.name} ({protocol.split}) has about {usual}"
        for found, usual, things in pairs
        if usual is not None and abs(found - usual) > _SIZE_TOLERANCE * usual
    )
