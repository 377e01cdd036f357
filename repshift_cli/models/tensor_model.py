"""A model of another library as a function from a batch of images to one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

_TOKENS = 3
"""Dimensions of tokens `[B, N, C]`, which some models return as feature maps."""


class TensorModel(nn.Module):
    """Runs a model and returns one tensor of its result, `[B, C]`, or `[B, T, C]` of a tower.

    `state_dict` has the keys of the model itself.

    Attributes:
        inner: the model of the library.
        num_classes: values per image if they are class scores, else 0.
        pretrained_cfg: preprocessing, where timm's models have it.
        img_size: height and width of the images, None if it takes any.
        frames: frames of a clip, None for a model of single images.
        missing: keys of weights that its file lacks. They are NaN, and the tensor does not depend on them.
    """

    def __init__(  # noqa: PLR0917
        self, inner: nn.Module, tensor: str, call: str, arguments: Mapping[str, Any], prefix: int, num_classes: int
    ) -> None:
        """Of `inner.call(images, **arguments)` return `tensor`; see `reduction.specs.spec.Output`."""
        super().__init__()
        self.inner = inner
        self.tensor, self.call, self.arguments = tensor, call, dict(arguments)
        self.prefix, self.num_classes = prefix, num_classes
        self.pretrained_cfg: dict[str, Any] = {}
        self.img_size: tuple[int, int] | None = None
        self.frames: int | None = None
        self.missing: tuple[str, ...] = ()

    def forward(self, images: Tensor) -> Tensor:
        """The tensor of a batch of images."""
        given = {key: part(self.inner, images) if callable(part) else part for key, part in self.arguments.items()}
        result = attrgetter(self.call)(self.inner)(images, **given)
        if not self.tensor:
            found: Tensor = result
        elif self.tensor == "class":
            found = result.last_hidden_state[:, 0]
        elif self.tensor == "feature_maps":
            found = torch.cat(
                [part if part.ndim == _TOKENS else part.flatten(2).mT for part in result.feature_maps], dim=1
            )
        elif self.tensor == "mean":
            found = result.last_hidden_state[:, self.prefix :].mean(dim=1)
        else:
            found = getattr(result, self.tensor)
        return found

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """With the keys of the model of the library."""
        return self.inner.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """With the keys of the model of the library."""
        return self.inner.load_state_dict(*args, **kwargs)


def library_model(model: nn.Module) -> Any:
    """The model of the library: the one inside a `TensorModel`, or the model itself."""
    return model.inner if isinstance(model, TensorModel) else model


def library_of_class(module: nn.Module) -> str:
    """The top-level package that defines the class of a module."""
    return type(module).__module__.partition(".")[0]
