"""Proportional attention (ToMe) on fused kernels.

Where `s_j` tokens were merged into key `j`, attention is `softmax(q k^T / sqrt(d) + log s) v` (ToMe, arXiv 2210.09461,
equation 1). Two forms of it run on a fused kernel, and agree up to rounding:

- `mask`: `log s` as an additive mask, one row for all queries. On CPU it costs a tenth of the attention.
- `folded`: `log s` as one more group of channels of q and k. On CUDA a mask would disable the flash kernel.

A `Backend` is the library. The package flash-attn supports no mask, and takes the output of a projection in its own
layout (`attend_projected`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function

Backend = Literal["flash", "sdpa", "explicit"]
"""The package flash-attn, torch's scaled dot-product attention, or a product, a softmax and a product."""

Form = Literal["mask", "folded", "explicit"]

WIDEST = 256
"""Maximum width of a head for flash kernels on CUDA."""

_CHANNEL_GROUP = 8
"""Fused kernels need a head width that is a multiple of this."""


def backend_of(fused: bool, flash: bool) -> Backend:
    """The backend for timm's `fused_attn` and our `flash_attn` option."""
    if not fused:
        return "explicit"
    return "flash" if flash else "sdpa"


def cheapest_form(device: torch.device, width: int) -> Form:
    """The form that torch's flash kernel of the device supports, for heads of `width` channels."""
    return "folded" if device.type == "cuda" and _foldable(width) else "mask"


def attend_projected(
    projected: Tensor,
    sizes: Tensor | None = None,
    *,
    backend: Backend,
    norms: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Self-attention from the output of the projection to queries, keys and values.

    Args:
        projected: `[B, T, 3, heads, d]`.
        sizes: `[B, T]`, how many tokens each key stands for, positive; None if each stands for itself.
        backend: flash-attn falls back to sdpa for heads that are too wide to fold sizes into.
        norms: of the queries and of the keys, over the channels of each head; None for no norms.
        dropout: probability that a weight is set to zero.

    Returns:
        `[B, T, heads * d]`.
    """
    query, key, value = projected.unbind(2)
    return attend_split(query, key, value, sizes, backend=backend, norms=norms, dropout=dropout)


def attend_split(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sizes: Tensor | None = None,
    *,
    backend: Backend,
    norms: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """As `attend_projected`, of queries `[B, Q, heads, d]`, keys and values `[B, T, heads, d]`: `[B, Q, heads * d]`."""
    width = query.shape[-1]
    if norms is not None:
        query, key = norms[0](query), norms[1](key)
    if backend == "flash" and (sizes is None or _foldable(width)):
        # under autocast norms return float32, which sdpa would convert itself
        query, key, scale = query.to(value.dtype), key.to(value.dtype), width**-0.5
        if sizes is not None:
            query, key, value = fold(query, key, value, sizes, heads_at=2)
        mixed = flash_attend(query, key, value, dropout=dropout, scale=scale)[..., :width]
    else:
        form = "explicit" if backend == "explicit" else cheapest_form(query.device, width)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        mixed = attend(query, key, value, sizes, form=form, dropout=dropout).transpose(1, 2)
    return mixed.flatten(2)


def attend(
    query: Tensor, key: Tensor, value: Tensor, sizes: Tensor | None = None, *, form: Form, dropout: float = 0.0
) -> Tensor:
    """`softmax(q k^T / sqrt(d) + log s) v` by torch alone, `[B, heads, T, d]` as k and v, and q with T or fewer.

    `sizes` is as for `attend_projected`; `explicit` uses no fused kernel.
    """
    if form == "explicit":
        logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        if sizes is not None:
            logits = logits + size_bias(sizes, logits.dtype)[:, None, None, :]
        return functional.dropout(logits.softmax(dim=-1), dropout) @ value
    if sizes is None:
        return functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    if form == "mask":
        bias = size_bias(sizes, query.dtype)[:, None, None, :]
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
    width = query.shape[-1]
    folded = fold(query, key, value, sizes)
    mixed = functional.scaled_dot_product_attention(*folded, dropout_p=dropout, scale=width**-0.5)
    return mixed[..., :width]


def flash_attend(
    query: Tensor, key: Tensor, value: Tensor, *, dropout: float = 0.0, scale: float | None = None
) -> Tensor:
    """Attention by flash-attn; torch's function modes intercept this call, independent of the flash-attn version.

    `query`, `key`, `value` and the result are `[B, T, heads, d]`, float16 or bfloat16 on CUDA. `scale` is that of the
    logits. Raises ImportError without flash-attn (see `attention_mode.flash_problem`).
    """
    if has_torch_function((query, key, value)):
        found: Tensor = handle_torch_function(
            flash_attend, (query, key, value), query, key, value, dropout=dropout, scale=scale
        )
        return found
    from flash_attn import flash_attn_func

    mixed: Tensor = flash_attn_func(query, key, value, dropout_p=dropout, softmax_scale=scale)
    return mixed


def size_bias(sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """`log s` in `dtype`, computed in float32 or wider."""
    return sizes.to(torch.promote_types(sizes.dtype, dtype)).log().to(dtype)


def fold(
    query: Tensor, key: Tensor, value: Tensor, sizes: Tensor, heads_at: Literal[1, 2] = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v with one more group of channels, so that `q k^T / sqrt(d)` includes the bias `log s` of the keys.

    The new channels of q are 1. Those of k are `sqrt(d) log s`, rounded to the dtype, and the rounding error. The scale
    remains `1 / sqrt(d)` with the original width. v is padded, since flash kernels need one width for all three. q, k
    and v are `[B, heads, T, d]`, or `[B, T, heads, d]` with `heads_at=2`.

    Returns q, k and v with d + 8 channels; only the first d channels of the attention are the result.
    """
    width = key.shape[-1]
    wide = torch.promote_types(query.dtype, torch.float32)
    bias = sizes.to(wide).log() * width**0.5
    high = bias.to(key.dtype)
    rest = (bias - high.to(wide)).to(key.dtype)
    channels = functional.pad(torch.stack((high, rest), dim=-1), (0, _CHANNEL_GROUP - 2)).unsqueeze(heads_at)
    ones = query.new_ones(*query.shape[:-1], _CHANNEL_GROUP)
    return (
        torch.cat((query, ones), dim=-1),
        torch.cat((key, channels.expand(*key.shape[:-1], -1)), dim=-1),
        functional.pad(value, (0, _CHANNEL_GROUP)),
    )


def _foldable(width: int) -> bool:
    """Whether heads of this width have room for the size channels."""
    return width + _CHANNEL_GROUP <= WIDEST
