"""Resizes a schedule until its measured latency meets a target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from repshift_cli.search.candidates import Method
from repshift_cli.search.cost_model import CostModel
from repshift_cli.search.evaluator import Candidate, Evaluated, Trials
from repshift_cli.search.target import Target

__all__ = ["LatencyTarget"]

_SLACK = 0.97
"""A latency between this share of the target and the target is accepted."""

_ROUNDS = 8
_STEP = 0.06
"""Step in MACs used when the cost model gives no direction."""

_LEAST_SHARE, _LARGEST_SHARE = 0.2, 0.8
"""Limits of the next size between one too slow and one fast enough, so that each measurement adds information."""


class _Timed(NamedTuple):
    """A candidate with its MACs and its latency."""

    macs: float
    latency: float
    candidate: Candidate


@dataclass(frozen=True)
class LatencyTarget:
    """A target of latency, with the trials that measure it."""

    target: Target
    trials: Trials

    def corrected(self, costs: CostModel, method: Method) -> CostModel:
        """The cost model, scaled by the measured latency of its best schedule for the target."""
        best = costs.front(method.reducer).best(self.target.budget)
        candidate = None if best is None else costs.on_budget(best.kept, self.target.budget, method, "additive model")
        # a target that is out of reach by the model may still be met by the clock
        candidate = candidate or costs.cheapest(method)
        return costs if candidate is None else costs.corrected(candidate, self.trials.latency(candidate.plan))

    def meet(self, costs: CostModel, start: Candidate, method: Method) -> tuple[CostModel, Evaluated | None]:
        """Resize a candidate until its latency just meets the target.

        Each latency corrects the cost model, which gives the next size. Times scatter, so once one size is too slow and
        another one fast enough, the next size lies between them.

        Returns:
            the corrected cost model, and the nearest candidate that can be evaluated, preferably one that meets the
            target.
        """
        timed: dict[str, _Timed] = {}
        target = self.target.value
        current: Candidate | None = start
        for _ in range(_ROUNDS):
            if current is None or current.key in timed:
                break
            bracketed = len({one.latency > target for one in timed.values()}) > 1
            latency = self.trials.latency(current.plan, bracketed)
            costs = costs.corrected(current, latency)
            timed[current.key] = _Timed(current.macs, latency, current)
            if target * _SLACK <= latency <= target:
                break
            current = self._resized(costs, start, method, timed)
        for one in sorted(timed.values(), key=lambda one: (one.latency > target, abs(one.latency - target))):
            if results := self.trials.evaluate([one.candidate]):
                return costs, results[0]
        return costs, None

    def _resized(
        self, costs: CostModel, start: Candidate, method: Method, timed: Mapping[str, _Timed]
    ) -> Candidate | None:
        """The next size to measure; None if there is none."""
        like = method.along(start.plan)
        target = self.target.value
        slow = min((one for one in timed.values() if one.latency > target), key=lambda one: one.macs, default=None)
        fast = max((one for one in timed.values() if one.latency <= target), key=lambda one: one.macs, default=None)
        if slow and fast:
            low, high = sorted((fast.macs, slow.macs))
            share = (self.target.budget - fast.latency) / (slow.latency - fast.latency)
            share = min(max(share, _LEAST_SHARE), _LARGEST_SHARE)
            return costs.on_budget(start.kept, low + share * (high - low), like, "resized", by_macs=True)
        resized = costs.on_budget(start.kept, self.target.budget, like, "resized")
        last = list(timed.values())[-1].macs
        wrong_way = resized is not None and (resized.macs > last if slow else resized.macs < last)
        if resized is not None and not wrong_way and resized.key not in timed:
            return resized
        aim = min(last * (1 - _STEP if slow else 1 + _STEP), 1.0)
        return costs.on_budget(start.kept, aim, like, "resized", by_macs=True)
