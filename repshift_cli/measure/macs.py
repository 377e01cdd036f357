"""Count multiply-accumulates."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from repshift_cli.errors import CheckFailed, ModelError

NORMS = frozenset({"batch_norm", "group_norm", "layer_norm"})
_UNCOUNTED = NORMS | {"gelu", "hardsigmoid", "hardswish", "relu", "relu6", "silu"}


def count_macs(model: nn.Module, input_size: tuple[int, ...], batch: int = 1) -> int:
    """Multiply-accumulates per image, counted in a run of a copy of the model on the `meta` device.

    Matrix products, convolutions and attention (fused or not) are counted; element-wise operations, norms and sorting
    are not. On `meta` the counter supports every attention call, which does not hold for real devices. The copy is in
    eval mode and keeps the hooks. `input_size` is `(C, H, W)`, or `(T, C, H, W)` for a clip.

    Raises:
        ModelError: the model cannot run on `meta`, because its shapes depend on values.
        CheckFailed: the count is not a whole number per image.
    """
    weightless = meta_copy(model)
    dtypes = (parameter.dtype for parameter in weightless.parameters() if parameter.is_floating_point())
    inputs = torch.empty(batch, *input_size, device="meta", dtype=next(dtypes, torch.float32))
    kernel = nullcontext() if _fused_attention_is_counted() else sdpa_kernel(SDPBackend.MATH)
    try:
        with torch.no_grad(), kernel:
            flops = _count_flops(lambda: weightless(inputs))
    except (NotImplementedError, RuntimeError) as error:
        raise ModelError(
            f"the operations of {type(model).__name__} cannot be counted: {error}",
            "Counting runs the model on torch's `meta` device, where tensors have shapes but no values.",
        ) from error
    macs, rest = divmod(flops, 2 * batch)
    if rest:
        raise CheckFailed(
            f"{flops} FLOPs for {batch} images of {type(model).__name__} are not a whole number of MACs per image",
            "An operation of the model has a wrong formula in torch.utils.flop_counter.",
        )
    return macs


def meta_copy(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode with empty parameters and buffers on `meta`."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    weightless = copy.deepcopy(model, memo).eval()
    on_flash: list[Any] = [part for part in weightless.modules() if getattr(part, "flash_attn", False)]
    for part in on_flash:
        part.flash_attn = False  # not supported by the counter
    return weightless


class _Uncounted(TorchFunctionMode):
    """Skip functions that keep the shape and are not counted; torch computes their shapes slowly."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and getattr(func, "__name__", "") in _UNCOUNTED:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


def _count_flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter, _Uncounted():
        run()
    return int(counter.get_total_flops())


@cache
def _fused_attention_is_counted() -> bool:
    """Whether this version of torch counts scaled dot-product attention on `meta`; some count zero."""
    heads, queries, keys, width = 2, 3, 5, 8
    query = torch.empty(1, heads, queries, width, device="meta")
    key = torch.empty(1, heads, keys, width, device="meta")
    with torch.no_grad():
        flops = _count_flops(lambda: functional.scaled_dot_product_attention(query, key, key))
    return flops == 2 * 2 * heads * queries * keys * width
