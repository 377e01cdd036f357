"""Resizes a schedule until its measured latency meets a target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from repshift_cli.search.cost_model import CostModel, Method
from repshift_cli.search.evaluator import Candidate, Evaluated
from repshift_cli.search.target import SearchTarget

_SLACK = 0.97
"""A latency between this share of the target and the target is accepted."""

_ROUNDS = 8
_STEP = 0.06
"""Step in MACs used when the cost model gives no direction."""

_LEAST_SHARE, _LARGEST_SHARE = 0.2, 0.8
"""Limits of the next size between one too slow and one fast enough, so that each measurement adds information."""


class _Timed(NamedTuple):
    candidate: Candidate
    latency: float


def corrected_by_latency(costs: CostModel, target: SearchTarget, method: Method) -> CostModel:
    """The cost model, scaled by the measured latency of its best schedule for the target.

    If it predicts that no schedule meets the target, it is scaled by the cheapest one: a time that was disturbed must
    not rule out a target that can be met.
    """
    best = costs.front(method.reducer).best(target.budget)
    candidate = None if best is None else costs.on_budget(best.kept, target.budget, method, "additive model")
    if candidate is not None:
        costs = costs.corrected(candidate, costs.planner.evaluator.cached_latency(candidate.plan))
    if candidate is None or costs.front(method.reducer).best(target.budget) is None:
        cheapest = costs.cheapest(method)
        if cheapest is not None:
            costs = costs.corrected(cheapest, costs.planner.evaluator.cached_latency(cheapest.plan))
    return costs


def meet_latency(
    costs: CostModel, target: SearchTarget, start: Candidate, method: Method
) -> tuple[CostModel, Evaluated | None]:
    """Resize a candidate until its latency just meets the target.

    Each latency corrects the cost model, which gives the next size. Times scatter, so once one size is too slow and
    another one fast enough, the next size lies between them.

    Returns:
        the corrected cost model, and the nearest candidate that can be evaluated, preferably one that meets the target.
    """
    evaluator = costs.planner.evaluator
    timed: list[_Timed] = []
    current: Candidate | None = start
    for _ in range(_ROUNDS):
        if current is None or current.key in {one.candidate.key for one in timed}:
            break
        bracketed = len({one.latency > target.value for one in timed}) > 1
        latency = evaluator.cached_latency(current.plan, bracketed)
        costs = costs.corrected(current, latency)
        timed.append(_Timed(current, latency))
        if target.value * _SLACK <= latency <= target.value:
            break
        current = _resized(costs, target, start, method.along(start.plan), timed)
    for one in sorted(timed, key=lambda one: (one.latency > target.value, abs(one.latency - target.value))):
        if results := evaluator.try_candidates([one.candidate]):
            return costs, results[0]
    return costs, None


def _resized(
    costs: CostModel, target: SearchTarget, start: Candidate, method: Method, timed: Sequence[_Timed]
) -> Candidate | None:
    slow = [one for one in timed if one.latency > target.value]
    fast = [one for one in timed if one.latency <= target.value]
    if slow and fast:
        slowest_fast = max(fast, key=lambda one: one.candidate.macs)
        fastest_slow = min(slow, key=lambda one: one.candidate.macs)
        low, high = sorted((slowest_fast.candidate.macs, fastest_slow.candidate.macs))
        share = (target.budget - slowest_fast.latency) / (fastest_slow.latency - slowest_fast.latency)
        share = min(max(share, _LEAST_SHARE), _LARGEST_SHARE)
        return costs.on_budget(start.kept, low + share * (high - low), method, "resized", by_macs=True)
    resized = costs.on_budget(start.kept, target.budget, method, "resized")
    last = timed[-1].candidate.macs
    if resized is not None and resized.key not in {one.candidate.key for one in timed}:
        right_way = resized.macs <= last if slow else resized.macs >= last
        if right_way:
            return resized
    aim = min(last * (1 - _STEP if slow else 1 + _STEP), 1.0)
    return costs.on_budget(start.kept, aim, method, "resized", by_macs=True)
