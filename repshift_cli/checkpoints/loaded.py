"""A loaded model and its description."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from repshift_cli.checkpoints.weights import Source
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import CheckpointError

__all__ = [
    "LoadedModel",
    "ModelDescription",
]


@dataclass(frozen=True)
class ModelDescription:
    """All that is needed to build the model again without its weights.

    Attributes:
        name: what people call it: the name of the model, or words for a shape that has none.
        architecture: name in timm's registry or of one of Vim's models; or what is built from `args` alone: None for a
            `VisionTransformer`, "vim" for a `VisionMamba`, "umt" for a UMT.
        args: keyword arguments for the builder.
        preprocessing: the model's own evaluation transform.
    """

    name: str
    architecture: str | None
    args: dict[str, Any]
    preprocessing: Preprocessing

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelDescription:
        """From the form that `to_dict` gives.

        Raises:
            CheckpointError: a key is missing or of a wrong type.
        """
        try:
            name, architecture, args = values["name"], values["architecture"], values["args"]
            preprocessing = Preprocessing.from_dict(values["preprocessing"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"the description of the model in the file is incomplete: {error!r}") from error
        if not (isinstance(name, str) and isinstance(architecture, str | None) and isinstance(args, dict)):
            raise CheckpointError("the description of the model in the file has values of the wrong type")
        return cls(name, architecture, args, preprocessing)


@dataclass
class LoadedModel:
    """A dense model in eval mode on the CPU, with what is known of it.

    Attributes:
        tensors: the weights as they were read (dtype included), under the model's keys.
        notes: what was assumed rather than told by the file, in words for the user.
        document: our metadata of the file, which holds a plan if it is a compressed checkpoint.
    """

    model: nn.Module
    description: ModelDescription
    source: Source
    tensors: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)
    document: dict[str, Any] | None = None
