"""Predictions of a model for one image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = [
    "Guess",
    "Reading",
]


@dataclass(frozen=True)
class Guess:
    """A predicted class: its number, its name, and the probability that the model gives it (0 to 1)."""

    label: int
    name: str
    probability: float

    def to_dict(self) -> dict[str, Any]:
        return {"class": self.label, "name": self.name, "probability": round(self.probability, 4)}


@dataclass(frozen=True)
class Reading:
    """What is said beside one picture or clip.

    Attributes:
        sample: path or name of it.
        label, label_name: the true class, None where it is not known.
        dense, compressed: the predictions, None where the model has no head.
        cosine: likeness of the features of the two, where the model has no head.
    """

    sample: str
    label: int | None = None
    label_name: str | None = None
    dense: Guess | None = None
    compressed: Guess | None = None
    cosine: float | None = None

    @property
    def moved(self) -> float:
        """How far the features moved: one minus their cosine."""
        return 0.0 if self.cosine is None else max(0.0, 1 - self.cosine)

    def to_dict(self) -> dict[str, Any]:
        """Of a picture, for JSON."""
        return {
            "image": self.sample,
            "label": self.label,
            "label_name": self.label_name,
            "dense": self.dense.to_dict() if self.dense else None,
            "compressed": self.compressed.to_dict() if self.compressed else None,
            "feature_cosine": None if self.cosine is None else round(self.cosine, 6),
        }

    def clip_to_dict(self) -> dict[str, Any]:
        """Of a clip, for JSON."""
        return {"clip": self.sample, "features_moved": round(self.moved, 6)}
