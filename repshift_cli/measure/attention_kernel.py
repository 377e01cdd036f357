"""Detect the attention kernel that a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from repshift_cli.ops.attention import flash_attend

# The operation of each fused backend; `sdpa:math` has none, so calls are counted too.
_FUSED_OPERATIONS = {
    "_scaled_dot_product_flash_attention_for_cpu": "sdpa:flash",
    "_scaled_dot_product_flash_attention": "sdpa:flash",
    "_scaled_dot_product_efficient_attention": "sdpa:efficient",
    "_scaled_dot_product_cudnn_attention": "sdpa:cudnn",
    "_scaled_dot_product_fused_attention_overrideable": "sdpa:fused",
}

_SOFTMAX_OPERATIONS = {"_softmax", "_safe_softmax"}
_ATTENTION_MAP_DIMS = 3  # at least batch, queries and keys; a softmax over classes has two


def observed_attention(run: Callable[[Tensor], Any], inputs: Tensor) -> str:
    """The attention kernel of one run, detected from its operations.

    Returns:
        `sdpa:flash`, `sdpa:efficient`, `sdpa:cudnn`, `sdpa:fused` or `sdpa:math` for torch's scaled dot-product
        attention; `flash-attn` for the package of that name; `explicit` for a softmax over a product in the
        code of the model; `none`. Several are joined with `+`.
    """
    operations = _AttentionOperations()
    calls = _AttentionCalls(operations)
    # In inference mode a dispatch mode sees composite operations as a whole, not the kernels inside.
    with torch.inference_mode(False), torch.no_grad(), operations, calls:
        run(inputs)
    found = operations.backends
    math_calls = calls.count - operations.fused_calls
    if math_calls > 0:
        found.add("sdpa:math")
    # the math backend runs one softmax per call; graphs make no calls
    if operations.softmax_calls > max(math_calls, 0):
        found.add("explicit")
    return "+".join(sorted(found)) or "none"


class _AttentionCalls(TorchFunctionMode):
    """Counts calls of scaled dot-product attention for any backend, and detects calls of flash-attn.

    Some versions of flash-attn call no operation that a dispatch mode sees.
    """

    def __init__(self, operations: _AttentionOperations) -> None:
        super().__init__()
        self.operations = operations
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is flash_attend:
            with self.operations.inside_flash():
                return func(*args, **(kwargs or {}))
        self.count += func is functional.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


class _AttentionOperations(TorchDispatchMode):
    """Records fused attention operations and counts softmax operations."""

    def __init__(self) -> None:
        super().__init__()
        self.backends: set[str] = set()
        self.fused_calls = 0
        self.softmax_calls = 0
        self._paused = False

    @contextmanager
    def inside_flash(self) -> Iterator[None]:
        """Record flash-attn and ignore the operations inside."""
        self.backends.add("flash-attn")
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if self._paused:
            return func(*args, **(kwargs or {}))
        if name in _FUSED_OPERATIONS:
            self.backends.add(_FUSED_OPERATIONS[name])
            self.fused_calls += 1
        elif func.namespace.replace("_", "").startswith("flashattn"):  # the name depends on the version
            self.backends.add("flash-attn")
        elif name in _SOFTMAX_OPERATIONS and args[0].ndim >= _ATTENTION_MAP_DIMS:
            self.softmax_calls += 1
        return func(*args, **(kwargs or {}))
