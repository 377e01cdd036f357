"""Attention in which a token counts as often as it stands for others, on fused kernels.

Where `s_j` tokens were merged into key `j`, attention is `softmax(q k^T / sqrt(d) + log s) v` (ToMe, arXiv 2210.09461,
equation 1): the key weighs as much as its tokens would have weighed. Two forms of it run on a fused kernel; they agree
up to rounding, and the device decides which is cheaper:

- `mask`: `log s` as an additive mask, one row that all queries share. On CPU it costs a tenth of the attention.
- `folded`: `log s` as one more group of channels of q and k, so that no mask is passed. On CUDA every mask leaves the
  flash kernel, and this form does not.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Form", "attend", "cheapest_form", "fold", "size_bias"]

Form = Literal["mask", "folded", "explicit"]

_WIDEST = 256
"""Flash kernels on CUDA take no wider heads."""

_CHANNEL_GROUP = 8
"""Fused kernels take widths of heads that are multiples of this."""


def cheapest_form(device: torch.device, width: int) -> Form:
    """The form that stays on the flash kernel of a device, for heads of `width` channels."""
    fits = width + _CHANNEL_GROUP <= _WIDEST
    return "folded" if device.type == "cuda" and fits else "mask"


def attend(
    query: Tensor, key: Tensor, value: Tensor, sizes: Tensor | None = None, *, form: Form, dropout: float = 0.0
) -> Tensor:
    """`softmax(q k^T / sqrt(d) + log s) v`.

    Args:
        query, key, value: `[B, heads, T, d]`.
        sizes: `[B, T]`, how many tokens each key stands for, positive; None where each stands for itself.
        form: how the sizes come in; `explicit` spells attention out, without a fused kernel.
        dropout: probability that a weight is set to zero.

    Returns:
        `[B, heads, T, d]`.
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


def size_bias(sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """`log s`, taken in float32 at least, in `dtype`."""
    return sizes.to(torch.promote_types(sizes.dtype, dtype)).log().to(dtype)


def fold(query: Tensor, key: Tensor, value: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v with a group of channels more, so that `q k^T / sqrt(d)` holds the bias `log s` of the keys.

    The group is 1 on the side of q, and on that of k `sqrt(d) log s` in two parts: what the dtype can hold of it, and
    what is left over (nothing in float32). The scale stays that of the width before, `1 / sqrt(d)`. v is padded too,
    since flash kernels want one width for all three.

    Args:
        query, key, value: `[B, heads, T, d]`.
        sizes: `[B, T]`.

    Returns:
        `[B, heads, T, d + 8]` each; of the result only the first d channels count.
    """
    batch, heads, _, width = key.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    bias = sizes.to(wide).log() * width**0.5
    high = bias.to(key.dtype)
    rest = (bias - high.to(wide)).to(key.dtype)
    channels = functional.pad(torch.stack((high, rest), dim=-1), (0, _CHANNEL_GROUP - 2))
    ones = query.new_ones(batch, heads, query.shape[2], _CHANNEL_GROUP)
    return (
        torch.cat((query, ones), dim=-1),
        torch.cat((key, channels[:, None].expand(-1, heads, -1, -1)), dim=-1),
        functional.pad(value, (0, _CHANNEL_GROUP)),
    )
