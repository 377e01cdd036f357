"""Which attention kernel a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from repshift_cli.ops import attention

__all__ = [
    "attention_backend",
    "observed_attention",
]


# ---------------------------------------------------------------------------------------------------------------------
# Which attention runs

# The operation that each fused backend dispatches to; `sdpa:math` dispatches to none, so the call itself is seen too.
_FUSED_OPERATIONS = {
    "_scaled_dot_product_flash_attention_for_cpu": "sdpa:flash",
    "_scaled_dot_product_flash_attention": "sdpa:flash",
    "_scaled_dot_product_efficient_attention": "sdpa:efficient",
    "_scaled_dot_product_cudnn_attention": "sdpa:cudnn",
    "_scaled_dot_product_fused_attention_overrideable": "sdpa:fused",
}


_FLASH_FUNCTIONS = (attention.flash_attend, attention.flash_attend_packed)


_SOFTMAX_OPERATIONS = {"_softmax", "_safe_softmax"}


_ATTENTION_MAP_DIMS = 3  # batch, queries and keys at least; a softmax over classes has two


def observed_attention(run: Callable[[Tensor], Any], inputs: Tensor) -> str:
    """The attention that one run really took, read off the operations that it called.

    Returns:
        `sdpa:flash`, `sdpa:efficient`, `sdpa:cudnn`, `sdpa:fused` or `sdpa:math` for torch's scaled dot-product
        attention; `flash-attn` for the package of that name; `explicit` for a softmax over a product that the
        model itself forms; `none`. Several are joined with `+`.
    """
    operations = _AttentionOperations()
    calls = _AttentionCalls(operations)
    # In inference mode composite operations reach a dispatch mode whole, so the kernels inside would go unseen.
    with torch.inference_mode(False), torch.no_grad(), operations, calls:
        run(inputs)
    found = operations.backends
    math_calls = calls.count - operations.fused_calls
    if math_calls > 0:
        found.add("sdpa:math")
    if operations.softmax_calls > max(math_calls, 0):  # the math backend takes one softmax a call; graphs make no calls
        found.add("explicit")
    return "+".join(sorted(found)) or "none"


def attention_backend(device: torch.device, dtype: torch.dtype, head_width: int = 64) -> str:
    """The backend that `scaled_dot_product_attention` takes here without a mask; values as `observed_attention`."""
    query = torch.zeros(1, 2, 64, head_width, device=device, dtype=dtype)
    return observed_attention(lambda x: functional.scaled_dot_product_attention(x, x, x), query)


class _AttentionCalls(TorchFunctionMode):
    """Counts calls of scaled dot-product attention, whatever they turn into, and sees those of flash-attn.

    Not every version of flash-attn calls an operation that a dispatch mode could see.
    """

    def __init__(self, operations: _AttentionOperations) -> None:
        super().__init__()
        self.operations = operations
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _FLASH_FUNCTIONS:
            with self.operations.inside_flash():
                return func(*args, **(kwargs or {}))
        self.count += func is functional.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


class _AttentionOperations(TorchDispatchMode):
    """Notes the fused attention operations and the softmax operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.backends: set[str] = set()
        self.fused_calls = 0
        self.softmax_calls = 0
        self._paused = False

    @contextmanager
    def inside_flash(self) -> Iterator[None]:
        """Notes flash-attn, and not what it does inside."""
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
        elif func.namespace.replace("_", "").startswith("flashattn"):  # the name changed between its versions
            self.backends.add("flash-attn")
        elif name in _SOFTMAX_OPERATIONS and args[0].ndim >= _ATTENTION_MAP_DIMS:
            self.softmax_calls += 1
        return func(*args, **(kwargs or {}))
