"""Annotations of videos: which texts belong to which videos, and errors with file and row for invalid ones."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from repshift_cli.data.catalog import DATA_DIR_VARIABLE
from repshift_cli.data.video import annotations as annotations_module
from repshift_cli.data.video.annotations import (
    PROTOCOLS,
    QaSet,
    Question,
    RetrievalSet,
    VideoTextSet,
    clean_text,
    open_video_text,
)
from repshift_cli.data.video.dataset import VideoFiles
from repshift_cli.errors import DataError, RepshiftError, UsageError


@pytest.fixture(autouse=True)
def _no_data_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DATA_DIR_VARIABLE, raising=False)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Ten videos, a to j; nothing here decodes them."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in "abcdefghij":
        (folder / f"{name}.mp4").touch()
    return folder


def written(path: Path, rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def opened(tmp_path: Path, rows: object, **options: Any) -> RetrievalSet | QaSet:
    return open_video_text(annotations=written(tmp_path / "own.json", rows), videos=tmp_path / "videos", **options)


def retrieval(tmp_path: Path, rows: object, **options: Any) -> RetrievalSet:
    found = opened(tmp_path, rows, **options)
    assert isinstance(found, RetrievalSet)
    return found


def questions(tmp_path: Path, rows: object, **options: Any) -> QaSet:
    found = opened(tmp_path, rows, **options)
    assert isinstance(found, QaSet)
    return found


def paths(found: VideoTextSet) -> tuple[Path, ...]:
    assert isinstance(found.videos, VideoFiles)
    return found.videos.paths


def names(found: RetrievalSet) -> str:
    return "".join(path.stem for path in paths(found))


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("A Man's dog, running!", "a mans dog running"),
        ("well-known and/or   new", "well known and or new"),
        ("<PERSON> opens the door.", "person opens the door"),
        ("  (what?) #1: ~\n", "what 1"),
        ("...", ""),
        ("[something] & [that]", "[something] & [that]"),
    ],
)
def test_clean_text(text: str, cleaned: str) -> None:
    assert clean_text(text) == cleaned


@given(st.text())
def test_clean_text_is_clean(text: str) -> None:
    cleaned = clean_text(text)
    assert not set(cleaned) & set(",.'!?\"()*#:;~-/")
    assert "  " not in cleaned


def test_one_caption_each(tmp_path: Path, videos: Path) -> None:
    found = retrieval(tmp_path, [{"video": "b.mp4", "caption": "A dog."}, {"video": "a", "caption": "a cat"}])
    assert paths(found) == (videos / "b.mp4", videos / "a.mp4")
    assert found.captions == ("a dog", "a cat")
    assert found.videos_of_caption == ((0,), (1,))
    assert (found.name, found.missing, found.notes, found.protocol) == ("own", (), (), None)
    assert found.description == "own: 2 videos, 2 captions"


@pytest.mark.usefixtures("videos")
def test_many_captions_of_one_video(tmp_path: Path) -> None:
    rows = [
        {"video": "a", "caption": ["one", "two"]},
        {"video": "b", "caption": "three"},
        {"video": "a.mp4", "caption": "four"},
    ]
    found = retrieval(tmp_path, rows)
    assert names(found) == "ab"
    assert found.captions == ("one", "two", "three", "four")
    assert found.videos_of_caption == ((0,), (0,), (1,), (0,))


@pytest.mark.usefixtures("videos")
def test_many_videos_of_one_caption(tmp_path: Path) -> None:
    rows = [{"video": ["c.mp4", "a.mp4"], "caption": "one"}, {"video": ["b.mp4", "a.mp4", "x"], "caption": "two"}]
    found = retrieval(tmp_path, rows)
    assert names(found) == "cab"
    assert found.videos_of_caption == ((0, 1), (1, 2))
    assert found.missing == ("x",)


@pytest.mark.usefixtures("videos")
def test_equal_captions_are_not_merged(tmp_path: Path) -> None:
    found = retrieval(tmp_path, [{"video": name, "caption": "Same"} for name in "ab"])
    assert found.captions == ("same", "same")
    assert found.videos_of_caption == ((0,), (1,))


@pytest.mark.usefixtures("videos")
def test_a_paragraph_is_one_text(tmp_path: Path) -> None:
    rows = [{"video": "a", "caption": ["He sits.", "He stands."]}, {"video": "b", "caption": "She sits."}]
    assert retrieval(tmp_path, rows, paragraph=True).captions == ("he sits he stands", "she sits")
    assert len(retrieval(tmp_path, rows).captions) == 3


@pytest.mark.usefixtures("videos")
def test_captions_of_missing_videos_are_left_out(tmp_path: Path) -> None:
    rows = [{"video": name, "caption": f"about {name}"} for name in ("x", "b", "y", "a", "x")]
    found = retrieval(tmp_path, rows)
    assert found.missing == ("x", "y")
    assert found.captions == ("about b", "about a")
    assert found.videos_of_caption == ((0,), (1,))


def test_all_videos_missing(tmp_path: Path, videos: Path) -> None:
    with pytest.raises(DataError, match=r"none of the 4 videos of .* is in .*: x0, x1, x2, \.\.\.") as raised:
        opened(tmp_path, [{"video": f"x{index}", "caption": "text"} for index in range(4)])
    assert str(videos) in raised.value.message


@pytest.mark.usefixtures("videos")
def test_a_limit_keeps_all_captions_of_a_video(tmp_path: Path) -> None:
    rows = [{"video": name, "caption": [f"{name}1", f"{name}2"]} for name in "abcdefghij"]
    found = retrieval(tmp_path, [*rows, {"video": ["a", "b"], "caption": "both"}], limit=5)
    assert names(found) == "bdfhj"
    assert found.captions == ("b1", "b2", "d1", "d2", "f1", "f2", "h1", "h2", "j1", "j2", "both")
    assert retrieval(tmp_path, rows, limit=100) == retrieval(tmp_path, rows)


def test_questions(tmp_path: Path, videos: Path) -> None:
    rows = [
        {"video": "a", "question": "What is this?", "answer": "dog", "question_id": 7},
        {"video": "x", "question": "Who?", "answer": "man"},
        {"video": "a", "question": "How many?", "answer": "Two"},
    ]
    found = questions(tmp_path, rows)
    assert paths(found) == (videos / "a.mp4",)
    assert found.questions == (Question(0, "what is this", "dog"), Question(0, "how many", "Two"))
    assert found.answers == ("Two", "dog", "man")
    assert found.missing == ("x",)
    assert any("no list of answers" in note for note in found.notes)
    assert found.description == "own: 2 questions about 1 videos, 3 answers"
    assert [one.question for one in questions(tmp_path, rows, limit=1).questions] == ["how many"]


@pytest.mark.usefixtures("videos")
def test_questions_with_a_list_of_answers(tmp_path: Path) -> None:
    rows = [{"video": "a", "question": "q", "answer": answer} for answer in ("dog", "emu")]
    found = questions(tmp_path, rows, answers=written(tmp_path / "answers.json", ["man", "dog", "man"]))
    assert found.answers == ("man", "dog")
    assert found.notes == ("the answers of 1 of 2 questions are not in the list of answers: they are wrong",)


@pytest.mark.usefixtures("videos")
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"a": 1}, "is not a list of answers"),
        ([], "is not a list of answers"),
        (["a", 3], "row 1 .* is not an answer, but a number"),
        (["a", " "], "row 1 .* is not an answer, but an empty text"),
    ],
)
def test_damaged_answers(tmp_path: Path, content: object, reason: str) -> None:
    answers = written(tmp_path / "answers.json", content)
    with pytest.raises(DataError, match=rf"answers\.json.*{reason}"):
        opened(tmp_path, [{"video": "a", "question": "q", "answer": "a"}], answers=answers)


GOOD = {"video": "a", "caption": "text"}
ASKED = {"video": "a", "question": "q", "answer": "x"}


@pytest.mark.usefixtures("videos")
@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ({"video": "a"}, "is not a list of rows, but a mapping"),
        ("text", "is not a list of rows, but a text"),
        ([], "has no rows"),
        ([GOOD, 3], r"row 1 \(counted from 0\) is not a mapping, but a number"),
        ([GOOD, ["a"]], "row 1 .* is not a mapping, but a list"),
        ([GOOD, {"video": "a"}], "row 1 .*: there is no 'caption'"),
        ([GOOD, {"video": "a", "captions": "x"}], "row 1 .*: there is no 'caption', but 'captions'"),
        ([GOOD, {"caption": "x"}], "row 1 .*: there is no 'video'"),
        ([GOOD, {"video": "a", "caption": 3}], "row 1 .*: 'caption' is a number, not a text"),
        ([GOOD, {"video": "a", "caption": ["x", None]}], "row 1 .*: 'caption' is null, not a text"),
        ([GOOD, {"video": "a", "caption": {}}], "row 1 .*: 'caption' is a mapping, not a text"),
        ([GOOD, {"video": "a", "caption": " \n"}], "row 1 .*: 'caption' is empty"),
        ([GOOD, {"video": "a", "caption": []}], "row 1 .*: 'caption' is an empty list"),
        ([GOOD, {"video": "a", "caption": "\ud800"}], "row 1 .*: 'caption' has half of a surrogate pair"),
        ([GOOD, {"video": "", "caption": "x"}], "row 1 .*: 'video' is empty"),
        ([GOOD, {"video": True, "caption": "x"}], "row 1 .*: 'video' is a truth value"),
        ([GOOD, {"video": "../a", "caption": "x"}], "row 1 .*: the video name '../a' leads out"),
        ([GOOD, {"video": "/etc/passwd", "caption": "x"}], "row 1 .*leads out"),
        ([GOOD, {"video": "a" * 5000, "caption": "x"}], "row 1 .*is not a valid name"),
        ([ASKED, GOOD], "row 1 .*: there is no 'question'"),
        ([ASKED, {**ASKED, "answer": ["x"]}], "row 1 .*: 'answer' is a list, not a text"),
        ([ASKED, {**ASKED, "question": ""}], "row 1 .*: 'question' is empty"),
    ],
)
def test_damaged_annotations(tmp_path: Path, rows: object, reason: str) -> None:
    with pytest.raises(DataError, match=rf"own\.json.*{reason}") as raised:
        opened(tmp_path, rows)
    assert raised.value.exit_code == 4


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not JSON"),
        (b'[{"video": "a"', "is not JSON"),
        (b"\xff\xfe[]", "not UTF-8 text"),
        (b"[" * 200_000, "nested too deeply"),
        (b"[" + b"9" * 10_000 + b"]", "is not JSON|a number"),
        (None, "cannot be read: No such file"),
    ],
)
def test_files_that_are_not_json(tmp_path: Path, videos: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "own.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"own\.json.*({reason})"):
        open_video_text(annotations=path, videos=videos)


def test_a_fifo_and_a_device(tmp_path: Path, videos: Path) -> None:
    os.mkfifo(tmp_path / "fifo.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for name in ("fifo.json", "zero.json"):
        with pytest.raises(DataError, match="is not a regular file"):
            open_video_text(annotations=tmp_path / name, videos=videos)
        with pytest.raises(DataError, match="is not a regular file"):
            opened(tmp_path, [ASKED], answers=tmp_path / name)


@pytest.mark.parametrize("refused", ["videos", "a.mp4"])
def test_folders_without_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, videos: Path, refused: str
) -> None:
    usual = Path.stat

    def stat(self: Path, **options: Any) -> os.stat_result:
        if self.name == refused:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return usual(self, **options)

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(DataError, match="cannot be read: Permission denied") as raised:
        opened(tmp_path, [GOOD])
    assert raised.value.exit_code == 4


def test_too_large_a_file(tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotations_module, "_LARGEST_FILE", 10)
    with pytest.raises(DataError, match="more than the maximum"):
        open_video_text(annotations=written(tmp_path / "own.json", [GOOD]), videos=videos)


def test_json_lines(tmp_path: Path, videos: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"video": "a", "caption": "on\u2028e"}\n\n{"video": "b", "caption": "two"}\r\n', encoding="utf-8")
    found = open_video_text(annotations=path, videos=videos)
    assert isinstance(found, RetrievalSet)
    assert names(found) == "ab"
    path.write_text('{"video": "a", "caption": "one"}\n{"video": ', encoding="utf-8")
    with pytest.raises(DataError, match=r"own\.jsonl, row 1 \(counted from 0\) is not JSON"):
        open_video_text(annotations=path, videos=videos)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.sampled_from(["a", "b.mp4", "../a"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["video", "caption", "question", "answer", "question_id"]), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=JSON)
def test_any_json_is_a_set_or_a_repshift_error(tmp_path: Path, videos: Path, rows: object) -> None:
    try:
        found = open_video_text(annotations=written(tmp_path / "own.json", rows), videos=videos)
    except RepshiftError:
        return
    assert found.questions if isinstance(found, QaSet) else found.captions


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_every_protocol_is_found_by_its_names(tmp_path: Path, name: str) -> None:
    protocol = PROTOCOLS[name]
    folder = tmp_path / protocol.folders[0]
    folder.mkdir(parents=True)
    (folder / "a.mp4").touch()
    row = {"video": "a.webm", "question": "q", "answer": "yes"}
    row = row if protocol.kind == "qa" else {"video": "a.webm", "caption": "text"}
    written(tmp_path / "anno_downstream" / protocol.annotations[-1], [row])
    for file in protocol.answers:
        written(tmp_path / "anno_downstream" / file, ["no", "yes"])
    found = open_video_text(name, data_dir=tmp_path)
    assert (found.name, found.protocol, found.missing) == (name, protocol, ())
    assert any(f"{name} ({protocol.split}) has about" in note for note in found.notes)
    if isinstance(found, QaSet):
        assert found.answers == ("no", "yes")
    else:
        assert paths(found) == (folder / "a.mp4",)


def test_a_folder_of_several_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "didemo" / "didemo_ret_test.json", [{"video": "a.mp4", "caption": ["One.", "Two."]}])
    (tmp_path / "didemo" / "a.mov").touch()
    monkeypatch.setenv(DATA_DIR_VARIABLE, str(tmp_path))
    found = open_video_text("didemo")
    assert isinstance(found, RetrievalSet)
    assert paths(found) == (tmp_path / "didemo" / "a.mov",)
    assert found.captions == ("one two",)
    assert found.protocol is not None
    assert found.protocol.first_seconds == 30


def test_given_paths_precede_those_of_the_protocol(tmp_path: Path, videos: Path) -> None:
    annotations = written(tmp_path / "my.json", [{"video": "a", "caption": "x"}])
    found = open_video_text("msrvtt", annotations=annotations, videos=videos)
    assert isinstance(found, RetrievalSet)
    assert names(found) == "a"


def test_missing_files_of_a_protocol(tmp_path: Path, videos: Path) -> None:
    with pytest.raises(DataError, match=r"needs a folder\n.*--data-dir"):
        open_video_text("msvd")
    with pytest.raises(DataError, match=r"no annotations of msvd in .*\n.*msvd_ret_test\.json"):
        open_video_text("msvd", data_dir=tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        open_video_text("msvd", data_dir=tmp_path / "none")
    with pytest.raises(DataError, match=r"no video benchmark 'msrvt'\nDid you mean msrvtt\?"):
        open_video_text("msrvt", data_dir=tmp_path)
    for name, rows, there in (("msvd", [ASKED], "questions"), ("msvd-qa", [GOOD], "captions")):
        with pytest.raises(DataError, match=f"holds {there}"):
            open_video_text(name, annotations=written(tmp_path / "own.json", rows), videos=videos)


def test_invalid_combinations(tmp_path: Path, videos: Path) -> None:
    annotations = written(tmp_path / "own.json", [GOOD])
    with pytest.raises(UsageError, match="neither a benchmark nor annotations"):
        open_video_text(annotations=annotations)
    with pytest.raises(UsageError, match=r"--answers .* is not used"):
        open_video_text(annotations=annotations, videos=videos, answers=tmp_path / "answers.json")
    with pytest.raises(UsageError, match="invalid limit 0"):
        open_video_text(annotations=annotations, videos=videos, limit=0)
    with pytest.raises(DataError, match=r"folder of videos .* does not exist"):
        open_video_text(annotations=annotations, videos=tmp_path / "none")
