"""CUDA kernels for Mamba from its authors' packages, if installed."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CHANNEL_MULTIPLE = 8
_MOST_STATES = 256


def usable(x: Tensor, d_state: int) -> bool:
    """Whether the kernels can run on `[B, T, E]`: on CUDA, both packages installed, and not in a traced graph.

    (A graph with these kernels would not run on a machine without them.)
    """
    if not x.is_cuda or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    fits = x.dtype in _DTYPES and x.shape[-1] % _CHANNEL_MULTIPLE == 0 and d_state <= _MOST_STATES
    return fits and _kernels() is not None


@cache
def _kernels() -> tuple[Any, Any] | None:
    """Both kernels; None if a package is missing or does not load."""
    try:
        scans = import_module("mamba_ssm.ops.selective_scan_interface")
        return import_module("causal_conv1d").causal_conv1d_fn, scans.selective_scan_fn
    except Exception:  # a library built for another torch fails in many ways
        return None


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU of the causal depthwise convolution: `[B, E, T]` by `[E, width]` to `[B, E, T]`."""
    kernels = _kernels()
    assert kernels is not None
    convolved: Tensor = kernels[0](x, weight, bias, activation="silu")
    return convolved


def selective_scan(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, *, skip: Tensor, bias: Tensor) -> Tensor:
    """The scan of one direction, with `softplus(delta + bias)` and `skip * u` inside the kernel: `[B, E, T]`.

    `u` and `delta` are `[B, E, T]`, `a` is float32 `[E, N]`, negative, `b` and `c` are `[B, N, T]` in the dtype of `u`,
    `skip` and `bias` float32 `[E]`.
    """
    kernels = _kernels()
    assert kernels is not None
    delta, b, c = (part.contiguous() for part in (delta, b, c))
    scanned: Tensor = kernels[1](u, delta, a, b, c, skip, z=None, delta_bias=bias, delta_softplus=True)
    return scanned
