"""Preprocessing of images for a model: size, crop, interpolation, mean and standard deviation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from pydantic.json_schema import SkipJsonSchema

from repshift_cli.errors import CheckpointError
from repshift_cli.utils.documents import validated

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn

LARGEST_SIDE = 4096
"""Maximum side of an image in pixels; larger values in a file are invalid."""

_LARGEST_RESIZED = 2 * LARGEST_SIDE
"""Maximum side of an image before it is cropped."""

# far beyond those of any model, and valid in float32
_Mean = Annotated[float, Field(ge=-1e4, le=1e4, allow_inf_nan=False)]
_Deviation = Annotated[float, Field(ge=1e-6, le=1e4, allow_inf_nan=False)]
_Side = Annotated[int, Field(ge=1, le=LARGEST_SIDE)]

Interpolation = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]


@dataclass(frozen=True, config=ConfigDict(extra="ignore"))
class Preprocessing:
    """The evaluation transform of a model, as timm describes it.

    Attributes:
        input_size: channels, height and width; of a spectrogram 1, time and frequency.
        mean, std: one value per channel, of pixels in 0..1.
        interpolation: `bicubic`, `bilinear`, ...
        crop_pct: share of the resized side that the crop takes.
        crop_mode: `center`, `squash` or `border`.
        frames: frames of one clip; None for models of single images.
        frame_step: every frame of a clip is so many frames of the video after the one before; None if they are spread
            over the whole video.
        spectrogram: an input is a spectrogram, made by the feature extractor of the model; its values are used as they
            are.
        unstated: why mean and std are not known, empty if they are; not a part of documents.
    """

    input_size: tuple[Annotated[int, Field(ge=1, le=1024)], _Side, _Side]
    mean: tuple[_Mean, ...]
    std: tuple[_Deviation, ...]
    interpolation: Interpolation
    crop_pct: Annotated[float, Field(ge=0.1, le=4)]
    crop_mode: Literal["center", "squash", "border"] = "center"
    frames: Annotated[int, Field(ge=1, le=4096)] | None = None
    frame_step: Annotated[int, Field(ge=1, le=1024)] | None = None
    spectrogram: bool = False
    unstated: Annotated[SkipJsonSchema[str], Field(exclude=True)] = field(default="", compare=False)

    @model_validator(mode="after")
    def _check(self) -> Preprocessing:
        if not len(self.mean) == len(self.std) == self.input_size[0]:
            raise ValueError(f"mean and std should have {self.input_size[0]} values, one per channel")
        if max(self.input_size[1:]) / self.crop_pct > _LARGEST_RESIZED:
            raise ValueError(f"input_size / crop_pct should be at most {_LARGEST_RESIZED}")
        if self.spectrogram and (self.input_size[0] != 1 or self.frames is not None):
            raise ValueError("a spectrogram should have one channel and no frames")
        return self

    @property
    def unit(self) -> str:
        """Name of one input: `image`, `clip` or `spectrogram`."""
        return "spectrogram" if self.spectrogram else "image" if self.frames is None else "clip"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input: `(C, H, W)`, `(T, C, H, W)` for a clip, `(time, frequency)` for a spectrogram."""
        if self.spectrogram:
            return self.input_size[1:]
        return self.input_size if self.frames is None else (self.frames, *self.input_size)

    @classmethod
    def of_model(cls, model: nn.Module) -> Preprocessing:
        """From timm's configuration of a model, at the image size that the model was built for."""
        from timm.data import resolve_model_data_config

        config = resolve_model_data_config(model)
        # timm's configuration has the size of the pretrained weights, not the one that the model was built with
        if size := built_size(model):
            # the first convolution; `proj` of a hybrid reads the maps of another network
            embedding: Any = getattr(model, "patch_embed", None)
            parts = embedding.modules() if embedding is not None else ()
            counts = (part.in_channels for part in parts if hasattr(part, "in_channels"))
            config["input_size"] = (next(counts, config["input_size"][0]), *size)
        stated = getattr(model, "pretrained_cfg", None) or {}  # timm has no clips and no spectrograms
        own = {"frames": stated.get("frames"), "spectrogram": stated.get("spectrogram", False)}
        return cls.from_dict({**config, **own})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "the preprocessing of the model") -> Preprocessing:
        """From the keys of a timm data configuration; raises CheckpointError if one is missing or invalid."""
        return validated(cls, dict(values), where)

    def to_dict(self) -> dict[str, Any]:
        """The keys of a timm data configuration; `frames`, `frame_step` and `spectrogram` only if they are set."""
        values = asdict(self)
        del values["unstated"]
        return {key: value for key, value in values.items() if value is not None and value is not False}

    def require_stated(self) -> None:
        """Raise a CheckpointError if the statistics that images of the user need are not known."""
        if self.unstated:
            hint = "Add the file of its processor, give --mean and --std, or set them on the model in memory."
            raise CheckpointError(self.unstated, hint)

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """The transform of one RGB image, or one frame of a clip, to a float32 tensor `[C, H, W]`."""
        from timm.data import create_transform

        plain = replace(self, frames=None, frame_step=None, spectrogram=False)
        return create_transform(**plain.to_dict(), is_training=False)

    def __str__(self) -> str:
        channels, height, width = self.input_size
        if self.spectrogram:
            return f"spectrogram of {height} x {width} (time, frequency)"
        mean, std = (", ".join(f"{value:.3f}" for value in values) for values in (self.mean, self.std))
        step = "" if self.frame_step is None else f" ({self.frame_step} apart)"
        clip = "" if self.frames is None else f"{self.frames} frames{step} of "
        return (
            f"{clip}{height}x{width}x{channels}, {self.interpolation}, crop {self.crop_pct:g} ({self.crop_mode}), "
            f"mean {mean}, std {std}"
        )


def fixed_size(model: nn.Module) -> tuple[int, int] | None:
    """Height and width of the images that the model takes; None if it takes any size."""
    return None if getattr(model, "dynamic_img_size", False) else built_size(model)


def built_size(model: nn.Module) -> tuple[int, int] | None:
    """Height and width that the model was built for; None if it does not state them."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", getattr(model, "img_size", None))
    return None if size is None else (int(size[0]), int(size[1]))
