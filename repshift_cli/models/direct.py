"""Modules called without what surrounds their `forward`.

`nn.Module.__call__` looks for hooks of many kinds, and `__getattr__` for every parameter and part. That takes as long
for few tokens as for many: at batch 1 it is a thirtieth of the time of DeiT-S on a CPU. `run` calls the function of
torch that a module would have called, with the same arguments, so that all bits are the same. A module that has hooks,
or is not one of those that are known here, is called as ever.
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

__all__ = ["is_plain", "may_pass_by", "run"]


def run(module: nn.Module, x: Tensor) -> Tensor:
    """What `module(x)` returns, by the shortest way; only where calls may be passed by."""
    function = _FUNCTIONS.get(type(module)) if is_plain(module) else None
    result: Tensor = module(x) if function is None else function(module, x)
    return result


def is_plain(module: nn.Module) -> bool:
    """Whether a call of the module, without gradients, is a call of the `forward` of its class, and nothing else."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def may_pass_by() -> bool:
    """Whether calls may be passed by at all.

    No gradients are wanted, for which modules have hooks of their own; no graph is traced, which knows its modules; and
    nobody watches all modules. Where torch no longer tells the last, somebody may.
    """
    watched: Callable[[], bool] | None = getattr(torch_module, "_has_any_global_hook", None)
    return not torch.is_grad_enabled() and not in_graph() and watched is not None and not watched()


def _identity(module: nn.Module, x: Tensor) -> Tensor:
    return x


def _dropout(module: nn.Module, x: Tensor) -> Any:
    return module(x) if module.training else x


def _linear(module: nn.Module, x: Tensor) -> Any:
    # wrappers for several devices leave plain tensors, elsewhere, in the place of parameters
    weight = module._parameters.get("weight")
    return module(x) if weight is None else functional.linear(x, weight, module._parameters["bias"])


def _layer_norm(module: Any, x: Tensor) -> Any:
    weight = module._parameters.get("weight")
    if weight is None:
        return module(x)
    # what functional.layer_norm calls after it has asked for the state of cuDNN
    return torch.layer_norm(x, module.normalized_shape, weight, module._parameters["bias"], module.eps)


def _timm_layer_norm(module: Any, x: Tensor) -> Any:
    return module(x) if module._fast_norm else _layer_norm(module, x)


def _layer_scale(module: Any, x: Tensor) -> Any:
    gamma = module._parameters.get("gamma")
    return module(x) if gamma is None or module.inplace else x * gamma


def _gelu(module: Any, x: Tensor) -> Any:
    return functional.gelu(x, approximate=module.approximate)


_FUNCTIONS: dict[type[nn.Module], Callable[[Any, Tensor], Any]] = {
    nn.Identity: _identity,
    nn.Dropout: _dropout,
    nn.Linear: _linear,
    nn.LayerNorm: _layer_norm,
    LayerNorm: _timm_layer_norm,
    LayerScale: _layer_scale,
    nn.GELU: _gelu,
}
