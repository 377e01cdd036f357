"""The built-in videos: two coloured shapes that move or stand still over a dark cluttered background.

A clip shows two objects that differ in shape and in colour; each moves left, right, up or down, or does not move. Grey
shapes and noise that never move lie below them, so that most of a frame does not matter for a caption. A caption ("a
red circle moves left and a blue square stays still") and questions with one word for an answer describe the clip, as in
the files of text-video retrieval and video question answering.

Scene `i` of a seed does not depend on other scenes, and all lengths are fractions of the frame's side, so one scene can
be drawn at any size and number of frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from repshift_cli.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

SHAPES = ("circle", "square", "triangle", "cross", "ring", "star", "diamond", "bar")

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
COLOURS = tuple(_RGB)

_DIRECTION = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "nowhere": (0, 0)}
MOTIONS = tuple(_DIRECTION)
"""Each motion by the word that answers "where does it move"."""

ANSWERS = SHAPES + COLOURS + MOTIONS
"""Every answer to a question; their order gives the classes of a question-answering model."""

TRAIN_SEED, TEST_SEED = 0, 1
"""Seeds of training and of test scenes."""

DISTINCT = len(SHAPES) * (len(SHAPES) - 1) * len(COLOURS) * (len(COLOURS) - 1) * len(MOTIONS) ** 2 // 2
"""Number of scenes with different captions, where the order of the objects does not count."""

# fractions of the frame's side
_SIZES = (0.26, 0.34)
_TRAVEL = (0.36, 0.58)
_DISTRACTOR_SIZES = (0.10, 0.20)

_DISTRACTORS = (3, 7)
_GREYS = (55, 105)

_GRIDS = ((5, 34.0), (16, 16.0))
"""Cells per side and brightness of the background's noise: blobs and texture."""

_TRIES = 40
_MOMENTS = 7
"""Moments of a clip at which the distance of the two objects is checked."""


@dataclass(frozen=True)
class Moving:
    """One object; lengths are fractions of the frame's side, x grows to the right and y downwards.

    Attributes:
        shape: one of `SHAPES`.
        colour: one of `COLOURS`.
        motion: one of `MOTIONS`.
        start: centre (x, y) in the first frame.
        size: side of the square that holds the shape.
        travel: distance of the centre from the first frame to the last, at constant speed.
    """

    shape: str
    colour: str
    motion: str
    start: tuple[float, float]
    size: float
    travel: float

    def centres(self, frames: int) -> np.ndarray:
        """The centre in every frame, float64 `[frames, 2]`."""
        return np.array(self.start) + np.linspace(0.0, self.travel, frames)[:, None] * np.array(_DIRECTION[self.motion])


@dataclass(frozen=True)
class Scene:
    """Two objects, in the order of the caption.

    Attributes:
        objects: they differ in shape and in colour; where they overlap, the second covers the first.
        background: seed of the background.
    """

    objects: tuple[Moving, Moving]
    background: int


class Question(NamedTuple):
    """A question of lower-case words without a question mark, and its answer, one of `ANSWERS`."""

    question: str
    answer: str


def draw_scene(seed: int | Sequence[int] | np.random.Generator) -> Scene:
    """Draw a random scene; the same seed gives the same scene."""
    rng = np.random.default_rng(seed)
    shapes = rng.permutation(len(SHAPES))[:2]
    colours = rng.permutation(len(COLOURS))[:2]
    motions = rng.integers(len(MOTIONS), size=2)
    for _ in range(_TRIES):
        first, second = (
            _place(SHAPES[shape], COLOURS[colour], MOTIONS[motion], rng)
            for shape, colour, motion in zip(shapes, colours, motions, strict=True)
        )
        distances = np.abs(first.centres(_MOMENTS) - second.centres(_MOMENTS)).max(axis=1)
        if distances.min() >= 0.45 * (first.size + second.size):  # the squares overlap at most by a narrow strip
            break
    return Scene((first, second), int(rng.integers(2**31)))


def scene(index: int, seed: int) -> Scene:
    """Scene number `index` of a seed; another scene may have the same caption."""
    return draw_scene([seed, index, 0])


def scenes(count: int, seed: int) -> list[Scene]:
    """The first `count` scenes of a seed, each drawn again until its caption differs from all earlier ones.

    The order of the two objects does not make a caption different.

    Raises:
        UsageError: there are fewer different captions.
    """
    if count > DISTINCT:
        raise UsageError(f"{count} scenes cannot all differ in their captions", f"Ask for {DISTINCT} at most.")
    seen: set[frozenset[str]] = set()
    drawn = []
    for index in range(count):
        attempt = 0
        found = scene(index, seed)
        while (content := frozenset(map(_phrase, found.objects))) in seen:
            attempt += 1
            found = draw_scene([seed, index, attempt])
        seen.add(content)
        drawn.append(found)
    return drawn


