"""timm's pre-norm `Block`, made to run its parts by `direct.run`: the same functions of torch in the same order.

As with `timm_attention` it is one and the same object that changes its class, so that parts, parameters, keys and hooks
stay where they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from inspect import signature
from operator import itemgetter
from typing import Any

from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional

from repshift_cli.models.direct import is_plain, makes_anew, may_pass_by, run, run_over
from repshift_cli.models.timm_attention import FlexibleAttention

__all__ = ["DirectBlock", "run_directly"]

_OF_BLOCK = itemgetter("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")
_OF_ATTENTION = itemgetter("qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop")
_OF_MLP = itemgetter("fc1", "act", "drop1", "norm", "fc2", "drop2")

_FORWARDS: dict[type[nn.Module], Any] = {kind: kind.forward for kind in (Block, Attention, FlexibleAttention, Mlp)}
"""As they were found, since somebody may replace them."""

_CAUSAL = "is_causal" in signature(Block.forward).parameters
"""Older versions of timm do not know it."""


class DirectBlock(Block):
    """A timm `Block` that passes by `nn.Module.__call__` where nothing but `forward` would happen."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """`[B, T, C]` to the same. With a mask, or where calls must not be passed by, timm's own code runs."""
        parts = None
        if may_pass_by() and Block.forward is _FORWARDS[Block] and attn_mask is None and not is_causal:
            parts = _parts(self, _OF_BLOCK)
        if parts is None:
            causal = {"is_causal": is_causal} if _CAUSAL else {}
            # not by super(): whoever holds this method may call it when the object is a Block again
            dense: Tensor = Block.forward(self, x, attn_mask=attn_mask, **causal)
            return dense
        norm1, attention, scale1, drop1, norm2, mlp, scale2, drop2 = parts
        x = x + run(drop1, run(scale1, _attend(attention, run(norm1, x))))
        return x + run(drop2, run(scale2, _mix_channels(mlp, run(norm2, x))))


def run_directly(blocks: Iterable[nn.Module], on: bool) -> bool:
    """Let blocks run their parts directly from now on, or by their own code; other kinds than `Block` are left alone.

    Another version of timm may compute something else. Where its `forward` asks for something that is not known here,
    its own code goes on running.

    Returns:
        Whether there is one that runs directly now.
    """
    then = DirectBlock if on and all(_computes_what_is_known(kind) for kind in _NAMES) else Block
    found = [block for block in blocks if type(block) in (Block, DirectBlock)]
    for block in found:
        block.__class__ = then
    return then is DirectBlock and bool(found)


def _attend(attention: Any, x: Tensor) -> Tensor:
    """`[B, T, C]` to the same, as timm's `Attention`, or what was made of it here."""
    known = _is_known(attention) and Attention.forward is _FORWARDS[Attention]  # which a FlexibleAttention goes back to
    parts = _parts(attention, _OF_ATTENTION) if known else None
    if parts is None or attention._modules.get("gate") is not None:
        called: Tensor = attention(x)
        return called
    batch, count = x.shape[:2]
    heads, width = attention.num_heads, attention.head_dim
    if isinstance(attention, FlexibleAttention):
        sizes, backend = attention.heeded(count), attention.backend
        if sizes is not None or backend == "flash":
            return attention.attend(x, sizes, backend, run)
    qkv, q_norm, k_norm, drop, norm, proj, proj_drop = parts
    query, key, value = run(qkv, x).reshape(batch, count, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
    query, key = run(q_norm, query), run(k_norm, key)
    if attention.fused_attn:
        dropout = drop.p if attention.training else 0.0
        mixed = functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    else:
        logits = (query * attention.scale) @ key.transpose(-2, -1)
        mixed = run(drop, logits.softmax(dim=-1)) @ value
    mixed = run(norm, mixed.transpose(1, 2).reshape(batch, count, heads * width))
    return run(proj_drop, run(proj, mixed))


def _mix_channels(mlp: Any, x: Tensor) -> Tensor:
    """`[B, T, C]` to the same, as timm's `Mlp`."""
    parts = _parts(mlp, _OF_MLP) if _is_known(mlp) else None
    if parts is None:
        called: Tensor = mlp(x)
        return called
    fc1, act, drop1, norm, fc2, drop2 = parts
    hidden = run(fc1, x)
    hidden = run_over(act, hidden) if makes_anew(fc1) else run(act, hidden)
    return run(drop2, run(fc2, run(norm, run(drop1, hidden))))


def _parts(module: nn.Module, names: itemgetter[Any]) -> Any:
    """The parts of a module; None where one of them is no module, or gone."""
    try:
        return names(module._modules)
    except KeyError:
        return None


def _is_known(module: nn.Module) -> bool:
    forward = _FORWARDS.get(type(module))
    return forward is not None and is_plain(module, forward)


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


def _computes_what_is_known(kind: type[nn.Module]) -> bool:
    """Whether `forward` of a class of timm is timm's own, and asks for nothing that is not known here."""
    forward = _FORWARDS[kind]
    code = getattr(forward, "__code__", None)
    if code is None or code.co_freevars or forward.__module__ != kind.__module__:
        return False
    return _NAMES[kind].issuperset(code.co_names)
