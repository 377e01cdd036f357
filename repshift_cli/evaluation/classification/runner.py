"""Run the models on a batch of images and count correct predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from repshift_cli.data.dataset import ImageDataset
from repshift_cli.data.loader import Batch
from repshift_cli.errors import DataError, ModelError, UsageError
from repshift_cli.evaluation.classification.counts import Counts, ModelCounts, PredictionRows, TopK
from repshift_cli.evaluation.classification.job import EvaluationJob
from repshift_cli.evaluation.common import alternate_order, check_finite, timed
from repshift_cli.measure.attention_kernel import observed_attention
from repshift_cli.measure.device import out_of_memory
from repshift_cli.utils.progress import Progress

_TOP = 5
_LOGITS_RANK = 2  # dimensions of logits: [B, K]


@dataclass
class Runner:
    """Runs the models over batches; `limit`, the images at a time, is halved while the device runs out of memory."""

    job: EvaluationJob
    progress: Progress
    limit: int = field(init=False)
    attention: dict[str, str] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.limit = self.job.batch_size

    def classify(self, batch: Batch) -> Counts:
        job, skipped = self.job, tuple(batch.broken)
        if batch.pixels is None:
            return Counts(0, {name: ModelCounts() for name in job.models}, 0, skipped)
        _check_labels(batch, job.dataset, job.num_classes)
        pieces: list[dict[str, tuple[TopK, float]]] = []
        place = 0
        while place < len(batch.pixels):
            pixels = batch.pixels[place : place + self.limit]
            found = self._try_piece(pixels, batch.number)
            if found is None:
                self._halve(len(pixels))
                continue
            pieces.append(found)
            place += len(pixels)
        top_k = {name: TopK.joined([piece[name][0] for piece in pieces]) for name in job.models}
        seconds = {name: sum(piece[name][1] for piece in pieces) for name in job.models}
        answers = batch.answers.to(torch.int32).numpy()
        return Counts(
            images=len(batch.indices),
            models={name: ModelCounts.of(top_k[name].top, answers, seconds[name]) for name in job.models},
            same=_same_top1(top_k),
            skipped=skipped,
            rows=(PredictionRows(tuple(batch.indices), answers, top_k),) if job.keep_rows else (),
            padded=tuple(batch.padded),
        )

    def _try_piece(self, pixels: Tensor, turn: int) -> dict[str, tuple[TopK, float]] | None:
        """`_run_piece`; None if the memory does not suffice. Returning frees what the failed pass had allocated."""
        try:
            return self._run_piece(pixels, turn)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if len(pixels) == 1:
                raise UsageError(
                    f"the device has not enough memory for one {self.job.preprocessing.unit} at a time",
                    "Use another --device or --dtype.",
                ) from error
        return None

    def _run_piece(self, pixels: Tensor, turn: int) -> dict[str, tuple[TopK, float]]:
        """Predictions and seconds by name of the model."""
        job = self.job
        pixels = pixels.to(device=job.device, non_blocking=True).to(dtype=job.dtype)
        if len(self.attention) < len(job.models):
            # The first pass allocates memory and selects kernels. It is not timed, so it can be observed.
            for name, model in job.models.items():
                self.attention[name] = observed_attention(model, pixels)
        found: dict[str, tuple[TopK, float]] = {}
        for name in alternate_order(list(job.models), turn):
            logits, seconds = timed(job.models[name], pixels, job.device)
            _check_logits(name, logits, len(pixels), job.num_classes)
            found[name] = _top_k(logits, job.dataset.outputs), seconds
        return found

    def _halve(self, size: int) -> None:
        if self.limit == self.job.batch_size:
            self.progress.note(
                f"the device has not enough memory for {size} {self.job.dataset.unit} at a time: the batch is halved "
                "until it fits"
            )
        self.limit = (size + 1) // 2
        if self.job.device.type == "cuda":
            torch.cuda.empty_cache()


def _top_k(logits: Tensor, outputs: tuple[int, ...] | None) -> TopK:
    """The most likely of `outputs`, of all if None."""
    allowed = torch.arange(logits.shape[1]) if outputs is None else torch.tensor(outputs)
    chosen = logits if outputs is None else logits[:, allowed.to(logits.device)]
    values, places = chosen.topk(min(_TOP, chosen.shape[1]), dim=1)
    # softmax of the K values alone
    probabilities = (values.float() - chosen.float().logsumexp(dim=1, keepdim=True)).exp()
    return TopK(allowed[places.cpu()].to(torch.int32).numpy(), probabilities.cpu().numpy())


def _same_top1(top_k: Mapping[str, TopK]) -> int:
    if len(top_k) != 2:  # noqa: PLR2004
        return 0
    first, second = (each.top[:, 0] for each in top_k.values())
    return int((first == second).sum())


def _check_logits(name: str, logits: object, batch: int, num_classes: int) -> None:
    if not isinstance(logits, Tensor) or logits.dim() != _LOGITS_RANK:
        raise ModelError(f"{name}: the model does not return class scores, so it cannot be evaluated on labels")
    if tuple(logits.shape) != (batch, num_classes):
        raise ModelError(f"{name}: the model returns {tuple(logits.shape)}: expected ({batch}, {num_classes})")
    check_finite(name, logits)


def _check_labels(batch: Batch, dataset: ImageDataset, num_classes: int) -> None:
    """Labels of datasets without a list of classes are known only when they are read."""
    allowed = range(num_classes) if dataset.outputs is None else frozenset(dataset.outputs)
    for index, (label, *_) in zip(batch.indices, batch.answers.tolist(), strict=True):
        if label not in allowed:
            raise DataError(
                f"{dataset.sample_id(index)} has label {label}, but the head of the model has {num_classes} outputs",
                f"Labels must be from 0 to {num_classes - 1}. Choose a model that was trained on this dataset.",
            )
