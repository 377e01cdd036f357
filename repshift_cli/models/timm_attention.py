"""timm's `Attention` with proportional attention (ToMe) and flash-attn.

Only the class of the object changes, to `FlexibleAttention` and back. So its parameters, keys, hooks and all references
to it stay valid.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from timm.layers import Attention
from torch import Tensor, nn

from repshift_cli.ops.attention import attend_projected, backend_of


class TokenSizes(Protocol):
    """Sizes of the tokens in the running pass."""

    def sizes_of(self, count: int) -> Tensor | None:
        """`[B, count]`; None if `count` tokens all have size 1."""
        ...


class FlexibleAttention(Attention):
    """A timm `Attention` with two options; without effect of either, timm's own code runs.

    `sizes` has the number of tokens that each key stands for; with `flash_attn`, flash-attn runs if `fused_attn` is on.
    """

    sizes: TokenSizes | None = None
    flash_attn: bool = False

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """`[B, T, C]` to the same shape. Sites reject masks, so a mask and sizes never come together."""
        sizes = None if self.sizes is None else self.sizes.sizes_of(x.shape[1])
        backend = backend_of(self.fused_attn, self.flash_attn)
        if sizes is None and (backend != "flash" or attn_mask is not None or is_causal):
            causal = {"is_causal": True} if is_causal else {}  # older versions of timm lack it
            dense: Tensor = super().forward(x, attn_mask=attn_mask, **causal)
            return dense
        projected = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim))
        plain = isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity)
        mixed = attend_projected(
            projected,
            sizes,
            backend=backend,
            norms=None if plain else (self.q_norm, self.k_norm),
            dropout=self.attn_drop.p if self.training else 0.0,
        )
        # older versions of timm lack the norm and the gate
        if (norm := getattr(self, "norm", None)) is not None:
            mixed = norm(mixed)
        if (gate := getattr(self, "gate", None)) is not None:
            mixed = mixed * gate(x).sigmoid()
        output: Tensor = self.proj_drop(self.proj(mixed))
        return output


def is_attention(module: nn.Module) -> bool:
    """Whether it is timm's `Attention` itself or a `FlexibleAttention`, and no other subclass."""
    return type(module) in (Attention, FlexibleAttention)


def use_proportional_attention(attentions: Iterable[Attention], sizes: TokenSizes | None) -> None:
    """Weight each key by the size of its token; None undoes it."""
    for attention in attentions:
        _set_option(attention, "sizes", sizes)


def run_on_flash(attention: Attention, on: bool) -> None:
    """Run on flash-attn if `fused_attn` is on; False undoes it."""
    _set_option(attention, "flash_attn", on or None)


def _set_option(attention: Attention, name: str, value: Any) -> None:
    """Set an option, or remove it if the value is None. Without options the class is timm's own."""
    options = vars(attention)
    options.pop(name, None)
    if value is not None:
        options[name] = value
    attention.__class__ = FlexibleAttention if options.keys() & {"sizes", "flash_attn"} else Attention
