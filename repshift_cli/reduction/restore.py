"""Blocks run on the tokens that are left, and what is around them gets all tokens.

In front of each block behind the first site the tokens that are left are gathered, and the output of the block is put
back to full length. A dropped token keeps the state that it had last. A merged one gets the state of the token that it
went into. So whatever reads the stream between or behind the blocks (norms, heads, hidden states, feature maps) sees
the shapes of the dense model, and each token at its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from repshift_cli.ops.tokens import gather_tokens, with_prefix
from repshift_cli.reduction.families.base import Site
from repshift_cli.reduction.token_stream import TokenStream


class Restorer:
    """The hooks of one block; methods, so that a hooked model can be copied and pickled.

    Attributes:
        entering: tokens with which the block runs.
        full: all tokens in front of the block, while it runs; None if none was dropped yet.
    """

    def __init__(self, stream: TokenStream, entering: int) -> None:
        self.stream, self.entering = stream, entering
        self.full: Tensor | None = None

    def gather(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Forward pre-hook: the tokens that are left."""
        self.full, places = None, self.stream.places.get(self.entering)
        if places is None:
            return None
        self.full = self.stream.batch_first(args[0])
        left = gather_tokens(self.full, with_prefix(places, self.stream.prefix))
        return (self.stream.batch_first(left), *args[1:])

    def restore(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Forward hook behind that of the site, if there is one: all tokens."""
        stream, full = self.stream, self.full
        arrived, self.full, stream.arrived = stream.arrived, None, None
        left = stream.batch_first(output)
        if left.shape[1] not in stream.places:
            return None
        if (owners := stream.owners.get(left.shape[1])) is not None:
            return stream.batch_first(gather_tokens(left, with_prefix(owners, stream.prefix)))
        if arrived is not None:  # at a site, where dropped tokens have run through this block
            full = arrived if full is None else self._put(arrived, full)
        assert full is not None
        return stream.batch_first(self._put(left, full))

    def _put(self, left: Tensor, full: Tensor) -> Tensor:
        """All tokens `[B, T, C]`, with the ones that are left, `[B, K, C]`, at their places."""
        places, (batch, kept) = with_prefix(self.stream.places[left.shape[1]], self.stream.prefix), left.shape[:2]
        if len(full) != batch:  # several metrics choose at one site
            full = full.repeat(batch // len(full), 1, 1)
        index = torch.arange(kept, kept + full.shape[1], device=places.device).expand(batch, -1)
        index = index.scatter(1, places, torch.arange(kept, device=places.device).expand(batch, -1))
        return gather_tokens(torch.cat((left, full), dim=1), index)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "full": None}


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
