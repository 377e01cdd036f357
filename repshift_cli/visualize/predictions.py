"""Predictions of the dense and the compressed model for one sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Prediction:
    """The predicted class, with its probability (0 to 1)."""

    label: int
    name: str
    probability: float

    def to_dict(self) -> dict[str, Any]:
        return {"class": self.label, "name": self.name, "probability": round(self.probability, 4)}


@dataclass(frozen=True)
class SampleResult:
    """Results for one image or clip.

    Attributes:
        sample: its path or name.
        label, label_name: the true class, None if unknown.
        dense, compressed: predictions of the two models, None without a head.
        cosine: cosine similarity of the features of the two models, None with a head.
    """

    sample: str
    label: int | None = None
    label_name: str | None = None
    dense: Prediction | None = None
    compressed: Prediction | None = None
    cosine: float | None = None

    @property
    def moved(self) -> float:
        """Distance of the features: one minus their cosine similarity."""
        return 0.0 if self.cosine is None else max(0.0, 1 - self.cosine)

    def to_dict(self, of_clip: bool) -> dict[str, Any]:
        if of_clip:
            return {"clip": self.sample, "features_moved": round(self.moved, 6)}
        return {
            "image": self.sample,
            "label": self.label,
            "label_name": self.label_name,
            "dense": self.dense.to_dict() if self.dense else None,
            "compressed": self.compressed.to_dict() if self.compressed else None,
            "feature_cosine": None if self.cosine is None else round(self.cosine, 6),
        }
