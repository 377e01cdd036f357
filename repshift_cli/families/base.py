"""What a family is: it knows where in a kind of model tokens can go, and where each tensor of a layer can be seen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from repshift_cli.errors import ModelError
from repshift_cli.plan import Layout, Plan
from repshift_cli.registry import members

__all__ = ["Family", "Probe", "Site", "families", "match"]


@dataclass(frozen=True)
class Probe:
    """Where a tensor can be seen: at the input or the output of a module, perhaps through a function."""

    module: nn.Module
    side: Literal["input", "output"] = "output"
    view: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Site:
    """A block after which tokens can go.

    Attributes:
        name: as the model names the module, `blocks.3`.
        layer: index of the block.
        block: its output is the token stream `[B, T, C]`.
        probes: where the tensors that metrics ask for can be seen. `block_input` and `block_output` need none.
        missing: why a tensor cannot be seen here, for messages; the key `*` stands for every tensor.
        attention_channels: heads times channels per head of its attention, 0 where it has none.
    """

    name: str
    layer: int
    block: nn.Module
    probes: Mapping[str, Probe]
    missing: Mapping[str, str]
    attention_channels: int = 0


class Family(ABC):
    """One kind of model.

    Attributes:
        name: what plans call it.
        covers: the models that it covers, in words for people.
    """

    name: ClassVar[str]
    covers: ClassVar[str]

    @abstractmethod
    def accepts(self, model: nn.Module) -> bool:
        """Whether the model is of this kind (even if something in it is not supported)."""

    @abstractmethod
    def refusal(self, model: nn.Module) -> str | None:
        """Why this particular model cannot be reduced, or None where it can."""

    @abstractmethod
    def layout(self, model: nn.Module) -> Layout:
        """Tokens and sites for the model's input size."""

    @abstractmethod
    def sites(self, model: nn.Module) -> list[Site]:
        """The sites, in the order of the forward pass."""

    @abstractmethod
    def macs(self, model: nn.Module, plan: Plan | None) -> int:
        """Multiply-accumulates of one image, from the shapes alone; None is the dense model.

        Counts matrix products and convolutions, as the field does; norms, activations and scores are left out.
        """


def families() -> list[Family]:
    """One of each family."""
    # mypy objects to an abstract class as argument, though `members` only compares with it
    return [found() for found in members("repshift_cli.families", Family)]  # type: ignore[type-abstract]


def match(model: nn.Module) -> Family:
    """The family that knows this model.

    Raises:
        ModelError: none does, or it does and says why the model cannot be reduced.
    """
    for family in families():
        if family.accepts(model):
            reason = family.refusal(model)
            if reason:
                raise ModelError(f"{type(model).__name__} cannot be reduced: {reason}")
            return family
    supported = "; ".join(f"{family.name} ({family.covers})" for family in families())
    raise ModelError(
        f"models of the kind {type(model).__name__} are not supported",
        f"Supported: {supported}.",
    )
