"""CUDA kernels for Mamba from its authors' packages, if installed."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["causal_conv", "selective_scan", "usable"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CHANNEL_MULTIPLE = 8
_MOST_STATES = 256


class _Kernels(NamedTuple):
    causal_conv: Any
    selective_scan: Any


def usable(x: Tensor, d_state: int) -> bool:
    """Whether the kernels can run on `[B, T, E]`: on CUDA, both packages installed, and not in a traced graph.

    (A graph with these kernels would not run where they are not installed.)
    """
    if not x.is_cuda or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    fits = x.dtype in _DTYPES and x.shape[-1] % _CHANNEL_MULTIPLE == 0 and d_state <= _MOST_STATES
    return fits and _kernels() is not None


@cache
def _kernels() -> _Kernels | None:
    """Both kernels; None if a package is missing or does not load."""
    try:
        return _Kernels(
            import_module("causal_conv1d").causal_conv1d_fn,
            import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn,
        )
    except Exception:  # a library built for another torch fails in many ways
        return None


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU of the causal depthwise convolution: `[B, E, T]` by `[E, width]` to `[B, E, T]`."""
    kernels = _kernels()
    assert kernels is not None
    convolved: Tensor = kernels.causal_conv(x, weight, bias, activation="silu")
    return convolved


def selective_scan(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, *, skip: Tensor, bias: Tensor) -> Tensor:
    """The scan of one direction, with `softplus(delta + bias)` and `skip * u` inside the kernel.

    Args:
        u, delta: `[B, E, T]`.
        a: float32 `[E, N]`, negative.
        b, c: `[B, N, T]`, in the dtype of `u`.
        skip, bias: float32 `[E]`.

    Returns:
        `[B, E, T]`.
    """
    kernels = _kernels()
    assert kernels is not None
    delta, b, c = (part.contiguous() for part in (delta, b, c))
    scanned: Tensor = kernels.selective_scan(u, delta, a, b, c, skip, z=None, delta_bias=bias, delta_softplus=True)
    return scanned
