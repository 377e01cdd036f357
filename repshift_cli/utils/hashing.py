"""SHA-256 of tensors and JSON documents."""

from __future__ import annotations

import json
from collections.abc import Iterable
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

_ELEMENTS = 1 << 24
"""Elements of a tensor that are hashed at a time, so that it is not copied as a whole."""


def digest_of_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of names, shapes, dtypes and values."""
    digest = sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        for part in tensor.detach().flatten().split(_ELEMENTS):
            digest.update(part.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def digest_of_document(document: Any) -> str:
    """SHA-256 of a JSON document, independent of the order of keys."""
    return sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
