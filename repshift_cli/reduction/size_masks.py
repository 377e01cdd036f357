"""Sizes of merged tokens in the attention of other libraries: `log(size)` of each key is added to its logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from repshift_cli.errors import UsageError
from repshift_cli.ops.attention import size_bias
from repshift_cli.reduction.token_stream import TokenStream

WEIGHTED = ("eager", "sdpa", None)
"""Attention implementations of transformers that add a mask to the logits."""

UNWEIGHTED = "the attention implementation {} does not weight tokens by size"
_EAGER_OR_SDPA = 'Use attn_implementation="sdpa" or "eager".'


def implementation_of(attention: nn.Module) -> str | None:
    """The attention implementation of a module of transformers."""
    found: str | None = getattr(getattr(attention, "config", None), "_attn_implementation", None)
    return found


def size_mask(
    args: tuple[Any, ...], kwargs: dict[str, Any], *, stream: TokenStream, name: str, attention: nn.Module
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Add `log(size)` of each key to the attention.

    Raises:
        UsageError: the attention has a mask already, or its implementation takes none.
    """
    tokens = args[0] if args else kwargs["hidden_states"]
    sizes = stream.sizes_of(tokens.shape[1])
    if sizes is None:
        return args, kwargs
    bias = size_bias(sizes, tokens.dtype)[:, None, None, :]
    if (implementation := implementation_of(attention)) not in WEIGHTED:
        raise UsageError(UNWEIGHTED.format(implementation), _EAGER_OR_SDPA)
    if (mask := next((part for part in (*args[1:2], kwargs.get(name)) if part is not None), None)) is not None:
        if not torch.compiler.is_exporting():  # then transformers makes a mask that hides nothing
            raise UsageError(
                "the attention was called with a mask, which does not fit merged tokens", "Run without a mask."
            )
        bias = torch.where(mask, bias, float("-inf")) if mask.dtype == torch.bool else mask + bias
    return args[:1], {**kwargs, name: bias}


def probe_mask(
    args: tuple[Any, ...], kwargs: dict[str, Any], *, stream: TokenStream, heads: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """As `size_mask` for `nn.MultiheadAttention` with one query per image, whose mask is `[B * heads, 1, T]`."""
    sizes = stream.last()
    if sizes is None:
        return args, kwargs
    bias = size_bias(sizes, args[0].dtype)[:, None, :].repeat_interleave(heads, dim=0)
    return args, {**kwargs, "attn_mask": bias}
