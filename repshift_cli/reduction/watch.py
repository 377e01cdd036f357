"""Record the tokens that leave each block while a dense model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from repshift_cli.planning.layout import After
from repshift_cli.reduction.families.base import match
from repshift_cli.reduction.stream import Stream


@dataclass(frozen=True)
class BlockOutput:
    """The output of one block in a forward pass: tokens `[B, N, C]`, as metrics see them, without the prefix.

    The later layers are computed from `carrier`; `view` turns a tensor like it, such as its gradient, into one like
    `tokens`.
    """

    tokens: Tensor
    carrier: Tensor
    view: Callable[[Tensor], Tensor]


@contextmanager
def record_block_outputs(model: nn.Module, after: After = "block") -> Iterator[dict[int, BlockOutput]]:
    """Inside the context each pass of a dense model fills the dict with the output of each block, by layer.

    Raises a ModelError if the model is not supported.
    """
    family = match(model)
    stream, outputs = family.stream(model), dict[int, BlockOutput]()
    handles = []
    for site in family.sites(model):
        block = site.attended if after == "attention" else site.block
        assert block is not None
        handles.append(block.register_forward_hook(partial(_record, stream, outputs, site.layer)))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _record(  # noqa: PLR0917
    stream: Stream, outputs: dict[int, BlockOutput], layer: int, module: nn.Module, args: Any, output: Any
) -> None:
    value, first = stream.enter(output), stream.prefix
    outputs[layer] = BlockOutput(
        stream.block_output(value)[:, first:],
        stream.carrier(value),
        lambda carrier: stream.carried(carrier)[:, first:],
    )
