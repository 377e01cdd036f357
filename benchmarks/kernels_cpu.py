"""Efficiency of the kernels of ViT blocks with fewer tokens: a limit for all schedules, and suitable token counts.

All linear layers of all blocks run in the order of the model with the given number of tokens, then the fused attention
of all blocks. With equally efficient kernels, the time of the layers would be proportional to the number of tokens and
that of attention to its square. `packed` has weights that are laid out in advance, as `torch.compile` does with
`freezing`; the difference is the cost of the layout. Weights are random.

    python benchmarks/kernels_cpu.py --threads 2
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from _results import publish, table
from _timing import pieces_parser, timed
from torch import Tensor
from torch.nn import functional

from repshift_cli.measure.device import DTYPES, device_name

WIDTHS = {"DeiT-S": 384, "DeiT-B": 768}
BLOCKS = 12
HEAD = 64
TOKENS = (197, 192, 176, 160, 158, 144, 128, 127, 112, 104, 102, 96, 64, 16)
WAYS = {"plain": 1, "packed": 1, "attention": 2}
"""What is timed, and the power of the number of tokens to which it is proportional."""


class Layer(NamedTuple):
    """One linear layer: `fc2` reads the wide output of `fc1`, the others read the embedding."""

    weight: Tensor
    bias: Tensor
    wide: bool


def main() -> None:
    parser = pieces_parser(__doc__, batches=[1, 8], rounds=10)
    parser.add_argument("--models", nargs="+", choices=list(WIDTHS), default=["DeiT-S"])
    parser.add_argument("--dtypes", nargs="+", choices=sorted(DTYPES), default=["float32", "bfloat16"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    columns = ["tokens", *(f"batch {batch}, {way}" for batch in options.batches for way in WAYS)]
    parts = []
    for model in options.models:
        for dtype in options.dtypes:
            found = [measure(WIDTHS[model], batch, DTYPES[dtype], options.rounds) for batch in options.batches]
            parts.append(f"{model}, {dtype}:\n\n{table(columns, rows(found))}")
    machine = f"{device_name(torch.device('cpu'))}, {options.threads} threads"
    note = (
        "Median ms of the linear layers of 12 blocks, plain and packed, and of their fused attention. In brackets the "
        "efficiency relative to 197 tokens: time per token at 197 divided by time per token here (attention: per pair "
        "of tokens)."
    )
    publish("kernels_cpu", "Kernels alone, by number of tokens", machine, [*parts, note], dry_run=options.dry_run)


def rows(found: list[list[tuple[float, ...]]]) -> list[list[str]]:
    """A row per number of tokens; `found` has the milliseconds of each variant by batch size."""
    lines = []
    for index, tokens in enumerate(TOKENS):
        cells = [
            f"{times[index][way]:.2f} ({times[0][way] / times[index][way] * (tokens / TOKENS[0]) ** power:.2f})"
            for times in found
            for way, power in enumerate(WAYS.values())
        ]
        lines.append([str(tokens), *cells])
    return lines


@torch.inference_mode()
def measure(width: int, batch: int, dtype: torch.dtype, rounds: int) -> list[tuple[float, ...]]:
    """Milliseconds of each variant for each number of tokens."""
    layers = [layer for _ in range(BLOCKS) for layer in block(width, dtype)]
    found = []
    for tokens in TOKENS:
        inputs = tuple(torch.randn(batch * tokens, channels).to(dtype) for channels in (width, 4 * width))
        laid_out = [packed(layer, batch * tokens) for layer in layers]
        plain = [partial(functional.linear, weight=layer.weight, bias=layer.bias) for layer in layers]
        parts = [attention_inputs(width, batch, tokens, dtype) for _ in range(BLOCKS)]
        sides: dict[str, Callable[[], object]] = {
            "plain": partial(run_all, plain, layers, inputs),
            "packed": partial(run_all, laid_out, layers, inputs),
            "attention": partial(attend_all, parts),
        }
        seconds = timed(sides, rounds)
        found.append(tuple(1e3 * seconds[way] for way in WAYS))
    return found


def attention_inputs(width: int, batch: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries, keys and values `[B, heads, T, d]`, views of one projection as in timm's models."""
    projected = torch.randn(batch, tokens, 3, width // HEAD, HEAD).to(dtype)
    return projected.permute(2, 0, 3, 1, 4).unbind(0)


def attend_all(parts: list[tuple[Tensor, ...]]) -> None:
    for part in parts:
        functional.scaled_dot_product_attention(*part)


def block(width: int, dtype: torch.dtype) -> list[Layer]:
    """The linear layers of one block: queries, keys and values, projection, both of the MLP."""
    shapes = ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))
    return [Layer(torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype), shape[1] > width) for shape in shapes]


def packed(layer: Layer, count: int) -> Callable[[Tensor], Tensor]:
    """The layer with weights in oneDNN's layout for `count` rows of input."""
    operations: Any = torch.ops.mkldnn
    weight = operations._reorder_linear_weight(layer.weight, count)
    return lambda inputs: operations._linear_pointwise(inputs, weight, layer.bias, "none", [], "")


def run_all(calls: list[Callable[[Tensor], Tensor]], layers: list[Layer], inputs: tuple[Tensor, ...]) -> None:
    for call, layer in zip(calls, layers, strict=True):
        call(inputs[layer.wide])


if __name__ == "__main__":
    main()
