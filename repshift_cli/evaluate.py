"""Accuracy of models on a labelled dataset. All models of a run see the same decoded batches."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import sqrt

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from repshift_cli import measure
from repshift_cli.backends import AttentionMode, attention_mode, auto_note
from repshift_cli.data.base import ImageDataset, UnreadableSample
from repshift_cli.errors import CheckFailed, DataError, ModelError, UsageError
from repshift_cli.preprocessing import Preprocessing
from repshift_cli.progress import Progress, Task

__all__ = [
    "Evaluation",
    "Score",
    "Skipped",
    "evaluate",
    "explained_memory",
    "finite",
    "in_turn",
    "per_second",
    "percent_interval",
    "wilson_interval",
]

_TOP = 5
_LOGITS_RANK = 2  # dimensions of logits: [B, K]


@dataclass(frozen=True)
class Skipped:
    """A picture that took no part, and why."""

    sample: str
    reason: str


@dataclass(frozen=True)
class Score:
    """What one model reached.

    Attributes:
        images: pictures that were classified.
        top1_correct, top5_correct: how many had their label first, or among the first five (all, where the head has
            fewer classes than five).
        seconds: time in the model alone, for all pictures.
        attention: what computed its attention; values as `measure.observed_attention`.
    """

    images: int
    top1_correct: int
    top5_correct: int
    seconds: float
    attention: str

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
    def images_per_s(self) -> float:
        """Images per second of model time: no decoding, no copying."""
        return per_second(self.images, self.seconds)


@dataclass(frozen=True)
class Evaluation:
    """The outcome for all models of a run.

    Attributes:
        dataset: name of the dataset.
        images: pictures that were classified, by every model.
        skipped: pictures that could not be read.
        scores: by the name of the model.
        same_top1: where there are two models, how many pictures both put into the same class; else None.
        seconds: from the first picture to the last result, decoding and all models included.
    """

    dataset: str
    images: int
    skipped: tuple[Skipped, ...]
    scores: Mapping[str, Score]
    same_top1: int | None
    seconds: float

    @property
    def agreement(self) -> float | None:
        """Share (0 to 1) of pictures that both models put into the same class; None unless there are two."""
        return None if self.same_top1 is None else self.same_top1 / self.images

    @property
    def images_per_s(self) -> float:
        """Images per second end to end, for all models together."""
        return per_second(self.images, self.seconds)


def evaluate(
    models: Mapping[str, nn.Module],
    dataset: ImageDataset,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    device: torch.device | str,
    dtype: torch.dtype,
    workers: int,
    strict: bool,
    num_classes: int,
    progress: Progress,
    attention: AttentionMode = "auto",
) -> Evaluation:
    """Classify every picture with every model.

    Args:
        models: by name; each maps `[B, C, H, W]` to logits `[B, num_classes]`. They are set to eval mode and moved
            to `device` and `dtype` in place.
        dataset: pictures and labels.
        preprocessing: the transform of the models.
        batch_size: pictures at a time; the last batch may have fewer.
        workers: processes that decode beside this one; 0 decodes in this one.
        strict: stop at the first picture that cannot be read, instead of leaving it out.
        num_classes: outputs of the head.
        attention: what is to compute the attention of all models.

    Raises:
        DataError: no picture, labels that do not fit the head, or (`strict`) a picture that cannot be read.
        ModelError: a model does not return logits of that form.
        CheckFailed: a model returns values that are not finite.
        UsageError: not enough memory for the batch, or attention cannot be computed as asked.
    """
    dataset = dataset.for_head(num_classes)
    _check_classes(dataset, num_classes)
    if len(dataset) == 0:
        raise DataError(f"the dataset {dataset.name} has no pictures")
    for model in models.values():
        model.to(device=device, dtype=dtype).eval()
    for note in {note for model in models.values() if (note := auto_note(model, attention))}:
        progress.note(note)
    device = torch.device(device)
    prepared = _Prepared(dataset, preprocessing)
    tally = _Tally({name: _Count() for name in models})
    started = time.perf_counter()
    with (
        ExitStack() as switched,
        torch.inference_mode(),
        explained_memory(f"{batch_size} images"),
        progress.task("evaluate", len(dataset)) as task,
    ):
        for model in models.values():
            switched.enter_context(attention_mode(model, attention))
        for batch in _batches(prepared, task, batch_size=batch_size, workers=workers, pinned=device.type == "cuda"):
            _note_broken(batch, dataset, strict, tally)
            if batch.pixels is not None:
                _check_labels(batch, dataset, num_classes)
                _classify(models, batch, tally, device=device, dtype=dtype, num_classes=num_classes)
    return tally.result(dataset, time.perf_counter() - started)


def per_second(count: int, seconds: float) -> float:
    """A rate; 0 where no time has passed."""
    return count / seconds if seconds > 0 else 0.0


def percent_interval(correct: int, total: int) -> tuple[float, float]:
    """`wilson_interval` at 95%, in percent."""
    low, high = wilson_interval(correct, total)
    return 100.0 * low, 100.0 * high


def wilson_interval(correct: int, total: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a share.

    Args:
        correct, total: `0 <= correct <= total`, `total > 0`.
        z: quantile of the normal distribution; the default gives 95%.

    Returns:
        Lower and upper end, in 0..1.
    """
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"{correct} of {total} is no share")
    share = correct / total
    spread = z * sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    middle = share + z * z / (2 * total)
    scale = 1 + z * z / total
    # the share lies inside, also where rounding says otherwise
    return min(share, max(0.0, (middle - spread) / scale)), max(share, min(1.0, (middle + spread) / scale))


