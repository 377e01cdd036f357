"""Results of an image classification evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from repshift_cli.data.dataset import ImageDataset
from repshift_cli.evaluation.classification.counts import Rows
from repshift_cli.evaluation.classification.predictions import Predictions
from repshift_cli.evaluation.common import Skipped, per_second
from repshift_cli.utils.stats import percent_interval
from repshift_cli.version import __version__

__all__ = [
    "Evaluation",
    "Pace",
    "Score",
    "predictions_of",
]


_NOTABLE_WAITING = 0.1
"""Share of the time above which a device that only waits for data is held up by them."""


@dataclass(frozen=True)
class Score:
    """What one model reached.

    Attributes:
        images: pictures that were classified.
        top1_correct, top5_correct: how many had their label first, or among the first five (all, where the head has
            fewer classes than five).
        seconds: time in the model alone, for all pictures; of several processes, added up.
        attention: what computed its attention, as `measure.observed_attention` has it; of several processes, joined
            with `+` where they differ. None where all was done in an earlier run.
    """

    images: int
    top1_correct: int
    top5_correct: int
    seconds: float
    attention: str | None

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

    @property
    def images_per_s(self) -> float:
        """Images per second of model time: no decoding, no copying; of each process, where there are several."""
        return per_second(self.images, self.seconds)


@dataclass(frozen=True)
class Pace:
    """Where the time of a run went: seconds, added up over its processes, without what was done in an earlier run.

    Attributes:
        total: from the first picture to the last result.
        waited: until a batch was there, the first one left out: for that one nothing can be done.
        decoding: processor time of reading, decoding and transforming.
        models: processor time in the models, and beside them in the process that runs them.
        workers: processes that decoded beside each of the others.
        processes: how many ran models.
        shares_cores: whether the models run on the processor too.
    """

    total: float
    waited: float
    decoding: float
    models: float
    workers: int
    processes: int
    shares_cores: bool

    @property
    def waiting(self) -> float:
        """Share of the time (0 to 1) that was spent waiting for data."""
        return min(1.0, self.waited / self.total) if self.total > 0 else 0.0

    @property
    def bottleneck(self) -> Literal["data", "model"]:
        """Which side holds up the other: on shared cores the one that takes more of them, else data if waited for."""
        if self.shares_cores:
            return "data" if self.decoding > self.models else "model"
        return "data" if self.waiting > _NOTABLE_WAITING else "model"


@dataclass(frozen=True)
class Evaluation:
    """The outcome for all models of a run.

    Attributes:
        dataset: name of the dataset.
        total: pictures of the dataset.
        outputs: of the head, among how many a model chose.
        images: pictures that were classified, by every model.
        skipped: pictures that could not be read.
        scores: by the name of the model.
        same_top1: where there are two models, how many pictures both put into the same class; else None.
        seconds: from the first picture to the last result, decoding and all models included; of several processes, the
            slowest one's.
        fresh: how many of the pictures were read in this run, and not in one that it goes on with.
        interrupted: whether it was; then not all pictures took part.
        pace: where the time went.
        batch_size: pictures at a time in the end; less than was asked for where the memory did not suffice.
        rows: what was said of each picture, where that was asked for.
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
    rows: Rows | None = None

    @property
    def agreement(self) -> float | None:
        """Share (0 to 1) of pictures that both models put into the same class; None unless there are two."""
        return None if self.same_top1 is None else self.same_top1 / self.images

    @property
    def images_per_s(self) -> float:
        """Images per second end to end, for all models and processes together."""
        return per_second(self.fresh, self.seconds)


def predictions_of(result: Evaluation, name: str, dataset: ImageDataset, model: str) -> Predictions:
    """What one of the models said, for a file.

    Args:
        result: of an evaluation with `keep_rows`.
        name: of the model, in the result.
        dataset: what was evaluated, labelled for the head.
        model: what the file is to call it.
    """
    rows = result.rows
    assert rows is not None
    classes = dataset.classes
    return Predictions(
        ids=np.array([dataset.key(index) for index in rows.indices], dtype=np.str_),
        answers=rows.answers,
        top=rows.said[name].top,
        probabilities=rows.said[name].probabilities,
        meta={
            "model": model,
            "dataset": result.dataset,
            "classes": None if classes is None else list(classes),
            "skipped": len(result.skipped),
            "repshift": __version__,
        },
    )
