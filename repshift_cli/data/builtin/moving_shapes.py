"""The built-in videos: two coloured shapes that move, or do not, over a dark cluttered background.

A clip shows two objects that differ in shape and in colour; each glides left, right, up or down, or stays where it is.
Grey shapes and blobs that never move lie below them, so that most of a frame is of no use to a caption. What is seen
is told by a caption ("a red circle moves left and a blue square stays still") and by questions with one word for an
answer, as the files of text-video retrieval and video question answering have them.

Scene `i` of a seed depends on nothing else, and all lengths are parts of the frame's side, so one scene can be drawn
at any size and number of frames.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from repshift_cli.errors import UsageError
from repshift_cli.utils.files import atomic_output, write_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL import Image
    from torch import Tensor


__all__ = [
    "ANSWERS",
    "COLOURS",
    "DISTINCT",
    "MOTIONS",
    "SHAPES",
    "TEST_SEED",
    "TRAIN_SEED",
    "Moving",
    "Question",
    "Scene",
    "caption",
    "draw_scene",
    "questions",
    "render",
    "scene",
    "scene_tensor",
    "scenes",
    "two_questions",
    "vocabulary_file",
    "write_clip",
    "write_dataset",
]


SHAPES = ("circle", "square", "triangle", "cross", "ring", "star", "diamond", "bar")


COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan", "orange", "white")


MOTIONS = ("left", "right", "up", "down", "nowhere")
"""Ways to move, each by the word that answers "where does it move"."""


ANSWERS = SHAPES + COLOURS + MOTIONS
"""Every answer to a question; their order gives the classes of a model that answers."""


TRAIN_SEED, TEST_SEED = 0, 1
"""Seeds of scenes to train on and to test on: no random number is shared between two seeds."""


_PAIRS = len(SHAPES) * (len(SHAPES) - 1) * len(COLOURS) * (len(COLOURS) - 1) * len(MOTIONS) ** 2


DISTINCT = _PAIRS // 2
"""How many scenes a caption can tell apart, whichever object it names first."""


_RGB = {
    "red": (225, 35, 40),
    "green": (35, 170, 55),
    "blue": (45, 85, 235),
    "yellow": (245, 225, 40),
    "purple": (165, 50, 200),
    "cyan": (60, 215, 225),
    "orange": (250, 135, 20),
    "white": (245, 245, 245),
}


_DIRECTION = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "nowhere": (0, 0)}


_SIZES = (0.26, 0.34)


_TRAVEL = (0.36, 0.58)


_TRIES = 40


_MOMENTS = 7


_DISTRACTORS = (3, 7)


_DISTRACTOR_SIZES = (0.10, 0.20)


_GREYS = (55, 105)


_GRIDS = ((5, 34.0), (16, 16.0))
"""Cells a side and brightness of the background's noise, from blobs to texture."""


@dataclass(frozen=True)
class Moving:
    """One object; lengths are parts of the frame's side, x grows to the right and y downwards.

    Attributes:
        shape: one of `SHAPES`.
        colour: one of `COLOURS`.
        motion: one of `MOTIONS`.
        start: centre (x, y) in the first frame.
        size: side of the square that holds the shape.
        travel: how far the centre goes from the first frame to the last; the speed is even.
    """

    shape: str
    colour: str
    motion: str
    start: tuple[float, float]
    size: float
    travel: float

    def centres(self, frames: int) -> np.ndarray:
        """The centre in every frame, float64 `[frames, 2]`."""
        way = np.linspace(0.0, self.travel, frames)[:, None] * np.array(_DIRECTION[self.motion])
        return np.array(self.start) + way


@dataclass(frozen=True)
class Scene:
    """Two objects, in the order of the caption.

    Attributes:
        objects: they differ in shape and in colour; where they meet, the second covers the first.
        background: seed of what lies below them.
    """

    objects: tuple[Moving, Moving]
    background: int


class Question(NamedTuple):
    """A question of lower-case words without a question mark, and its answer, one of `ANSWERS`."""

    question: str
    answer: str


