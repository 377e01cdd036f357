"""Representation shift: how much a layer changes a token (arXiv 2508.00367, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from repshift_cli.reduction.metrics.base import Metric, Polarity, SiteContext, Tap, norms

Operation = Literal["mlp", "attention", "mixer", "block"]
Distance = Literal["l2", "l1", "cosine"]
Reading = Literal["update", "literal"]

_UPDATE: dict[Operation, Tap] = {"mlp": "mlp_update", "attention": "attention_update", "mixer": "mixer_update"}
_ORDERS: dict[Distance, int] = {"l2": 2, "l1": 1}
_STREAM: dict[Operation, Tap] = {"mlp": "mlp_stream", "attention": "block_input", "mixer": "mixer_stream"}


class RepresentationShift(Metric):
    """`s_i = D(F(x)_i, x_i)` for a layer F and a distance D.

    Attributes:
        operation: F is the MLP sublayer, the attention sublayer, the mixer of a state space model, or the whole block.
        distance: D is the L2 or the L1 norm of the difference, or one minus the cosine.
        reading: `update` compares the stream after the sublayer with the stream before it (for L2: the norm of the
            sublayer's output); `literal` compares the branch output without its residual with the stream, as in the
            paper's formula `||MLP(LN(x')) - x'||`. For `block` the two are the same.
        polarity: whether tokens with the largest or the smallest shift are kept.
    """

    kind: ClassVar[str] = "representation_shift"

    operation: Operation | None = None
    distance: Distance | None = None
    reading: Reading | None = None
    polarity: Polarity | None = None

    def taps(self) -> frozenset[Tap]:
        operation, distance, reading = self._choice()
        if operation == "block":
            return frozenset({"block_input", "block_output"})
        if distance != "cosine" and reading == "update":
            return frozenset({_UPDATE[operation]})
        return frozenset({_UPDATE[operation], _STREAM[operation]})

    def score(self, seen: Mapping[str, Tensor], site: SiteContext) -> Tensor:
        operation, distance, reading = self._choice()
        if operation == "block":
            before, after = seen["block_input"][:, site.prefix :], seen["block_output"][:, site.prefix :]
            return _distance(distance, after, before)
        update = seen[_UPDATE[operation]]
        if reading == "update" and distance != "cosine":
            # the norm of all tokens: contiguous memory is read faster
            return norms(update, _ORDERS[distance])[:, site.prefix :]
        update, stream = update[:, site.prefix :], seen[_STREAM[operation]][:, site.prefix :]
        return _distance(distance, update if reading == "literal" else stream + update, stream)

    def variants(self) -> tuple[Metric, ...]:
        kinds = {"operation": Operation, "distance": Distance, "reading": Reading, "polarity": Polarity}
        choices = [
            get_args(kind) if (value := getattr(self, name)) is None else (value,) for name, kind in kinds.items()
        ]
        found: dict[Metric, None] = {}
        for values in product(*choices):
            fields = dict(zip(kinds, values, strict=True))
            if fields["operation"] == "block" and self.reading is None:
                fields["reading"] = "update"  # both readings of a whole block are the same
            found[RepresentationShift(**fields)] = None
        return tuple(found)

    def with_defaults(self) -> Metric:
        operation, distance, reading = self._choice()
        return RepresentationShift(
            operation=operation, distance=distance, reading=reading, polarity=self.polarity or "largest"
        )

    def _choice(self) -> tuple[Operation, Distance, Reading]:
        """The fields, open ones as in the paper's best variant: the L2 norm of the MLP update."""
        return self.operation or "mlp", self.distance or "l2", self.reading or "update"


def _distance(distance: Distance, after: Tensor, before: Tensor) -> Tensor:
    """Distance of each token, in float32: `[B, N, C]` twice to `[B, N]`."""
    if distance == "cosine":
        # half the squared distance of the unit vectors: the same number, but exact where the two are nearly equal,
        # where one minus the cosine in float32 is all rounding
        after, before = normalize(after.float(), dim=-1), normalize(before.float(), dim=-1)
        return (after - before).square().sum(-1) / 2
    after, before = after.float(), before.float()
    if distance == "l2" and after.stride(-1) != 1:
        # channel-major in memory, as feature maps are: one pass for difference and square
        return torch.nn.functional.mse_loss(after, before, reduction="none").sum(-1).sqrt()
    return norms(after - before, _ORDERS[distance])
