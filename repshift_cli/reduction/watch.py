"""Record token counts and scores while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from repshift_cli.planning.layout import After
from repshift_cli.reduction.families.base import Stream, match

__all__ = [
    "BlockOutput",
    "record_block_outputs",
]


@dataclass(frozen=True)
class BlockOutput:
    """What left one block in a pass.

    Attributes:
        tokens: `[B, T, C]`, as metrics see them, without the prefix.
        carrier: the tensor that what follows was computed from.
        view: turns a tensor like `carrier` into one like `tokens`.
    """

    tokens: Tensor
    carrier: Tensor
    view: Callable[[Tensor], Tensor]


@contextmanager
def record_block_outputs(model: nn.Module, after: After = "block") -> Iterator[dict[int, BlockOutput]]:
    """Inside the context each pass of a dense model leaves what left each block, by layer.

    Raises:
        ModelError: the model is not supported.
    """
    family = match(model)
    stream, seen = family.stream(model), dict[int, BlockOutput]()
    handles = []
    for site in family.sites(model):
        place = site.attended if after == "attention" else site.block
        assert place is not None
        handles.append(place.register_forward_hook(_Watch(stream, site.layer, seen).on_block))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class _Watch:
    """Remembers what left one block."""

    def __init__(self, stream: Stream, layer: int, seen: dict[int, BlockOutput]) -> None:
        self.stream = stream
        self.layer = layer
        self.seen = seen

    def on_block(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Store it."""
        value, prefix = self.stream.enter(output), self.stream.prefix
        tokens = self.stream.block_output(value)[:, prefix:]
        self.seen[self.layer] = BlockOutput(tokens, self.stream.carrier(value), self._view)

    def _view(self, value: Tensor) -> Tensor:
        return self.stream.carried(value)[:, self.stream.prefix :]
