"""The last block computes the prefix tokens only, where the head reads nothing else.

Its attention needs the keys and values of all tokens. Queries, projection and MLP of the patch tokens would change no
output. The block gets only the prefix tokens, for the residual connection, and its first module gets all of them. That
holds for a call of the model itself; `forward_features` calls no hook of the model, so it returns all tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from repshift_cli.models import timm_attention
from repshift_cli.reduction.families.base import LastBlockParts


class ExactLastBlock:
    """The hooks of one model; methods, so that a hooked model can be copied and pickled.

    Attributes:
        queries: prefix tokens while a pass runs that reads nothing else, or None.
        everything: in such a pass the tokens `[B, T, C]` that arrive at the block.
    """

    def __init__(self, prefix: int, suffices: Callable[[Any], bool]) -> None:
        self.prefix, self.suffices = prefix, suffices
        self.enabled = True
        self.queries: int | None = None
        self.everything: Tensor | None = None

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the model: other arguments than the images are masks, or make the attention causal."""
        plain = len(args) + len(kwargs) == 1 and not module.training
        self.queries = self.prefix if self.enabled and plain and self.suffices(module) else None

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook of the model, also after an exception."""
        self.queries = self.everything = None

    def shorten(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Pre-hook of the block: the prefix tokens."""
        if self.queries is None:
            return None
        self.everything = args[0]
        return (args[0][:, : self.queries], *args[1:])

    def lengthen(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Pre-hook of the first module in it: all tokens."""
        everything, self.everything = self.everything, None
        return None if everything is None else (everything, *args[1:])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "queries": None, "everything": None}


def register_last_block(parts: LastBlockParts, prefix: int) -> tuple[ExactLastBlock, list[Callable[[], None]]]:
    """Hook a model with `prefix` prefix tokens; returns the hooks, and functions that undo it."""
    hook = ExactLastBlock(prefix, parts.suffices)
    handles = (
        parts.model.register_forward_pre_hook(hook.begin, with_kwargs=True),
        parts.model.register_forward_hook(hook.end, always_call=True),
        parts.block.register_forward_pre_hook(hook.shorten),
        parts.reader.register_forward_pre_hook(hook.lengthen),
    )
    timm_attention.ask_first_tokens(parts.attention, hook)
    undo = partial(timm_attention.ask_first_tokens, parts.attention, None)
    return hook, [undo, *(handle.remove for handle in handles)]
