"""The interface of a reducer: it turns the tokens at a site and the scores of a metric into fewer tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

from torch import Tensor

from repshift_cli.planning.layout import After
from repshift_cli.planning.recipe import ComponentSpec, Place, StrictModel
from repshift_cli.planning.registry import build_component, members


class Dims(NamedTuple):
    """Channels at a site: of a token, and of one head of the attention (0 if there is none)."""

    width: int
    head: int


class Merged(NamedTuple):
    """The result of a merge: tokens `[B, prefix + K, C]` and sizes `[B, prefix + K]`, not always integers.

    Of patch tokens: `places`, int64 `[B, K]`, is the position of each remaining one before the merge; `sources`, int64
    `[B, D]`, are those of the others, and `targets` the indices in `places` of the tokens that they went into.
    """

    tokens: Tensor
    sizes: Tensor
    places: Tensor
    sources: Tensor
    targets: Tensor


class Reducer(StrictModel, ABC):
    """A way to reduce tokens. Its fields are the keys under `reducer` in a recipe.

    It acts `after` the whole block or after its attention; `scored` is whether it uses the scores.
    """

    kind: ClassVar[str]
    after: ClassVar[After] = "block"
    scored: ClassVar[bool] = True

    def taps(self) -> frozenset[str]:
        """Names of the tensors that it reads besides the tokens (see `metrics.base.Tap`)."""
        return frozenset()

    def macs(self, patches: int, dropped: int, dims: Dims) -> int:
        """Multiply-accumulates of reducing one image, matrix products only.

        `dropped` of the `patches` patch tokens that reach the site are removed.
        """
        return 0


class Pruner(Reducer):
    """A reducer that keeps the tokens with the best scores, in order."""

    @abstractmethod
    def reduce(self, tokens: Tensor, keep: Tensor) -> Tensor:
        """Reduce the tokens of one site, `[B, T, C]` to `[B, K, C]`.

        `keep` is int64 `[B, K]`, ascending positions among the T; it includes all tokens that are not patches.
        """


class Merger(Reducer):
    """A reducer that merges tokens, and so needs their sizes.

    Attributes:
        pooled_by_size: whether attention and means over tokens of the model weight merged tokens by size. Off for UMT
            with vid-TLDR, whose blocks weight them in attention themselves and whose means are plain.
    """

    pooled_by_size: ClassVar[bool] = True

    @abstractmethod
    def merge(  # noqa: PLR0917
        self, tokens: Tensor, sizes: Tensor, scores: Tensor, count: int, prefix: int, seen: Mapping[str, Tensor]
    ) -> Merged:
        """Merge the tokens `[B, prefix + N, C]` of one site, with sizes `[B, prefix + N]`.

        Args:
            scores: float32 `[B, N]`; large ones are important.
            count: how many patch tokens are removed, at least 1.
            prefix: prefix tokens in front, which stay unchanged.
            seen: the tensors that `taps` names.
        """

    def most(self, patches: int) -> int:
        """How many of `patches` tokens can be removed at one site."""
        return patches - 1


def reducer_kinds() -> dict[str, type[Reducer]]:
    """All reducers by kind."""
    return {found.kind: found for found in members("repshift_cli.reduction.reducers", Reducer)}


def build_reducer(spec: ComponentSpec, place: Place | None = None) -> Reducer:
    """The reducer of a recipe; raises a RecipeError for an unknown kind or option, with its place."""
    reducer: Reducer = build_component(spec, reducer_kinds(), place or Place("reducer", {}), ("reducer",))
    return reducer
