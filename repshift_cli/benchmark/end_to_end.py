"""From picture files to results: how fast a model is when its pictures have to be read first."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from repshift_cli.benchmark.report import EndToEnd, Passes, Setting
from repshift_cli.data.dataset import ImageDataset
from repshift_cli.data.decode import UnreadableSample
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import DataError
from repshift_cli.measure.device import wait_for
from repshift_cli.measure.latency import Subject
from repshift_cli.utils.progress import Progress

__all__ = ["Placement", "Source", "measure_end_to_end"]

_MIN_PASSES = 5
"""With fewer, all rounds would agree by chance too often."""


@dataclass(frozen=True)
class Source:
    """Where pictures come from.

    Attributes:
        images: pictures of one pass at most; whole batches are read, at least one.
        workers: processes that read, decode and preprocess; 0 for the process of the model itself.
        min_passes: least number of passes of each model.
    """

    dataset: ImageDataset
    images: int
    workers: int
    min_passes: int = _MIN_PASSES


@dataclass(frozen=True)
class Placement:
    """Where and how pictures lie when the model gets them."""

    device: torch.device
    dtype: torch.dtype
    memory_format: torch.memory_format = torch.contiguous_format


@dataclass
class _Log:
    seconds: list[float] = field(default_factory=list)
    waiting_s: list[float] = field(default_factory=list)

    def passes(self, images: int) -> Passes:
        return Passes(images, tuple(self.seconds), tuple(self.waiting_s))


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
    """Pass over the pictures with every subject in turn, and once more with none, to know what reading alone takes.

    The workers are started once and stay; a first pass, which fills caches of the system, is thrown away. Each pass
    begins with the first request for a picture and ends with the last result.

    Args:
        subjects: take images `[B, C, H, W]`.
        against: by the name of a subject, that of the one it is compared with.
        preprocessing: of all of them.
        max_seconds: after this time no new round starts, once there are `source.min_passes`.

    Raises:
        DataError: there are fewer pictures than a batch holds, or one cannot be read.
    """
    batches = _Batches(source, preprocessing, setting.batch, pinned=placement.device.type == "cuda")
    readers: list[Subject | None] = [None, *subjects]
    logs = {reader.name if reader else None: _Log() for reader in readers}
    label = f"reading {batches.images} pictures a pass"
    with torch.inference_mode(), progress.task(label, max(1, source.min_passes)) as task:
        _pass(batches, None, placement)
        start, turn = time.perf_counter(), 0
        while turn < source.min_passes or time.perf_counter() - start < max_seconds:
            for reader in readers if turn % 2 == 0 else reversed(readers):
                seconds, waiting = _pass(batches, reader, placement)
                log = logs[reader.name if reader else None]
                log.seconds.append(seconds)
                log.waiting_s.append(waiting)
            turn += 1
            if turn <= source.min_passes:
                task.advance()
    return EndToEnd(
        setting=setting,
        data=source.dataset.name,
        workers=batches.workers,
        reading=logs[None].passes(batches.images),
        sides={subject.name: logs[subject.name].passes(batches.images) for subject in subjects},
        against={name: other for name, other in against.items() if name in logs and other in logs},
    )


class _Batches:
    """Whole batches of pictures, the same ones in every pass; those who read them stay between passes."""

    def __init__(self, source: Source, preprocessing: Preprocessing, batch: int, pinned: bool) -> None:
        available = min(source.images, len(source.dataset)) if source.images >= batch else batch
        self.images = available // batch * batch
        if not 0 < self.images <= len(source.dataset):
            raise DataError(
                f"{source.dataset.name} has {len(source.dataset)} pictures, which do not fill a batch of {batch}",
                "Name more pictures with --data, or take a smaller --batch-size.",
            )
        # where pictures have to be read in order, more processes would read each other's
        self.workers = source.workers if source.dataset.random_access else 0
        self._loader = DataLoader(
            _Pictures(source.dataset, preprocessing, self.images),
            batch_size=batch,
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=pinned,
            persistent_workers=self.workers > 0,
        )

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self._loader:
            if isinstance(batch, UnreadableSample):
                raise batch
            yield batch


class _Pictures(TorchDataset["Tensor | UnreadableSample"]):
    """The first pictures of a dataset through the transform of a model, float32 `[C, H, W]`.

    What cannot be read is handed on: an error that is raised in another process arrives as one of another kind.
    """

    def __init__(self, dataset: ImageDataset, preprocessing: Preprocessing, count: int) -> None:
        self.dataset = dataset
        self.transform = preprocessing.transform()
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor | UnreadableSample:
        try:
            picture, _ = self.dataset.load(index)
        except UnreadableSample as problem:
            return problem
        return self.transform(picture)


def _collate(samples: Sequence[Tensor | UnreadableSample]) -> Tensor | UnreadableSample:
    """`[B, C, H, W]`, or what is wrong with the first picture that cannot be read."""
    good = [sample for sample in samples if isinstance(sample, Tensor)]
    broken = [sample for sample in samples if isinstance(sample, UnreadableSample)]
    return broken[0] if broken else torch.stack(good)


def _pass(batches: _Batches, subject: Subject | None, placement: Placement) -> tuple[float, float]:
    """One pass, through a model or without one: seconds, and for how many of them it waited for pictures."""
    waiting, start = 0.0, time.perf_counter()
    if subject is None:
        for pixels in batches:
            _place(pixels, placement)
        wait_for(placement.device)
        whole = time.perf_counter() - start
        return whole, whole
    with subject.context():
        asked = start
        for pixels in batches:
            waiting += time.perf_counter() - asked
            subject.run(_place(pixels, placement))
            # as somebody who needs each result would; queued work would hide who waits for whom
            wait_for(placement.device)
            asked = time.perf_counter()
    return time.perf_counter() - start, waiting


def _place(pixels: Tensor, placement: Placement) -> Tensor:
    return pixels.to(placement.device, placement.dtype, memory_format=placement.memory_format, non_blocking=True)
