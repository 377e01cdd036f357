"""The interface of a metric: it reads tensors at a site and returns one score per patch token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.linalg import vector_norm

from repshift_cli.planning.recipe import ComponentSpec, Place, StrictModel
from repshift_cli.planning.registry import build_component, members

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
    "patch_place",  # the original positions of the patch tokens, int64 [B, N]
]
"""Tensors that may be available at a site. T counts prefix and patch tokens."""

Polarity = Literal["largest", "smallest"]


@dataclass(frozen=True)
class SiteContext:
    """The site at which a metric reads tensors; with a `class_token`, it is token 0.

    Attributes:
        attention_channels, width, head: channels of all heads together, of a token, and of one head; 0 if unknown.
        grid: see `families.base.Site`.
    """

    layer: int
    prefix: int
    class_token: bool
    attention_channels: int = 0
    width: int = 0
    head: int = 0
    grid: tuple[int, ...] = ()


class Metric(StrictModel, ABC):
    """A score. Its fields are the keys under `metric` in a recipe.

    A field that is None is open: calibration chooses one of `variants`, else `with_defaults` fills it. `pairwise` is
    whether it compares all tokens with each other, which is refused for feature maps.
    """

    kind: ClassVar[str]
    pairwise: ClassVar[bool] = False
    polarity: Polarity | None = "largest"

    @abstractmethod
    def taps(self) -> frozenset[Tap]:
        """Names of the tensors that `score` reads."""

    @abstractmethod
    def score(self, seen: Mapping[str, Tensor], site: SiteContext) -> Tensor:
        """Score the patch tokens from the tensors that `taps` names: float32 `[B, N]`.

        `polarity` decides which end is kept.
        """

    def on(self, device: torch.device) -> Metric:
        """The metric with its tensors on a device; the metric itself if they are there."""
        return self

    def macs(self, tokens: int, site: SiteContext) -> int:
        """Multiply-accumulates of the score for one image, matrix products only.

        `tokens` reach the site, prefix included.
        """
        return 0

    @property
    def open(self) -> bool:
        """Whether calibration has a field to choose or weights to fit."""
        return len(self.variants()) > 1

    @property
    def channels(self) -> int | None:
        """Required channels of the tokens, None for any number."""
        return None

    @property
    def keeps_largest(self) -> bool:
        """Whether the tokens with the largest scores are kept."""
        return self.polarity != "smallest"

    def variants(self) -> tuple[Metric, ...]:
        """Every way to fill the open fields; the metric itself if none is open."""
        return (self,)

    def with_defaults(self) -> Metric:
        """The metric with its open fields set as in the paper."""
        return self

    def spec(self) -> ComponentSpec:
        """The metric as in a recipe, without open fields."""
        return ComponentSpec(kind=self.kind, **self._filled())

    def _filled(self) -> dict[str, Any]:
        """The fields that are not open, polarity last."""
        values = self.model_dump(mode="json", exclude_none=True)
        return {key: values[key] for key in sorted(values, key=lambda key: key == "polarity")}

    def __str__(self) -> str:
        values = ", ".join(str(value) for value in self._filled().values())
        return f"{self.kind} ({values})" if values else self.kind


def norms(tokens: Tensor, order: int = 2) -> Tensor:
    """Norm of each token, `[B, N, C]` to float32 `[B, N]`; half-precision tokens are summed in float32."""
    if tokens.dtype == torch.float32 and tokens.stride(-1) == 1:
        return vector_norm(tokens, ord=order, dim=-1)  # the dtype calls below cost time at batch 1
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    if tokens.stride(-1) != 1:
        # channel-major in memory, where a plain sum is 4 times faster than `vector_norm`
        return (tokens.abs().sum(-1, dtype=dtype) if order == 1 else tokens.to(dtype).square().sum(-1).sqrt()).float()
    return vector_norm(tokens, ord=order, dim=-1, dtype=dtype).float()


def metric_kinds() -> dict[str, type[Metric]]:
    """All metrics by kind."""
    # mypy rejects an abstract class as argument, but `members` only compares with it
    return {found.kind: found for found in members("repshift_cli.reduction.metrics", Metric)}  # type: ignore[type-abstract]


def build_metric(spec: ComponentSpec, place: Place | None = None, path: tuple[str | int, ...] = ("metric",)) -> Metric:
    """The metric at `path` of a recipe; raises a RecipeError for an unknown kind or option."""
    metric: Metric = build_component(spec, metric_kinds(), place or Place("metric", {}), path)
    return metric
