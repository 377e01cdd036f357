"""Parameters of a hooked model in place of those of the dense model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class ReplacedParameters:
    """Other values for some parameters of a model, and the dense model's.

    The parameters are exchanged as objects: what shares those of the dense model, such as a copy, keeps its values.

    Attributes:
        active: whether the model has the other values now.
    """

    def __init__(self, model: nn.Module, values: Mapping[str, Tensor]) -> None:
        """Replace parameters; `values` by name, of their shapes. Raises AttributeError for an unknown name."""
        self._model = model
        self._spare = {name: nn.Parameter(value, requires_grad=False) for name, value in values.items()}
        self.active = False
        self.exchange()

    def parameters(self) -> dict[str, nn.Parameter]:
        """The other values by name, also while the model has those of the dense model."""
        if not self.active:
            return dict(self._spare)
        return {name: self._model.get_parameter(name) for name in self._spare}

    def exchange(self) -> None:
        """Switch between the other values and those of the dense model, on the device and in the dtype of the model."""
        for name, other in self._spare.items():
            path, _, leaf = name.rpartition(".")
            current = self._model.get_parameter(name)
            if (other.device, other.dtype) != (current.device, current.dtype):
                with torch.inference_mode(False):
                    other = nn.Parameter(other.detach().to(current.device, current.dtype), requires_grad=False)  # noqa: PLW2901
            setattr(self._model.get_submodule(path), leaf, other)
            self._spare[name] = current
        self.active = not self.active

    def restore(self) -> None:
        """Give the model the parameters of the dense model."""
        if self.active:
            self.exchange()
