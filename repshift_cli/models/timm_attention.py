"""timm's `Attention` with proportional attention (ToMe), flash-attn, and queries of the first tokens only.

Only the class of the object changes, to `FlexibleAttention` and back. So its parameters, keys, hooks and all references
to it stay valid.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional

from repshift_cli.ops.attention import attend_split, backend_of


class TokenSizes(Protocol):
    """Sizes of the tokens in the running pass."""

    def sizes_of(self, count: int) -> Tensor | None:
        """`[B, count]`; None if `count` tokens all have size 1."""
        ...


class QueryCount(Protocol):
    """How many tokens need queries in the running pass."""

    @property
    def queries(self) -> int | None:
        """Only the first so many; None if all do."""
        ...


class FlexibleAttention(Attention):
    """A timm `Attention` with three options; without effect of any, timm's own code runs.

    `sizes` has the number of tokens that each key stands for; with `flash_attn`, flash-attn runs if `fused_attn` is on;
    with `asked`, the output has only the first tokens.
    """

    sizes: TokenSizes | None = None
    flash_attn: bool = False
    asked: QueryCount | None = None

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """`[B, T, C]` to `[B, T, C]`, or `[B, Q, C]` for Q queries. Masks never come together with sizes or queries."""
        sizes = None if self.sizes is None else self.sizes.sizes_of(x.shape[1])
        queries = None if self.asked is None else self.asked.queries
        backend = backend_of(self.fused_attn, self.flash_attn)
        if sizes is None and queries is None and (backend != "flash" or attn_mask is not None or is_causal):
            causal = {"is_causal": True} if is_causal else {}  # older versions of timm lack it
            dense: Tensor = super().forward(x, attn_mask=attn_mask, **causal)
            return dense
        plain = isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity)
        query, key, value = self._project(x, queries)
        mixed = attend_split(
            query,
            key,
            value,
            sizes,
            backend=backend,
            norms=None if plain else (self.q_norm, self.k_norm),
            dropout=self.attn_drop.p if self.training else 0.0,
        )
        # older versions of timm lack the norm and the gate
        if (norm := getattr(self, "norm", None)) is not None:
            mixed = norm(mixed)
        if (gate := getattr(self, "gate", None)) is not None:
            mixed = mixed * gate(x if queries is None else x[:, :queries]).sigmoid()
        output: Tensor = self.proj_drop(self.proj(mixed))
        return output

    def _project(self, x: Tensor, queries: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, `[B, T, heads, d]`."""
        layer, heads = self.qkv, (self.num_heads, self.head_dim)
        # a layer of another kind, such as a quantized one, does more than multiply by its weight
        plain = type(layer) is nn.Linear and not (layer._forward_hooks or layer._forward_pre_hooks)
        if queries is None or not plain:
            query, key, value = layer(x).unflatten(2, (3, *heads)).unbind(2)
            return query if queries is None else query[:, :queries], key, value
        width = self.num_heads * self.head_dim
        first, rest = (None, None) if layer.bias is None else (layer.bias[:width], layer.bias[width:])
        query = functional.linear(x[:, :queries], layer.weight[:width], first).unflatten(2, heads)
        key, value = functional.linear(x, layer.weight[width:], rest).unflatten(2, (2, *heads)).unbind(2)
        return query, key, value


def is_attention(module: nn.Module) -> bool:
    """Whether it is timm's `Attention` itself or a `FlexibleAttention`, and no other subclass."""
    return type(module) in (Attention, FlexibleAttention)


def use_proportional_attention(attentions: Iterable[Attention], sizes: TokenSizes | None) -> None:
    """Weight each key by the size of its token; None undoes it."""
    for attention in attentions:
        _set_option(attention, "sizes", sizes)


def ask_first_tokens(attention: Attention, asked: QueryCount | None) -> None:
    """Compute the output of the first tokens only; None undoes it."""
    _set_option(attention, "asked", asked)


def run_on_flash(attention: Attention, on: bool) -> None:
    """Run on flash-attn if `fused_attn` is on; False undoes it."""
    _set_option(attention, "flash_attn", on or None)


def _set_option(attention: Attention, name: str, value: Any) -> None:
    """Set an option, or remove it if the value is None. Without options the class is timm's own."""
    options = vars(attention)
    options.pop(name, None)
    if value is not None:
        options[name] = value
    attention.__class__ = FlexibleAttention if options.keys() & {"sizes", "flash_attn", "asked"} else Attention
