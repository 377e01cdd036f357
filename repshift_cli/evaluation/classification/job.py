"""Header and resume state of an image classification evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import nn

from repshift_cli.checkpoints.exported import Runtime
from repshift_cli.data.dataset import ImageDataset
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.models.attention_mode import AttentionMode
from repshift_cli.reduction.compressed_model import CompressedModel
from repshift_cli.utils.files import sha256_of
from repshift_cli.utils.hashing import digest_of_document, digest_of_tensors
from repshift_cli.version import __version__

__all__ = [
    "EvaluationJob",
]


_MOST_SHARDS = 256
"""Of a run, each with a file of its own where progress is kept; small runs have one for each batch."""


_STATE_FORMAT = 1


@dataclass(frozen=True)
class EvaluationJob:
    """What is to be evaluated: all that the outcome depends on. The arguments are those of `evaluate`."""

    models: Mapping[str, nn.Module]
    dataset: ImageDataset
    preprocessing: Preprocessing
    batch_size: int
    device: torch.device
    dtype: torch.dtype
    num_classes: int
    attention: AttentionMode
    keep_rows: bool

    @property
    def batches(self) -> int:
        """How many batches the dataset has."""
        return -(-len(self.dataset) // self.batch_size)

    @property
    def shards(self) -> list[range]:
        """The batches of each shard, which is what progress is kept of and what processes share."""
        size = -(-self.batches // _MOST_SHARDS)
        return [range(first, min(first + size, self.batches)) for first in range(0, self.batches, size)]

    def pictures(self, batch: int) -> range:
        """The pictures of a batch."""
        return range(batch * self.batch_size, min((batch + 1) * self.batch_size, len(self.dataset)))

    def header(self) -> dict[str, Any]:
        """What makes this run the one that it is, in words that tell a user what differs."""
        stamps = sha256()
        for index in range(len(self.dataset)):
            stamps.update(self.dataset.stamp(index).encode("utf-8", "backslashreplace") + b"\n")
        return {
            "evaluation": _STATE_FORMAT,
            "repshift": __version__,
            "torch": str(torch.__version__),
            "models": {name: _digest_of_model(model) for name, model in self.models.items()},
            "data": stamps.hexdigest(),
            "pictures": len(self.dataset),
            "outputs": digest_of_document([self.num_classes, self.dataset.outputs]),
            "preprocessing": _json_form(self.preprocessing.to_dict()),
            "batch size": self.batch_size,
            "device": self.device.type,
            "dtype": str(self.dtype),
            "attention": self.attention,
            "saved predictions": self.keep_rows,
        }


def _json_form(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON would give them back: tuples become lists."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _digest_of_model(model: nn.Module) -> str:
    """SHA-256 of weights, and of the plan by which tokens go; of exported files, of all that is in them."""
    plans = [part.plan.model_dump(mode="json") for part in model.modules() if isinstance(part, CompressedModel)]
    files = [sha256_of(part.path) for part in model.modules() if isinstance(part, Runtime)]
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    return digest_of_document([kind, digest_of_tensors(model.state_dict().items()), plans, files])
