"""What was counted on some pictures, and the sum of several such counts. Plain numbers and NumPy, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Count", "Part", "Rows", "Said", "padded"]

_NO_ANSWER = -1


@dataclass(frozen=True)
class Count:
    """What one model reached: pictures whose label came first, and among the first five; seconds in the model."""

    top1: int = 0
    top5: int = 0
    seconds: float = 0.0

    def __add__(self, other: Count) -> Count:
        return Count(self.top1 + other.top1, self.top5 + other.top5, self.seconds + other.seconds)


@dataclass(frozen=True)
class Said:
    """What a model said of some pictures, the likeliest first.

    Attributes:
        top: int32 `[n, K]`, outputs of the head.
        probabilities: float32 `[n, K]`, theirs.
    """

    top: NDArray[np.int32]
    probabilities: NDArray[np.float32]


@dataclass(frozen=True)
class Rows:
    """What was said of each of some pictures.

    Attributes:
        indices: of the pictures, in the dataset.
        answers: int32 `[n, A]`, the outputs that are right; -1 where there are fewer than A.
        said: by the name of the model.
    """

    indices: tuple[int, ...]
    answers: NDArray[np.int32]
    said: Mapping[str, Said]

    @staticmethod
    def joined(parts: Sequence[Rows]) -> Rows:
        """All of them, in the order of the pictures; one part at least, all of the same models."""
        indices = [index for part in parts for index in part.indices]
        order = np.argsort(np.array(indices, dtype=np.int64), kind="stable")
        width = max(part.answers.shape[1] for part in parts)
        answers = np.concatenate([padded(part.answers, width) for part in parts])
        said = {
            name: Said(
                np.concatenate([part.said[name].top for part in parts])[order],
                np.concatenate([part.said[name].probabilities for part in parts])[order],
            )
            for name in parts[0].said
        }
        return Rows(tuple(indices[place] for place in order), answers[order], said)


@dataclass(frozen=True)
class Part:
    """What was counted on some pictures.

    Attributes:
        images: pictures that were classified.
        counts: by the name of the model.
        same: where there are two models, how many pictures both put into the same class; else 0.
        skipped: places in the dataset of the pictures that could not be read, and why.
        rows: picture by picture, where that was asked for.
    """

    images: int
    counts: Mapping[str, Count]
    same: int
    skipped: tuple[tuple[int, str], ...]
    rows: tuple[Rows, ...] = ()

    @staticmethod
    def joined(parts: Iterable[Part], models: Sequence[str]) -> Part:
        """The sum of the parts, which are of these models."""
        every = list(parts)
        return Part(
            images=sum(part.images for part in every),
            counts={name: sum((part.counts[name] for part in every), Count()) for name in models},
            same=sum(part.same for part in every),
            skipped=tuple(entry for part in every for entry in part.skipped),
            rows=tuple(rows for part in every for rows in part.rows),
        )


def padded(answers: NDArray[np.int32], width: int) -> NDArray[np.int32]:
    """Answers `[n, A]` as `[n, width]`, `width >= A`, with -1 for those that there are not."""
    return np.pad(answers, ((0, 0), (0, width - answers.shape[1])), constant_values=_NO_ANSWER)
