"""Run the models over the images and count correct predictions."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from repshift_cli.data.dataset import ImageDataset
from repshift_cli.data.loader import Batch
from repshift_cli.errors import DataError, ModelError, UsageError
from repshift_cli.evaluation.classification.counts import Count, Part, Rows, Said
from repshift_cli.evaluation.classification.job import EvaluationJob
from repshift_cli.evaluation.common import finite, in_turn
from repshift_cli.measure.attention_kernel import observed_attention
from repshift_cli.measure.device import out_of_memory, wait_for
from repshift_cli.utils.progress import Progress

__all__ = [
    "Runner",
]


_TOP = 5


_LOGITS_RANK = 2  # dimensions of logits: [B, K]


@dataclass
class Runner:
    """Runs the models over batches, as many pictures at a time as there is memory for.

    Attributes:
        limit: pictures at a time.
        attention: what computed it, by the name of the model, once there was a batch.
    """

    job: EvaluationJob
    progress: Progress
    limit: int = field(init=False)
    attention: dict[str, str] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.limit = self.job.batch_size

    def part(self, batch: Batch) -> Part:
        """What the models say of a batch."""
        dataset, skipped = self.job.dataset, tuple(batch.broken)
        if batch.pixels is None:
            return Part(0, {name: Count() for name in self.job.models}, 0, skipped)
        _check_labels(batch, dataset, self.job.num_classes)
        heard = self._heard(batch)
        counts = {name: _count(said, batch.answers) for name, said in heard.items()}
        first = [said.top[:, 0] for said in heard.values()]
        same = int((first[0] == first[1]).sum()) if len(first) == 2 else 0  # noqa: PLR2004
        rows = (_rows(batch, heard),) if self.job.keep_rows else ()
        return Part(len(batch.indices), counts, same, skipped, rows)

    def _heard(self, batch: Batch) -> dict[str, _Heard]:
        """What each model says, with the batch halved until it fits into the memory."""
        assert batch.pixels is not None
        pieces: list[dict[str, _Heard]] = []
        place = 0
        while place < len(batch.pixels):
            pixels = batch.pixels[place : place + self.limit]
            try:
                pieces.append(self._piece(pixels, batch.number))
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if len(pixels) == 1:
                    raise UsageError(
                        "the device has not enough memory for one image at a time", "Use another --device or --dtype."
                    ) from error
            else:
                place += len(pixels)
                continue
            # here, and not above: the error holds on to what the failed pass had in memory
            self._halve(len(pixels))
        return {name: _Heard.joined([piece[name] for piece in pieces]) for name in self.job.models}

    def _piece(self, pixels: Tensor, turn: int) -> dict[str, _Heard]:
        job = self.job
        pixels = pixels.to(device=job.device, non_blocking=True).to(dtype=job.dtype)
        if len(self.attention) < len(job.models):
            # The first pass pays for memory pools and kernel selection; it is not part of the speed, so it can be
            # watched.
            for name, model in job.models.items():
                self.attention[name] = observed_attention(model, pixels)
        found: dict[str, _Heard] = {}
        for name in in_turn(list(job.models), turn):
            logits, seconds = _timed(job.models[name], pixels, job.device)
            _check_logits(name, logits, len(pixels), job.num_classes)
            found[name] = _heard(logits, job.dataset.outputs, seconds)
        return found

    def _halve(self, size: int) -> None:
        if self.limit == self.job.batch_size:
            self.progress.note(
                f"the device has not enough memory for {size} images at a time: the batch is halved until it fits"
            )
        self.limit = (size + 1) // 2
        if self.job.device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class _Heard:
    """The outputs that a model holds likeliest: int64 `[B, K]`; their probabilities float32 `[B, K]`; its seconds."""

    top: Tensor
    probabilities: Tensor
    seconds: float

    @staticmethod
    def joined(pieces: Sequence[_Heard]) -> _Heard:
        """Pieces of a batch, in order."""
        return _Heard(
            torch.cat([piece.top for piece in pieces]),
            torch.cat([piece.probabilities for piece in pieces]),
            sum(piece.seconds for piece in pieces),
        )


def _heard(logits: Tensor, outputs: tuple[int, ...] | None, seconds: float) -> _Heard:
    """The likeliest of the outputs among which is chosen."""
    places = None if outputs is None else torch.tensor(outputs, device=logits.device)
    chosen = logits if places is None else logits[:, places]
    values, top = chosen.topk(min(_TOP, chosen.shape[1]), dim=1)
    # the softmax of the five, without that of all the others
    probabilities = (values.float() - chosen.float().logsumexp(dim=1, keepdim=True)).exp()
    return _Heard((top if places is None else places[top]).cpu(), probabilities.cpu(), seconds)


def _count(said: _Heard, answers: Tensor) -> Count:
    hits = (said.top[:, :, None] == answers[:, None, :]).any(dim=2)
    return Count(int(hits[:, 0].sum()), int(hits.any(dim=1).sum()), said.seconds)


def _rows(batch: Batch, heard: Mapping[str, _Heard]) -> Rows:
    said = {name: Said(each.top.to(torch.int32).numpy(), each.probabilities.numpy()) for name, each in heard.items()}
    return Rows(tuple(batch.indices), batch.answers.to(torch.int32).numpy(), said)


def _timed(model: nn.Module, pixels: Tensor, device: torch.device) -> tuple[Tensor, float]:
    wait_for(device)
    started = time.perf_counter()
    logits = model(pixels)
    wait_for(device)
    return logits, time.perf_counter() - started


def _check_logits(name: str, logits: object, batch: int, num_classes: int) -> None:
    if not isinstance(logits, Tensor) or logits.dim() != _LOGITS_RANK:
        raise ModelError(f"{name}: the model does not return class scores, so it cannot be evaluated on labels")
    if tuple(logits.shape) != (batch, num_classes):
        raise ModelError(f"{name}: the model returns {tuple(logits.shape)} where ({batch}, {num_classes}) is expected")
    finite(name, logits)


def _check_labels(batch: Batch, dataset: ImageDataset, num_classes: int) -> None:
    """Refuse labels outside the head, where no list of classes told it beforehand."""
    fits = range(num_classes) if dataset.outputs is None else frozenset(dataset.outputs)
    for index, (label, *_) in zip(batch.indices, batch.answers.tolist(), strict=True):
        if label not in fits:
            raise DataError(
                f"{dataset.sample_id(index)} has label {label}, but the head of the model has {num_classes} outputs",
                f"Labels from 0 to {num_classes - 1} fit. Choose a model that was trained on this dataset.",
            )
