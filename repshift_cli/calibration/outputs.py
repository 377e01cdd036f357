"""Outputs of a model on the calibration inputs, and the distance between those of two models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repshift_cli.utils.progress import Task

__all__ = [
    "ReferenceOutputs",
    "agreement",
    "distance",
    "divergence",
    "reference_outputs",
    "run_batches",
]


@dataclass(frozen=True)
class ReferenceOutputs:
    """What a model says of inputs, in a form in which two models can be compared.

    A classifier gives logits. A model that is there to compare embeddings (it has a `temperature`) is asked which of
    the dense model's embeddings each of its own is like, both without their mean: what all embeddings have in common
    does not matter to a ranking, yet it is most of what moves when the mean is taken over fewer tokens.

    Attributes:
        reference: of the dense model, `[n, classes]`, or features `[n, channels]`.
        gallery: its embeddings without their mean, of length one, `[n, channels]`; None for other models.
        temperature: of the similarities.
        are_logits: whether `reference` are logits.
    """

    reference: Tensor
    gallery: Tensor | None
    temperature: float
    are_logits: bool

    def of(self, outputs: Tensor) -> Tensor:
        """Outputs of another model for some of the inputs, all that there are, in the form of `reference`."""
        if self.gallery is None:
            return outputs
        return _centred(outputs) @ self.gallery.T / self.temperature


def reference_outputs(model: nn.Module, outputs: Tensor) -> ReferenceOutputs:
    """How to compare with a dense model, given its outputs `[n, channels]` for all inputs."""
    temperature = getattr(model, "temperature", None)
    if not isinstance(temperature, float):
        return ReferenceOutputs(outputs, None, 1.0, getattr(model, "num_classes", 0) > 0)
    gallery = _centred(outputs)
    return ReferenceOutputs(gallery @ gallery.T / temperature, gallery, temperature, True)


def _centred(embeddings: Tensor) -> Tensor:
    embeddings = torch.nn.functional.normalize(embeddings.float(), dim=-1)
    return torch.nn.functional.normalize(embeddings - embeddings.mean(dim=0), dim=-1)


def divergence(reference: Tensor, output: Tensor, has_head: bool) -> Tensor:
    """How far outputs are from the dense model's, per image, in float32.

    Args:
        reference, output: `[B, classes]` logits, or `[B, channels]` features where `has_head` is off.

    Returns:
        `[B]`: KL(reference || output) in nats for logits, `1 - cosine` for features.
    """
    if not has_head:
        return 1.0 - torch.nn.functional.cosine_similarity(reference.float(), output.float(), dim=-1)
    wanted, given = reference.float().log_softmax(-1), output.float().log_softmax(-1)
    return (wanted.exp() * (wanted - given)).sum(-1).clamp_min(0.0)


def distance(reference: Tensor, output: Tensor, has_head: bool) -> Tensor:
    """As `divergence`, but bounded: by it candidates are compared.

    One image on which a confident model changes its mind has a KL as large as that of hundreds of harmless ones; the
    mean would tell little else.

    Returns:
        `[B]`: the squared Hellinger distance `1 - sum sqrt(p q)` of the probabilities for logits, in 0..1; `1 - cosine`
        for features.
    """
    if not has_head:
        return divergence(reference, output, has_head)
    both = reference.float().softmax(-1) * output.float().softmax(-1)
    return (1.0 - both.sqrt().sum(-1)).clamp_min(0.0)


def agreement(reference: Tensor, output: Tensor) -> Tensor:
    """1.0 for each image whose predicted class is the same, else 0.0: `[B, classes]` twice to float32 `[B]`."""
    return (reference.argmax(-1) == output.argmax(-1)).float()


def run_batches(model: nn.Module, images: Tensor, batch_size: int, task: Task) -> Tensor:
    """What a model returns for all images, batch by batch."""
    parts = []
    for batch in images.split(batch_size):
        parts.append(model(batch))
        task.advance(len(batch))
    return torch.cat(parts)
