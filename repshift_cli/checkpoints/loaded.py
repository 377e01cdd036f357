"""A loaded model and its description."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import ValidationError
from torch import Tensor, nn

from repshift_cli.checkpoints.builtin import BUILTIN
from repshift_cli.checkpoints.weights import Source
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import CheckpointError
from repshift_cli.planning.plan import Plan


@dataclass(frozen=True)
class ModelDescription:
    """What is needed to build the model again, besides its weights.

    Attributes:
        name: of the model, or a description of a shape without a name.
        architecture: a registered name, or a kind that is built from `args` alone, see `checkpoints.create`.
        args: keyword arguments of the builder.
        preprocessing: the evaluation transform.
    """

    name: str
    architecture: str | None
    args: dict[str, Any]
    preprocessing: Preprocessing

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelDescription:
        """From a dict of `to_dict`.

        Raises:
            CheckpointError: a key is missing or has the wrong type.
        """
        try:
            name, architecture, args = values["name"], values["architecture"], values["args"]
            preprocessing = Preprocessing.from_dict(values["preprocessing"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"the model description in the file is incomplete: {error!r}") from error
        if not (isinstance(name, str) and isinstance(architecture, str | None) and isinstance(args, dict)):
            raise CheckpointError("the model description in the file has values of the wrong type")
        return cls(name, architecture, args, preprocessing)


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
        try:
            return Plan.model_validate(self.document.get("plan"))
        except ValidationError as error:
            where = self.source.path or "the checkpoint"
            raise CheckpointError(f"{where}: its plan is damaged: {error.errors()[0]['msg']}") from error

    @property
    def is_builtin(self) -> bool:
        """Whether it is one of the built-in models, which the built-in datasets are for."""
        return self.source.origin == "builtin" or f"builtin:{self.description.name}" in BUILTIN
