"""What a caller can say about the model in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PREPROCESSING = ("mean", "std", "crop_pct", "interpolation")
"""The fields that describe the preprocessing."""


@dataclass(frozen=True)
class LoadOptions:
    """What the user says about a model; None if the checkpoint decides.

    Attributes:
        model_name: name of the model, if the file has none.
        heads: attention heads, if neither a name nor a convention gives their number.
        img_size: side of the image: any for a convolutional network, else that of the weights.
        frames: frames per clip of a video model.
        checkpoint_frames: frames that the weights were trained on; positions are interpolated in time from these.
        fallback_name: the model that a recipe names. It is used if nothing else identifies the model and the weights
            fit it.
        mean, std: of pixels in 0..1, one value per channel or one for all.
        crop_pct, interpolation: as in `Preprocessing`; these four are for files that do not state their preprocessing.
    """

    model_name: str | None = None
    heads: int | None = None
    img_size: int | None = None
    frames: int | None = None
    checkpoint_frames: int | None = None
    fallback_name: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_pct: float | None = None
    interpolation: str | None = None

    @property
    def preprocessing(self) -> dict[str, Any]:
        """The given parts of the preprocessing."""
        return {key: value for key in PREPROCESSING if (value := getattr(self, key)) is not None}
