"""Results of an image classification evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from repshift_cli.data.dataset import ImageDataset
from repshift_cli.evaluation.classification.counts import Accuracy, PredictionRows
from repshift_cli.evaluation.classification.predictions import Predictions
from repshift_cli.evaluation.common import Skipped, per_second
from repshift_cli.utils.stats import GuessVerdict, against_guessing
from repshift_cli.version import __version__

_NOTABLE_WAITING = 0.1
"""Share of time waiting for data above which data loading is the bottleneck on a separate device."""


@dataclass(frozen=True)
class Score(Accuracy):
    """Accuracy and speed of one model.

    Attributes:
        seconds: time in the model alone for all images, summed over processes.
        attention: attention kernel, see `observed_attention`; joined with `+` if processes differ. None if an earlier
            run had classified all images.
    """

    seconds: float
    attention: str | None

    @property
    def images_per_s(self) -> float:
        """Images per second of model time per process, without decoding and copying."""
        return per_second(self.images, self.seconds)


@dataclass(frozen=True)
class Pace:
    """Seconds spent on data and models, summed over processes, without those of an earlier run.

    Attributes:
        total: from the first image to the last result.
        waited: waiting for batches, without the first one.
        decoding: CPU time of reading, decoding and transforming.
        models: CPU time of the processes that run the models, without decoding.
        workers: decoding processes per process that runs models.
        processes: number of processes that run models.
        shares_cores: whether the models run on the CPU too.
    """

    total: float
    waited: float
    decoding: float
    models: float
    workers: int
    processes: int
    shares_cores: bool

    @staticmethod
    def joined(parts: Sequence[Pace]) -> Pace:
        """Sum over processes."""
        summed = ("total", "waited", "decoding", "models", "processes")
        return replace(parts[0], **{name: sum(getattr(part, name) for part in parts) for name in summed})

    @property
    def waiting(self) -> float:
        """Share of time (0 to 1) spent waiting for data."""
        return min(1.0, self.waited / self.total) if self.total > 0 else 0.0

    @property
    def bottleneck(self) -> Literal["data", "model"]:
        """What limits the speed: on shared cores the larger CPU time, else data if the models wait for it."""
        if self.shares_cores:
            return "data" if self.decoding > self.models else "model"
        return "data" if self.waiting > _NOTABLE_WAITING else "model"


@dataclass(frozen=True)
class Evaluation:
    """Result for all models of a run.

    Attributes:
        unit: what the dataset holds: images, videos or spectrograms. Below, an image can be one of these.
        total: images of the dataset.
        outputs: number of outputs among which a model chooses.
        images: images classified by every model.
        same_top1: with two models, images with the same top-1 class; else None.
        seconds: from the first image to the last result, decoding and all models included; of the slowest process.
        fresh: images classified in this run, not in an earlier one that was resumed.
        interrupted: whether it was, so that images are missing.
        batch_size: final number of images at a time; lower than requested if memory ran out.
        padded: videos that are shorter than the clip.
        rows: prediction of each image, if requested.
    """

    dataset: str
    total: int
    outputs: int
    images: int
    skipped: tuple[Skipped, ...]
    scores: Mapping[str, Score]
    same_top1: int | None
    seconds: float
    fresh: int
    interrupted: bool
    pace: Pace
    batch_size: int
    unit: Literal["images", "videos", "spectrograms"] = "images"
    padded: tuple[str, ...] = ()
    rows: PredictionRows | None = None

    @property
    def agreement(self) -> float | None:
        """Share (0 to 1) of images with the same top-1 class; None unless there are two models."""
        return None if self.same_top1 is None else self.same_top1 / self.images

    def against_guessing(self, name: str) -> GuessVerdict:
        """How the top-1 accuracy of a model compares with guessing among the outputs."""
        return against_guessing(self.scores[name].top1_correct, self.images, 1 / self.outputs)

    @property
    def images_per_s(self) -> float:
        """Images per second end to end, for all models and processes together."""
        return per_second(self.fresh, self.seconds)


def predictions_of(result: Evaluation, name: str, dataset: ImageDataset, model: str) -> Predictions:
    """Predictions of one model, for a file.

    Args:
        result: of an evaluation with `keep_rows`.
        name, model: name of the model in the result, and in the file.
        dataset: the evaluated dataset, labelled for the head.
    """
    rows, classes = result.rows, dataset.classes
    assert rows is not None
    keys = (dataset.key(index).encode("utf-8", "backslashreplace").decode() for index in range(len(dataset)))
    names = _unique(list(keys))
    return Predictions(
        ids=np.array([names[index] for index in rows.indices], dtype=np.str_),
        answers=rows.answers,
        top=rows.top_k[name].top,
        probabilities=rows.top_k[name].probabilities,
        meta={
            "model": model,
            "dataset": result.dataset,
            "classes": None if classes is None else list(classes),
            "skipped": len(result.skipped),
            "repshift": __version__,
        },
    )


def _unique(names: Sequence[str]) -> list[str]:
    """The names; the second image of a name gets ` #2`, in any run on the same dataset."""
    counts: Counter[str] = Counter()
    taken, found = set(names), []
    for name in names:
        counts[name] += 1
        new = name if counts[name] == 1 else f"{name} #{counts[name]}"
        while counts[name] > 1 and new in taken:
            new += "#"
        taken.add(new)
        found.append(new)
    return found
