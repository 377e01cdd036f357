"""Random scores, a baseline for every other score."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, StrictInt
from torch import Tensor

from repshift_cli.reduction.metrics.base import Metric, SiteContext, Tap


class Random(Metric):
    """Scores drawn from the seed, the layer and the position of the token, the same for every image.

    With a draw for each image, a result would depend on the other images of the batch.
    """

    kind: ClassVar[str] = "random"

    polarity: Literal["largest"] | None = "largest"
    seed: Annotated[StrictInt, Field(ge=0, lt=2**31)] = 0

    def taps(self) -> frozenset[Tap]:
        return frozenset({"block_output"})

    def score(self, seen: Mapping[str, Tensor], site: SiteContext) -> Tensor:
        stream = seen["block_output"]
        count = stream.shape[1] - site.prefix
        places = torch.arange(count, device=stream.device, dtype=torch.int64)
        return _hash(places, self.seed * 1009 + site.layer).expand(stream.shape[0], count)


def _hash(numbers: Tensor, seed: int) -> Tensor:
    """Uniform float32 in [0, 1) from int64: multiply and shift, twice (31 bits, so that no product overflows)."""
    mask = 0x7FFFFFFF
    mixed = (numbers * 48271 + (seed + 1) * 69621) & mask
    for factor in (0x45D9F3B, 0x119DE1F3):
        mixed = ((mixed ^ (mixed >> 15)) * factor) & mask
    mixed = mixed ^ (mixed >> 13)
    return mixed.to(torch.float32) / float(mask + 1)
