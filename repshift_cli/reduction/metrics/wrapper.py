"""The base of scores that change another score."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from itertools import product
from typing import Any, Literal

import torch
from pydantic import field_validator
from torch import Tensor

from repshift_cli.errors import RecipeError
from repshift_cli.planning.recipe import ComponentSpec
from repshift_cli.reduction.metrics.base import Metric, SiteContext, Tap, build_metric

_DEEPEST = 2


class Wrapper(Metric):
    """A score computed from the score `of`, whose open fields calibration chooses as usual.

    Attributes:
        of: a metric as in a recipe, of at most one other wrapper.
    """

    of: ComponentSpec = ComponentSpec(kind="fitted")
    polarity: Literal["largest"] | None = "largest"

    @field_validator("of", mode="before")
    @classmethod
    def _check_depth(cls, of: Any) -> Any:
        part, depth = of, 0
        while isinstance(part, Mapping | ComponentSpec):
            part = part.get("of") if isinstance(part, Mapping) else part.options.get("of")
            depth += 1
        if depth > _DEEPEST:
            raise ValueError("is nested too deeply: at most a score of a score of a score")
        return of

    @field_validator("of")
    @classmethod
    def _check_metric(cls, of: ComponentSpec) -> ComponentSpec:
        try:
            build_metric(of)
        except RecipeError as error:
            raise ValueError(" ".join([error.message.partition(": ")[2], error.hint or ""]).strip()) from None
        return of

    def model_post_init(self, context: Any, /) -> None:
        _ = self.inner  # `torch.compile` does not trace how it is built

    @cached_property
    def inner(self) -> Metric:
        """The score `of`."""
        return build_metric(self.of)

    @abstractmethod
    def choices(self) -> tuple[dict[str, Any], ...]:
        """Every way to fill its own open fields, the default first."""

    @abstractmethod
    def rescore(self, scores: Tensor, seen: Mapping[str, Tensor], site: SiteContext) -> Tensor:
        """Its score from that of `of`, float32 `[B, N]`, of which the largest are important."""

    def score(self, seen: Mapping[str, Tensor], site: SiteContext) -> Tensor:
        scores = self.inner.score(seen, site)
        return self.rescore(scores if self.inner.keeps_largest else -scores, seen, site)

    def taps(self) -> frozenset[Tap]:
        return self.inner.taps()

    def macs(self, tokens: int, site: SiteContext) -> int:
        return self.inner.macs(tokens, site)

    def on(self, device: torch.device) -> Metric:
        placed = self.inner.on(device)
        if placed is self.inner:
            return self
        moved = self.model_copy()
        vars(moved)["inner"] = placed
        return moved

    @property
    def open(self) -> bool:
        return self.inner.open or len(self.choices()) > 1

    @property
    def channels(self) -> int | None:
        return self.inner.channels

    def variants(self) -> tuple[Metric, ...]:
        return tuple(self._with(*parts) for parts in product(self.inner.variants(), self.choices()))

    def with_defaults(self) -> Metric:
        return self._with(self.inner.with_defaults(), self.choices()[0])

    def _with(self, inner: Metric, fields: dict[str, Any]) -> Metric:
        own = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self)(**{**own, **fields, "of": inner.spec()})

    def __str__(self) -> str:
        own = [str(value) for name, value in self._filled().items() if name not in {"of", "polarity"}]
        return f"{self.kind} ({', '.join([str(self.inner), *own])})"
