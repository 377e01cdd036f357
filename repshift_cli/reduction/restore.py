"""Blocks run on the tokens that are left, and what is around them gets all tokens.

In front of each block behind the first site the tokens that are left are gathered, and the output of the block is put
back to full length. A dropped or merged token is updated too: each block adds to it what it adds to the token that it
was merged into, or to the most similar one that was kept. So whatever reads the stream between or behind the
blocks (norms, heads, hidden states, feature maps) sees the shapes of the dense model, and each token at its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from repshift_cli.ops.tokens import at_places, complement, gather_tokens, with_prefix
from repshift_cli.reduction.families.base import Site
from repshift_cli.reduction.token_stream import TokenStream


class _Route(NamedTuple):
    """Indices behind a site, int64: of the tokens that are left among all, `[B, K]`; of the one that each of all
    follows among those that are left, `[B, T]`; and of each of all among both, those that are left first, `[B, T]`."""

    left: Tensor
    followed: Tensor
    both: Tensor


class Restorer:
    """The hooks of one block; methods, so that a hooked model can be copied and pickled.

    Attributes:
        entering: tokens with which the block runs.
        before: all tokens in front of the block, and those with which it runs; None if no token was dropped yet.
    """

    def __init__(self, stream: TokenStream, entering: int) -> None:
        self.stream, self.entering = stream, entering
        self.before: tuple[Tensor, Tensor] | None = None

    def gather(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Forward pre-hook: the tokens that are left."""
        self.before, route = None, self.stream.routes.get(self.entering)
        if route is None:
            return None
        full = self.stream.inward(args[0])
        left = gather_tokens(full, route.left)
        self.before = full, left
        return (self.stream.outward(left), *args[1:])

    def restore(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Forward hook behind that of the site, if there is one: all tokens."""
        stream, before = self.stream, self.before
        arrived, self.before, stream.arrived = stream.arrived, None, None
        left = stream.inward(output)
        ran, count = left if arrived is None else arrived, left.shape[1]
        if count not in stream.places:
            return None
        full = ran
        if before is not None:
            route = stream.routes[ran.shape[1]]
            full = _put(ran, self._moved(*before, ran, route), route)
        if arrived is not None:
            route = stream.routes[count] = self._route(count, full.shape[1])
            full = _put(left, full, route)
        return stream.outward(full)

    def _moved(self, full: Tensor, entered: Tensor, ran: Tensor, route: _Route) -> Tensor:
        """All tokens, with the update of the token that each follows."""
        return full + gather_tokens(ran - entered, route.followed)

    def _route(self, count: int, total: int) -> _Route:
        stream = self.stream
        left, followed = (with_prefix(each[count], stream.prefix) for each in (stream.places, stream.owners))
        others = complement(left, total)
        first = torch.arange(count, device=left.device).expand_as(left)
        both = at_places(torch.cat((left, others), dim=1), torch.cat((first, others + count), dim=1))
        return _Route(left, followed, both)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "before": None}


def _put(left: Tensor, full: Tensor, route: _Route) -> Tensor:
    """All tokens `[B, T, C]`, with those that are left, `[B, K, C]`, at their places."""
    if full.shape[0] != left.shape[0]:  # several metrics choose at one site
        full = full.repeat(left.shape[0] // full.shape[0], 1, 1)
    return gather_tokens(torch.cat((left, full), dim=1), route.both)


def register_restore(
    stream: TokenStream, sites: Sequence[Site], counts: Sequence[int], first: int
) -> list[RemovableHandle]:
    """Hook the blocks from the first site on; the hooks of sites must be registered later, with `prepend`.

    Args:
        counts: tokens that enter each block.
        first: layer of the first site.
    """
    stream.restores = True
    handles = []
    for site, count in zip(sites, counts, strict=False):
        if site.layer >= first:
            restorer = Restorer(stream, count)
            if site.layer > first:
                handles.append(site.block.register_forward_pre_hook(restorer.gather))
            # before hooks of the library, which record what leaves a block
            handles.append(site.block.register_forward_hook(restorer.restore, prepend=True))
    return handles
