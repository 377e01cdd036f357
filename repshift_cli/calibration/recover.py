"""Adapt a few parameters of a compressed model to the dropped tokens, without labels.

Norms, biases and the last layer are trained so that the outputs come nearer to those of the dense model, on the half of
the calibration images that also chooses the metric. The result is kept if it is clearly better on the held-out half.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from repshift_cli.calibration.calibrate import CLEAR_SIGMAS, MIN_IMAGES, Deviation, paired_sigmas
from repshift_cli.calibration.outputs import ReferenceOutputs, divergence, reference_outputs, run_batches
from repshift_cli.errors import CheckFailed, DataError, ModelError, UsageError, first_line
from repshift_cli.measure.device import out_of_memory
from repshift_cli.models.tensor_model import library_model
from repshift_cli.reduction.compressed_model import CompressedModel
from repshift_cli.utils.progress import Progress, Task

_BATCH = 16
_LEARNING_RATE = 1e-3
_MOST_NORM = 1.0
"""Gradients are scaled to at most this norm."""

_MOST_VALUES = 10_000_000
"""The checkpoint stores the values in its metadata; safetensors limits these to 100 MB."""


@dataclass(frozen=True)
class Recovery:
    """The result of `recover`.

    Attributes:
        images: number of images for training and checking together; `identity` is theirs, for the record.
        passes: over the images for training.
        tensors: names of the trained parameters.
        before, after: on the held-out images.
        sigmas: by how many standard errors `after` is better, over paired images.
        kept: whether the model has the trained values.
    """

    images: int
    identity: Mapping[str, Any]
    passes: int
    tensors: tuple[str, ...]
    before: Deviation
    after: Deviation
    sigmas: float
    kept: bool
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "data": dict(self.identity),
            "passes": self.passes,
            "tensors": list(self.tensors),
            "before": self.before.numbers(),
            "after": self.after.numbers(),
            "sigmas": round(self.sigmas, 2),
        }


def recover(  # noqa: PLR0917
    compressed: CompressedModel,
    images: Tensor,
    identity: Mapping[str, Any],
    passes: int,
    seed: int,
    progress: Progress,
) -> Recovery:
    """Train norms, biases and the last layer on the outputs of the dense model, and keep the result if it is better.

    It is better if the distance on the held-out images is clearly smaller and no fewer predictions are unchanged. Else
    the model has the dense model's parameters again, bit by bit.

    Args:
        compressed: float32; `replaced` has the trained parameters afterwards.
        images: `[n, C, H, W]`, preprocessed, unlabelled; at least 8. The first half trains.
        identity: of the images, for the record.
        seed: of the order of the images.

    Raises:
        DataError: too few images.
        UsageError: more parameters than a checkpoint can store.
        ModelError: gradients do not reach the parameters.
        CheckFailed: the dense model returns values that are not finite.
    """
    if len(images) < MIN_IMAGES:
        raise DataError(f"recovery needs at least {MIN_IMAGES} images, there are {len(images)}")
    begin, border = time.monotonic(), len(images) // 2  # not more than calibration and search choose on
    values = {name: value.detach().clone() for name, value in _trainable(compressed).items()}
    if (count := sum(map(Tensor.numel, values.values()))) > _MOST_VALUES:
        raise UsageError(
            f"--recover: norms, biases and the last layer have {count} values, a checkpoint stores at most "
            f"{_MOST_VALUES}",
            "Leave --recover out.",
        )
    with progress.task("recovering", 3 * len(images) - 2 * border + passes * border) as task:
        with torch.no_grad(), compressed.dense():
            dense = run_batches(compressed, images, _BATCH, task)
        if not bool(dense.isfinite().all()):
            raise CheckFailed("the dense model returns values that are not finite", "Leave --recover out.")
        wanted = reference_outputs(compressed.model, dense)
        before = _held_out(compressed, images[border:], wanted, border, task)
        compressed.replace_parameters(values)
        try:
            names = _train(compressed, images[:border], dense, wanted.are_logits, passes, seed, task)
            compressed.replace_parameters({name: values[name] for name in names})
            after = _held_out(compressed, images[border:], wanted, border, task)
        except BaseException:
            compressed.replace_parameters({})
            raise
    sigmas = paired_sigmas(before.distances, after.distances)
    kept = sigmas >= CLEAR_SIGMAS and (after.agreement or 0.0) >= (before.agreement or 0.0)
    if not kept:
        compressed.replace_parameters({})
    seconds = time.monotonic() - begin
    return Recovery(len(images), identity, passes, names, before, after, sigmas, kept, seconds)


def _trainable(compressed: CompressedModel) -> dict[str, nn.Parameter]:
    """Norms, biases, and linear layers outside of the blocks that return the class scores, by name."""
    model, classes = library_model(compressed.model), int(getattr(compressed.model, "num_classes", 0) or 0)
    blocks = {part for site in compressed.family.sites(compressed.model) for part in site.block.modules()}
    found = {}
    for path, module in model.named_modules():
        head = isinstance(module, nn.Linear) and module.out_features == classes and module not in blocks
        for name, parameter in module.named_parameters(path, recurse=False):
            bias = name.endswith("bias") and parameter.ndim == 1
            if head or bias or "Norm" in type(module).__name__:
                found[name] = parameter
    return found


def _held_out(
    compressed: CompressedModel, images: Tensor, dense: ReferenceOutputs, start: int, task: Task
) -> Deviation:
    with torch.no_grad():
        result = Deviation(outputs=[run_batches(compressed, images, _BATCH, task)])
    result.compare(dense, start)
    return result


def _train(  # noqa: PLR0917
    compressed: CompressedModel, images: Tensor, dense: Tensor, are_logits: bool, passes: int, seed: int, task: Task
) -> tuple[str, ...]:
    """Train the replaced parameters in place; the names of those that the output depends on."""
    assert compressed.replaced is not None
    parameters = compressed.replaced.parameters()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters.values(), lr=_LEARNING_RATE, weight_decay=0.0)
    steps = passes * -(-len(images) // _BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            for _ in range(passes):
                for part in torch.randperm(len(images), generator=generator).to(images.device).split(_BATCH):
                    optimizer.zero_grad()
                    divergence(dense[part], compressed(images[part]), are_logits).mean().backward()
                    torch.nn.utils.clip_grad_norm_(parameters.values(), _MOST_NORM)
                    optimizer.step()
                    schedule.step()
                    task.advance(len(part))
    except RuntimeError as error:  # the base class of torch's errors
        if out_of_memory(error):
            raise
        raise ModelError(
            f"--recover: the model cannot be trained here: {first_line(error)}", "Leave --recover out."
        ) from error
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
    return tuple(name for name, parameter in parameters.items() if parameter.grad is not None)
