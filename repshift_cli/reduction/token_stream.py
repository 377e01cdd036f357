"""The stream of a transformer as one tensor, with the sizes and the original positions of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from repshift_cli.ops.tokens import with_prefix
from repshift_cli.planning.plan import PlanSite
from repshift_cli.reduction.stream import Merge, Reduce, SizedStream


class Tokens(NamedTuple):
    """Tokens `[B, T, C]`, their sizes (float32 `[B, T]`, None for 1), and the original positions of the patch tokens
    (int64 `[B, K]`, None if all are there)."""

    tokens: Tensor
    sizes: Tensor | None = None
    places: Tensor | None = None


class TokenStream(SizedStream):
    """Blocks pass on a tensor `[B, T, C]`, or `[T, B, C]`; sizes and positions are stored here during a pass.

    The key is the number of tokens, which is unique to each site that removes tokens. A checkpointed block runs again
    in the backward pass, when the state of later sites is stored too.

    Attributes:
        count: tokens that entered the current block.
    """

    def __init__(self, prefix: int, sequence_first: bool = False, keeps_places: bool = False) -> None:
        super().__init__(prefix)
        self.sequence_first, self.keeps_places = sequence_first, keeps_places
        self._clear()

    def _clear(self) -> None:
        self.sizes: dict[int, Tensor] = {}
        self.places: dict[int, Tensor] = {}
        self._gathered: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.normed, self.count = None, 0

    def begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._clear()

    def arrive(self, tokens: Tensor) -> None:
        """Note how many tokens enter a block."""
        self.count = tokens.shape[0 if self.sequence_first else 1]

    def enter(self, output: Tensor) -> Tokens:
        tokens = output.transpose(0, 1) if self.sequence_first else output
        return Tokens(tokens, self.sizes.get(tokens.shape[1]), self.places.get(tokens.shape[1]))

    def leave(self, value: Tokens) -> Tensor:
        count = value.tokens.shape[1]
        if value.sizes is not None:
            self.sizes[count] = value.sizes
        if value.places is not None:
            self.places[count] = value.places
        return value.tokens.transpose(0, 1) if self.sequence_first else value.tokens

    def shape(self, value: Any) -> tuple[int, ...]:
        return (value.tokens.shape[1],)

    def block_input(self, args: tuple[Any, ...], output: Any) -> Tensor:
        entered: Tensor = args[0]
        return entered.transpose(0, 1) if self.sequence_first else entered

    def reduce(self, output: Any, keep: Tensor, planned: PlanSite, reduce: Reduce) -> Any:
        sizes = None if output.sizes is None else output.sizes.gather(1, keep)
        return Tokens(reduce(output.tokens, keep), sizes, self._follow(output.places, self.patches(keep)))

    def merge(self, output: Any, scores: Tensor, planned: PlanSite, merge: Merge) -> tuple[Any, Tensor]:
        merged, places = super().merge(output[:2], scores, planned, merge)
        return Tokens(*merged, self._follow(output.places, places)), places

    def _follow(self, places: Tensor | None, kept: Tensor) -> Tensor | None:
        if not self.keeps_places:
            return None
        return kept if places is None else places.gather(1, kept)

    def join(self, outputs: Sequence[Any]) -> Any:
        sizes, places = (
            torch.cat(parts) if (parts := [part for part in column if part is not None]) else None
            for column in (tuple(output.sizes for output in outputs), tuple(output.places for output in outputs))
        )
        return Tokens(torch.cat([output.tokens for output in outputs]), sizes, places)

    def sizes_of(self, count: int) -> Tensor | None:
        """The sizes `[B, count]` of `count` tokens, None if they stand for themselves."""
        return self.sizes.get(count)

    def last(self) -> Tensor | None:
        """The sizes after all blocks."""
        return self.sizes[min(self.sizes)] if self.sizes else None

    def gather(self, value: Any, pairs: bool, prefix: bool) -> Any:
        """A tensor with one entry per original token, for the tokens of the current block.

        Args:
            value: `[..., N, C]`, or `[..., N, N]` for `pairs`, with at most four dimensions; or a tuple of these.
            prefix: prefix tokens have entries too.

        Returns:
            `[B, heads or 1, K, C]` or `[B, heads or 1, K, K]`, or the value itself if no token was dropped.
        """
        places = self.places.get(self.count)
        if places is None:
            return value
        if isinstance(value, tuple | list):
            return type(value)(self.gather(part, pairs, prefix) for part in value)
        key = (id(value), self.count)
        if key not in self._gathered:  # the value is stored too, so that its id stays unique
            self._gathered[key] = value, _gather(value, with_prefix(places, self.prefix) if prefix else places, pairs)
        return self._gathered[key][1]

    def __getstate__(self) -> dict[str, Any]:
        # a copy does not take over the tensors of a running pass
        return {**self.__dict__, "sizes": {}, "places": {}, "_gathered": {}, "normed": None}


def _gather(value: Tensor, index: Tensor, pairs: bool) -> Tensor:
    value = value.reshape(*(1,) * (4 - value.ndim), *value.shape)
    rows = index[:, None, :, None]
    value = value.expand(index.shape[0], -1, -1, -1)
    value = value.gather(2, rows.expand(-1, value.shape[1], -1, value.shape[3]))
    if pairs:
        value = value.gather(3, index[:, None, None, :].expand(-1, value.shape[1], value.shape[2], -1))
    return value