def caption(scene: Scene) -> str:
    """The caption, such as "a red circle moves left and an orange square stays still"."""
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
    """A question about shape or colour, which one frame answers, and one about motion; chosen by the background."""
    color1, shape1, motion1, motion2, color2, shape2, motion3, motion4 = questions(scene)
    look, motion = np.random.default_rng(scene.background).integers(4, size=2)
    return (color1, shape1, color2, shape2)[look], (motion1, motion2, motion3, motion4)[motion]


@contextmanager
def vocabulary_file() -> Iterator[Path]:
    """The BERT vocabulary of all captions, questions and answers, one token on a line, `[PAD]` first."""
    with as_file(files("repshift_cli").joinpath("assets/shapes_vocab.txt")) as path:
        yield path


def render(scene: Scene, frames: int = 6, size: int = 48) -> np.ndarray:
    """Draw a scene.

    Returns:
        uint8 `[frames, size, size, 3]`, RGB.
    """
    clip = np.repeat(_background(scene.background, size)[None], frames, axis=0)
    for one in scene.objects:
        _paint(clip, one.shape, one.centres(frames), one.size, np.array(_RGB[one.colour], np.float32))
    return (clip + 0.5).astype(np.uint8)


def _phrase(one: Moving) -> str:
    article = "an" if one.colour[0] in "aeiou" else "a"
    verb = "stays still" if one.motion == "nowhere" else f"moves {one.motion}"
    return f"{article} {one.colour} {one.shape} {verb}"


def _place(shape: str, colour: str, motion: str, rng: np.random.Generator) -> Moving:
    """An object of random size and speed, which stays in the frame."""
    size = float(rng.uniform(*_SIZES))
    travel = 0.0 if motion == "nowhere" else float(rng.uniform(*_TRAVEL))
    x, y = (
        size / 2 + (travel if step < 0 else 0.0) + float(rng.random()) * (1.0 - size - travel * abs(step))
        for step in _DIRECTION[motion]
    )
    return Moving(shape, colour, motion, (x, y), size, travel)


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
        _paint(ground[None], shape, centre, side, grey)
    return ground


def _interpolation(cells: int, size: int) -> np.ndarray:
    """The weights of linear interpolation from `cells` points to `size` pixels, float32 `[size, cells]`."""
    places = np.linspace(0.0, cells - 1.0, size, dtype=np.float32)
    weights: np.ndarray = np.clip(1.0 - np.abs(places[:, None] - np.arange(cells, dtype=np.float32)), 0.0, 1.0)
    return weights


def _paint(clip: np.ndarray, shape: str, centres: np.ndarray, side: float, colour: np.ndarray | np.float32) -> None:
    """Draw a shape with antialiased outline into float32 frames `[T, H, W, 3]`, in place.

    Args:
        shape: one of `SHAPES`.
        centres: the shape's centre (x, y) in each frame, `[T, 2]`.
        side: its size as a fraction of the frame's.
        colour: RGB, or one grey.
    """
    size = clip.shape[1]
    # only the columns and rows that the shape touches: most of the frame is background
    columns, rows = (_lane(centres[:, axis], side, size) for axis in (0, 1))
    pixels = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    middle = centres.astype(np.float32)
    half = np.float32(side / 2)
    x = (pixels[columns] - middle[:, :1])[:, None, :] / half
    y = (pixels[rows] - middle[:, 1:])[:, :, None] / half
    outside = _distance(shape, x, y) * np.float32(half * size)
    cover = np.clip(np.float32(0.5) - outside, 0.0, 1.0)[..., None]
    below = clip[:, rows, columns]
    below += cover * (colour - below)


def _lane(centres: np.ndarray, side: float, size: int) -> slice:
    """The pixels of one axis that an object of `side` can touch on its way through `centres` `[T]`."""
    low, high = centres.min() - side / 2, centres.max() + side / 2
    return slice(max(int(low * size) - 1, 0), min(int(high * size) + 2, size))


def _distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance `[T, H, W]` to the outline of a shape in the square from -1 to 1, negative inside.

    Args:
        x: coordinates to the right, `[T, 1, W]`.
        y: coordinates downwards, `[T, H, 1]`.
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
            # all ten edges are folded onto the one from the tip (1, 0) to the notch
            tip, notch = np.pi / 5, 0.42
            angle = np.abs((np.arctan2(x, -y) + tip) % (2 * tip) - tip)
            radius = np.hypot(x, y)
            step_x, step_y = notch * np.cos(tip) - 1.0, notch * np.sin(tip)
            along_edge = (radius * np.cos(angle) - 1.0) * step_y - radius * np.sin(angle) * step_x
            distance = along_edge / np.hypot(step_x, step_y)
        case "diamond":
            distance = (across / np.float32(0.7) + along - 1.0) / np.float32(np.hypot(1.0 / 0.7, 1.0))
        case _:
            distance = np.maximum(across - 1.0, along - 0.3)
    return distance


def scene_tensor(frames: np.ndarray, transform: Callable[[Image.Image], Tensor]) -> Tensor:
    """Preprocess rendered frames, uint8 `[T, H, W, 3]`, to float32 `[T, C, H, W]`."""
    import torch
    from PIL import Image

    return torch.stack([transform(Image.fromarray(frame)) for frame in frames])
