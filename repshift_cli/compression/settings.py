"""Settings of a compression job."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from repshift_cli.checkpoints.identify import Clips
from repshift_cli.checkpoints.loaded import LoadedModel
from repshift_cli.models.attention_mode import AttentionMode
from repshift_cli.reduction.families.base import Family

__all__ = [
    "Amounts",
    "Settings",
]


_HEAVY_MACS = 20_000_000_000


@dataclass(frozen=True)
class Settings:
    """How to compress and measure.

    Attributes:
        recipe: file or shipped name; None for the default schedule.
        target: what a search is to reach (`macs=0.65`), in place of the layers of the recipe; None for its own budget
            or its layers.
        output: where the checkpoint goes; None to write none.
        data: pictures on which agreement is measured (folder or dataset); None for built-in scenes.
        calibration: pictures for calibration; None for `data`, or built-in scenes where the model is built in.
        calibrate: whether open fields of the metric are calibrated at all.
        calibration_images, agreement_images, batch_size: None for the `_Amounts` that suit the model.
        seconds: time for the latency measurement.
        attention: what is to compute attention while a search looks and while both sides are measured; the file that
            is written does not depend on it.
    """

    recipe: str | None = None
    target: str | None = None
    model_name: str | None = None
    heads: int | None = None
    img_size: int | None = None
    clips: Clips = field(default_factory=Clips)
    output: Path | None = None
    data: str | None = None
    calibration: str | None = None
    calibrate: bool = True
    calibration_images: int | None = None
    agreement_images: int | None = None
    device: str = "cpu"
    dtype: str = "float32"
    batch_size: int | None = None
    seconds: float = 10.0
    attention: AttentionMode = "auto"
    seed: int = 0
    force: bool = False


@dataclass(frozen=True)
class Amounts:
    """How many inputs serve what: a clip of a large video model is as much work as a hundred pictures.

    Attributes:
        batch: at a time.
        agreement: for the comparison with the dense model.
        calibration: for calibration.
    """

    batch: int = 8
    agreement: int = 32
    calibration: int = 128

    @classmethod
    def of(cls, settings: Settings, loaded: LoadedModel, family: Family) -> Amounts:
        """What the user asks for, else what suits the model."""
        clips = loaded.description.preprocessing.frames is not None
        usual = cls(1, 4, 32) if clips and family.macs(loaded.model, None) > _HEAVY_MACS else cls()
        return cls(
            settings.batch_size or usual.batch,
            settings.agreement_images or usual.agreement,
            settings.calibration_images or usual.calibration,
        )
