"""The result of identification, and the choice between several models that fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from repshift_cli.checkpoints.identify.computation import computation
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import CheckpointError
from repshift_cli.reduction.families.base import families

Fitting = dict[str, tuple[nn.Module, dict[str, Any]]]
"""Models that fit, by name, with their builder arguments."""


@dataclass
class Identity:
    """A model that fits the weights.

    Attributes:
        name, architecture, args, preprocessing: see `ModelDescription`.
        tensors: the weights under the model's own keys.
        notes: assumptions, for the user.
    """

    name: str
    architecture: str | None
    args: dict[str, Any]
    preprocessing: Preprocessing
    tensors: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Shapes by name, which identification compares."""
    return {key: value.shape for key, value in tensors.items()}


def supported() -> str:
    """The models that are supported, for messages."""
    return f"Supported are {', '.join(family.covers for family in families())}."


def best_fit(fitting: Fitting, where: str, hint: str, plain: str = "") -> str:
    """The model that is named like the file, else the one with the shortest name.

    Args:
        hint: the file's name. It counts if it holds the whole name of a model.
        plain: prefix of the names that come before others of the same length.

    Raises:
        CheckpointError: several fit and compute different things.
    """
    hinted = [name for name in fitting if re.search(rf"(?<![a-zA-Z0-9]){re.escape(name)}(?![a-zA-Z0-9])", hint)]
    hinted = [name for name in hinted if not any(name != other and name in other for other in hinted)]
    changed = {name: len(fitting[name][1].keys() & {"img_size", "global_pool"}) for name in fitting}
    names = sorted(hinted or fitting, key=lambda name: (changed[name], len(name), name))
    names.sort(key=lambda name: (changed[name], not hinted and not name.startswith(plain)))
    if len({computation(fitting[name][0]) for name in names}) > 1:
        raise CheckpointError(
            f"{where}: several models have exactly these tensors but compute different things: {', '.join(names)}",
            "Choose one with --model, or give --heads if they differ in these.",
        )
    return names[0]
