"""The built-in videos: equal for equal seeds, matching their captions, and preserved by a video encoder."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from _shape_videos import write_clip, write_dataset

from repshift_cli.data.builtin.moving_shapes import (
    ANSWERS,
    COLOURS,
    DISTINCT,
    MOTIONS,
    SHAPES,
    TEST_SEED,
    TRAIN_SEED,
    Moving,
    Scene,
    caption,
    draw_scene,
    questions,
    render,
    scene,
    scenes,
    two_questions,
    vocabulary_file,
)
from repshift_cli.errors import UsageError

STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "nowhere": (0, 0)}


@pytest.fixture(scope="module")
def thousand() -> list[Scene]:
    return scenes(1000, TEST_SEED)


def alone(one: Moving) -> Scene:
    """A scene with one visible object; the other is outside of the frame."""
    return Scene((Moving("bar", "green", "nowhere", (9.0, 9.0), 0.3, 0.0), one), 5)


def seen(one: Moving, frames: int = 6, size: int = 48) -> np.ndarray:
    """Which pixels an object changes, bool `[T, H, W]`."""
    return (render(alone(one), frames, size) != render(alone(alone(one).objects[0]), frames, size)).any(axis=-1)


def test_a_scene_depends_on_its_number_and_seed_only() -> None:
    assert scene(3, 7) == scene(3, 7) == draw_scene(np.random.default_rng([7, 3, 0]))
    assert scene(3, 7) != scene(3, 8)
    assert scene(3, 7) != scene(4, 7)
    assert scene(0, TRAIN_SEED) != scene(0, TEST_SEED)
    np.testing.assert_array_equal(render(scene(3, 7)), render(scene(3, 7)))


def test_fewer_scenes_are_the_beginning_of_more(thousand: list[Scene]) -> None:
    assert scenes(100, TEST_SEED) == thousand[:100]


def test_captions_are_distinct_in_either_order(thousand: list[Scene]) -> None:
    assert len({frozenset(caption(one).split(" and ")) for one in thousand}) == len(thousand)


@pytest.mark.slow
def test_a_repeated_caption_is_drawn_anew() -> None:
    drawn = [frozenset(caption(scene(index, 0)).split(" and ")) for index in range(2000)]
    assert len(set(drawn)) < len(drawn)
    assert len({frozenset(caption(one).split(" and ")) for one in scenes(2000, 0)}) == len(drawn)


def test_more_scenes_than_captions_are_refused() -> None:
    with pytest.raises(UsageError, match="captions"):
        scenes(DISTINCT + 1, 0)


def test_objects_differ_and_stay_in_the_frame(thousand: list[Scene]) -> None:
    for one in thousand:
        first, second = one.objects
        assert first.shape != second.shape
        assert first.colour != second.colour
        for item in one.objects:
            centres = item.centres(6)
            assert (centres >= item.size / 2 - 1e-9).all()
            assert (centres <= 1 - item.size / 2 + 1e-9).all()


def test_objects_move_by_their_motion(thousand: list[Scene]) -> None:
    for item in (item for one in thousand for item in one.objects):
        way = item.centres(6)[-1] - item.centres(6)[0]
        np.testing.assert_allclose(way, item.travel * np.array(STEPS[item.motion]), atol=1e-9)
        assert item.travel >= 1 / 3 or item.motion == "nowhere"


def test_objects_rarely_overlap(thousand: list[Scene]) -> None:
    def nearest(one: Scene) -> float:
        first, second = (item.centres(25) for item in one.objects)
        return float(np.abs(first - second).max(axis=1).min() / sum(item.size / 2 for item in one.objects))

    assert np.mean([nearest(one) < 0.8 for one in thousand]) < 0.02


def test_shapes_colours_and_motions_are_about_equally_frequent(thousand: list[Scene]) -> None:
    items = [item for one in thousand for item in one.objects]
    for values, name in ((SHAPES, "shape"), (COLOURS, "colour"), (MOTIONS, "motion")):
        counts = Counter(getattr(item, name) for item in items)
        assert set(counts) == set(values)
        assert max(counts.values()) < 1.5 * min(counts.values())


@pytest.mark.parametrize("motion", MOTIONS)
def test_pixels_move_by_the_motion(motion: str) -> None:
    step = np.array(STEPS[motion])
    mask = seen(Moving("circle", "red", motion, tuple(0.5 - 0.2 * step), 0.3, 0.4 * bool(step.any())))
    places = np.array([np.argwhere(frame).mean(axis=0)[::-1] for frame in mask]) / 48
    np.testing.assert_allclose(places[-1] - places[0], 0.4 * step, atol=0.01)
    np.testing.assert_allclose(np.diff(places, axis=0), np.tile(0.08 * step, (5, 1)), atol=0.02)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_fills_exactly_its_square(shape: str) -> None:
    mask = seen(Moving(shape, "white", "nowhere", (0.5, 0.5), 0.5, 0.0), 1, 96)[0]
    rows, columns = np.argwhere(mask).T
    for places in (rows, columns):
        assert places.min() >= 23
        assert places.max() <= 72
    assert max(np.ptp(rows), np.ptp(columns)) >= 40


def test_all_shapes_differ() -> None:
    masks = [seen(Moving(shape, "white", "nowhere", (0.5, 0.5), 0.3, 0.0), 1)[0] for shape in SHAPES]
    for place, mask in enumerate(masks):
        for other in masks[:place]:
            assert (mask ^ other).sum() > 0.15 * min(mask.sum(), other.sum())


@pytest.mark.parametrize(("frames", "size"), [(6, 48), (1, 32), (24, 96)])
def test_clips_have_any_size(frames: int, size: int) -> None:
    clip = render(scene(0, TEST_SEED), frames, size)
    assert clip.shape == (frames, size, size, 3)
    assert clip.dtype == np.uint8


def test_colours_and_the_second_object_is_in_front() -> None:
    below = Moving("square", "red", "nowhere", (0.5, 0.5), 0.3, 0.0)
    above = Moving("circle", "white", "nowhere", (0.5, 0.5), 0.15, 0.0)
    clip = render(Scene((below, above), 0))
    np.testing.assert_array_equal(clip[0, 24, 24], (245, 245, 245))
    np.testing.assert_array_equal(clip[0, 24, 19], (225, 35, 40))


def test_the_background_is_dark_and_still() -> None:
    clip = render(alone(Moving("bar", "red", "nowhere", (9.0, 9.0), 0.3, 0.0)))
    assert clip.max() <= 110
    assert clip.std() > 5
    assert (clip == clip[:1]).all()


def test_texts_of_captions_and_questions() -> None:
    example = Scene(
        (
            Moving("circle", "orange", "left", (0.8, 0.2), 0.3, 0.4),
            Moving("square", "blue", "nowhere", (0.3, 0.7), 0.3, 0.0),
        ),
        0,
    )
    assert caption(example) == "an orange circle moves left and a blue square stays still"
    assert questions(example)[:4] == [
        ("what color is the circle", "orange"),
        ("what shape is orange", "circle"),
        ("where does the circle move", "left"),
        ("where does the orange shape move", "left"),
    ]
    assert ("where does the square move", "nowhere") in questions(example)


def test_answers_are_in_the_list_and_fit_the_question(thousand: list[Scene]) -> None:
    assert len(set(ANSWERS)) == len(ANSWERS) == 21
    for one in thousand[:200]:
        asked = questions(one)
        assert {answer for _, answer in asked} <= set(ANSWERS)
        assert len({question for question, _ in asked}) == 8


def test_two_questions_are_about_appearance_and_motion(thousand: list[Scene]) -> None:
    chosen = [two_questions(one) for one in thousand]
    assert all(look.question.startswith("what") and look.answer not in MOTIONS for look, _ in chosen)
    assert all(motion.question.startswith("where") and motion.answer in MOTIONS for _, motion in chosen)
    assert all(set(pair) <= set(questions(one)) for pair, one in zip(chosen, thousand, strict=True))
    assert chosen == [two_questions(one) for one in thousand]


def test_the_vocabulary_has_every_word_once(thousand: list[Scene]) -> None:
    with vocabulary_file() as path:
        tokens = path.read_text(encoding="utf-8").splitlines()
    assert tokens[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(set(tokens)) == len(tokens)
    texts = [text for one in thousand for text in (caption(one), *(question for question, _ in questions(one)))]
    assert set(tokens[5:]) == {word for text in (*texts, *ANSWERS) for word in text.split()}


def decoded(path: Path) -> np.ndarray:
    av = pytest.importorskip("av")
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_a_video_keeps_its_frames(tmp_path: Path) -> None:
    pytest.importorskip("av")
    clip = render(scene(0, TEST_SEED), 24, 96)
    write_clip(clip, tmp_path / "clip.mp4")
    back = decoded(tmp_path / "clip.mp4")
    assert back.shape == clip.shape
    error = np.abs(back.astype(int) - clip)
    assert error.mean() < 3
    # Chroma has half the resolution, so outlines have the largest error.
    assert np.percentile(error, 99) < 40
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


def test_a_failed_video_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("av")
    with pytest.raises(ValueError, match="float"):
        write_clip(np.zeros((2, 48, 48, 3), np.float64), tmp_path / "clip.mp4")
    assert not list(tmp_path.iterdir())


def test_odd_sides_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("av")
    with pytest.raises(UsageError, match="47x48"):
        write_clip(np.zeros((2, 48, 47, 3), np.uint8), tmp_path / "clip.mp4")


def test_without_pyav_the_error_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UsageError, match=r"repshift-cli\[video\]"):
        write_clip(np.zeros((2, 48, 48, 3), np.uint8), tmp_path / "clip.mp4")


def test_a_dataset_has_the_files_of_umt(tmp_path: Path) -> None:
    pytest.importorskip("av")
    folder = tmp_path / "set"
    write_dataset(folder, 3, TEST_SEED, frames=6, size=48)
    names = ["00000.mp4", "00001.mp4", "00002.mp4"]
    assert sorted(path.name for path in folder.iterdir()) == ["answers.json", "qa.json", "retrieval.json", "videos"]
    assert sorted(path.name for path in (folder / "videos").iterdir()) == names

    retrieval, asked, answers = (
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("retrieval", "qa", "answers")
    )
    drawn = scenes(3, TEST_SEED)
    assert retrieval == [{"video": name, "caption": caption(one)} for name, one in zip(names, drawn, strict=True)]
    assert answers == list(ANSWERS)
    assert [set(one) for one in asked] == [{"question_id", "video", "question", "answer"}] * 6
    assert [one["question_id"] for one in asked] == list(range(6))
    assert [one["video"] for one in asked] == [name for name in names for _ in range(2)]
    assert [(one["question"], one["answer"]) for one in asked[:2]] == list(two_questions(drawn[0]))
    for name, one in zip(names, drawn, strict=True):
        error = np.abs(decoded(folder / "videos" / name).astype(int) - render(one))
        assert error.mean() < 6


def test_a_dataset_is_not_mixed_with_another(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    with pytest.raises(UsageError, match="already exists"):
        write_dataset(tmp_path, 1, TEST_SEED, frames=2, size=48)
