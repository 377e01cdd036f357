"""Time every way to run a model, compare its outputs with those of the dense model, and name the best."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repshift_cli.benchmark import ways
from repshift_cli.benchmark.ways import Missing, Way
from repshift_cli.calibration.outputs import agreement, divergence, reference_outputs
from repshift_cli.checkpoints.artifact import Opened
from repshift_cli.data.inputs import ImageBatch, load_inputs
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import UsageError
from repshift_cli.measure.device import device_name
from repshift_cli.measure.latency import Speedup, Spread, Subject, Timing, compute_speedup, measure_latency
from repshift_cli.models.tensor_model import class_names
from repshift_cli.utils.progress import Progress
from repshift_cli.utils.stats import significant

_MIN_RUNS = 5


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        data: folder or dataset of images to compare outputs on; None to measure speed alone.
        images: how many of them.
        calibration: folder or dataset of images for static int8.
        agreement: least share of unchanged predictions (or mean cosine of embeddings) of a way that is advised.
        seconds: of the measurement, for each way.
    """

    data: str | None = None
    images: int = 64
    calibration: str | None = None
    smaller_models: tuple[str, ...] = ()
    batch: int = 1
    agreement: float = 0.98
    seconds: float = 3.0
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One way, measured.

    Attributes:
        unchanged: share of predictions that are those of the dense model, or mean cosine of embeddings; None if not
            measured.
        top1: share of correct predictions; None without labels.
    """

    way: Way
    latency: Spread
    speedup: Speedup
    unchanged: float | None
    top1: float | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.way.name,
            "gmacs": self.way.macs / 1e9,
            "bytes": self.way.bytes,
            "latency_ms": self.latency.to_dict(),
            "speedup": significant(self.speedup.ratio),
            "clear": self.speedup.clear,
            "unchanged": None if self.unchanged is None else round(self.unchanged, 6),
            "top1": None if self.top1 is None else round(self.top1, 6),
        }


@dataclass(frozen=True)
class Advice:
    """The table, and the fastest row whose outputs are near enough to those of the dense model.

    Attributes:
        measure: what `unchanged` of the rows is.
        images: on which it was measured; None without images.
    """

    rows: tuple[Row, ...]
    missing: tuple[Missing, ...]
    measure: str
    images: ImageBatch | None
    question: Question
    device: str
    threads: int

    @property
    def best(self) -> Row | None:
        """The fastest row that is clearly faster than the dense model and, if measured, has outputs near enough."""
        near = [
            row
            for row in self.rows
            if row.speedup.clear and (self.images is None or (row.unchanged or 0.0) >= self.question.agreement)
        ]
        return max(near, key=lambda row: row.speedup.ratio, default=None)

    def to_dict(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "threads": self.threads,
            "torch": torch.__version__,
            "batch": self.question.batch,
            "measure": self.measure,
            "images": None if self.images is None else self.images.identity,
            "agreement": self.question.agreement,
            "rows": [row.to_dict() for row in self.rows],
            "missing": [{"name": each.name, "reason": each.reason} for each in self.missing],
            "best": self.best.way.name if self.best else None,
        }


Exported = Callable[[Sequence[Way], Path, str | None, Progress], Iterator[Way | Missing]]
"""Writes files of models to a folder, int8 with images to calibrate on: the ways of other runtimes."""


def advise(opened: Opened, question: Question, exported: Exported, progress: Progress) -> Advice:
    """Measure every way to run a compressed model that exists on this machine.

    Raises:
        UsageError: the model is not compressed, or takes no images.
        DataError: the images cannot be read.
    """
    if (unit := opened.loaded.description.preprocessing.unit) != "image":
        raise UsageError(f"advise is for models of images, and the model takes {unit}s", "Use repshift bench.")
    batch = _draw(opened, question, opened.loaded.description.preprocessing)
    with tempfile.TemporaryDirectory(prefix="repshift-") as folder:
        found = list(_models(opened, question))
        models = [each for each in found if isinstance(each, Way)]
        found += [*ways.in_bfloat16(opened), *ways.compiled(opened, question.batch)]
        found += exported(models, Path(folder), question.calibration, progress)
        rows = [each for each in found if isinstance(each, Way)]
        timings = _time(rows, question, progress)
        quality, measure = _compare(opened, rows, question, batch, progress)
    dense = timings[rows[0].name]
    return Advice(
        rows=tuple(
            Row(way, timings[way.name].spread, compute_speedup(dense, timings[way.name]), *quality[way.name])
            for way in rows
        ),
        missing=tuple(each for each in found if isinstance(each, Missing)),
        measure=measure,
        images=batch,
        question=question,
        device=device_name(torch.device("cpu")),
        threads=torch.get_num_threads(),
    )


def _models(opened: Opened, question: Question) -> Iterator[Way | Missing]:
    """The model and what can be taken instead, in torch."""
    yield from ways.both(opened)
    yield ways.smaller_input(opened)
    classes = int(getattr(opened.loaded.model, "num_classes", 0) or 0)
    for name in question.smaller_models:
        yield ways.smaller_model(name, classes)


def _time(rows: Sequence[Way], question: Question, progress: Progress) -> dict[str, Timing]:
    """All ways in turn, each on random images of its own size."""
    generator = torch.Generator().manual_seed(0)

    def subject(way: Way) -> Subject:
        own = torch.randn(question.batch, *way.preprocessing.shape, generator=generator)
        return Subject(way.name, lambda _: way.run(own), way.context)

    return measure_latency(
        [subject(way) for way in rows],
        torch.zeros(1),
        max_seconds=question.seconds * len(rows),
        warmup=2,
        min_runs=_MIN_RUNS,
        progress=progress,
    )


def _draw(opened: Opened, question: Question, preprocessing: Preprocessing) -> ImageBatch | None:
    """The images of the question; the same ones for every preprocessing."""
    if question.data is None:
        return None
    loaded = opened.loaded
    return load_inputs(
        question.data,
        question.images,
        preprocessing,
        question.seed,
        num_classes=getattr(loaded.model, "num_classes", None) or None,
        class_names=class_names(loaded.model),
    )


def _compare(
    opened: Opened, rows: Sequence[Way], question: Question, batch: ImageBatch | None, progress: Progress
) -> tuple[dict[str, tuple[float | None, float | None]], str]:
    """By way: share of unchanged predictions or mean cosine, and top-1. Then what the first of them is."""
    if batch is None:
        return {way.name: (None, None) for way in rows}, "none"
    found: dict[str, tuple[float | None, float | None]] = {}
    with progress.task("comparing outputs", len(rows)) as task, torch.inference_mode():
        wanted = reference_outputs(opened.loaded.model, _outputs(rows[0], batch.tensor, question.batch))
        for way in rows:
            same_size = way.preprocessing == opened.loaded.description.preprocessing
            own = batch if same_size else _draw(opened, question, way.preprocessing)
            assert own is not None
            outputs = _outputs(way, own.tensor, question.batch)
            unchanged = None
            if way.comparable and outputs.shape == wanted.reference.shape:
                near = agreement if wanted.are_logits else _cosine
                unchanged = float(near(wanted.reference, outputs).mean())
            top1 = None
            if batch.labels is not None and way.comparable and wanted.are_logits:
                top1 = float((outputs.argmax(-1) == batch.labels).float().mean())
            found[way.name] = (unchanged, top1)
            task.advance()
    return found, "predictions" if wanted.are_logits else "cosine"


def _outputs(way: Way, images: Tensor, batch: int) -> Tensor:
    """In batches of the size that is timed, for which a model may be compiled."""
    outputs = []
    for part in images.split(batch):
        with way.context():
            outputs.append(way.run(part).float())
    return torch.cat(outputs)


def _cosine(reference: Tensor, outputs: Tensor) -> Tensor:
    return 1.0 - divergence(reference, outputs, has_head=False)
