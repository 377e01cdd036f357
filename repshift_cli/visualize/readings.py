"""Predictions of the dense and the compressed model for one image or clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Guess", "Reading"]


@dataclass(frozen=True)
class Guess:
    """A predicted class: its index, name and probability (0 to 1)."""

    label: int
    name: str
    probability: float

    def to_dict(self) -> dict[str, Any]:
        return {"class": self.label, "name": self.name, "probability": round(self.probability, 4)}


@dataclass(frozen=True)
class Reading:
    """Label and predictions of one image or clip.

    Attributes:
        sample: its path or name.
        label, label_name: the true class, None if unknown.
        dense, compressed: predictions, None if the model has no head.
        cosine: cosine similarity of the features of both models, if the model has no head.
    """

    sample: str
    label: int | None = None
    label_name: str | None = None
    dense: Guess | None = None
    compressed: Guess | None = None
    cosine: float | None = None

    @property
    def moved(self) -> float:
        """Change of the features: 1 - cosine."""
        return 0.0 if self.cosine is None else max(0.0, 1 - self.cosine)

    def to_dict(self) -> dict[str, Any]:
        """JSON entry of an image."""
        return {
            "image": self.sample,
            "label": self.label,
            "label_name": self.label_name,
            "dense": self.dense.to_dict() if self.dense else None,
            "compressed": self.compressed.to_dict() if self.compressed else None,
            "feature_cosine": None if self.cosine is None else round(self.cosine, 6),
        }

    def clip_to_dict(self) -> dict[str, Any]:
        """JSON entry of a clip."""
        return {"clip": self.sample, "features_moved": round(self.moved, 6)}