def draw_scene(seed: int | Sequence[int] | np.random.Generator) -> Scene:
    """A random scene; the same one for the same number or numbers, none of them negative."""
    rng = np.random.default_rng(seed)
    shapes = rng.permutation(len(SHAPES))[:2]
    colours = rng.permutation(len(COLOURS))[:2]
    motions = rng.integers(len(MOTIONS), size=2)
    looks = [
        (SHAPES[shape], COLOURS[colour], MOTIONS[motion])
        for shape, colour, motion in zip(shapes, colours, motions, strict=True)
    ]
    for _ in range(_TRIES):
        first, second = _placed(*looks[0], rng), _placed(*looks[1], rng)
        if not _meet(first, second):
            break
    return Scene((first, second), int(rng.integers(2**31)))


def scene(index: int, seed: int) -> Scene:
    """Scene number `index` of a seed, without a look at whether another one has its caption."""
    return draw_scene([seed, index, 0])


def scenes(count: int, seed: int) -> list[Scene]:
    """The first `count` scenes of a seed, drawn anew where they would say what an earlier one says.

    No two captions tell of the same two objects, in either order. Fewer scenes are the beginning of more.

    Raises:
        UsageError: there are not so many captions.
    """
    if count > DISTINCT:
        raise UsageError(f"{count} scenes cannot all differ in their captions", f"Ask for {DISTINCT} at most.")
    seen: set[frozenset[str]] = set()
    drawn = []
    for index in range(count):
        attempt = 0
        while (content := frozenset(map(_phrase, (one := draw_scene([seed, index, attempt])).objects))) in seen:
            attempt += 1
        seen.add(content)
        drawn.append(one)
    return drawn


def caption(scene: Scene) -> str:
    """What a scene shows, such as "a red circle moves left and an orange square stays still"."""
    return " and ".join(map(_phrase, scene.objects))


def questions(scene: Scene) -> list[Question]:
    """All questions about a scene: four about the first object, then the same four about the second."""
    return [
        question
        for one in scene.objects
        for question in (
            Question(f"what color is the {one.shape}", one.colour),
            Question(f"what shape is {one.colour}", one.shape),
            Question(f"where does the {one.shape} move", one.motion),
            Question(f"where does the {one.colour} shape move", one.motion),
        )
    ]


def two_questions(scene: Scene) -> tuple[Question, Question]:
    """One question about a look, which a single frame answers, and one about a motion; chosen by the background."""
    asked = questions(scene)
    look, motion = np.random.default_rng(scene.background).integers(4, size=2)
    looks, motions = ([asked[kind + start] for start in (0, 4) for kind in kinds] for kinds in ((0, 1), (2, 3)))
    return looks[look], motions[motion]


@contextmanager
def vocabulary_file() -> Iterator[Path]:
    """The BERT vocabulary of all captions, questions and answers, one token on a line, `[PAD]` first."""
    with as_file(files("repshift_cli").joinpath("assets").joinpath("shapes_vocab.txt")) as path:
        yield path


def render(scene: Scene, frames: int = 6, size: int = 48) -> np.ndarray:
    """Draw a scene.

    Returns:
        uint8 `[frames, size, size, 3]`, RGB.
    """
    clip = np.repeat(_background(scene.background, size)[None], frames, axis=0)
    for one in scene.objects:
        # Only the lanes that the object passes through are drawn: most of the frame is background.
        centres = one.centres(frames)
        columns, rows = (_lane(centres[:, axis], one.size, size) for axis in (0, 1))
        cover = _coverage(one.shape, centres, one.size, size, (columns, rows))[..., None]
        below = clip[:, rows, columns]
        below += cover * (np.array(_RGB[one.colour], np.float32) - below)
    return (clip + 0.5).astype(np.uint8)


