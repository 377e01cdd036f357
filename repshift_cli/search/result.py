"""The settings and the result of a search."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from repshift_cli.errors import CheckFailed
from repshift_cli.planning.plan import Plan
from repshift_cli.planning.recipe import ComponentSpec, Recipe
from repshift_cli.search.target import QUALITY_SLACK, SearchTarget
from repshift_cli.utils.stats import percent_interval

NOISE_SIGMAS = 2.0
"""Standard errors above which a difference is not noise."""

_POINTS = ("dense", "paper", "found", "random", "given")
"""Names of the reported schedules, in the order of the report."""


@dataclass(frozen=True)
class SearchSettings:
    """What to search for, and on which images.

    Attributes:
        images: `[n, C, H, W]` (clips: `[n, T, C, H, W]`), preprocessed; at least 16. Schedules are selected on the
            first half. The second half is held out.
        identity: description of the images, for the record.
        start: recipe that gives the metric, the reducer and the model. Its layers are only compared with.
        labels: int64 `[n]`; None if there are none.
        evaluations: number of schedules that the refinement may try.
        state: file that keeps the evaluations, so that the search can continue.
        seconds: time of each latency measurement; 0 measures none.
    """

    target: SearchTarget
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
class MeasuredSchedule:
    """Cost and quality of one schedule.

    Attributes:
        name: `dense`, `paper`, `found`, `given`, `random`, or the step of the search that made it.
        tokens: for each site its layer and the tokens that leave it, prefix tokens included.
        macs, latency: fractions of the dense model's; latency is None if it was not measured.
        distance: mean squared Hellinger distance from the dense model (1 - cosine for a model without a head).
        kl: mean KL divergence in nats (1 - cosine for a model without a head).
        agreement: share of unchanged predictions; None without a head.
        top1: percent; None without labels.
        images: number of images it was evaluated on.
        recall: share of the nearest neighbours that are found, at the number of the target, else at 10; None with a
            head, or with too few images.
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
    recall: float | None = None

    @classmethod
    def of(
        cls, name: str, plan: Plan | None, macs: float, latency: float | None, values: Mapping[str, Any]
    ) -> MeasuredSchedule:
        """A plan (None: the dense model) with its measured values."""
        tokens = () if plan is None else tuple((site.layer, site.tokens_out) for site in plan.sites)
        quality = {key: values[key] for key in ("distance", "kl", "agreement", "top1", "images", "recall")}
        return cls(name=name, tokens=tokens, macs=macs, latency=latency, **quality)

    @property
    def top1_interval(self) -> tuple[float, float] | None:
        """95% interval of `top1` in percent; None without labels."""
        return None if self.top1 is None else percent_interval(round(self.top1 * self.images / 100), self.images)

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "macs": round(self.macs, 6),
            "latency": None if self.latency is None else round(self.latency, 4),
            "top1_interval": self.top1_interval,
        }


def pareto_front(
    schedules: Sequence[MeasuredSchedule], quality: Callable[[MeasuredSchedule], float], cost: str = "macs"
) -> list[MeasuredSchedule]:
    """The Pareto front of quality and cost (`macs` or `latency`), the cheapest first.

    Schedules without that cost are left out.
    """
    best: list[MeasuredSchedule] = []
    measured = [one for one in schedules if getattr(one, cost) is not None]
    for one in sorted(measured, key=lambda one: (getattr(one, cost), -quality(one))):
        if not best or quality(one) > quality(best[-1]):
            best.append(one)
    return best


