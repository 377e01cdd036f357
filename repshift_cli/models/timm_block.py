"""timm's pre-norm `Block`, made to run its parts by `direct.run`: the same functions of torch in the same order.

As with `timm_attention` it is one and the same object that changes its class, so that parts, parameters, keys and hooks
stay where they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from repshift_cli.models.direct import is_plain, may_pass_by, run
from repshift_cli.models.timm_attention import FlexibleAttention, is_attention

__all__ = ["DirectBlock", "run_directly"]


class DirectBlock(Block):
    """A timm `Block` that passes by `nn.Module.__call__` where nothing but `forward` would happen."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """`[B, T, C]` to the same. With a mask, or where calls must not be passed by, timm's own code runs."""
        if attn_mask is not None or is_causal or not may_pass_by():
            causal = {"is_causal": True} if is_causal else {}  # older versions of timm do not know it
            dense: Tensor = super().forward(x, attn_mask=attn_mask, **causal)
            return dense
        parts: Any = self._modules
        attended = _attend(parts["attn"], run(parts["norm1"], x))
        x = x + run(parts["drop_path1"], run(parts["ls1"], attended))
        widened = _mix_channels(parts["mlp"], run(parts["norm2"], x))
        return x + run(parts["drop_path2"], run(parts["ls2"], widened))


def run_directly(blocks: Iterable[nn.Module], on: bool) -> bool:
    """Let blocks run their parts directly from now on, or by their own code; other kinds than `Block` are left alone.

    Another version of timm may compute something else. It shows in what its `forward` asks for, and then its own code
    goes on running.

    Returns:
        Whether there is one that runs directly now.
    """
    then = DirectBlock if on and all(_is_known(kind) for kind in _NAMES) else Block
    found = [block for block in blocks if type(block) in (Block, DirectBlock)]
    for block in found:
        block.__class__ = then
    return then is DirectBlock and bool(found)


def _attend(attention: Any, x: Tensor) -> Tensor:
    """`[B, T, C]` to the same, as timm's `Attention`, or what was made of it here."""
    parts: Any = attention._modules
    if not is_attention(attention) or parts.get("gate") is not None or not is_plain(attention):
        called: Tensor = attention(x)
        return called
    batch, count = x.shape[:2]
    if isinstance(attention, FlexibleAttention):
        sizes, backend = attention.heeded(count), attention.backend
        if sizes is not None or backend == "flash":
            return attention.attend(x, sizes, backend, run)
    heads = run(parts["qkv"], x).reshape(batch, count, 3, attention.num_heads, attention.head_dim)
    query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
    query, key = run(parts["q_norm"], query), run(parts["k_norm"], key)
    if attention.fused_attn:
        dropout = parts["attn_drop"].p if attention.training else 0.0
        mixed = scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    else:
        logits = (query * attention.scale) @ key.transpose(-2, -1)
        mixed = run(parts["attn_drop"], logits.softmax(dim=-1)) @ value
    mixed = run(parts["norm"], mixed.transpose(1, 2).reshape(batch, count, -1))
    return run(parts["proj_drop"], run(parts["proj"], mixed))


def _mix_channels(mlp: Any, x: Tensor) -> Tensor:
    """`[B, T, C]` to the same, as timm's `Mlp`."""
    if type(mlp) is not Mlp or not is_plain(mlp):
        called: Tensor = mlp(x)
        return called
    parts: Any = mlp._modules
    hidden = run(parts["drop1"], run(parts["act"], run(parts["fc1"], x)))
    return run(parts["drop2"], run(parts["fc2"], run(parts["norm"], hidden)))


_NAMES: dict[type[nn.Module], frozenset[str]] = {
    Block: frozenset(["norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"]),
    Attention: frozenset(
        [
            "shape",
            "qkv",
            "reshape",
            "num_heads",
            "head_dim",
            "permute",
            "unbind",
            "q_norm",
            "k_norm",
            "fused_attn",
            "F",
            "scaled_dot_product_attention",
            "training",
            "attn_drop",
            "p",
            "scale",
            "softmax",
            "transpose",
            "attn_dim",
            "resolve_self_attn_mask",
            "maybe_add_mask",
            "gate",
            "sigmoid",
            "norm",
            "proj",
            "proj_drop",
        ]
    ),
    Mlp: frozenset(["fc1", "act", "drop1", "norm", "fc2", "drop2"]),
}
"""What `forward` of these classes asks for, in the versions of timm that are known."""


def _is_known(kind: type[nn.Module]) -> bool:
    code = getattr(kind.forward, "__code__", None)
    return code is not None and _NAMES[kind].issuperset(code.co_names)
