"""Pruning: the other tokens are dropped."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from repshift_cli.ops.tokens import gather_tokens
from repshift_cli.reduction.reducers.base import Pruner


class Prune(Pruner):
    """Keep the chosen tokens unchanged and in order, drop the others."""

    kind: ClassVar[str] = "prune"

    def reduce(self, tokens: Tensor, keep: Tensor) -> Tensor:
        return gather_tokens(tokens, keep)