def write_clip(frames: np.ndarray, path: Path, rate: int = 8) -> None:
    """Encode frames as an H.264 video in an MP4 file, in place of what lies there; nothing half written is left.

    Args:
        frames: uint8 `[T, H, W, 3]`, RGB, of even height and width.
        path: the file.
        rate: frames a second.

    Raises:
        UsageError: PyAV is not installed, or a side is odd.
        OutputError: the file cannot be written.
    """
    try:
        import av
    except ImportError as error:
        raise UsageError("videos need PyAV", "Install it with: pip install 'repshift-cli[video]'") from error
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise UsageError(f"a video of {width}x{height} pixels cannot be encoded", "Choose even sides.")
    with atomic_output(path, force=True) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "8", "preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))


def write_dataset(folder: Path, count: int, seed: int, frames: int, size: int) -> None:
    """Write scenes with distinct captions as videos, with annotations in the form that UMT reads.

    The folder, made where it is missing, gets `videos/*.mp4`; `retrieval.json`, a caption for each video; `qa.json`,
    two questions for each; and `answers.json`, the list of all answers.

    Raises:
        UsageError: the folder has videos already, or as `scenes` and `write_clip`.
        OutputError: a file cannot be written.
    """
    drawn = scenes(count, seed)
    videos = folder / "videos"
    try:
        videos.mkdir(parents=True)
    except FileExistsError as error:
        raise UsageError(f"{videos} already exists", "Choose another folder.") from error
    retrieval: list[dict[str, str]] = []
    asked: list[dict[str, str | int]] = []
    for index, one in enumerate(drawn):
        name = f"{index:05d}.mp4"
        write_clip(render(one, frames, size), videos / name)
        retrieval.append({"video": name, "caption": caption(one)})
        for question, answer in two_questions(one):
            asked.append({"question_id": len(asked), "video": name, "question": question, "answer": answer})
    for file, content in (("retrieval.json", retrieval), ("qa.json", asked), ("answers.json", list(ANSWERS))):
        write_text(folder / file, json.dumps(content, indent=1) + "\n", force=True)


def _phrase(one: Moving) -> str:
    article = "an" if one.colour[0] in "aeiou" else "a"
    verb = "stays still" if one.motion == "nowhere" else f"moves {one.motion}"
    return f"{article} {one.colour} {one.shape} {verb}"


def _placed(shape: str, colour: str, motion: str, rng: np.random.Generator) -> Moving:
    """An object of random size and speed, whose whole path lies in the frame."""
    size = float(rng.uniform(*_SIZES))
    travel = 0.0 if motion == "nowhere" else float(rng.uniform(*_TRAVEL))
    x, y = (
        size / 2 + (travel if step < 0 else 0.0) + float(rng.random()) * (1.0 - size - travel * abs(step))
        for step in _DIRECTION[motion]
    )
    return Moving(shape, colour, motion, (x, y), size, travel)


def _meet(first: Moving, second: Moving) -> bool:
    """Whether the two squares come to overlap by more than a narrow strip."""
    apart = np.abs(first.centres(_MOMENTS) - second.centres(_MOMENTS)).max(axis=1)
    return bool(apart.min() < 0.45 * (first.size + second.size))


def _background(seed: int, size: int) -> np.ndarray:
    """Dark coloured noise with grey shapes on it, float32 `[size, size, 3]`."""
    rng = np.random.default_rng(seed)
    ground = np.full((size, size, 3), 12.0, np.float32)
    for cells, bright in _GRIDS:
        weights = _interpolation(cells, size)
        noise = rng.random((3, cells, cells), dtype=np.float32) * np.float32(bright)
        ground += (weights @ noise @ weights.T).transpose(1, 2, 0)
    for _ in range(rng.integers(*_DISTRACTORS)):
        shape, grey = SHAPES[rng.integers(len(SHAPES))], np.float32(rng.uniform(*_GREYS))
        side, centre = float(rng.uniform(*_DISTRACTOR_SIZES)), rng.random((1, 2))
        columns, rows = (_lane(centre[:, axis], side, size) for axis in (0, 1))
        below = ground[rows, columns]
        below += _coverage(shape, centre, side, size, (columns, rows))[0, ..., None] * (grey - below)
    return ground


