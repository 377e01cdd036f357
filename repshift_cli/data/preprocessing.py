"""Preprocessing of images for a model: size, crop, interpolation, mean and standard deviation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from repshift_cli.errors import CheckpointError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn

LARGEST_SIDE = 16384
"""Maximum side of an image in pixels; larger values in a file are invalid."""

MOST_FRAMES = 4096
"""Maximum number of frames of a clip; larger values in a file are invalid."""

_LARGEST_CROP = 10
_LARGEST, _SMALLEST = 1e4, 1e-6
"""Limits of means and deviations of pixels in 0..1: far beyond those of any model, and valid in float32."""

_INTERPOLATIONS = frozenset({"nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"})
_CROP_MODES = frozenset({"center", "squash", "border"})


@dataclass(frozen=True)
class Preprocessing:
    """The evaluation transform of a model, as timm describes it.

    Attributes:
        input_size: channels, height and width.
        mean, std: one value per channel, of pixels in 0..1.
        interpolation: `bicubic`, `bilinear`, ...
        crop_pct: share of the resized side that the crop takes.
        crop_mode: `center`, `squash` or `border`.
        frames: frames of one clip; None for models of single images.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str = "center"
    frames: int | None = None

    @property
    def unit(self) -> str:
        """Name of one input: `image` or `clip`."""
        return "image" if self.frames is None else "clip"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input: `(C, H, W)`, or `(T, C, H, W)` for a clip."""
        return self.input_size if self.frames is None else (self.frames, *self.input_size)

    @classmethod
    def of_model(cls, model: nn.Module) -> Preprocessing:
        """From timm's configuration of a model, at the image size that the model was built for."""
        from timm.data import resolve_model_data_config

        config = resolve_model_data_config(model)
        # timm's configuration has the size of the pretrained weights, not the one that the model was built with
        if size := fixed_size(model):
            projection = getattr(getattr(model, "patch_embed", None), "proj", None)
            config["input_size"] = (getattr(projection, "in_channels", config["input_size"][0]), *size)
        frames = (getattr(model, "pretrained_cfg", None) or {}).get("frames")  # timm has no clips
        return cls.from_dict({**config, "frames": frames})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """From the keys of a timm data configuration.

        Raises:
            CheckpointError: a key is missing or has an invalid value.
        """
        try:
            channels, height, width = (int(size) for size in values["input_size"])
            found = cls(
                input_size=(channels, height, width),
                mean=tuple(float(value) for value in values["mean"]),
                std=tuple(float(value) for value in values["std"]),
                interpolation=str(values["interpolation"]),
                crop_pct=float(values["crop_pct"]),
                crop_mode=str(values.get("crop_mode", "center")),
                frames=None if values.get("frames") is None else int(values["frames"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"the preprocessing of the model cannot be read: {error!r}") from error
        found._check()
        return found

    def _check(self) -> None:
        """Raise CheckpointError for values that no model has and that would need too much time or memory."""
        valid = {
            "input_size": self.input_size[0] >= 1 and all(1 <= side <= LARGEST_SIDE for side in self.input_size[1:]),
            "mean": len(self.mean) == self.input_size[0] and all(abs(value) <= _LARGEST for value in self.mean),
            "std": len(self.std) == self.input_size[0] and all(_SMALLEST <= value <= _LARGEST for value in self.std),
            "interpolation": self.interpolation in _INTERPOLATIONS,
            "crop_mode": self.crop_mode in _CROP_MODES,
            "crop_pct": 0 < self.crop_pct <= _LARGEST_CROP,
            "frames": self.frames is None or 1 <= self.frames <= MOST_FRAMES,
        }
        for key, fine in valid.items():
            if not fine:
                raise CheckpointError(f"the preprocessing of the model has an invalid {key}: {getattr(self, key)}")

    def to_dict(self) -> dict[str, Any]:
        """The keys of a timm data configuration; `frames` only for clips."""
        return {key: value for key, value in asdict(self).items() if key != "frames" or value is not None}

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """The transform of one RGB image, or one frame of a clip, to a float32 tensor `[C, H, W]`."""
        from timm.data import create_transform

        return create_transform(**replace(self, frames=None).to_dict(), is_training=False)

    def __str__(self) -> str:
        channels, height, width = self.input_size
        mean, std = (", ".join(f"{value:.3f}" for value in values) for values in (self.mean, self.std))
        clip = "" if self.frames is None else f"{self.frames} frames of "
        return (
            f"{clip}{height}x{width}x{channels}, {self.interpolation}, crop {self.crop_pct:g} ({self.crop_mode}), "
            f"mean {mean}, std {std}"
        )


def fixed_size(model: nn.Module) -> tuple[int, int] | None:
    """Height and width of the images that the model takes; None if it takes any size."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", getattr(model, "img_size", None))
    return None if size is None else (int(size[0]), int(size[1]))
