"""What an image evaluation depends on: models, data and settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
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

_MAX_SHARDS = 256
"""Each shard is one file of the resume state; small runs have one shard per batch."""

_STATE_FORMAT = 1


@dataclass(frozen=True)
class EvaluationJob:
    """Everything that the result depends on; fields as in `evaluate`."""

    models: Mapping[str, nn.Module]
    dataset: ImageDataset
    preprocessing: Preprocessing
    batch_size: int
    device: torch.device
    dtype: torch.dtype
    num_classes: int
    attention: AttentionMode
    keep_rows: bool

    @cached_property
    def shards(self) -> list[range]:
        """The batches of each shard. Shards are distributed over processes and saved for resuming."""
        batches = -(-len(self.dataset) // self.batch_size)
        size = -(-batches // _MAX_SHARDS)
        return [range(first, min(first + size, batches)) for first in range(0, batches, size)]

    def images(self, batch: int) -> range:
        """The images of a batch, by index in the dataset."""
        return range(batch * self.batch_size, min((batch + 1) * self.batch_size, len(self.dataset)))

    def images_of_shard(self, shard: int) -> range:
        """The images of a shard, by index in the dataset."""
        batches = self.shards[shard]
        return range(self.images(batches[0]).start, self.images(batches[-1]).stop)

    def header(self, with_times: bool = True) -> dict[str, Any]:
        """Identity of the run; the keys are shown to the user if two runs differ.

        Args:
            with_times: include the times at which the images were written, which differ between two machines.
        """
        data = sha256(repr(self.dataset.classes).encode("utf-8", "backslashreplace"))
        for index in range(len(self.dataset)):
            text = self.dataset.stamp(index) if with_times else self.dataset.fingerprint(index)
            data.update(text.encode("utf-8", "backslashreplace") + b"\n")
        return {
            "evaluation": _STATE_FORMAT,
            "repshift": __version__,
            "torch": str(torch.__version__),
            "models": self._digests,
            "data": data.hexdigest(),
            "pictures": len(self.dataset),  # the key of this format
            "outputs": digest_of_document([self.num_classes, self.dataset.outputs]),
            "preprocessing": self.preprocessing.to_dict(),
            "batch size": self.batch_size,
            "device": self.device.type,
            "dtype": str(self.dtype),
            "attention": self.attention,
            "saved predictions": self.keep_rows,
        }

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {name: _digest_of_model(model) for name, model in self.models.items()}


def _digest_of_model(model: nn.Module) -> str:
    """SHA-256 of weights and plan; of exported files, of the file."""
    plans = [part.plan.model_dump(mode="json") for part in model.modules() if isinstance(part, CompressedModel)]
    files = [sha256_of(part.path) for part in model.modules() if isinstance(part, Runtime)]
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    return digest_of_document([kind, digest_of_tensors(model.state_dict().items()), plans, files])
