"""The settings and the result of a search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from repshift_cli.errors import CheckFailed
from repshift_cli.planning.plan import Plan
from repshift_cli.planning.recipe import ComponentSpec, Recipe
from repshift_cli.search.target import Target
from repshift_cli.utils.stats import percent_interval

__all__ = ["QUALITY_SLACK", "Point", "SearchResult", "SearchSettings", "point_of"]

QUALITY_SLACK = 1e-6
"""Points of top-1 that rounding may cost."""


@dataclass(frozen=True)
class SearchSettings:
    """What to search for, and on what.

    Attributes:
        target: what is to be reached.
        images: `[n, C, H, W]` (of clips `[n, T, C, H, W]`), preprocessed; at least 16. The first half chooses, the
            second checks.
        identity: what they are, for the record.
        start: its metric (also that of single layers), reducer and model are used; its layers are compared only.
        labels: int64 `[n]`; None where there are none.
        evaluations: how many schedules the refinement may try.
        reducers: others to try.
        state: file that keeps what is known, so that the search resumes; None for none.
        seconds: for each measurement of latency; 0 measures none.
    """

    target: Target
    images: Tensor
    identity: Mapping[str, Any]
    start: Recipe
    labels: Tensor | None = None
    batch_size: int = 8
    seed: int = 0
    evaluations: int = 40
    reducers: tuple[ComponentSpec, ...] = ()
    state: Path | None = None
    seconds: float = 5.0


@dataclass(frozen=True)
class Point:
    """One schedule: what it costs and what it keeps.

    Attributes:
        name: `dense`, `paper`, `found`, `given`, `random`, or how the search came to it.
        tokens: layer and tokens that leave it, prefix tokens included, for each site.
        macs, latency: fractions of the dense model's; latency None where it was not measured.
        distance: mean squared Hellinger distance from the dense model (or one minus the cosine, without a head).
        kl: mean KL in nats (or one minus the cosine).
        agreement: share of unchanged predictions; None without a head.
        top1: percent; None without labels.
        images: how many it was judged on.
    """

    name: str
    tokens: tuple[tuple[int, int], ...]
    macs: float
    latency: float | None
    distance: float
    kl: float
    agreement: float | None
    top1: float | None
    images: int

    @property
    def top1_interval(self) -> tuple[float, float] | None:
        """95% interval of `top1`, in percent; None without labels."""
        return None if self.top1 is None else percent_interval(round(self.top1 * self.images / 100), self.images)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "tokens": [list(pair) for pair in self.tokens],
            "macs": round(self.macs, 6),
            "latency": None if self.latency is None else round(self.latency, 4),
            "distance": self.distance,
            "kl": self.kl,
            "agreement": self.agreement,
            "top1": self.top1,
            "top1_interval": None if self.top1_interval is None else list(self.top1_interval),
            "images": self.images,
        }


@dataclass(frozen=True)
class SearchResult:
    """What a search found. Where the target could not be met, `found` is the nearest; `require_met` then raises.

    Attributes:
        recipe, plan: the found schedule.
        met: whether it meets the target: a cost exactly (latency as measured last), a quality on the choosing images.
        nearest: what the found schedule reaches, in the unit of the target.
        dense, paper, found, random: on the images that took no part, except to decide between the found schedule and
            the paper's. `paper` is the paper's schedule at the same operations, its scores chosen in the same way;
            `random` the found one with tokens dropped at random. `paper` is None where the model has no site that it
            needs.
        given: the start recipe as it stands, on the choosing images; None where it cannot be carried out, or has no
            layers.
        paper_is_found: whether nothing better than the paper's schedule was found: better on the choosing images, and
            not worse on the others.
        held_back_decided: whether it was better on the choosing images, and the others turned it into the paper's.
        paper_calibrated: whether its scores were chosen along it (not so after an interruption).
        tried: all schedules that were evaluated, on the choosing images, in order.
        evaluations: how many.
        seconds: of this run; less than the whole where it resumed.
    """

    recipe: Recipe
    plan: Plan
    target: Target
    met: bool
    nearest: float
    dense: Point
    paper: Point | None
    found: Point
    random: Point | None
    given: Point | None
    paper_is_found: bool
    held_back_decided: bool
    paper_calibrated: bool
    tried: tuple[Point, ...]
    evaluations: int
    seconds: float
    interrupted: bool
    identity: Mapping[str, Any]
    seed: int

    def require_met(self) -> None:
        """Refuse what misses the target.

        Raises:
            CheckFailed: with the nearest that can be reached.
        """
        if self.met:
            return
        raise CheckFailed(
            f"the target {self.target} cannot be met here: the nearest is {self.target.kind}={self.nearest:.4g}",
            "Ask for that, or let other reducers and scores be tried.",
        )

    @property
    def held_back_met(self) -> bool | None:
        """Whether a target of quality is met on the images held back as well, without a margin; None for a cost."""
        dense, found, value = self.dense, self.found, self.target.value
        if self.target.kind == "agreement" and found.agreement is not None:
            return found.agreement >= value
        if self.target.kind == "max-drop" and dense.top1 is not None and found.top1 is not None:
            return dense.top1 - found.top1 <= value + QUALITY_SLACK
        return None

    @property
    def front(self) -> tuple[Point, ...]:
        """Of all that were tried, those that nothing cheaper is as near to the dense model as, the cheapest first."""
        kept: list[Point] = []
        for point in sorted(self.tried, key=lambda point: (point.macs, point.distance)):
            if not kept or point.distance < kept[-1].distance:
                kept.append(point)
        return tuple(kept)

    def to_dict(self) -> dict[str, Any]:
        points = {
            "dense": self.dense,
            "paper": self.paper,
            "found": self.found,
            "random": self.random,
            "given": self.given,
        }
        return {
            "target": {"kind": self.target.kind, "value": self.target.value},
            "met": self.met,
            "nearest": round(self.nearest, 6),
            "recipe": self.recipe.to_yaml(),
            "plan": self.plan.summary(),
            "points": {name: point.to_dict() if point else None for name, point in points.items()},
            "paper_is_found": self.paper_is_found,
            "held_back_decided": self.held_back_decided,
            "held_back_met": self.held_back_met,
            "paper_calibrated": self.paper_calibrated,
            "tried": [point.to_dict() for point in self.tried],
            "front": [point.to_dict() for point in self.front],
            "evaluations": self.evaluations,
            "seconds": round(self.seconds, 1),
            "interrupted": self.interrupted,
            "data": dict(self.identity),
            "seed": self.seed,
        }


def point_of(
    name: str, tokens: tuple[tuple[int, int], ...], macs: float, latency: float | None, values: Mapping[str, Any]
) -> Point:
    """A point with the measured values of a schedule."""
    shown = {key: values[key] for key in ("distance", "kl", "agreement", "top1", "images")}
    return Point(name=name, tokens=tokens, macs=macs, latency=latency, **shown)