@dataclass
class _Count:
    top1: int = 0
    top5: int = 0
    seconds: float = 0.0
    attention: str = "none"


@dataclass
class _Tally:
    counts: dict[str, _Count]
    images: int = 0
    batches: int = 0
    same: int = 0
    skipped: list[Skipped] = field(default_factory=list)

    def result(self, dataset: ImageDataset, seconds: float) -> Evaluation:
        if self.images == 0:
            raise DataError(
                f"none of the {len(self.skipped)} pictures of {dataset.name} can be read",
                f"The first: {self.skipped[0].sample}: {self.skipped[0].reason}",
            )
        scores = {
            name: Score(self.images, count.top1, count.top5, count.seconds, count.attention)
            for name, count in self.counts.items()
        }
        same = self.same if len(self.counts) == 2 else None  # noqa: PLR2004
        return Evaluation(dataset.name, self.images, tuple(self.skipped), scores, same, seconds)


@dataclass
class _Sample:
    """A preprocessed picture, or the reason why there is none."""

    index: int
    label: int
    pixels: Tensor | None
    reason: str | None


@dataclass
class _Batch:
    """What was read of some samples: pixels float32 `[B, C, H, W]`, labels int64 `[B]`, and what could not be read."""

    pixels: Tensor | None
    labels: Tensor
    indices: list[int]
    broken: list[tuple[int, str]]

    def pin_memory(self) -> _Batch:
        """Called by the loader when the device copies faster from pinned memory."""
        if self.pixels is not None:
            self.pixels = self.pixels.pin_memory()
        return self


class _Prepared(TorchDataset[_Sample]):
    """The dataset through the transform. A picture that cannot be read is reported, not raised."""

    def __init__(self, dataset: ImageDataset, preprocessing: Preprocessing) -> None:
        self.dataset = dataset
        self.transform = preprocessing.transform()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> _Sample:
        try:
            picture, label = self.dataset.load(index)
        except UnreadableSample as problem:
            return _Sample(index, -1, None, problem.reason)
        return _Sample(index, label, self.transform(picture), None)


def _collate(samples: list[_Sample]) -> _Batch:
    good = [(sample.index, sample.label, sample.pixels) for sample in samples if sample.pixels is not None]
    return _Batch(
        pixels=torch.stack([pixels for _, _, pixels in good]) if good else None,
        labels=torch.tensor([label for _, label, _ in good], dtype=torch.int64),
        indices=[index for index, _, _ in good],
        broken=[(sample.index, sample.reason) for sample in samples if sample.reason is not None],
    )


def _batches(prepared: _Prepared, task: Task, *, batch_size: int, workers: int, pinned: bool) -> Iterator[_Batch]:
    loader = DataLoader(
        prepared,
        batch_size=batch_size,
        num_workers=workers if prepared.dataset.random_access else 0,
        collate_fn=_collate,
        pin_memory=pinned,
    )
    for batch in loader:
        yield batch
        task.advance(len(batch.indices) + len(batch.broken))


def _note_broken(batch: _Batch, dataset: ImageDataset, strict: bool, tally: _Tally) -> None:
    for index, reason in batch.broken:
        if strict:
            raise UnreadableSample(dataset.sample_id(index), reason)
        tally.skipped.append(Skipped(dataset.sample_id(index), reason))


