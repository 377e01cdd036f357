"""A score fitted to the model: a linear projection that predicts the influence of a token on the output."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import StrictStr, field_validator
from torch import Tensor

from repshift_cli.reduction.metrics.base import Metric, Polarity, SiteContext, Tap
from repshift_cli.reduction.metrics.representation_shift import RepresentationShift

_MOST_CHANNELS = 1 << 16
_FLOAT_BYTES = 4


class Fitted(Metric):
    """`w x_i`, with one weight for each channel of the stream, fitted on unlabelled images (see `calibration/fit.py`).

    `weights` are little-endian float32 in base64, for recipes and plans; None is open, and calibration fits them.
    """

    kind: ClassVar[str] = "fitted"

    weights: StrictStr | None = None
    polarity: Polarity | None = "largest"

    @field_validator("weights")
    @classmethod
    def _decodes(cls, weights: str | None) -> str | None:
        if weights is None:
            return None
        try:
            raw = base64.b64decode(weights, validate=True)
        except (binascii.Error, ValueError):
            raise ValueError("should be base64") from None
        if not raw or len(raw) % _FLOAT_BYTES or len(raw) > _FLOAT_BYTES * _MOST_CHANNELS:
            raise ValueError(f"should be 1 to {_MOST_CHANNELS} float32 values in base64, it is {len(raw)} bytes")
        return weights

    @classmethod
    def of(cls, weights: Sequence[float]) -> Fitted:
        """The metric with these weights, one for each channel."""
        return cls(weights=base64.b64encode(np.asarray(weights, "<f4").tobytes()).decode("ascii"))

    @property
    def open(self) -> bool:
        return self.weights is None

    @property
    def channels(self) -> int | None:
        return None if self.weights is None else len(self.vector)

    @cached_property
    def vector(self) -> Tensor:
        """The weights, float32 `[C]`; empty for an open score."""
        # not a private attribute of pydantic, which `torch.compile` does not support
        values = np.frombuffer(base64.b64decode(self.weights or ""), "<f4").astype(np.float32)
        return _lasting(lambda: torch.from_numpy(values))

    def model_post_init(self, context: Any, /) -> None:
        if not bool(self.vector.isfinite().all()):
            raise ValueError("the weights should be finite")

    def taps(self) -> frozenset[Tap]:
        return frozenset({"block_output"})

    def score(self, seen: Mapping[str, Tensor], site: SiteContext) -> Tensor:
        # Without a class token the stream keeps the strides of the patch embedding. Torch would then run a batched
        # product, which is counted; that of contiguous tokens is not, and `macs` leaves it out.
        tokens = seen["block_output"].float().contiguous()
        weights = self.vector.to(tokens.device)  # no copy after `on`
        # autocast would round a matrix product to half precision, and make many scores equal
        device = tokens.device.type
        rounded = device != "meta" and torch.is_autocast_enabled(device)
        scores = (tokens * weights).sum(-1) if rounded else tokens @ weights
        return scores[:, site.prefix :]  # slicing the prefix off earlier would copy

    def on(self, device: torch.device) -> Metric:
        if self.vector.device == device:
            return self
        moved = self.model_copy()
        vars(moved)["vector"] = _lasting(lambda: self.vector.to(device))
        return moved

    def with_defaults(self) -> Metric:
        """Without weights, the shift over the block, which every block supports."""
        return RepresentationShift(operation="block").with_defaults() if self.open else self

    def __eq__(self, other: object) -> bool:
        # without the decoded tensor, which pydantic would compare too
        return isinstance(other, Fitted) and (self.weights, self.polarity) == (other.weights, other.polarity)

    def __hash__(self) -> int:
        return hash((self.weights, self.polarity))

    def __str__(self) -> str:
        return self.kind if self.open else f"{self.kind} ({self.channels} weights)"


def _lasting(make: Callable[[], Tensor]) -> Tensor:
    """Make a tensor outside inference mode, so that it can be used in a pass with gradients."""
    with torch.inference_mode(False):
        return make()
