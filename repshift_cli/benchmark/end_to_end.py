"""From image files to results: how fast a model is when its images have to be read first."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repshift_cli.benchmark.report import EndToEnd, Passes, Setting
from repshift_cli.data.dataset import ImageDataset
from repshift_cli.data.loader import Batch, BatchLoader, cut_batches, image_loader
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import DataError
from repshift_cli.measure.device import wait_for
from repshift_cli.measure.latency import Subject
from repshift_cli.utils.progress import Progress

Warn = Callable[[str], None]

_MIN_PASSES = 5
"""With fewer passes, all rounds would agree by chance too often."""


@dataclass(frozen=True)
class Source:
    """Where images come from.

    Attributes:
        images: maximum number of images in one pass; whole batches are read, at least one.
        workers: processes that read, decode and preprocess; 0 for the process of the model itself.
        min_passes: minimum number of passes of each model.
    """

    dataset: ImageDataset
    images: int
    workers: int
    min_passes: int = _MIN_PASSES


@dataclass(frozen=True)
class Placement:
    """Device, dtype and memory format of the images that the model gets."""

    device: torch.device
    dtype: torch.dtype
    memory_format: torch.memory_format = torch.contiguous_format


def measure_end_to_end(  # noqa: PLR0917
    subjects: Sequence[Subject],
    against: Mapping[str, str],
    preprocessing: Preprocessing,
    source: Source,
    setting: Setting,
    placement: Placement,
    *,
    max_seconds: float,
    progress: Progress,
) -> EndToEnd:
    """Pass over the images with every subject in turn, and once without a model, to measure reading alone.

    The workers are started once; a first pass, which fills the caches of the system, is discarded. Each pass begins
    with the first request for an image and ends with the last result.

    Args:
        subjects: take images `[B, C, H, W]`.
        against: by the name of a subject, that of the one it is compared with.
        preprocessing: of all of them.
        max_seconds: no new round starts after this time, once there are `source.min_passes`.

    Raises:
        DataError: there are fewer images than a batch holds, or one cannot be read.
    """
    batches = _loader(source, preprocessing, setting.batch, placement, progress.warn)
    images = len(batches.batches) * setting.batch
    readers: list[Subject | None] = [None, *subjects]
    logs: dict[str | None, list[tuple[float, float]]] = {reader.name if reader else None: [] for reader in readers}
    label = f"reading {images} images a pass"
    with torch.inference_mode(), progress.task(label, max(1, source.min_passes)) as task:
        _pass(batches, None, placement)
        start, turn = time.perf_counter(), 0
        while turn < source.min_passes or time.perf_counter() - start < max_seconds:
            for reader in readers if turn % 2 == 0 else reversed(readers):
                logs[reader.name if reader else None].append(_pass(batches, reader, placement))
            turn += 1
            if turn <= source.min_passes:
                task.advance()
    passes = {name: Passes(images, *zip(*log, strict=True)) for name, log in logs.items()}
    return EndToEnd(
        setting=setting,
        data=source.dataset.name,
        workers=batches.workers,
        reading=passes[None],
        sides={subject.name: passes[subject.name] for subject in subjects},
        against={name: other for name, other in against.items() if name in logs and other in logs},
    )


def _loader(source: Source, preprocessing: Preprocessing, batch: int, placement: Placement, warn: Warn) -> BatchLoader:
    """Whole batches of images, the same in every pass; the worker processes stay alive between passes."""
    available = min(source.images, len(source.dataset)) if source.images >= batch else batch
    images = available // batch * batch
    if not 0 < images <= len(source.dataset):
        raise DataError(
            f"{source.dataset.name} has {len(source.dataset)} images, which do not fill a batch of {batch}",
            "Give more images with --data, or a smaller --batch-size.",
        )
    return image_loader(
        source.dataset,
        preprocessing,
        cut_batches(images, batch),
        workers=source.workers,
        pinned=placement.device.type == "cuda",
        warn=warn,
        strict=True,
        persistent=True,
    )


def _pass(batches: BatchLoader, subject: Subject | None, placement: Placement) -> tuple[float, float]:
    """One pass, through a model or without one: seconds, and how many of them it waited for images."""
    waiting, start = 0.0, time.perf_counter()
    if subject is None:
        for batch in batches:
            _place(batch, placement)
        wait_for(placement.device)
        seconds = time.perf_counter() - start
        return seconds, seconds
    with subject.context():
        requested = start
        for batch in batches:
            waiting += time.perf_counter() - requested
            subject.run(_place(batch, placement))
            # as an application that needs each result; with queued work the waiting time would be wrong
            wait_for(placement.device)
            requested = time.perf_counter()
    return time.perf_counter() - start, waiting


def _place(batch: Batch, placement: Placement) -> Tensor:
    assert batch.pixels is not None
    return batch.pixels.to(placement.device, placement.dtype, memory_format=placement.memory_format, non_blocking=True)