def _classify(
    models: Mapping[str, nn.Module],
    batch: _Batch,
    tally: _Tally,
    *,
    device: torch.device,
    dtype: torch.dtype,
    num_classes: int,
) -> None:
    """Run the models over one batch and add up what they say."""
    assert batch.pixels is not None
    pixels = batch.pixels.to(device=device, dtype=dtype)
    if tally.batches == 0:
        # The first pass pays for memory pools and kernel selection; it is not part of the speed, so it can be watched.
        for name, model in models.items():
            tally.counts[name].attention = measure.observed_attention(model, pixels)
    first: dict[str, Tensor] = {}
    for name in in_turn(list(models), tally.batches):
        logits, seconds = _timed(models[name], pixels, device)
        _check_logits(name, logits, len(batch.indices), num_classes)
        ranked = logits.topk(min(_TOP, num_classes), dim=1).indices.cpu()
        hits = ranked == batch.labels[:, None]
        count = tally.counts[name]
        count.seconds += seconds
        count.top1 += int(hits[:, 0].sum())
        count.top5 += int(hits.sum())
        first[name] = ranked[:, 0]
    tally.images += len(batch.indices)
    tally.batches += 1
    if len(first) == 2:  # noqa: PLR2004
        one, other = first.values()
        tally.same += int((one == other).sum())


def in_turn(names: list[str], turn: int) -> list[str]:
    """The names, every second time in reverse, so that none always runs on the warmer caches."""
    return names[::-1] if turn % 2 else names


def _timed(model: nn.Module, pixels: Tensor, device: torch.device) -> tuple[Tensor, float]:
    measure.wait_for(device)
    started = time.perf_counter()
    logits = model(pixels)
    measure.wait_for(device)
    return logits, time.perf_counter() - started


def _check_logits(name: str, logits: object, batch: int, num_classes: int) -> None:
    if not isinstance(logits, Tensor) or logits.dim() != _LOGITS_RANK:
        raise ModelError(f"{name}: the model does not return class scores, so it cannot be evaluated on labels")
    if tuple(logits.shape) != (batch, num_classes):
        raise ModelError(f"{name}: the model returns {tuple(logits.shape)} where ({batch}, {num_classes}) is expected")
    finite(name, logits)


def finite(name: str, values: Tensor) -> Tensor:
    """The values as they are.

    Raises:
        CheckFailed: one is not finite; `name` is what the model is called.
    """
    if not bool(torch.isfinite(values).all()):
        raise CheckFailed(
            f"{name}: the model returns values that are not finite in {str(values.dtype).removeprefix('torch.')}",
            "Evaluate with --dtype float32 or bfloat16; if that fails as well, the weights are damaged.",
        )
    return values


def _check_classes(dataset: ImageDataset, num_classes: int) -> None:
    """Refuse a dataset whose classes are not those of the head: labels would be off without anyone noticing."""
    if num_classes < 1:
        raise ModelError(
            "the model has no classification head, so it cannot be evaluated on labels",
            "Use a checkpoint that was trained to classify.",
        )
    classes = dataset.classes
    if classes is None or len(classes) == num_classes:
        return
    raise DataError(
        f"the dataset {dataset.name} has {len(classes)} classes, but the head of the model has {num_classes}",
        _advice(len(classes), num_classes),
    )


def _advice(classes: int, outputs: int) -> str:
    if outputs == classes + 1:
        return (
            "One output more may be a background class, first or last; which one is not guessed. Use a checkpoint "
            "whose head has the classes of the dataset alone."
        )
    if outputs > classes:
        return (
            "Labels are places in the sorted list of classes, so every class of the model has to be there: add empty "
            "folders for classes without pictures, or choose a model that was trained on these classes."
        )
    return "Choose a model that was trained on these classes, or a dataset with the classes of the model."


def _check_labels(batch: _Batch, dataset: ImageDataset, num_classes: int) -> None:
    """Refuse labels outside the head, where no list of classes told it beforehand."""
    for index, label in zip(batch.indices, batch.labels.tolist(), strict=True):
        if not 0 <= label < num_classes:
            raise DataError(
                f"{dataset.sample_id(index)} has label {label}, but the head of the model has {num_classes} outputs",
                f"Labels from 0 to {num_classes - 1} fit. Choose a model that was trained on this dataset.",
            )


@contextmanager
def explained_memory(what: str) -> Iterator[None]:
    """Turn an error of the device's memory into one that says what to do; `what` is in memory at a time."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UsageError(f"the device has not enough memory for {what} at a time", "Lower --batch-size.") from error
