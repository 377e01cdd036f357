"""A stand-in for the package flash-attn on machines without a GPU: its function in plain torch."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import transformers.models.bert.modeling_bert  # noqa: F401 (it looks for flash-attn when it is imported, once for all)
from torch import Tensor
from torch.nn import functional

from repshift_cli.models import attention_mode

__all__ = ["STAND_IN", "FlashStandIn", "allow_flash"]


class FlashStandIn(ModuleType):
    """Attention of `[B, T, heads, d]`, in the layout of flash-attn; counts its calls."""

    def __init__(self) -> None:
        super().__init__("flash_attn")
        self.calls = 0

    def flash_attn_func(
        self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None
    ) -> Tensor:
        self.calls += 1
        assert q.dtype == k.dtype == v.dtype
        return attention(q, k, v, dropout_p, softmax_scale)


def attention(q: Tensor, k: Tensor, v: Tensor, dropout: float, scale: float | None) -> Tensor:
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return torch.einsum("bhqk,bkhd->bqhd", functional.dropout(logits.softmax(dim=-1), dropout), v)


STAND_IN = FlashStandIn()
"""One for all tests: compiled graphs keep the module that they were compiled with."""


def allow_flash(monkeypatch: pytest.MonkeyPatch) -> FlashStandIn:
    """Install the stand-in as flash-attn, and allow it on every device."""
    STAND_IN.calls = 0
    monkeypatch.setitem(sys.modules, "flash_attn", STAND_IN)
    monkeypatch.setattr(attention_mode, "flash_problem", lambda device, dtype, width: None)
    return STAND_IN