@dataclass(frozen=True)
class SearchResult:
    """The found schedule. If the target cannot be met, it is the nearest one, and `check_met` raises.

    Attributes:
        met: whether it meets the target: a cost exactly (latency as last measured), a quality on the selection images.
        nearest: what the found schedule reaches, in the unit of the target.
        dense, paper, found, random: evaluated on the held-out images. `paper` is the paper's schedule at the same MACs
            with metrics chosen in the same way; None if the model lacks its sites. `random` is the found schedule with
            tokens dropped at random.
        random_sigmas: by how many standard errors the found schedule is better than `random`, over the same images;
            None if its reducer uses no score or the search was interrupted.
        selection: the dense model, the found schedule and the paper's on the selection images, as `tried`.
        given: the start recipe with its own layers, on the selection images; None if it has none or does not fit.
        held_back_decided: whether it is the result because it was better on the held-out images only.
        seconds: time of this run; less than the whole if it resumed.
    """

    recipe: Recipe
    plan: Plan
    target: SearchTarget
    met: bool
    nearest: float
    dense: MeasuredSchedule
    paper: MeasuredSchedule | None
    found: MeasuredSchedule
    random: MeasuredSchedule | None
    given: MeasuredSchedule | None
    random_sigmas: float | None
    selection: Mapping[str, MeasuredSchedule]
    paper_is_found: bool
    held_back_decided: bool
    tried: tuple[MeasuredSchedule, ...]
    evaluations: int
    seconds: float
    interrupted: bool
    identity: Mapping[str, Any]
    seed: int

    def check_met(self, force: bool, warn: Callable[[str], None]) -> None:
        """Warn if the target is met on the selection images only, or random dropping is about as good.

        Raises:
            CheckFailed: it is missed, or random dropping is better, and `force` is off; with `force` it is a warning.
        """
        self._check_random(force, warn)
        target, nearest = self.target, f"the nearest is {self.target.reached(self.nearest)}"
        if not self.met and not force:
            hint = "Ask for that value, or allow other reducers and metrics."
            raise CheckFailed(f"the target {target} cannot be met: {nearest}", hint)
        if not self.met:
            warn(f"the target {target} is not met: {nearest}")
        elif self.held_back_met is False:
            warn(
                f"the target {target} is met on the selection half, but missed on the held-out half; "
                "use more images (--images) to reduce the sampling error"
            )

    def _check_random(self, force: bool, warn: Callable[[str], None]) -> None:
        sigmas = self.random_sigmas
        if sigmas is None or sigmas >= NOISE_SIGMAS:
            return
        numbers = f"({sigmas:.1f} standard errors on {self.found.images} held-out images)"
        if sigmas > -NOISE_SIGMAS:
            warn(f"the found schedule is not clearly better than random dropping {numbers}")
            return
        problem = f"random dropping is better than the found schedule {numbers}"
        if not force:
            raise CheckFailed(problem, "Use more images (--images), a milder target or another metric, or add --force.")
        warn(problem)

    def check_limit(self, limit: SearchTarget, force: bool, warn: Callable[[str], None]) -> None:
        """Check a limit of quality on the held-out images.

        Raises:
            CheckFailed: it is missed, or cannot be measured, and `force` is off; with `force` it is a warning.
        """
        value, images = self.heldout_quality(limit), self.found.images
        if images < limit.images_needed:
            warn(
                f"{images} held-out images are too few to decide {limit}: give {2 * limit.images_needed} images "
                "(--calibration-images)"
            )
        if value is not None and self._holds(limit, value):
            return
        reached = "it cannot be measured" if value is None else f"it is {limit.reached(value)}"
        problem = f"at {self.target} the limit {limit} is missed: {reached} on {images} held-out images"
        if not force:
            hint = f"To find the lowest cost within {limit}, ask for it alone. --force writes the file all the same."
            raise CheckFailed(problem, hint)
        warn(problem)

    def heldout_quality(self, target: SearchTarget) -> float | None:
        """The quality of the found schedule on the held-out images, in the unit of the target; None if not measured."""
        dense, found = self.dense, self.found
        if target.kind == "max-drop":
            return None if dense.top1 is None or found.top1 is None else dense.top1 - found.top1
        if target.kind == "cosine":
            return 1.0 - found.kl
        return found.recall if target.k else found.agreement

    @staticmethod
    def _holds(target: SearchTarget, quality: float) -> bool:
        if target.kind == "max-drop":
            return quality <= target.value + QUALITY_SLACK
        return quality >= target.value - (0.0 if target.kind == "agreement" else QUALITY_SLACK)

    @property
    def held_back_met(self) -> bool | None:
        """Whether a target of quality is met on the held-out images, without a margin; None for a target of cost."""
        quality = None if self.target.limits_cost else self.heldout_quality(self.target)
        return None if quality is None else self._holds(self.target, quality)

    @property
    def points(self) -> dict[str, MeasuredSchedule]:
        """The schedules with a name that were evaluated, by name."""
        return {name: one for name in _POINTS if (one := getattr(self, name)) is not None}

    @property
    def front(self) -> list[MeasuredSchedule]:
        """The Pareto front of MACs and distance over all tried schedules, the cheapest first."""
        return pareto_front(self.tried, lambda one: -one.distance)

    def to_dict(self) -> dict[str, Any]:
        return {
            "target": str(self.target),
            "nearest": round(self.nearest, 6),
            "recipe": self.recipe.to_yaml(),
            "plan": self.plan.summary(),
            "last_block": self.plan.last_block,
            "points": {**dict.fromkeys(_POINTS), **{name: point.to_dict() for name, point in self.points.items()}},
            "tried": [point.to_dict() for point in self.tried],
            "front": [point.to_dict() for point in self.front],
            "seconds": round(self.seconds, 1),
            "data": dict(self.identity),
            "met": self.met,
            "paper_is_found": self.paper_is_found,
            "held_back_decided": self.held_back_decided,
            "held_back_met": self.held_back_met,
            "random_sigmas": None if self.random_sigmas is None else round(self.random_sigmas, 2),
            "paper_calibrated": not self.interrupted,
            "evaluations": self.evaluations,
            "interrupted": self.interrupted,
            "seed": self.seed,
        }
