"""Outputs of a model on the calibration inputs, and the distance between those of two models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repshift_cli.utils.progress import Task


@dataclass(frozen=True)
class ReferenceOutputs:
    """Outputs of the dense model in a form in which another model can be compared with it.

    For a classifier these are logits. For a model of embeddings (it has a `temperature`) they are similarities to the
    dense model's embeddings (`gallery`, `[n, channels]`), both without their mean and of length one: the common part of
    all embeddings does not change a ranking, but it changes most when the mean is taken over fewer tokens.

    Attributes:
        reference: logits `[n, classes]`, or features `[n, channels]` if `are_logits` is False.
    """

    reference: Tensor
    gallery: Tensor | None
    temperature: float
    are_logits: bool

    def of(self, outputs: Tensor) -> Tensor:
        """Outputs of another model for some of the inputs, in the form of `reference`."""
        if self.gallery is None:
            return outputs
        return _centred(outputs) @ self.gallery.T / self.temperature


def reference_outputs(model: nn.Module, outputs: Tensor) -> ReferenceOutputs:
    """The outputs `[n, channels]` of the dense model for all inputs, prepared for comparison."""
    temperature = getattr(model, "temperature", None)
    if not isinstance(temperature, float):
        return ReferenceOutputs(outputs, None, 1.0, getattr(model, "num_classes", 0) > 0)
    gallery = _centred(outputs)
    return ReferenceOutputs(gallery @ gallery.T / temperature, gallery, temperature, True)


def _centred(embeddings: Tensor) -> Tensor:
    embeddings = torch.nn.functional.normalize(embeddings.float(), dim=-1)
    return torch.nn.functional.normalize(embeddings - embeddings.mean(dim=0), dim=-1)


def divergence(reference: Tensor, output: Tensor, has_head: bool) -> Tensor:
    """Divergence from the dense model's outputs per image, float32: `[B, classes]` or `[B, ..., channels]` to `[B]`.

    KL(reference || output) in nats for logits, `1 - cosine` for features (without `has_head`), the mean over tokens.
    """
    if not has_head:
        alike = torch.nn.functional.cosine_similarity(reference.float(), output.float(), dim=-1)
        return 1.0 - alike.reshape(len(alike), -1).mean(dim=1)
    wanted, given = reference.float().log_softmax(-1), output.float().log_softmax(-1)
    return (wanted.exp() * (wanted - given)).sum(-1).clamp_min(0.0)


def distance(reference: Tensor, output: Tensor, has_head: bool) -> Tensor:
    """A bounded divergence to compare candidates by, `[B]`.

    For logits it is the squared Hellinger distance `1 - sum sqrt(p q)` of the probabilities, in 0..1; for features
    `1 - cosine`. The KL of one image with a changed confident prediction can dominate the mean over hundreds of images.
    """
    if not has_head:
        return divergence(reference, output, has_head)
    both = reference.float().softmax(-1) * output.float().softmax(-1)
    return (1.0 - both.sqrt().sum(-1)).clamp_min(0.0)


def agreement(reference: Tensor, output: Tensor) -> Tensor:
    """1.0 for each image whose predicted class is the same, else 0.0: `[B, classes]` twice to float32 `[B]`."""
    return (reference.argmax(-1) == output.argmax(-1)).float()


def run_batches(model: nn.Module, images: Tensor, batch_size: int, task: Task) -> Tensor:
    """The outputs of a model for all images, run in batches."""
    parts = []
    for batch in images.split(batch_size):
        parts.append(model(batch))
        task.advance(len(batch))
    return torch.cat(parts)
