"""What changed between two runs over the same pictures, and whether that is more than chance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repshift_cli.errors import DataError
from repshift_cli.evaluation.classification.predictions import Predictions
from repshift_cli.utils.stats import mcnemar, paired_difference, percent_interval

__all__ = ["ClassFlips", "Comparison", "Side", "compare_predictions"]


@dataclass(frozen=True)
class Side:
    """What one run reached on the pictures that both have.

    Attributes:
        model: what it was called.
        images: how many pictures.
        top1_correct, top5_correct: how many had a right answer first, or among the first five.
    """

    model: str
    images: int
    top1_correct: int
    top5_correct: int

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"model": self.model}
        for key, correct in (("top1", self.top1_correct), ("top5", self.top5_correct)):
            found[key] = 100.0 * correct / self.images
            found[f"{key}_interval"] = list(percent_interval(correct, self.images))
            found[f"{key}_correct"] = correct
        return found


@dataclass(frozen=True)
class ClassFlips:
    """Pictures of one class: how many, and of how many the second run lost or won the right answer."""

    name: str
    images: int
    lost: int
    won: int


@dataclass(frozen=True)
class Comparison:
    """Two runs over the same pictures.

    Attributes:
        first, second: what each reached.
        images: pictures that both have.
        only_first, only_second: pictures that one of them lacks, because it could not read them, for example.
        same: pictures that both put into the same class.
        lost: pictures that the first has right and the second wrong.
        won: the reverse.
        other: pictures that both have wrong, but not alike.
        classes: those with a change, the most changed first.
    """

    first: Side
    second: Side
    images: int
    only_first: int
    only_second: int
    same: int
    lost: int
    won: int
    other: int
    classes: tuple[ClassFlips, ...]

    @property
    def difference(self) -> float:
        """Points of top-1 by which the second is above the first."""
        return 100.0 * (self.won - self.lost) / self.images

    @property
    def difference_interval(self) -> tuple[float, float]:
        """95% interval of `difference`, from the pictures that changed."""
        low, high = paired_difference(self.lost, self.won, self.images)
        return 100.0 * low, 100.0 * high

    @property
    def p_value(self) -> float:
        """Of McNemar's exact test of whether as many were lost as won."""
        return mcnemar(self.lost, self.won)

    def to_dict(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "only_first": self.only_first,
            "only_second": self.only_second,
            "first": self.first.to_dict(),
            "second": self.second.to_dict(),
            "difference": self.difference,
            "difference_interval": list(self.difference_interval),
            "mcnemar_p": self.p_value,
            "agreement": self.same / self.images,
            "agreement_interval": [share / 100.0 for share in percent_interval(self.same, self.images)],
            "lost": self.lost,
            "won": self.won,
            "other_changes": self.other,
            "classes": [vars(entry) for entry in self.classes],
        }


def compare_predictions(first: Predictions, second: Predictions) -> Comparison:
    """Compare two runs on the pictures that both have.

    Raises:
        DataError: they have no picture in common, or do not agree on what is right.
    """
    _, ours, theirs = np.intersect1d(first.ids, second.ids, assume_unique=True, return_indices=True)
    if len(ours) == 0:
        raise DataError(
            "the two files have no picture in common",
            "Compare runs over one dataset; pictures are told by their names.",
        )
    one, other = _chosen(first, ours), _chosen(second, theirs)
    _check_answers(one, other)
    right, still = one.right, other.right
    same = one.top[:, 0] == other.top[:, 0]
    return Comparison(
        first=_side(one),
        second=_side(other),
        images=len(one),
        only_first=len(first) - len(one),
        only_second=len(second) - len(other),
        same=int(same.sum()),
        lost=int((right & ~still).sum()),
        won=int((~right & still).sum()),
        other=int((~right & ~still & ~same).sum()),
        classes=_by_class(one, right & ~still, ~right & still),
    )


def _chosen(predictions: Predictions, places: NDArray[np.intp]) -> Predictions:
    return Predictions(
        predictions.ids[places],
        predictions.answers[places],
        predictions.top[places],
        predictions.probabilities[places],
        predictions.meta,
    )


def _side(predictions: Predictions) -> Side:
    right, in_five = int(predictions.right.sum()), int(predictions.right_in_five.sum())
    return Side(str(predictions.meta.get("model")), len(predictions), right, in_five)


def _check_answers(one: Predictions, other: Predictions) -> None:
    """Refuse runs that were judged by different labels: their difference would not be one of the models."""
    width = max(one.answers.shape[1], other.answers.shape[1])
    ours, theirs = (_filled(each.answers, width) for each in (one, other))
    differing = np.flatnonzero((ours != theirs).any(axis=1))
    if len(differing):
        raise DataError(
            f"the two files do not agree on what is right for {len(differing)} pictures: {one.ids[differing[0]]}, ...",
            "Compare runs that were evaluated with the same labels.",
        )


def _filled(answers: NDArray[np.int32], width: int) -> NDArray[np.int32]:
    """The answers as sets that can be compared: `[n, width]`, each row sorted."""
    return np.sort(np.pad(answers, ((0, 0), (0, width - answers.shape[1])), constant_values=-1), axis=1)


def _by_class(predictions: Predictions, lost: NDArray[np.bool_], won: NDArray[np.bool_]) -> tuple[ClassFlips, ...]:
    """The classes in which something changed; a picture with several right answers counts under the first."""
    labels = predictions.answers[:, 0]
    counts: Mapping[str, NDArray[np.int64]] = {
        name: np.bincount(labels[chosen], minlength=int(labels.max()) + 1)
        for name, chosen in (("images", np.ones_like(lost)), ("lost", lost), ("won", won))
    }
    changed = counts["lost"] + counts["won"]
    order = sorted(np.flatnonzero(changed), key=lambda label: (-int(changed[label]), int(label)))
    return tuple(
        ClassFlips(
            predictions.class_name(int(label)), *(int(counts[name][label]) for name in ("images", "lost", "won"))
        )
        for label in order
    )
