"""CUDA kernels for Mamba, from the packages of its authors, where they are installed and the device allows."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

__all__ = ["causal_conv", "selective_scan", "usable"]

_PACKAGES = ("mamba_ssm", "causal_conv1d")


def usable(x: Tensor) -> bool:
    """Whether the kernels can run on this tensor: on CUDA, both packages there, and no graph is being traced.

    (A graph with foreign kernels would not run where they are not installed.)
    """
    return x.is_cuda and not torch.compiler.is_compiling() and _installed()


@cache
def _installed() -> bool:
    return all(find_spec(package) is not None for package in _PACKAGES)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU of the causal depthwise convolution: `[B, E, T]` by `[E, width]` to `[B, E, T]`."""
    kernel: Any = import_module("causal_conv1d").causal_conv1d_fn
    convolved: Tensor = kernel(x, weight, bias, activation="silu")
    return convolved


def selective_scan(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, *, skip: Tensor, bias: Tensor) -> Tensor:
    """The scan of one direction, with `softplus(delta + bias)` and `skip * u` inside the kernel.

    Args:
        u, delta: `[B, E, T]`.
        a: `[E, N]`, negative.
        b, c: `[B, N, T]`.
        skip, bias: float32 `[E]`.

    Returns:
        `[B, E, T]`.
    """
    kernel: Any = import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    parts = (part.contiguous() for part in (delta, b, c))
    delta, b, c = parts
    scanned: Tensor = kernel(u, delta, a, b, c, skip, z=None, delta_bias=bias, delta_softplus=True)
    return scanned
