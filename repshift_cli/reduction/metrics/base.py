"""What a metric is: it asks for tensors that pass at a site and returns one score per patch token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.linalg import vector_norm

from repshift_cli.planning.recipe import ComponentSpec, Place
from repshift_cli.planning.registry import build_component, members

__all__ = ["Metric", "SiteContext", "Tap", "build_metric", "metric_kinds", "norms"]

Tap = Literal[
    "block_input",  # the stream before the block, [B, T, C]
    "block_output",  # the stream after the block
    "attention_update",  # what the attention branch adds to the stream
    "mlp_update",  # what the MLP branch adds to the stream
    "mlp_stream",  # the stream that the MLP branch reads and adds to
    "mixer_update",  # what a state space mixer adds to the stream
    "mixer_stream",  # the stream that it reads and adds to
    "attention_query",  # queries as attention uses them, [B, heads, T, d]
    "attention_key",  # keys, likewise
]
"""Tensors that a family can show at a site. T counts prefix and patch tokens."""

Polarity = Literal["largest", "smallest"]


@dataclass(frozen=True)
class SiteContext:
    """What a metric may know of the site beside the tensors.

    Attributes:
        layer: index of the block.
        prefix: number of prefix tokens.
        class_token: whether token 0 is a class token.
    """

    layer: int
    prefix: int
    class_token: bool


class Metric(BaseModel, ABC):
    """A score. Its fields are the keys that a recipe may give under `metric`.

    A field that is None is open: calibration chooses it among `variants`, else `with_defaults` fills it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: ClassVar[str]
    polarity: Polarity | None = "largest"

    @abstractmethod
    def taps(self) -> frozenset[Tap]:
        """Names of the tensors that `score` reads."""

    @abstractmethod
    def score(self, seen: Mapping[str, Tensor], site: SiteContext) -> Tensor:
        """Score the patch tokens.

        Args:
            seen: the tensors that `taps` names.
            site: where they were seen.

        Returns:
            float32 `[B, N]`. Which end is kept is a matter of `polarity`.
        """

    def on(self, device: torch.device) -> Metric:
        """The metric with the tensors that it holds on a device; the metric itself where it holds none elsewhere."""
        return self

    def macs(self, tokens: int, attention_channels: int) -> int:
        """Multiply-accumulates of the score for one image that are matrix products (norms and sums do not count).

        Args:
            tokens: tokens that reach the site, prefix tokens included.
            attention_channels: heads times channels per head.
        """
        return 0

    @property
    def open(self) -> bool:
        """Whether calibration has something to choose or to fit."""
        return len(self.variants()) > 1

    @property
    def channels(self) -> int | None:
        """Channels that the tokens must have, None for any number."""
        return None

    @property
    def keeps_largest(self) -> bool:
        """Whether the tokens with the largest scores stay."""
        return self.polarity != "smallest"

    def variants(self) -> tuple[Metric, ...]:
        """Every way to fill the open fields; the metric itself where none is open."""
        return (self,)

    def with_defaults(self) -> Metric:
        """The open fields filled as the paper has them."""
        return self

    def spec(self) -> ComponentSpec:
        """The metric as a recipe names it, open fields left out."""
        return ComponentSpec(kind=self.kind, **self._filled())

    def _filled(self) -> dict[str, Any]:
        """The fields that are not open, polarity last: people read what is measured before which end is kept."""
        values = self.model_dump(mode="json", exclude_none=True)
        return {key: values[key] for key in sorted(values, key=lambda key: key == "polarity")}

    def __str__(self) -> str:
        values = ", ".join(str(value) for value in self._filled().values())
        return f"{self.kind} ({values})" if values else self.kind


def norms(tokens: Tensor, order: int = 2) -> Tensor:
    """Norm of each token, `[B, N, C]` to float32 `[B, N]`; half-precision tokens are summed in float32."""
    if tokens.dtype == torch.float32 and tokens.stride(-1) == 1:
        return vector_norm(tokens, ord=order, dim=-1)  # at batch 1 the calls about dtypes below are felt
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    if tokens.stride(-1) != 1:
        # channel by channel in memory: `vector_norm` would walk across it, a plain sum does not (4 times faster)
        return tokens.abs().sum(-1, dtype=dtype).float() if order == 1 else _square_sum(tokens, dtype).sqrt().float()
    return vector_norm(tokens, ord=order, dim=-1, dtype=dtype).float()


def _square_sum(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    return tokens.to(dtype).square().sum(-1)


def metric_kinds() -> dict[str, type[Metric]]:
    """All metrics by kind."""
    # mypy objects to an abstract class as argument, though `members` only compares with it
    return {found.kind: found for found in members("repshift_cli.reduction.metrics", Metric)}  # type: ignore[type-abstract]


def build_metric(part: ComponentSpec, place: Place | None = None, path: tuple[str | int, ...] = ("metric",)) -> Metric:
    """The metric that a recipe names at `path`.

    Raises:
        RecipeError: an unknown kind or option, with its place in the recipe.
    """
    metric: Metric = build_component(part, metric_kinds(), place or Place("metric", {}), path)
    return metric
