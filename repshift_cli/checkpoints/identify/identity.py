"""The result of identification, and the choice between several models that fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

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
        hint: the file's name.
        plain: prefix of the names that come before others of the same length.

    Raises:
        CheckpointError: several fit and compute different things.
    """
    hinted = [name for name in fitting if hint and (hint in name or name in hint)]
    names = sorted(hinted or fitting, key=lambda name: ("img_size" in fitting[name][1], len(name), name))
    names.sort(key=lambda name: ("img_size" in fitting[name][1], not hinted and not name.startswith(plain)))
    if len({repr(fitting[name][0]) for name in names}) > 1:
        raise CheckpointError(
            f"{where}: several models have exactly these tensors but compute different things: {', '.join(names)}",
            "Choose one with --model.",
        )
    return names[0]
