"""A loaded model and its description."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor, nn

from repshift_cli.checkpoints.builtin import BUILTIN
from repshift_cli.checkpoints.weights import Source
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.planning.plan import Plan
from repshift_cli.utils.documents import Name, validated


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ModelDescription:
    """What is needed to build the model again, besides its weights.

    Attributes:
        name: of the model, or a description of a shape without a name.
        architecture: a registered name, or a kind that is built from `args` alone, see `checkpoints.create`.
        args: keyword arguments of the builder.
        preprocessing: the evaluation transform.
    """

    name: Name
    architecture: Name | None
    args: dict[str, Any]
    preprocessing: Preprocessing

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "the model description") -> ModelDescription:
        """From a dict of `to_dict`; raises CheckpointError if a value is missing or invalid."""
        return validated(cls, values, where)


@dataclass
class LoadedModel:
    """A dense model as loaded, in eval mode on the CPU, with its origin.

    Attributes:
        tensors: the weights in the dtype of the file, under the model's keys.
        notes: assumptions that the file does not confirm, for the user.
        document: our metadata of the file, which holds the plan of a compressed checkpoint.
    """

    model: nn.Module
    description: ModelDescription
    source: Source
    tensors: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)
    document: dict[str, Any] | None = None

    @property
    def plan(self) -> Plan | None:
        """The plan of a compressed checkpoint, None for a dense one; raises CheckpointError if it is invalid."""
        if self.document is None or not {"plan", "format_version"} & self.document.keys():
            return None
        return validated(
            Plan, self.document.get("plan"), f"{self.source.path or 'the checkpoint'}: its plan is damaged"
        )

    @property
    def is_builtin(self) -> bool:
        """Whether it is one of the built-in models, which the built-in datasets are for."""
        return self.source.origin == "builtin" or f"builtin:{self.description.name}" in BUILTIN


def differing_tensors(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that only one has, or that differ in dtype, shape or bits."""

    def equal(name: str) -> bool:
        if name not in a or name not in b or a[name].dtype != b[name].dtype or a[name].shape != b[name].shape:
            return False
        return torch.equal(*(each[name].reshape(-1).contiguous().view(torch.uint8) for each in (a, b)))

    return [name for name in dict.fromkeys((*a, *b)) if not equal(name)]
