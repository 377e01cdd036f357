"""The stream of a transformer as one tensor, with the sizes and the original positions of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from repshift_cli.ops.merging import nearest
from repshift_cli.ops.tokens import complement, gather_tokens, owners_after, suffix_first, suffix_last, with_prefix
from repshift_cli.planning.plan import PlanSite
from repshift_cli.reduction.stream import Merge, Reduce, SizedStream


class Tokens(NamedTuple):
    """Tokens `[B, T, C]`, their sizes (float32 `[B, T]`, None for 1), and the original positions of the patch tokens
    (int64 `[B, K]`, None if all are there). `owners`, int64 `[B, N]`, are for all original patch tokens the indices of
    those that they went into (None if not needed)."""

    tokens: Tensor
    sizes: Tensor | None = None
    places: Tensor | None = None
    owners: Tensor | None = None


class TokenStream(SizedStream):
    """Blocks pass on a tensor `[B, T, C]`, or `[T, B, C]`; sizes and positions are stored here during a pass.

    Tokens behind the patch tokens count as prefix. `inward` moves them there, `outward` back.

    The key is the number of tokens, which is unique to each site that removes tokens. A checkpointed block runs again
    in the backward pass, when the state of later sites is stored too.

    Attributes:
        count: tokens that entered the current block.
        restores: whether all tokens are put back behind each block (`reduction/restore.py`).
        arrived: then the tokens `[B, T, C]` that left the current block, before its site reduced them.
        owners, routes: then `Tokens.owners`, and what `Restorer` computes once per site, by the number of tokens.
    """

    restores = False

    def __init__(self, prefix: int, sequence_first: bool = False, keeps_places: bool = False, suffix: int = 0) -> None:
        super().__init__(prefix + suffix)
        self.front, self.suffix = prefix, suffix
        self.sequence_first, self.keeps_places = sequence_first, keeps_places
        self._clear()

    def _clear(self) -> None:
        self.sizes: dict[int, Tensor] = {}
        self.places: dict[int, Tensor] = {}
        self.owners: dict[int, Tensor] = {}
        self.routes: dict[int, Any] = {}
        self.arrived: Tensor | None = None
        self._gathered: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.normed, self.count = None, 0

    def begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._clear()

    def arrive(self, tokens: Tensor) -> None:
        """Note how many tokens enter a block."""
        self.count = tokens.shape[0 if self.sequence_first else 1]

    def enter(self, output: Tensor) -> Tokens:
        tokens = self.inward(output)
        if self.restores:
            self.arrived = tokens
        count = tokens.shape[1]
        return Tokens(tokens, self.sizes.get(count), self.places.get(count), self.owners.get(count))

    def leave(self, value: Tokens) -> Tensor:
        count = value.tokens.shape[1]
        if value.sizes is not None:
            self.sizes[count] = value.sizes
        if value.places is not None:
            self.places[count] = value.places
        if value.owners is not None:
            self.owners[count] = value.owners
        return self.outward(value.tokens)

    def inward(self, tokens: Tensor) -> Tensor:
        """`[B, T, C]` from the form in which blocks pass tokens on."""
        tokens = tokens.transpose(0, 1) if self.sequence_first else tokens
        return suffix_first(tokens, self.front, self.suffix) if self.suffix else tokens

    def outward(self, tokens: Tensor) -> Tensor:
        """Undoes `inward`."""
        tokens = suffix_last(tokens, self.front, self.suffix) if self.suffix else tokens
        return tokens.transpose(0, 1) if self.sequence_first else tokens

    def shape(self, value: Any) -> tuple[int, ...]:
        return (value.tokens.shape[1],)

    def block_input(self, args: tuple[Any, ...], output: Any) -> Tensor:
        return self.inward(args[0])

    def patch_place(self, output: Any) -> Tensor:
        batch, total, _ = output.tokens.shape
        here = torch.arange(total - self.prefix, device=output.tokens.device).expand(batch, -1)
        return here if output.places is None else output.places

    def reduce(self, output: Any, keep: Tensor, planned: PlanSite, reduce: Reduce) -> Any:
        sizes = None if output.sizes is None else output.sizes.gather(1, keep)
        tokens, kept, owners = reduce(output.tokens, keep), self.patches(keep), None
        if self.restores:
            owners = owners_after(output.owners, kept, *_most_similar(output.tokens[:, self.prefix :], kept))
        return Tokens(tokens, sizes, self._follow(output.places, kept), owners)

    def merge(self, output: Any, scores: Tensor, planned: PlanSite, merge: Merge) -> Any:
        merged = self.merged(output[:2], scores, planned, merge)
        owners = owners_after(output.owners, *merged[2:]) if self.restores else None
        return Tokens(*merged[:2], self._follow(output.places, merged.places), owners)

    def _follow(self, places: Tensor | None, kept: Tensor) -> Tensor | None:
        if not (self.keeps_places or self.restores):
            return None
        return kept if places is None else places.gather(1, kept)

    def join(self, outputs: Sequence[Any]) -> Any:
        columns = ([part for part in column if part is not None] for column in zip(*outputs, strict=True))
        return Tokens(*(torch.cat(parts) if parts else None for parts in columns))  # type: ignore[arg-type]

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
        empty: dict[str, Any] = {"sizes": {}, "places": {}, "owners": {}, "routes": {}, "_gathered": {}}
        return {**self.__dict__, **empty, "arrived": None, "normed": None}


def _most_similar(patches: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The positions `[B, D]` of the tokens that are not kept, and the index of the most similar kept one of each."""
    dropped = complement(kept, patches.shape[1])
    return dropped, nearest(gather_tokens(patches, dropped), gather_tokens(patches, kept))


def _gather(value: Tensor, index: Tensor, pairs: bool) -> Tensor:
    value = value.reshape(*(1,) * (4 - value.ndim), *value.shape)
    rows = index[:, None, :, None]
    value = value.expand(index.shape[0], -1, -1, -1)
    value = value.gather(2, rows.expand(-1, value.shape[1], -1, value.shape[3]))
    if pairs:
        value = value.gather(3, index[:, None, None, :].expand(-1, value.shape[1], value.shape[2], -1))
    return value
