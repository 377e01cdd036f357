"""The recovered weights in the document of a compressed checkpoint, whose tensors are those of the dense model."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from repshift_cli.checkpoints.schema import RecoveredPart
from repshift_cli.errors import CheckpointError
from repshift_cli.models.tensor_model import library_model
from repshift_cli.utils.documents import validated


def recovered_part(found: Mapping[str, Any], values: Mapping[str, Tensor]) -> RecoveredPart:
    """The entry of a document, from `Recovery.to_dict` and the values by name."""
    raw = b"".join(value.detach().cpu().float().numpy().astype("<f4").tobytes() for value in values.values())
    return RecoveredPart.model_validate({**found, "tensors": list(values), "values": base64.b64encode(raw).decode()})


def recovered_values(document: Mapping[str, Any], model: nn.Module, where: str) -> dict[str, Tensor]:
    """The recovered weights of a document, float32 by the name of the parameter; empty if it has none.

    Raises:
        CheckpointError: they do not fit the model.
    """
    if document.get("recovered") is None:
        return {}
    damaged = f"{where}: its recovered weights are damaged"
    part = validated(RecoveredPart, document["recovered"], damaged)
    known = dict(library_model(model).named_parameters())
    if unknown := sorted(set(part.tensors) - known.keys()):
        raise CheckpointError(f"{damaged}: the model has no parameter {unknown[0]}")
    try:
        flat = torch.from_numpy(np.frombuffer(base64.b64decode(part.values, validate=True), "<f4").astype(np.float32))
    except (binascii.Error, ValueError) as error:
        raise CheckpointError(f"{damaged}: values should be float32 in base64") from error
    sizes = [known[name].numel() for name in part.tensors]
    if len(flat) != sum(sizes) or not bool(flat.isfinite().all()):
        raise CheckpointError(f"{damaged}: values should be {sum(sizes)} finite numbers")
    parts = zip(part.tensors, flat.split(sizes), strict=True)
    return {name: values.reshape(known[name].shape).clone() for name, values in parts}
