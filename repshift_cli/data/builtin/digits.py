"""The built-in data: real handwritten digits in cluttered scenes.

The digits are the 1,797 handwritten digits of the UCI repository (Alpaydin and Kaynak, CC BY 4.0) as scikit-learn
ships them. A scene shows one whole digit at a random place, size and slant among fragments of other digits, on an
uneven and noisy background; the label is the whole digit, as in cluttered MNIST (Mnih et al. 2014).

Scene `i` depends only on the split and the seed, so any subset, order or number of workers gives the same images.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Literal

import numpy as np
from PIL import Image

from repshift_cli.data.dataset import ImageDataset
from repshift_cli.utils.ranges import check_ranges

Split = Literal["train", "test"]

SCENE_SIZE = 72
"""Side of a scene in pixels."""

_SPLIT_SEED = 2025
_TRAIN_SHARE = 0.75
_DIGIT_SIZES = (16, 24)
_FRAGMENTS = (6, 10)
_TRIES = 10
_SPLIT_STREAM = {"train": 0, "test": 1}


@lru_cache(maxsize=2)
def load_digits(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """The digits of one split; no digit is in both.

    Returns:
        images: uint8 `[n, 8, 8]`, 0 is background.
        labels: int64 `[n]`, 0 to 9.
    """
    with files("repshift_cli").joinpath("assets/digits.npz").open("rb") as handle:
        archive = np.load(handle, allow_pickle=False)
        images, labels = archive["images"], archive["labels"].astype(np.int64)
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(images))
    border = int(len(images) * _TRAIN_SHARE)
    chosen = np.sort(order[:border] if split == "train" else order[border:])
    return images[chosen], labels[chosen]


@dataclass(frozen=True)
class Placed:
    """A whole digit in a scene: its label and its square in pixels."""

    label: int
    left: int
    top: int
    side: int


class DigitScenes:
    """Scenes as a map-style dataset: `scenes[i]` is `(RGB image, label)`.

    Args:
        split: digits to draw from.
        count: number of scenes.
        seed: another seed gives other scenes of the same digits.
        whole: whole digits in each scene. More than one is for training only, which is several times faster with it.
    """

    classes = tuple(str(digit) for digit in range(10))

    def __init__(self, split: Split = "test", count: int = 1000, seed: int = 0, whole: int = 1) -> None:
        self.split: Split = split
        self.count = count
        self.seed = seed
        self.whole = whole
        self.images, self.labels = load_digits(split)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        scene, placed = self.render(index)
        return Image.fromarray(scene).convert("RGB"), placed[-1].label

    def render(self, index: int) -> tuple[np.ndarray, list[Placed]]:
        """Draw one scene, uint8 `[SCENE_SIZE, SCENE_SIZE]`, and its whole digits; the last one is never covered."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, _SPLIT_STREAM[self.split], index])
        scene = _background(rng)
        for _ in range(rng.integers(*_FRAGMENTS)):
            _paste(scene, _fragment(self.images[rng.integers(len(self.images))], rng), *_place(rng))
        placed: list[Placed] = []
        for _ in range(self.whole):
            chosen = rng.integers(len(self.images))
            digit = _slanted(self.images[chosen], int(rng.integers(*_DIGIT_SIZES)), rng)
            left, top = _paste(scene, digit, *_free_place(placed, digit.shape[0], rng), clear=True)
            placed.append(Placed(int(self.labels[chosen]), left, top, digit.shape[0]))
        scene += rng.normal(0.0, 10.0, scene.shape).astype(np.float32)
        return np.clip(scene, 0, 255).astype(np.uint8), placed


class DigitDataset(ImageDataset):
    """The scenes as a dataset of the command line, named `builtin:digits`."""

    def __init__(self, split: Split, count: int, seed: int) -> None:
        check_ranges(images=count)
        self.name = "builtin:digits"
        self.scenes = DigitScenes(split, count, seed)

    @property
    def description(self) -> str:
        scenes = self.scenes
        return f"{len(scenes)} built-in {scenes.split} scenes of handwritten digits, drawn with seed {scenes.seed}"

    @property
    def classes(self) -> tuple[str, ...]:
        return self.scenes.classes

    def __len__(self) -> int:
        return len(self.scenes)

    def sample_id(self, index: int) -> str:
        return f"{self.name}/{self.scenes.split}/{self.scenes.seed}/{index}"

    def load(self, index: int) -> tuple[Image.Image, int]:
        return self.scenes[index]


def _background(rng: np.random.Generator) -> np.ndarray:
    """A gradient of grey, float32 `[SCENE_SIZE, SCENE_SIZE]`."""
    axis = np.linspace(-1.0, 1.0, SCENE_SIZE, dtype=np.float32)
    slope_x, slope_y = rng.uniform(-25.0, 25.0, 2)
    wave: np.ndarray = (40.0 + slope_x * axis[None, :] + slope_y * axis[:, None]).astype(np.float32)
    return wave


def _place(rng: np.random.Generator) -> tuple[float, float]:
    """A place in the scene, x and y in 0..1."""
    x, y = rng.random(2)
    return float(x), float(y)


def _free_place(placed: list[Placed], side: int, rng: np.random.Generator) -> tuple[float, float]:
    """A place where a square of `side` pixels covers no other digit, if one is found in a few tries."""
    room = SCENE_SIZE - side + 1
    for _ in range(_TRIES):
        x, y = _place(rng)
        left, top = int(x * room), int(y * room)
        if not any(
            left < other.left + other.side
            and other.left < left + side
            and top < other.top + other.side
            and other.top < top + side
            for other in placed
        ):
            break
    return x, y


def _slanted(digit: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """The digit enlarged to `side` pixels with a little rotation and shear, float32 `[side, side]`."""
    angle, shear, scale = rng.uniform(-0.25, 0.25), rng.uniform(-0.2, 0.2), 8.0 / side
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
    matrix = (cos, sin + shear * scale, 0.0, -sin, cos, 0.0)
    centre = (side - 1) / 2
    shift_x = 3.5 - matrix[0] * centre - matrix[1] * centre
    shift_y = 3.5 - matrix[3] * centre - matrix[4] * centre
    affine = (matrix[0], matrix[1], shift_x, matrix[3], matrix[4], shift_y)
    image = Image.fromarray(digit).transform(
        (side, side), Image.Transform.AFFINE, affine, resample=Image.Resampling.BICUBIC
    )
    bright: np.ndarray = np.asarray(image, dtype=np.float32) * np.float32(rng.uniform(0.75, 1.0))
    return bright


def _fragment(digit: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A piece of a digit, too small to be recognised: float32, 7 to 11 pixels per side."""
    slanted = _slanted(digit, int(rng.integers(*_DIGIT_SIZES)), rng)
    height, width = rng.integers(7, 12, 2)
    top, left = (int(rng.integers(0, slanted.shape[0] - size + 1)) for size in (height, width))
    return slanted[top : top + height, left : left + width]


def _paste(scene: np.ndarray, piece: np.ndarray, x: float, y: float, clear: bool = False) -> tuple[int, int]:
    """Draw `piece` at the relative place (x, y), keeping the brighter pixel; `clear` dims the scene below it."""
    height, width = piece.shape
    left, top = int(x * (SCENE_SIZE - width + 1)), int(y * (SCENE_SIZE - height + 1))
    below = scene[top : top + height, left : left + width]
    if clear:
        np.minimum(below, 60.0, out=below)
    np.maximum(below, piece, out=below)
    return left, top
