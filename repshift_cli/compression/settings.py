"""Settings of a compression job."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from repshift_cli.checkpoints.loaded import LoadedModel
from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.models.attention_mode import AttentionMode
from repshift_cli.reduction.families.base import match
from repshift_cli.search.target import SearchTarget
from repshift_cli.utils.ranges import check_ranges

_HEAVY_MACS = 20_000_000_000


@dataclass(frozen=True)
class Settings:
    """How to compress and measure.

    Attributes:
        recipe: file or shipped name; None for the default schedule.
        metric, reducer: kinds in place of those of the recipe.
        target: target of a search (`macs=0.65`) that replaces the layers of the recipe; None for the recipe's own
            budget or layers.
        limit: limit of quality (`max-drop=1`) for the schedule that a search for a cost finds.
        load: what the user says about the model.
        output: path of the checkpoint; None to write none.
        data: images for the comparison of predictions (folder or dataset); None for built-in scenes.
        calibration: images for calibration; None for `data`, or built-in scenes for a built-in model.
        calibrate: whether open fields of the metric are calibrated.
        recover: passes over the calibration images that train norms, biases and the last layer; None for no training.
        calibration_images, agreement_images, batch_size: None for the `Amounts` of the model.
        seconds: time for the latency measurement.
        attention: implementation of attention during search and measurement; the written file does not depend on it.
    """

    recipe: str | None = None
    metric: str | None = None
    reducer: str | None = None
    target: SearchTarget | None = None
    limit: SearchTarget | None = None
    load: LoadOptions = field(default_factory=LoadOptions)
    output: Path | None = None
    data: str | None = None
    calibration: str | None = None
    class_order: str | None = None
    calibrate: bool = True
    recover: int | None = None
    calibration_images: int | None = None
    agreement_images: int | None = None
    device: str = "cpu"
    dtype: str = "float32"
    batch_size: int | None = None
    seconds: float = 10.0
    attention: AttentionMode = "auto"
    seed: int = 0
    force: bool = False

    def __post_init__(self) -> None:
        check_ranges(batch_size=self.batch_size, seconds=self.seconds, seed=self.seed)
        check_ranges(calibration_images=self.calibration_images or None, recover=self.recover)


@dataclass(frozen=True)
class Amounts:
    """Numbers of inputs: per batch, for the comparison with the dense model, and for calibration."""

    batch: int = 8
    agreement: int = 32
    calibration: int = 128

    @classmethod
    def of(cls, settings: Settings, loaded: LoadedModel) -> Amounts:
        """The numbers of the user, else those for the model: a clip costs a large model as much as 100 images."""
        clips = loaded.description.preprocessing.frames is not None
        heavy = clips and match(loaded.model).macs(loaded.model, None) > _HEAVY_MACS
        usual = cls(1, 4, 32) if heavy else cls()
        return cls(
            settings.batch_size or usual.batch,
            settings.agreement_images or usual.agreement,
            settings.calibration_images or usual.calibration,
        )
