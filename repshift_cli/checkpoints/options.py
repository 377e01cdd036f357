"""What a caller can say about the model in a checkpoint."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from repshift_cli.errors import UsageError
from repshift_cli.utils.ranges import RANGES, check_ranges

PREPROCESSING = ("mean", "std", "crop_pct", "interpolation")
"""The fields that describe the preprocessing."""

_WORDS = {"true": True, "false": False, "null": None}

WeightsKind = Literal["raw", "ema"]
"""The weights of a training checkpoint: as trained, or averaged over the training steps."""


class ImageSize(NamedTuple):
    """Height and width of the images of a model."""

    height: int
    width: int

    @classmethod
    def parse(cls, text: str) -> ImageSize:
        """From `N` or `HEIGHTxWIDTH`; raises UsageError for other texts."""
        if not re.fullmatch(r"[0-9]{1,9}(x[0-9]{1,9})?", text):
            raise UsageError(f"invalid --img-size {text}: must be N or HEIGHTxWIDTH, such as 224 or 256x128")
        height, _, width = text.partition("x")
        return cls.of((int(height), int(width or height)))

    @classmethod
    def of(cls, size: int | tuple[int, int]) -> ImageSize:
        """The size of square images, or of any; raises UsageError if it is out of range."""
        found = cls(size, size) if isinstance(size, int) else cls(*size)
        low, high = RANGES["img_size"]
        if not all(low <= side <= high for side in found):
            raise UsageError(f"invalid --img-size {found}", f"Allowed are {low} to {high}.")
        return found

    @property
    def argument(self) -> int | list[int]:
        """The value of the argument `img_size` of a builder."""
        return self.height if self.height == self.width else list(self)

    def square(self, what: str) -> int:
        """The side of square images; raises UsageError for others."""
        if self.height != self.width:
            raise UsageError(f"--img-size {self}: {what} takes square images only", "Give one number.")
        return self.height

    def __str__(self) -> str:
        return "x".join(map(str, self[: 1 + (self.height != self.width)]))


def parse_model_args(pairs: Iterable[str]) -> dict[str, Any] | None:
    """Arguments of a builder from texts `key=value`: numbers, true, false, null, lists, other texts as they are.

    Raises:
        UsageError: a text has another form.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier() or key in found:
            raise UsageError(
                f"invalid --model-args {pair}: must be key=value, once per key", "Such as global_pool=avg."
            )
        value: Any = text
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            value = _WORDS[text] if text in _WORDS else ast.literal_eval(text)
        try:
            found[key] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise UsageError(f"invalid --model-args {pair}: {error}", "Allowed are JSON values and texts.") from error
    return found or None


@dataclass(frozen=True)
class LoadOptions:
    """What the user says about a model; None if the checkpoint decides.

    Attributes:
        model_name: name of the model, if the file has none.
        heads: attention heads, if neither a name nor a convention gives their number.
        img_size: side, or height and width, of the images: any for a convolutional network, else that of the weights.
        frames: frames per clip of a video model.
        checkpoint_frames: frames that the weights were trained on; positions are interpolated in time from these.
        frame_step: as in `Preprocessing`, for models of clips.
        fallback_name: the model that a recipe names. It is used if nothing else identifies the model and the weights
            fit it.
        weights: which weights of a file that holds both; the averaged ones by default.
        mean, std: of pixels in 0..1, one value per channel or one for all.
        crop_pct, interpolation: as in `Preprocessing`; these four are for files that do not state their preprocessing.
        model_args: arguments of the builder of the model, in place of those of the file.
        tower: the part of a larger model to load, such as `vision` for `vision_config`.
    """

    model_name: str | None = None
    heads: int | None = None
    img_size: int | tuple[int, int] | None = None
    frames: int | None = None
    checkpoint_frames: int | None = None
    frame_step: int | None = None
    fallback_name: str | None = None
    weights: WeightsKind | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_pct: float | None = None
    interpolation: str | None = None
    model_args: Mapping[str, Any] | None = None
    tower: str | None = None

    def __post_init__(self) -> None:
        clip = {"frames": self.frames, "checkpoint_frames": self.checkpoint_frames, "frame_step": self.frame_step}
        check_ranges(heads=self.heads, **clip)

    @property
    def size(self) -> ImageSize | None:
        """The image size; raises UsageError if it is out of range."""
        return None if self.img_size is None else ImageSize.of(self.img_size)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """The given parts of the preprocessing."""
        keys = (*PREPROCESSING, "frame_step")
        return {key: value for key in keys if (value := getattr(self, key)) is not None}
