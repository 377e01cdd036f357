"""timm's `Attention`, made to heed sizes of tokens and to run on flash-attn.

It is one and the same object that becomes a `FlexibleAttention` and turns back: only its class changes. So its parts,
parameters, keys and the hooks on it stay where they are, and whoever holds it goes on holding it.
"""

from __future__ import annotations

from typing import Protocol

from timm.layers import Attention
from torch import Tensor, nn

from repshift_cli.ops.attention import attend_projected, backend_of

__all__ = ["FlexibleAttention", "TokenSizes", "is_attention", "run_on_flash", "use_proportional_attention"]


class TokenSizes(Protocol):
    """Knows the sizes of the tokens that are on their way."""

    def sizes_of(self, count: int) -> Tensor | None:
        """`[B, count]`, or None where each of so many tokens stands for itself."""
        ...


class FlexibleAttention(Attention):
    """A timm `Attention` with two more switches; see `use_proportional_attention` and `run_on_flash`, which make one.

    Where neither has an effect, timm's own code runs.

    Attributes:
        sizes: tells how many tokens each key stands for; None for one each.
        flash_attn: whether flash-attn runs where `fused_attn` asks for a fused kernel.
    """

    sizes: TokenSizes | None = None
    flash_attn: bool = False

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """`[B, T, C]` to the same. Masks only come where no token has a size, since sites refuse them."""
        sizes = None if self.sizes is None else self.sizes.sizes_of(x.shape[1])
        backend = backend_of(self.fused_attn, self.flash_attn)
        if sizes is None and (backend != "flash" or attn_mask is not None or is_causal):
            causal = {"is_causal": True} if is_causal else {}  # older versions of timm do not know it
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
        # older versions of timm do not know the norm and the gate
        if (norm := getattr(self, "norm", None)) is not None:
            mixed = norm(mixed)
        if (gate := getattr(self, "gate", None)) is not None:
            mixed = mixed * gate(x).sigmoid()
        output: Tensor = self.proj_drop(self.proj(mixed))
        return output


def is_attention(module: nn.Module) -> bool:
    """Whether it is timm's plain attention, as it comes or as it was made here, and no other that derives from it."""
    return type(module) in (Attention, FlexibleAttention)


def use_proportional_attention(attention: Attention, sizes: TokenSizes | None) -> None:
    """From now on each key counts as often as the size of its token says; None undoes it."""
    flexible = _flexible(attention)
    flexible.sizes = sizes
    _settle(flexible)


def run_on_flash(attention: Attention, on: bool) -> None:
    """Whether flash-attn runs from now on, where `fused_attn` asks for a fused kernel."""
    flexible = _flexible(attention)
    flexible.flash_attn = on
    _settle(flexible)


def _flexible(attention: Attention) -> FlexibleAttention:
    if not isinstance(attention, FlexibleAttention):
        attention.__class__ = FlexibleAttention
    assert isinstance(attention, FlexibleAttention)
    return attention


def _settle(attention: FlexibleAttention) -> None:
    """Leave nothing of a switch that is off; where both are, it is timm's own again."""
    if attention.sizes is None:
        vars(attention).pop("sizes", None)
    if not attention.flash_attn:
        vars(attention).pop("flash_attn", None)
    if attention.sizes is None and not attention.flash_attn:
        attention.__class__ = Attention  # type: ignore[assignment]
