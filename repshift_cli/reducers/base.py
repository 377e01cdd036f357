"""What a reducer is: it turns the tokens of a site and the choice of the metric into fewer tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from repshift_cli.recipe import Part, Place
from repshift_cli.registry import build_part, members

__all__ = ["Reducer", "build_reducer", "reducer_kinds"]


class Reducer(BaseModel, ABC):
    """A way to reduce. Its fields are the keys that a recipe may give under `reducer`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: ClassVar[str]

    @abstractmethod
    def reduce(self, tokens: Tensor, keep: Tensor, prefix: int) -> Tensor:
        """Reduce the tokens of one site.

        Args:
            tokens: `[B, prefix + N, C]`.
            keep: int64 `[B, K]`, ascending places among the N patch tokens.
            prefix: prefix tokens, which stay as they are.

        Returns:
            `[B, prefix + K, C]`.
        """


def reducer_kinds() -> dict[str, type[Reducer]]:
    """All reducers by kind."""
    # mypy objects to an abstract class as argument, though `members` only compares with it
    return {found.kind: found for found in members("repshift_cli.reducers", Reducer)}  # type: ignore[type-abstract]


def build_reducer(part: Part, place: Place | None = None) -> Reducer:
    """The reducer that a recipe names.

    Raises:
        RecipeError: an unknown kind or option, with its place in the recipe.
    """
    reducer: Reducer = build_part(part, reducer_kinds(), place or Place("reducer", {}), ("reducer",))
    return reducer
