"""What a caller can say about the model in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from repshift_cli.utils.ranges import check_ranges


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
    """

    model_name: str | None = None
    heads: int | None = None
    img_size: int | None = None
    frames: int | None = None
    checkpoint_frames: int | None = None
    fallback_name: str | None = None

    def __post_init__(self) -> None:
        check_ranges(
            heads=self.heads,
            img_size=self.img_size,
            frames=self.frames,
            checkpoint_frames=self.checkpoint_frames,
        )
