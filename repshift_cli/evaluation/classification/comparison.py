"""Compare the saved predictions of two runs on the same images, with tests of significance."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repshift_cli.errors import DataError
from repshift_cli.evaluation.classification.counts import Accuracy, correct_at
from repshift_cli.evaluation.classification.predictions import Predictions
from repshift_cli.utils.stats import mcnemar, paired_difference, percent_interval

_RUN_KEYS = ("model", "top1", "top1_interval", "top1_correct", "top5", "top5_interval", "top5_correct")


@dataclass(frozen=True)
class ComparedRun(Accuracy):
    """Accuracy of one run on the common images."""

    model: str

    def to_dict(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in _RUN_KEYS}


@dataclass(frozen=True)
class ClassChanges:
    """Images of one class, and how many the second run lost (correct, then wrong) or won (the reverse)."""

    name: str
    images: int
    lost: int
    won: int


@dataclass(frozen=True)
class Comparison:
    """Two runs on the same images.

    Attributes:
        images: common images.
        only_first, only_second: images of one run only, for example because the other could not read them.
        same: images with the same top-1 class.
        lost, won: images that only the first, or only the second, predicts correctly.
        other: images that both predict wrongly, as different classes.
        classes: those with lost or won images, most changes first.
    """

    first: ComparedRun
    second: ComparedRun
    images: int
    only_first: int
    only_second: int
    same: int
    lost: int
    won: int
    other: int
    classes: tuple[ClassChanges, ...]

    @property
    def difference(self) -> float:
        """Top-1 accuracy of the second minus that of the first, in percentage points."""
        return 100.0 * (self.won - self.lost) / self.images

    @property
    def difference_interval(self) -> tuple[float, float]:
        """95% interval of `difference`, paired by image."""
        low, high = paired_difference(self.lost, self.won, self.images)
        return 100.0 * low, 100.0 * high

    @property
    def p_value(self) -> float:
        """p-value of McNemar's exact test that equally many are lost and won."""
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
            "classes": [asdict(entry) for entry in self.classes],
        }


def compare_predictions(first: Predictions, second: Predictions) -> Comparison:
    """Compare two runs on their common images.

    Raises:
        DataError: no common image, or different labels.
    """
    _, in_first, in_second = np.intersect1d(first.ids, second.ids, assume_unique=True, return_indices=True)
    if len(in_first) == 0:
        raise DataError(
            "the two files have no image in common",
            "Compare runs on one dataset; images are matched by name.",
        )
    one, other = first.subset(in_first), second.subset(in_second)
    _check_answers(one, other)
    lost, won = one.correct & ~other.correct, ~one.correct & other.correct
    same = one.top[:, 0] == other.top[:, 0]
    return Comparison(
        first=_accuracy(one),
        second=_accuracy(other),
        images=len(one),
        only_first=len(first) - len(one),
        only_second=len(second) - len(other),
        same=int(same.sum()),
        lost=int(lost.sum()),
        won=int(won.sum()),
        other=int((~one.correct & ~other.correct & ~same).sum()),
        classes=_by_class(one, lost, won),
    )


def _accuracy(predictions: Predictions) -> ComparedRun:
    top1, top5 = (int(correct_at(k, predictions.top, predictions.answers).sum()) for k in (1, 5))
    return ComparedRun(len(predictions), top1, top5, model=str(predictions.meta.get("model")))


def _check_answers(one: Predictions, other: Predictions) -> None:
    """Raise if the labels differ: then the difference would not be one of the models."""
    width = max(one.answers.shape[1], other.answers.shape[1])
    first, second = (
        np.sort(np.pad(each.answers, ((0, 0), (0, width - each.answers.shape[1])), constant_values=-1), axis=1)
        for each in (one, other)
    )
    differing = np.flatnonzero((first != second).any(axis=1))
    if len(differing):
        raise DataError(
            f"the two files have different labels for {len(differing)} images: {one.ids[differing[0]]}, ...",
            "Compare runs that were evaluated with the same labels.",
        )


def _by_class(predictions: Predictions, lost: NDArray[np.bool_], won: NDArray[np.bool_]) -> tuple[ClassChanges, ...]:
    """The classes with a change; an image with several correct classes counts for the first."""
    labels = predictions.answers[:, 0]
    size = int(labels.max()) + 1
    images, losses, wins = (np.bincount(each, minlength=size) for each in (labels, labels[lost], labels[won]))
    changed = losses + wins
    order = sorted(map(int, np.flatnonzero(changed)), key=lambda label: (-int(changed[label]), label))
    return tuple(
        ClassChanges(predictions.class_name(label), int(images[label]), int(losses[label]), int(wins[label]))
        for label in order
    )
