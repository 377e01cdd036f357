"""Counts of correct predictions on a set of images, and their sum. Numbers and NumPy arrays, no torch.

`resume.py` saves `Counts` as JSON; the annotations of the fields are the names and limits in these files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, PlainSerializer, PlainValidator

from repshift_cli.utils.stats import percent_interval

_NO_LABEL = -1
_AS_LISTS = PlainSerializer(lambda array: array.tolist())

Natural = Annotated[int, Field(ge=0)]


def _integers(rows: Any) -> NDArray[np.int32]:
    array = np.asarray(rows)
    if array.size and (array.dtype.kind != "i" or (array != array.astype(np.int32)).any()):
        raise ValueError("must be integers of 32 bits")
    return array.astype(np.int32)


def _floats(rows: Any) -> NDArray[np.float32]:
    array = np.asarray(rows, dtype=np.float32)
    if not np.isfinite(array).all():
        raise ValueError("must be finite")
    return array


Integers = Annotated[NDArray[np.int32], PlainValidator(_integers), _AS_LISTS]
Floats = Annotated[NDArray[np.float32], PlainValidator(_floats), _AS_LISTS]


@dataclass(frozen=True)
class Accuracy:
    """Images whose label is the most likely class, or among the five most likely."""

    images: int
    top1_correct: int
    top5_correct: int

    @property
    def top1(self) -> float:
        """Percent, 0 to 100."""
        return 100.0 * self.top1_correct / self.images

    @property
    def top5(self) -> float:
        """Percent, 0 to 100."""
        return 100.0 * self.top5_correct / self.images

    @property
    def top1_interval(self) -> tuple[float, float]:
        """95% interval of `top1`, in percent."""
        return percent_interval(self.top1_correct, self.images)

    @property
    def top5_interval(self) -> tuple[float, float]:
        """95% interval of `top5`, in percent."""
        return percent_interval(self.top5_correct, self.images)


@dataclass(frozen=True)
class ModelCounts:
    """Images with a correct top-1 and top-5 prediction of one model, and seconds in the model."""

    top1: Natural = 0
    top5: Natural = 0
    seconds: Annotated[float, Field(ge=0)] = 0.0

    @staticmethod
    def of(top: NDArray[np.int32], answers: NDArray[np.int32], seconds: float) -> ModelCounts:
        """Of the most likely outputs, int32 `[n, K]`, and the correct ones, int32 `[n, A]`."""
        return ModelCounts(int(correct_at(1, top, answers).sum()), int(correct_at(5, top, answers).sum()), seconds)

    def __add__(self, other: ModelCounts) -> ModelCounts:
        return ModelCounts(self.top1 + other.top1, self.top5 + other.top5, self.seconds + other.seconds)


@dataclass(frozen=True)
class TopK:
    """The K most likely outputs of each image, most likely first, and their probabilities: `[n, K]` each."""

    top: Integers
    probabilities: Floats

    @staticmethod
    def joined(parts: Sequence[TopK]) -> TopK:
        """Concatenate along the images; at least one part."""
        return TopK(
            np.concatenate([part.top for part in parts]), np.concatenate([part.probabilities for part in parts])
        )


@dataclass(frozen=True)
class PredictionRows:
    """Labels and predictions of each image.

    Attributes:
        indices: of the images in the dataset.
        answers: int32 `[n, A]`, the correct outputs; -1 pads images with fewer than A.
        top_k: by name of the model.
    """

    indices: tuple[Natural, ...]
    answers: Integers
    top_k: Annotated[Mapping[str, TopK], Field(alias="said")]  # the key in state files

    @staticmethod
    def joined(parts: Sequence[PredictionRows]) -> PredictionRows:
        """Concatenate in the order of the images; at least one part, all of the same models."""
        indices = np.concatenate([part.indices for part in parts])
        order = np.argsort(indices, kind="stable")
        width = max(part.answers.shape[1] for part in parts)
        pads = [((0, 0), (0, width - part.answers.shape[1])) for part in parts]
        answers = [np.pad(part.answers, pad, constant_values=_NO_LABEL) for part, pad in zip(parts, pads, strict=True)]
        top_k = {name: TopK.joined([part.top_k[name] for part in parts]) for name in parts[0].top_k}
        return PredictionRows(
            tuple(indices[order].tolist()),
            np.concatenate(answers)[order],
            {name: TopK(each.top[order], each.probabilities[order]) for name, each in top_k.items()},
        )


@dataclass(frozen=True)
class Counts:
    """Results on some images, such as a batch or a shard.

    Attributes:
        same: images with the same top-1 class of both models; 0 unless there are two.
        skipped: index and reason of each image that could not be read.
        padded: indices of videos that are shorter than the clip.
        rows: prediction of each image, if requested.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    images: Natural
    models: Annotated[Mapping[str, ModelCounts], Field(alias="counts")]  # the key in state files
    same: Natural
    skipped: tuple[tuple[Natural, str], ...]
    rows: tuple[PredictionRows, ...] = ()
    padded: tuple[Natural, ...] = ()

    @staticmethod
    def joined(parts: Iterable[Counts], models: Iterable[str]) -> Counts:
        """Sum over the parts, all of these models."""
        parts = list(parts)
        return Counts(
            images=sum(part.images for part in parts),
            models={name: sum((part.models[name] for part in parts), ModelCounts()) for name in models},
            same=sum(part.same for part in parts),
            skipped=tuple(entry for part in parts for entry in part.skipped),
            rows=tuple(rows for part in parts for rows in part.rows),
            padded=tuple(index for part in parts for index in part.padded),
        )


def correct_at(k: int, top: NDArray[np.int32], answers: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Whether one of the first `k` outputs is correct: int32 `[n, K]` and `[n, A]` to bool `[n]`."""
    hits: NDArray[np.bool_] = (top[:, :k, None] == answers[:, None, :]).any(axis=(1, 2))
    return hits
