"""What a search has to reach. Plain numbers, no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from repshift_cli.errors import UsageError
from repshift_cli.utils.stats import wilson_interval
from repshift_cli.utils.suggest import nearest

COST_TOLERANCE = 1e-9
QUALITY_SLACK = 1e-6
"""Tolerances for rounding: of a fraction of the dense cost, and of points of top-1."""

_MOST_SPEEDUP = 20.0

_RANGES = {
    "macs": "in (0, 1)",
    "latency": "in (0, 1)",
    "speedup": f"in (1, {_MOST_SPEEDUP:g}]",
    "agreement": "in (0, 1]",
    "max-drop": "in [0, 100)",
    "recall@K": "in (0, 1]",
    "cosine": "in (0, 1]",
}
"""The kinds of target, with their valid values."""

_RECALL = re.compile(r"recall@([1-9][0-9]{0,3})")
_USUAL_NEIGHBOURS = 10

_EXAMPLES = (
    "Possible are macs=0.65 and latency=0.6 (fractions of the dense model's MACs and batch time), speedup=1.5 (the "
    "inverse of latency), agreement=0.99 (lowest share of unchanged predictions) and max-drop=0.5 (points of top-1; "
    "needs labels). For models without a head: recall@10=0.99 (share of the 10 nearest neighbours) and cosine=0.98 "
    "(mean cosine to the dense embedding)."
)
_AGREEMENT_ERRORS, _DROP_ERRORS = 1.0, 0.5
"""One-sided margins in standard errors. The schedule is selected on the images that it is tested on."""

_LATENCY_AIM = 0.985
"""Share of a latency target that the search aims at, because measured times scatter."""


@dataclass(frozen=True)
class SearchTarget:
    """The limit that a schedule has to meet.

    Attributes:
        kind: `macs`, `latency`, `agreement`, `max-drop`, `recall@10` (or another number of neighbours) or `cosine`.
        value: fraction of the dense model, share of predictions or neighbours, points of top-1, or mean cosine.
        as_speedup: whether a latency is shown as a speed-up.
    """

    kind: str
    value: float
    as_speedup: bool = False

    def __post_init__(self) -> None:
        general = "recall@K" if self.k else self.kind
        if general not in _RANGES or self.kind in ("recall@K", "speedup"):
            raise UsageError(f"unknown target {self.kind!r}", nearest(self.kind, _RANGES) + _EXAMPLES)
        high = 100.0 if self.kind == "max-drop" else 1.0
        bound = {"max-drop": 0.0, "macs": None, "latency": None}.get(self.kind, high)
        if not (0 < self.value < high or self.value == bound):
            raise UsageError(f"invalid target {self}: must be {_RANGES[general]}")

    @classmethod
    def parse(cls, text: str) -> SearchTarget:
        """Parse `macs=0.65` and the like.

        Raises:
            UsageError: the form, the kind or the value is invalid.
        """
        kind, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise UsageError(f"invalid target {text!r}: must have the form kind=value", _EXAMPLES)
        try:
            number = float(value)
        except ValueError:
            raise UsageError(f"invalid target {text!r}: no number after the =", _EXAMPLES) from None
        if kind != "speedup":
            return cls(kind, number)
        if not 1 < number <= _MOST_SPEEDUP:
            raise UsageError(f"invalid target {text}: must be {_RANGES[kind]}")
        return cls("latency", 1 / number, as_speedup=True)

    @property
    def k(self) -> int | None:
        """The number of neighbours of a target of recall, None for others."""
        found = _RECALL.fullmatch(self.kind)
        return int(found[1]) if found else None

    @property
    def neighbours(self) -> int:
        """The number of neighbours at which recall is reported."""
        return self.k or _USUAL_NEIGHBOURS

    @property
    def is_of_classes(self) -> bool | None:
        """Whether the target is defined for models with classes only (True), without (False), or for all (None)."""
        return None if self.limits_cost else self.kind in ("agreement", "max-drop")

    @property
    def limits_cost(self) -> bool:
        """True if the cost is given and quality is maximized; False if quality is given and cost minimized."""
        return self.kind in ("macs", "latency")

    @property
    def budget(self) -> float:
        """The cost that the search aims at, as a fraction of the dense model's; only if `limits_cost`."""
        return self.value * (_LATENCY_AIM if self.kind == "latency" else 1.0)

    @property
    def images_needed(self) -> int:
        """The fewest images on which a target of quality can be decided; 0 for other targets.

        One image must be at most the allowed loss, or all images must give an interval above the agreement. There must
        be two images per neighbour.
        """
        if self.k:
            return 2 * self.k
        if self.kind == "agreement" and self.value < 1:
            return math.ceil(self.value / (1 - self.value) * _AGREEMENT_ERRORS**2 - COST_TOLERANCE)
        return math.ceil(100 / self.value) if self.kind == "max-drop" and self.value else 0

    def quality(self, values: Mapping[str, Any]) -> float:
        """The measured quality in the unit of the target; larger is better."""
        if self.kind == "cosine":
            return 1.0 - float(values["kl"])
        key = "recall" if self.k else "agreement"
        value: float = -values["lost"] if self.kind == "max-drop" else values[key]
        return value

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether a target of quality is met by measured values, with a margin for sampling error."""
        if self.kind == "agreement":
            agreement, count = values["agreement"], values["images"]
            return agreement == 1.0 or lower_agreement(agreement, count) >= self.value
        if self.is_of_classes is False:
            quality, error = self.quality(values), values["recall_error" if self.k else "cosine_error"]
            return quality - _AGREEMENT_ERRORS * error >= self.value - QUALITY_SLACK
        worst: float = values["lost"] + _DROP_ERRORS * values["lost_error"]
        return worst <= self.value + QUALITY_SLACK

    def reached(self, value: float) -> str:
        """A measured value in the form of the target."""
        return f"speedup={1 / value:.4g}" if self.as_speedup else f"{self.kind}={value:.4g}"

    def __str__(self) -> str:
        return f"speedup={1 / self.value:.6g}" if self.as_speedup else f"{self.kind}={self.value:.12g}"


def split_goals(goals: Sequence[str]) -> tuple[SearchTarget | None, SearchTarget | None]:
    """The target of a search, and a limit of quality that its schedule must keep.

    With a goal of cost and one of quality, the search is for the cost, and the quality is checked.

    Raises:
        UsageError: a goal is invalid, or two are of the same kind.
    """
    targets = [SearchTarget.parse(goal) for goal in goals]
    costs = [target for target in targets if target.limits_cost]
    qualities = [target for target in targets if not target.limits_cost]
    if len(costs) > 1 or len(qualities) > 1:
        both = " and ".join(map(str, costs if len(costs) > 1 else qualities))
        raise UsageError(f"{both} are goals of the same kind", "Give one for the cost and one for the quality.")
    if costs and qualities and qualities[0].k not in (None, _USUAL_NEIGHBOURS):
        raise UsageError(
            f"{qualities[0]}: with a goal of cost, recall is measured at {_USUAL_NEIGHBOURS}",
            f"Give recall@{_USUAL_NEIGHBOURS}={qualities[0].value:g}, or leave {costs[0]} out.",
        )
    if not costs:
        return (qualities[0] if qualities else None), None
    return costs[0], (qualities[0] if qualities else None)


def lower_agreement(share: float, count: int) -> float:
    """Lower end of Wilson's interval of a share of `count` images; it is below 1 even for a share of 1."""
    return wilson_interval(round(share * count), count, _AGREEMENT_ERRORS)[0]
