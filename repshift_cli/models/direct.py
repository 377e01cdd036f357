"""Modules called without what surrounds their `forward`.

`nn.Module.__call__` looks for hooks of many kinds, and `__getattr__` for every parameter and part. That takes as long
for few tokens as for many: 0.6 to 1.4 of 30 to 36 ms of a compressed DeiT-S at batch 1. `run` calls the function of
torch that a module would have called, with the same arguments, so that all bits are the same. What somebody has put on
a module, on its class or on all modules is not passed by: then it is called as ever.

Who knows where a tensor comes from can also do without a second one: `run_over` writes a GELU over its input. For a
large one glibc fetches new pages from the system in each call, and zeroing them takes up to a tenth of a pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import LayerNorm, LayerScale
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as torch_module

from repshift_cli.tokens import in_graph

__all__ = ["is_plain", "makes_anew", "may_pass_by", "run", "run_over"]

_CALL, _LINEAR, _GELU = nn.Module.__call__, functional.linear, functional.gelu


def run(module: nn.Module, x: Tensor) -> Tensor:
    """What `module(x)` returns, by the shortest way; only where calls may be passed by."""
    forward, function = _FUNCTIONS.get(type(module), _UNKNOWN)
    result: Tensor = function(module, x) if is_plain(module, forward) else module(x)
    return result


def run_over(module: nn.Module, x: Tensor) -> Tensor:
    """As `run`, perhaps with the result in the memory of `x`, of which nobody else may know."""
    known = type(module) is nn.GELU and functional.gelu is _GELU and is_plain(module, _FUNCTIONS[nn.GELU][0])
    # autocast chooses dtypes for functions, and passes over those that write somewhere
    if not known or torch.is_autocast_enabled(x.device.type):
        return run(module, x)
    result: Tensor = torch.ops.aten.gelu_.default(x, approximate=module.approximate)
    return result


def makes_anew(module: nn.Module) -> bool:
    """Whether what `run` returns for this module is a tensor of which nobody else knows."""
    return type(module) is nn.Linear and functional.linear is _LINEAR and is_plain(module, _FUNCTIONS[nn.Linear][0])


def is_plain(module: nn.Module, forward: Any) -> bool:
    """Whether a call of the module, without gradients, is a call of this function, and nothing else."""
    return type(module).forward is forward and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
    )


def may_pass_by() -> bool:
    """Whether calls may be passed by at all.

    No gradients are wanted, for which modules have hooks of their own; no graph is traced, which knows its modules; and
    nobody watches all modules. Where torch no longer tells the last, somebody may.
    """
    watched: Callable[[], bool] | None = getattr(torch_module, "_has_any_global_hook", None)
    return (
        not torch.is_grad_enabled()
        and nn.Module.__call__ is _CALL
        and not in_graph()
        and watched is not None
        and not watched()
    )


def _identity(module: nn.Module, x: Tensor) -> Tensor:
    return x


def _dropout(module: nn.Module, x: Tensor) -> Any:
    return module(x) if module.training else x


def _linear(module: nn.Module, x: Tensor) -> Any:
    try:
        weight, bias = module._parameters["weight"], module._parameters["bias"]
    except KeyError:  # wrappers for several devices leave plain tensors, elsewhere, in the place of parameters
        return module(x)
    return functional.linear(x, weight, bias)  # type: ignore[arg-type]


def _layer_norm(module: Any, x: Tensor) -> Any:
    try:
        weight, bias = module._parameters["weight"], module._parameters["bias"]
    except KeyError:
        return module(x)
    return functional.layer_norm(x, module.normalized_shape, weight, bias, module.eps)


def _timm_layer_norm(module: Any, x: Tensor) -> Any:
    return module(x) if module._fast_norm else _layer_norm(module, x)


def _layer_scale(module: Any, x: Tensor) -> Any:
    gamma = module._parameters.get("gamma")
    return module(x) if gamma is None or module.inplace else x * gamma


def _gelu(module: Any, x: Tensor) -> Any:
    return functional.gelu(x, approximate=module.approximate)


_Function = Callable[[Any, Tensor], Any]

_FUNCTIONS: dict[type[nn.Module], tuple[Any, _Function]] = {
    nn.Identity: (nn.Identity.forward, _identity),
    nn.Dropout: (nn.Dropout.forward, _dropout),
    nn.Linear: (nn.Linear.forward, _linear),
    nn.LayerNorm: (nn.LayerNorm.forward, _layer_norm),
    LayerNorm: (LayerNorm.forward, _timm_layer_norm),
    LayerScale: (LayerScale.forward, _layer_scale),
    nn.GELU: (nn.GELU.forward, _gelu),
}
"""By class: its `forward`, which somebody may replace, and what does the same."""

_UNKNOWN: tuple[Any, _Function] = (None, _identity)
