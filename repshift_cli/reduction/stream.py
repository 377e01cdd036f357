"""The form in which tokens pass from block to block: a plain tensor, or tokens with their sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from repshift_cli.ops.tokens import Sized, keep_top_behind
from repshift_cli.planning.plan import PlanSite
from repshift_cli.reduction.reducers.base import Merged

Reduce = Callable[[Tensor, Tensor], Tensor]
"""`Pruner.reduce`: tokens `[B, T, C]` and all kept positions, int64 `[B, K]`, to `[B, K, C]`."""

Merge = Callable[[Tensor, Tensor, Tensor, int, int], Merged]
"""`Merger.merge`: tokens `[B, prefix + N, C]`, sizes `[B, prefix + N]`, scores `[B, N]`, how many patch tokens to
remove, and prefix."""


class Stream:
    """The form in which tokens pass from block to block, and how a hook on a block reads and reduces them.

    This class handles a plain tensor `[B, prefix + N, C]`; families override what differs. `enter` converts the output
    of a block, the other methods take the converted value, and `leave` returns the input of the next block.

    Attributes:
        prefix: tokens at the front that metrics do not score.
    """

    def __init__(self, prefix: int = 0) -> None:
        self.prefix = prefix

    def begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the first block: clear the state of the last pass."""

    def enter(self, output: Any) -> Any:
        """The output of a block, with the state that belongs to it."""
        return output

    def leave(self, value: Any) -> Any:
        """The input of the next block."""
        return value

    def shape(self, value: Any) -> tuple[int, ...]:
        """The number of tokens, to compare with `PlanSite.shape_in`."""
        return (value.shape[1],)

    def block_input(self, args: tuple[Any, ...], output: Any) -> Tensor:
        """The tokens `[B, prefix + N, C]` before a block, from its arguments and its output."""
        entered: Tensor = args[0]
        return entered

    def block_output(self, output: Any) -> Tensor:
        """The tokens `[B, prefix + N, C]` after a block."""
        left: Tensor = output
        return left

    def patch_place(self, output: Any) -> Tensor:
        """The original positions of the patch tokens, int64 `[B, N]`."""
        raise NotImplementedError(type(self).__name__)

    def carrier(self, output: Any) -> Tensor:
        """The tensor that the later layers are computed from; its gradient is the influence of each token."""
        tokens: Tensor = output
        return tokens

    def carried(self, carrier: Tensor) -> Tensor:
        """A tensor like `carrier`, such as its gradient, as tokens `[B, prefix + N, C]`."""
        return carrier

    def choose(self, scores: Tensor, output: Any, planned: PlanSite) -> Tensor:
        """The tokens to keep, int64 `[B, K]`: ascending positions, here among all tokens, prefix included.

        `reduce` and `patches` of the same class interpret them. `scores` are float32, one per token that metrics see,
        without the prefix; the largest are kept. `planned` has the counts.
        """
        return keep_top_behind(scores, planned.tokens_out - self.prefix, self.prefix)

    def patches(self, keep: Tensor) -> Tensor:
        """The result of `choose` as ascending positions among the patch tokens."""
        return keep[:, self.prefix :] - self.prefix

    def reduce(self, output: Any, keep: Tensor, planned: PlanSite, reduce: Reduce) -> Any:
        """The output of the block with only the tokens at `keep`."""
        return reduce(output, keep)

    def merge(self, output: Any, scores: Tensor, planned: PlanSite, merge: Merge) -> Any:
        """The output of the block after a merge."""
        raise NotImplementedError(type(self).__name__)

    def join(self, outputs: Sequence[Any]) -> Any:
        """Concatenate along the batch."""
        return torch.cat(list(outputs))


class SizedStream(Stream):
    """Tokens with their sizes, which the blocks pass on as `tokens.Sized`.

    Attributes:
        normed: `[B, N, C]`, the tokens after the last norm, for a mean over them.
    """

    normed: Tensor | None = None

    def remember(self, normed: Tensor) -> Tensor:
        """Store the tokens after the last norm."""
        self.normed = normed
        return normed

    def shape(self, value: Sized) -> tuple[int, ...]:
        return (value.tokens.shape[1],)

    def block_output(self, output: Sized) -> Tensor:
        return output.tokens

    def carrier(self, output: Sized) -> Tensor:
        return output.tokens

    def reduce(self, output: Sized, keep: Tensor, planned: PlanSite, reduce: Reduce) -> Sized:
        sizes = None if output.sizes is None else output.sizes.gather(1, keep)
        return Sized(reduce(output.tokens, keep), sizes)

    def merge(self, output: Sized, scores: Tensor, planned: PlanSite, merge: Merge) -> Sized:
        merged = self.merged(output, scores, planned, merge)
        return Sized(merged.tokens, merged.sizes)

    def merged(self, output: Sized, scores: Tensor, planned: PlanSite, merge: Merge) -> Merged:
        """The result of the merger."""
        tokens, sizes = output
        if sizes is None:
            sizes = torch.ones(tokens.shape[:2], dtype=torch.float32, device=tokens.device)
        return merge(tokens, sizes, scores, planned.tokens_in - planned.tokens_out, self.prefix)

    def join(self, outputs: Sequence[Sized]) -> Sized:
        sizes = [output.sizes for output in outputs if output.sizes is not None]
        return Sized(torch.cat([output.tokens for output in outputs]), torch.cat(sizes) if sizes else None)