def _interpolation(cells: int, size: int) -> np.ndarray:
    """The weights of linear interpolation from `cells` points to `size` pixels, float32 `[size, cells]`."""
    places = np.linspace(0.0, cells - 1.0, size, dtype=np.float32)
    weights: np.ndarray = np.clip(1.0 - np.abs(places[:, None] - np.arange(cells, dtype=np.float32)), 0.0, 1.0)
    return weights


def _lane(centres: np.ndarray, side: float, size: int) -> slice:
    """The pixels of one axis that an object of `side` can touch on its way through `centres` `[T]`."""
    low, high = centres.min() - side / 2, centres.max() + side / 2
    return slice(max(int(low * size) - 1, 0), min(int(high * size) + 2, size))


def _coverage(shape: str, centres: np.ndarray, side: float, size: int, lanes: tuple[slice, slice]) -> np.ndarray:
    """How much of each pixel a shape covers, 0 to 1, by the distance of the pixel's centre to its outline.

    Args:
        shape: one of `SHAPES`.
        centres: the shape's centre in each frame `[T, 2]`, x and y.
        side: its size as a part of the frame's.
        size: pixels a side.
        lanes: the columns and the rows to look at.

    Returns:
        float32 `[T, rows, columns]`.
    """
    columns, rows = lanes
    pixels = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    middle = centres.astype(np.float32)
    half = np.float32(side / 2)
    x = (pixels[columns] - middle[:, :1])[:, None, :] / half
    y = (pixels[rows] - middle[:, 1:])[:, :, None] / half
    outside = _distance(shape, x, y) * np.float32(half * size)
    cover: np.ndarray = np.clip(np.float32(0.5) - outside, 0.0, 1.0)
    return cover


def _distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The distance to a shape's outline near it, negative inside; the shape lies in the square from -1 to 1.

    Args:
        shape: one of `SHAPES`.
        x: places to the right `[T, 1, W]`.
        y: places downwards `[T, H, 1]`.

    Returns:
        `[T, H, W]`.
    """
    across, along = np.abs(x), np.abs(y)
    distance: np.ndarray
    match shape:
        case "circle":
            distance = np.hypot(x, y) - 0.95
        case "square":
            distance = np.maximum(across, along) - 0.85
        case "triangle":
            distance = np.maximum((1.8 * across - (y + 1.0)) / np.float32(np.hypot(1.8, 1.0)), y - 0.8)
        case "cross":
            distance = np.minimum(np.maximum(across - 1.0, along - 0.3), np.maximum(across - 0.3, along - 1.0))
        case "ring":
            distance = np.abs(np.hypot(x, y) - 0.78) - 0.22
        case "star":
            distance = _star_distance(x, y)
        case "diamond":
            distance = (across / np.float32(0.7) + along - 1.0) / np.float32(np.hypot(1.0 / 0.7, 1.0))
        case _:
            distance = np.maximum(across - 1.0, along - 0.3)
    return distance


def _star_distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """As `_distance`, of a star with five points: all ten edges are folded onto one."""
    tip, notch = np.pi / 5, 0.42
    angle = np.abs((np.arctan2(x, -y) + tip) % (2 * tip) - tip)
    radius = np.hypot(x, y)
    # One edge, from the tip (1, 0) to the notch.
    step_x, step_y = notch * np.cos(tip) - 1.0, notch * np.sin(tip)
    length = np.hypot(step_x, step_y)
    distance: np.ndarray = ((radius * np.cos(angle) - 1.0) * step_y - radius * np.sin(angle) * step_x) / length
    return distance


def scene_tensor(frames: object, transform: Callable[[Image.Image], Tensor]) -> Tensor:
    """Rendered frames, uint8 `[T, H, W, 3]`, as the model takes them: float32 `[T, C, H, W]`."""
    import numpy as np
    import torch
    from PIL import Image

    return torch.stack([transform(Image.fromarray(frame)) for frame in np.asarray(frames)])
