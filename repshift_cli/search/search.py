"""Find the schedule for a budget: where tokens go, how many, by which scores, so that predictions change least.

First the score of each layer is chosen, with that layer as the only site. Then the harm of dropping at each layer is
measured at several ratios, and what it saves is computed (operations) or measured (latency). From both, dynamic
programming has the best schedule of an additive model; the rest of the work is on the real thing: scores are chosen
again along the schedule, neighbours of it are tried, then other reducers. Half of the images take no part in all that:
on them the result is compared with the paper's schedule at the same operations, and where that is better there, it is
the result.

Every evaluation is a pure function of a plan and some images, and is kept by its key. So a search resumes by running
again over what is known, and several processes that share the evaluations all take the same way.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import nn

from repshift_cli.calibration.calibrate import unfitted
from repshift_cli.errors import CheckFailed, DataError, RecipeError, UsageError
from repshift_cli.planning.layout import After
from repshift_cli.planning.plan import Plan, resolve
from repshift_cli.planning.recipe import PAPER_DROP_RATIO, ComponentSpec, Recipe, default_recipe
from repshift_cli.reduction.checks import acts_after, resolve_for
from repshift_cli.reduction.families.base import Family
from repshift_cli.reduction.metrics.base import build_metric
from repshift_cli.search.additive import Additive, Curve, Kept
from repshift_cli.search.evaluator import Candidate, Evaluated, Evaluator, NoTask, Timed, plan_key
from repshift_cli.search.result import QUALITY_SLACK, Point, SearchResult, SearchSettings, point_of
from repshift_cli.search.schedule import Front, Solution, fit, neighbours, on_tiles, paper_schedule, solve, to_recipe
from repshift_cli.search.state import EvaluationCache, identity_of
from repshift_cli.utils.distributed import together
from repshift_cli.utils.progress import Progress, Silent, Task
from repshift_cli.utils.stats import wilson_interval

__all__ = ["search"]

_MIN_IMAGES = 16


_SENSE_SHARES = (0.9, 0.7, 0.5, 0.3)
"""Of the tokens kept: between them the harm grows like a power, so four points are enough."""

_CHOICE_SHARES = (0.5, 0.7, 0.9)
"""Of the tokens kept where the score is chosen: the first that the model allows."""

_LATENCY_SHARES = (0.8, 0.6, 0.4, 0.2)
_SITE_LIMITS = (2, 3, 4, 6)
"""How many sites the first schedules may have, beside one without a limit: the additive model likes too many."""

_BATCH = 4
"""Neighbours tried at a time, whatever the number of processes, so that all take the same way."""

_SECTIONS, _SECTION_ROUNDS = 4, 3
_AGREEMENT_SIGMAS, _DROP_SIGMAS = 1.0, 0.5
"""One-sided: by so many standard errors a quality has to hold on the choosing images, from which it was chosen."""

_SITE_COST = 0.002
"""What scoring and gathering at a site take, as a fraction of a dense pass: where it saves less, a site is no use."""

_BUDGET_TRIES = 8
_SWEEP = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
_SWEEP_APART = 0.04
_LATENCY_AIM = 0.985
_LATENCY_SLACK = 0.97
_LATENCY_ROUNDS = 8


_BLIND_STEP = 0.06
"""Of the operations, the step where the model sees no way on."""


@torch.inference_mode()
def search(model: nn.Module, family: Family, settings: SearchSettings, progress: Progress) -> SearchResult:
    """Find a schedule for a target.

    Under `torchrun`, or in an initialised process group, every process calls this with the same arguments; the
    evaluations are spread over them, and all return the same (latency is measured by the first alone, and so is what it
    reports after an interruption).

    Args:
        model: dense, in eval mode, on the device and in the dtype to search in.
        family: the model's family.

    Raises:
        DataError: too few images.
        UsageError: labels or a head are missing that the target needs; the state is that of another search.
        RecipeError: the metric or the reducer can run at no site of this model.
        CheckFailed: the dense model returns values that are not finite.
        KeyboardInterrupt: before a first schedule was found; after that the best so far is returned.
    """
    _check(settings)
    begin = time.monotonic()
    with ExitStack() as stack:
        processes = stack.enter_context(together())
        stack.callback(family.adapt(model))  # the dense model is compared as it is beside a reduced one
        listener = progress if processes.rank == 0 else Silent()
        bench = Evaluator(model, family, settings, listener)
        memo = EvaluationCache(settings.state, lambda: identity_of(model, settings), processes)
        return _Search(bench, memo, settings, listener).run(begin)


def _check(settings: SearchSettings) -> None:
    count, target = len(settings.images), settings.target
    if count < _MIN_IMAGES:
        raise DataError(f"a search needs at least {_MIN_IMAGES} images, there are {count}")
    if settings.labels is not None and len(settings.labels) != count:
        raise DataError(f"there are {len(settings.labels)} labels for {count} images")
    if target.kind == "max-drop" and settings.labels is None:
        raise UsageError("the target max-drop needs labels", "Give labelled images, or ask for agreement=0.99.")
    if target.kind == "latency" and settings.seconds <= 0:
        raise UsageError("the target latency needs time to measure", "Give it some seconds.")


# ---------------------------------------------------------------------------------------------------------------------
# Processes, and what is known


# ---------------------------------------------------------------------------------------------------------------------
# What candidates are judged by


# ---------------------------------------------------------------------------------------------------------------------
# The search


class _Search:
    """One run of the search."""

    def __init__(self, bench: Evaluator, memo: EvaluationCache, settings: SearchSettings, progress: Progress) -> None:
        self.bench = bench
        self.memo = memo
        self.settings = settings
        self.target = settings.target
        self.progress = progress
        self.random = random.Random(settings.seed)  # noqa: S311 (a search, not a secret)
        self.reducer = settings.start.reducer
        self.open = self._open_metrics()
        self.scores: dict[int, ComponentSpec] = {}  # by layer, the metric that is used there now
        self.layers: list[int] = []
        self.tried: dict[str, Evaluated] = {}
        self.latencies: dict[str, float] = {}
        self.best: Evaluated | None = None
        self.reachable = True
        self.interrupted = False
        self.place = memo.of_first(bench.place)
        self.limits: dict[str, Callable[[int], int]] = {}
        self.rate: Callable[[int], float] | None = None
        self.factor = 1.0

    def run(self, begin: float) -> SearchResult:
        """All of it; `begin` is when it began, for the record."""
        if not self.bench.has_head and self.target.kind in ("agreement", "max-drop"):
            raise UsageError(f"the model has no head, so {self.target.kind} has no meaning", "Ask for macs=0.65.")
        self._fit_scores()
        self._choose_scores()
        self._sense()
        try:
            self._start()
            self._improve()
        except KeyboardInterrupt:
            if self.best is None:
                raise
            self.interrupted = True
            self.memo.alone()
        return self._result(begin)

    # -- scores and curves

    def _open_metrics(self) -> dict[int, ComponentSpec]:
        """By layer, the metric that the start recipe gives it, perhaps with open fields."""
        given = {drop.layer: drop.metric for drop in self.settings.start.layers if drop.metric is not None}
        metric = self.settings.start.metric
        return {site.layer: given.get(site.layer) or given.get(site.name) or metric for site in self.bench.layout.sites}

    def _fit_scores(self) -> None:
        """Fit the scores that are to be fitted, those of all layers at once."""
        layers = [layer for layer, part in self.open.items() if unfitted(build_metric(part))]
        if not layers:
            return
        with self.progress.task("fitting scores", len(self.bench.parts["choice"].images)) as task:
            found = self.memo.get(["fit"], lambda _: self.bench.fit(layers, self._after, task), NoTask())[0]
        self.open |= {layer: ComponentSpec.model_validate(found[str(layer)]) for layer in layers}

    def _choose_scores(self) -> None:
        """The metric of each layer, as the only site; layers that can feed none drop out."""
        plans = {site.layer: self._middling(site.layer) for site in self.bench.layout.sites}
        wanted = [plan for plan in plans.values() if plan is not None]
        found = dict(zip((plan.sites[0].layer for plan in wanted), self._choices(wanted), strict=True))
        self.scores = {layer: parts[0] for layer, parts in found.items() if parts is not None}
        self.layers = sorted(self.scores)
        if not self.layers:
            metric, reducer = self.settings.start.metric.kind, self.reducer.kind
            raise RecipeError(f"at no layer of this model {metric} and {reducer} can reduce tokens")

    def _middling(self, layer: int) -> Plan | None:
        for share in _CHOICE_SHARES:
            plan = self._single(layer, max(1, round(share * self.tokens)))
            if plan is not None:
                return plan
        return None

    def _choices(self, plans: Sequence[Plan]) -> list[list[ComponentSpec] | None]:
        """For each plan the metrics of its sites, chosen along it."""
        asked = [plan.with_metrics([self.open[site.layer] for site in plan.sites]) for plan in plans]
        keys = [f"choose {plan_key(plan)}" for plan in asked]
        with self.progress.task("choosing scores", len(asked)) as task:
            found = self.memo.get(keys, lambda index: self.bench.choose(asked[index]), task)
        return [None if parts is None else [ComponentSpec.model_validate(part) for part in parts] for parts in found]

    def _sense(self) -> None:
        """The harm of each layer, and with it the additive model."""
        counts = sorted({round(share * self.tokens) for share in _SENSE_SHARES} - {0, self.tokens}, reverse=True)
        asked = [(layer, count) for layer in self.layers for count in counts]
        plans = [self._single(layer, count) for layer, count in asked]
        possible = [(place, plan) for place, plan in zip(asked, plans, strict=True) if plan is not None]
        keys = [f"sense {plan_key(plan)}" for _, plan in possible]
        with self.progress.task("measuring layers", len(keys)) as task:
            found = self.memo.get(keys, lambda index: self.bench.judge(possible[index][1], "sense"), task)
        points: dict[int, list[tuple[int, float]]] = {layer: [] for layer in self.layers}
        for ((layer, count), _), values in zip(possible, found, strict=True):
            if values is not None:
                points[layer].append((count, values["distance"]))
        self.curves = [Curve(self.tokens, tuple(points[layer])) for layer in self.layers]
        if self.target.kind == "latency":
            self._sense_latency()

    def _sense_latency(self) -> None:
        """How much of the saved operations the clock sees, by how many tokens are left behind the first site."""
        pairs: list[tuple[int, float]] = []
        for share in _LATENCY_SHARES:
            count = max(1, round(share * self.tokens))
            plan = self._single(self.layers[0], count)
            if plan is not None:
                saved = 1.0 - self.bench.macs(plan)
                if saved > 0:  # not so where the score costs more than what few tokens save
                    pairs.append((count, min(max((1.0 - self._latency(plan)) / saved, 0.05), 2.0)))
        if not pairs:
            return
        counts, rates = zip(*sorted(pairs), strict=True)
        self.rate = lambda kept: float(np.interp(kept, counts, rates))

    # -- the additive model

    @property
    def multiple(self) -> int:
        """What all tokens behind each site are a multiple of, as the recipe says; of a map lines count, not tokens."""
        return 1 if self.bench.layout.map_size is not None else self.settings.start.round_tokens or 1

    @property
    def tokens(self) -> int:
        """Patch tokens of the dense model."""
        return self.bench.layout.patch_tokens

    def _single(self, layer: int, kept: int, reducer: ComponentSpec | None = None) -> Plan | None:
        """The plan whose only site is this layer; None where it cannot be."""
        index = [site.layer for site in self.bench.layout.sites]
        schedule = tuple(kept if other >= layer else self.tokens for other in index)
        return self._plan(schedule, index, self.scores or self.open, reducer or self.reducer)

    def _plan(
        self, kept: Kept, layers: Sequence[int], metrics: Mapping[int, ComponentSpec], reducer: ComponentSpec
    ) -> Plan | None:
        parts = {layer: metrics.get(layer, self.open[layer]) for layer in layers}
        try:
            recipe = to_recipe(kept, self.bench.layout, layers, metrics=parts, reducer=reducer)
            return resolve_for(self.bench.model, recipe)
        except UsageError:
            return None

    def _by_macs(self, reducer: ComponentSpec) -> Additive:
        """Costs in multiply-accumulates, within what the reducer can take."""
        return replace(self._macs_model, most=self._most(reducer))

    @cached_property
    def _macs_model(self) -> Additive:
        """Costs in multiply-accumulates, for any reducer."""
        last = len(self.layers) - 1
        floors = [self._floor(layer) for layer in self.layers]

        @cache
        def behind(site: int, kept: int) -> float:
            """Cost of the plan that has its only site here, as a fraction."""
            if site > last or kept >= self.tokens:
                return 1.0
            plan = self._counts(self.layers[site], max(kept, floors[site]))
            return 1.0 if plan is None else self.bench.family.macs(self.bench.model, plan) / self.bench.dense_macs

        @cache
        def gain(site: int, kept: int) -> float:
            return max(0.0, behind(site + 1, kept) - behind(site, kept))

        return self._additive(gain)

    def _counts(self, layer: int, kept: int) -> Plan | None:
        """As `_single`, by the counts alone: what a reducer cannot take at one site, several can come to."""
        schedule = tuple(kept if other >= layer else self.tokens for other in self.open)
        try:
            recipe = to_recipe(
                schedule, self.bench.layout, list(self.open), metrics=self.open, reducer=ComponentSpec(kind="prune")
            )
            return resolve(recipe, self.bench.layout, self._after)
        except UsageError:
            return None

    def _floor(self, layer: int) -> int:
        """The fewest tokens of a map that a layer may leave; below it what follows would not fit."""
        low, high = 1, self.tokens
        while self.bench.layout.map_size is not None and low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self._counts(layer, middle) is None else (low, middle)
        return low

    @cached_property
    def _after(self) -> After:
        """Where in a block the reducer acts."""
        return acts_after(self.settings.start.reducer)

    def _additive(self, gain: Callable[[int, int], float]) -> Additive:
        return Additive(
            tokens=self.tokens,
            sites=len(self.layers),
            gain=gain,
            harm=lambda site, kept: self.curves[site](kept),
        )

    def _most(self, reducer: ComponentSpec) -> Callable[[int], int]:
        """How many of so many tokens a reducer can take at one site, as far as all of them tell."""
        key = reducer.model_dump_json()
        if key not in self.limits:
            low, high = 1, self.tokens - 1
            while low < high:
                middle = (low + high + 1) // 2
                plans = (self._single(layer, self.tokens - middle, reducer) for layer in self.layers)
                low, high = (middle, high) if any(plan is not None for plan in plans) else (low, middle - 1)
            self.limits[key] = partial(_share_of, low, self.tokens)
        return self.limits[key]

    def _model(self, reducer: ComponentSpec | None = None) -> Additive:
        """The additive model of what the target limits, latency or else operations, within what a reducer can take."""
        base = self._by_macs(reducer or self.reducer)
        if self.rate is None:
            return base
        rate, factor = self.rate, self.factor
        return replace(base, gain=lambda site, kept: base.gain(site, kept) * rate(kept) * factor)

    def _front(self) -> Front:
        return solve(replace(self._model(), site_cost=_SITE_COST), max_sites=None)

    # -- candidates

    def _candidate(self, kept: Kept, name: str) -> Candidate | None:
        """The schedule as a plan, with the scores of now; None where the model cannot carry it out."""
        return self._with(kept, self.scores, self.reducer, name)

    def _scores_of(self, candidate: Candidate | None) -> dict[int, ComponentSpec]:
        """The scores of a candidate, at other layers those of now."""
        return self.scores | {site.layer: site.metric for site in candidate.plan.sites} if candidate else self.scores

    def _with(
        self, kept: Kept, metrics: Mapping[int, ComponentSpec], reducer: ComponentSpec, name: str
    ) -> Candidate | None:
        kept = on_tiles(kept, self.tokens, self.bench.layout.prefix_tokens, self.multiple)
        plan = self._plan(kept, self.layers, metrics, reducer)
        if plan is None:
            return None
        try:
            return Candidate(kept, plan, self.bench.macs(plan), name)
        except RecipeError:
            return None

    def _on_budget(
        self,
        kept: Kept,
        budget: float,
        name: str,
        *,
        by_macs: bool = False,
        reducer: ComponentSpec | None = None,
        like: Candidate | None = None,
    ) -> Candidate | None:
        """The schedule stretched or shrunk to the budget; what scores and reducers cost in operations is in it.

        Args:
            by_macs: the budget is one of operations, whatever the target is.
            reducer: None for that of `like`, else that of now.
            like: gives its scores where it has them; None for those of now.
        """
        reducer = reducer or (like.plan.reducer if like else self.reducer)
        model, aim, metrics = self._by_macs(reducer) if by_macs else self._model(reducer), budget, self._scores_of(like)
        exact = by_macs or self.rate is None
        for attempt in range(_BUDGET_TRIES):
            fitted = fit(kept, model, aim)
            candidate = None if fitted is None else self._with(fitted, metrics, reducer, name)
            if candidate is None or not exact or candidate.macs <= budget + 1e-9:
                return candidate
            # counts are whole, so a step as small as the excess may lead to the same ones again
            aim -= (candidate.macs - budget) * 2**attempt
        return None

    def _judge(self, candidates: Sequence[Candidate | None], task: Task | None = None) -> list[Evaluated]:
        """Evaluate on the choosing images; those that cannot be carried out are left out."""
        asked = list({one.key: one for one in candidates if one is not None}.values())
        keys = [f"judge {one.key}" for one in asked]
        found = self.memo.get(keys, lambda index: self.bench.judge(asked[index].plan, "judge"), task or NoTask())
        results = [Evaluated(one, values) for one, values in zip(asked, found, strict=True) if values is not None]
        for result in results:
            self.tried.setdefault(result.candidate.key, result)
        return results

    def _latency(self, plan: Plan, patient: bool = False) -> float:
        key = f"latency {self.place}: {plan_key(plan)}"
        found: float = self.memo.get(
            [key], lambda _: self.bench.latency(plan, self.progress, patient), NoTask(), first_only=True
        )[0]
        self.latencies[plan_key(plan)] = found
        return found

    def _holds(self, tried: Evaluated) -> bool:
        """Whether it meets a target of quality, with a margin for chance."""
        values = tried.values
        if self.target.kind == "agreement":
            share, count = values["agreement"], values["images"]
            return share == 1.0 or _least_share(share, count) >= self.target.value
        worst: float = values["lost"] + _DROP_SIGMAS * values["lost_error"]
        return worst <= self.target.value + QUALITY_SLACK

    # -- steps

    def _start(self) -> None:
        """First schedules: those of the additive model."""
        if self.target.limits_cost:
            self._start_at_cost()
        else:
            self._start_at_quality()

    @property
    def _budget(self) -> float:
        return self.target.value * (_LATENCY_AIM if self.target.kind == "latency" else 1.0)

    def _start_at_cost(self) -> None:
        if self.rate is not None:
            self._correct_latency()
        firsts = [solution.kept for solution in self._solutions(self._budget)]
        candidates = [self._on_budget(kept, self._budget, "additive model") for kept in firsts]
        if all(candidate is None for candidate in candidates):
            self.reachable = False
            candidates = [self._cheapest()]
            self.progress.warn(f"the target {self.target} is out of reach; the nearest is searched for")
        else:
            candidates.append(self._paper_candidate(self._budget, by_macs=False))
        with self.progress.task("first schedules", len({one.key for one in candidates if one})) as task:
            self._keep(self._judge(candidates, task))
        if self.best is None:
            raise CheckFailed("no schedule for the target can be carried out", "Let other reducers be tried.")

    def _cheapest(self) -> Candidate | None:
        """What costs least, of all that the additive model knows and the model itself can carry out."""
        found = (self._candidate(solution.kept, "cheapest") for solution in reversed(self._front().pareto()))
        return next((candidate for candidate in found if candidate is not None), None)

    def _solutions(self, budget: float) -> list[Solution]:
        free = self._front().best(budget)
        limited = solve(self._model(), max_sites=max(_SITE_LIMITS))
        found = [free, *(limited.best(budget, limit) for limit in _SITE_LIMITS)]
        return [solution for solution in found if solution is not None]

    def _correct_latency(self) -> None:
        """Scale the model so that it predicts what is measured of the first schedule."""
        first = self._front().best(self._budget)
        candidate = None if first is None else self._on_budget(first.kept, self._budget, "additive model")
        candidate = candidate or self._cheapest()  # out of reach for the model, and perhaps not for the clock
        if candidate is not None:
            self._scale(candidate)

    def _scale(self, candidate: Candidate, patient: bool = False) -> float:
        """Take a measured latency into the model; returns it."""
        measured, predicted = self._latency(candidate.plan, patient), self._model().cost(candidate.kept)
        if measured < 1.0 and predicted < 1.0:
            self.factor *= (1.0 - measured) / (1.0 - predicted)
        return measured

    def _start_at_quality(self) -> None:
        front, judged = self._front(), len(self.bench.parts["judge"].images)
        if self.target.kind == "agreement" and _least_share(1.0, judged) < self.target.value:
            self.progress.warn(f"{judged} images are too few to tell whether {self.target} holds; give more")

        def at(budget: float) -> Candidate | None:
            solution = front.best(budget)
            return None if solution is None else self._on_budget(solution.kept, budget, "additive model")

        self._sections(at, front.cheapest().cost, 1.0, "first schedules")
        if self.best is None:
            mildest = front.pareto()[:2]
            self._keep(self._judge([self._candidate(one.kept, "mildest") for one in mildest if min(one.kept) > 0]))
        if self.best is None:
            self.reachable = False
            ranked = sorted(self.tried.values(), key=lambda tried: (-self._quality(tried), tried.order))
            if not ranked:
                raise CheckFailed("no schedule for the target can be carried out", "Let other reducers be tried.")
            self.best = ranked[0]

    def _quality(self, tried: Evaluated) -> float:
        value: float = tried.values["agreement"] if self.target.kind == "agreement" else -tried.values["lost"]
        return value

    def _sections(
        self, at: Callable[[float], Candidate | None], low: float, high: float, label: str, rounds: int | None = None
    ) -> None:
        """Look for the lowest budget between `low` and `high` at which the quality holds, several at a time."""
        rounds = _SECTION_ROUNDS if rounds is None else rounds
        with self.progress.task(label, rounds * _SECTIONS) as task:
            for _ in range(rounds):
                step = (high - low) / (_SECTIONS + 1)
                budgets = [low + step * (index + 1) for index in range(_SECTIONS)]
                made = [(budget, at(budget)) for budget in budgets]
                results = self._judge([candidate for _, candidate in made], task)
                self._keep(results)
                holding = {result.candidate.key for result in results if self._holds(result)}
                good = [budget for budget, one in made if one is not None and one.key in holding]
                high = min(good, default=high)
                low = max((budget for budget in (low, *budgets) if budget < high), default=low)

    def _keep(self, results: Sequence[Evaluated]) -> None:
        """Remember the best so far: the nearest to the dense model at the budget, or the cheapest that holds."""
        for result in results:
            if not self.target.limits_cost and not self._holds(result):
                continue
            if self.best is None or self._rank(result) < self._rank(self.best):
                self.best = result

    def _rank(self, tried: Evaluated) -> tuple[Any, ...]:
        """The smallest is the best that meets the target."""
        return tried.order if self.target.limits_cost else (tried.candidate.macs, *tried.order)

    def _improve(self) -> None:
        """Scores along the schedule, neighbours, reducers, neighbours again."""
        assert self.best is not None
        if not self.reachable:
            self._rescore()
            return
        half = self.settings.evaluations // 2
        self._rescore()
        self._compare_with_paper()
        self._refine(half)
        self._try_reducers()
        self._refine(self.settings.evaluations - half)
        self._rescore()
        self._compare_with_paper()
        if self.target.kind == "latency":
            self._meet_latency()
        self._sweep()

    def _sweep(self) -> None:
        """The best schedule at other costs: not to be found, but to show what a little more or less would give."""
        assert self.best is not None
        best = self.best.candidate
        costs = [cost for cost in _SWEEP if abs(cost - best.macs) > _SWEEP_APART]
        self._judge([self._on_budget(best.kept, cost, "other cost", by_macs=True, like=best) for cost in costs])

    def _rescore(self) -> None:
        """Choose the scores again, along the best schedule; they stay where they are not better."""
        assert self.best is not None
        best = self.best.candidate
        if not any(build_metric(self.open[site.layer]).open for site in best.plan.sites):
            return
        parts = self._choices([best.plan])[0]
        if parts is None:
            return
        chosen = {site.layer: part for site, part in zip(best.plan.sites, parts, strict=True)}
        changed = self._with(best.kept, {**self.scores, **chosen}, best.plan.reducer, "scores chosen again")
        before = self.best
        self._keep(self._judge([changed]))
        if self.best is not before or (changed is not None and changed.key == before.candidate.key):
            self.scores.update(chosen)

    def _refine(self, evaluations: int) -> None:
        """Try neighbours on the real objective, at the cost of the best so far; then, for a quality, go cheaper."""
        assert self.best is not None
        current, model = self.best, self._model(self.best.candidate.plan.reducer)
        budget = self._budget if self.target.limits_cost else current.candidate.macs
        spent, step = 0, max(self.tokens // 8, model.least_drop)
        with self.progress.task("trying neighbours", evaluations) as task:
            while spent < evaluations:
                batch = self._pick(current.candidate, model, budget, step)[: evaluations - spent]
                results = self._judge(batch, task)
                spent += len(batch)
                self._keep(results)
                better = min(results, key=lambda tried: tried.order, default=current)
                if better.order < current.order:
                    current = better
                elif step > 1:
                    step //= 2
                elif not batch:
                    break
            task.advance(evaluations - spent)
        if not self.target.limits_cost:
            self._cheapen(current)

    def _pick(self, current: Candidate, model: Additive, budget: float, step: int) -> list[Candidate]:
        """Some neighbours that were not tried: most by prediction, one by chance."""
        scored = self._scores_of(current)
        # what scores and reducers cost is not in the model
        aside = current.macs - model.cost(current.kept) if self.rate is None else 0.0
        fresh = neighbours(current.kept, model, budget - max(aside, 0.0), step)
        made: list[Candidate] = []
        while fresh and len(made) < _BATCH:
            by_chance = len(made) == _BATCH - 1
            kept = fresh.pop(self.random.randrange(len(fresh)) if by_chance else 0)
            candidate = self._with(kept, scored, current.plan.reducer, "neighbour")
            over = candidate is not None and self.rate is None and candidate.macs > budget + 1e-9
            if candidate is not None and not over and candidate.key not in self.tried:
                made.append(candidate)
        return made

    def _cheapen(self, current: Evaluated) -> None:
        """Shrink the cost of a schedule as far as the quality holds."""
        cost = current.candidate.macs
        if not self._holds(current):
            return

        def at(budget: float) -> Candidate | None:
            reducer = current.candidate.plan.reducer
            fitted = fit(current.candidate.kept, self._by_macs(reducer), budget)
            return (
                None if fitted is None else self._with(fitted, self._scores_of(current.candidate), reducer, "cheaper")
            )

        self._sections(at, max(cost - 0.15, 0.0), cost, "going cheaper", rounds=2)

    def _try_reducers(self) -> None:
        """The best schedule with other reducers, back on the budget."""
        assert self.best is not None
        best = self.best.candidate
        budget = self._budget if self.target.limits_cost else best.macs
        others = [part for part in self.settings.reducers if part != best.plan.reducer]
        candidates = [candidate for part in others for candidate in self._with_reducer(best, budget, part)]
        results = self._judge(candidates)
        self._keep(results)
        if not self.target.limits_cost:  # nearer at the same cost may become cheaper
            nearest = min((*results, self.best), key=lambda tried: tried.order)
            self._cheapen(nearest)
        assert self.best is not None
        self.reducer = self.best.candidate.plan.reducer

    def _with_reducer(self, best: Candidate, budget: float, reducer: ComponentSpec) -> list[Candidate | None]:
        """The schedule on the budget with another reducer; with one that can take fewer, also its own best one."""
        model = self._model(reducer)
        schedules = [best.kept]
        if not model.possible(best.kept):
            own = solve(replace(model, site_cost=_SITE_COST)).best(budget)
            schedules += [] if own is None else [own.kept]
        name = f"reducer {reducer.kind}"
        return [self._on_budget(one, budget, name, reducer=reducer, like=best) for one in schedules]

    # -- the paper's schedule

    def _paper_candidate(self, budget: float, *, by_macs: bool, calibrated: bool = True) -> Candidate | None:
        """The paper's schedule, all its ratios scaled by one factor to the budget, its scores chosen along it."""
        sites = self.bench.layout.sites
        recipe = default_recipe(len(sites), [site.layer for site in sites])
        named = {drop.layer for drop in recipe.layers}
        ratios = {place: PAPER_DROP_RATIO for place, layer in enumerate(self.layers) if layer in named}
        if not ratios:
            return None
        kept = paper_schedule(len(self.layers), self.tokens, ratios)
        candidate = self._on_budget(kept, budget, "paper", by_macs=by_macs, reducer=self.settings.start.reducer)
        if candidate is None or not calibrated:
            return candidate
        parts = self._choices([candidate.plan])[0]
        if parts is None:
            return candidate
        chosen = {site.layer: part for site, part in zip(candidate.plan.sites, parts, strict=True)}
        return self._with(candidate.kept, chosen, self.settings.start.reducer, "paper") or candidate

    def _compare_with_paper(self) -> None:
        """The paper's schedule at the operations of the best; where it is better, it is the best."""
        assert self.best is not None
        found = self._paper_at_same_macs()
        if found is not None and (self.target.kind != "macs" or found.candidate.macs <= self.target.value + 1e-9):
            self._keep([found])

    def _paper_at_same_macs(self, calibrated: bool = True) -> Evaluated | None:
        assert self.best is not None
        budget = self.best.candidate.macs
        if self.target.kind == "macs" and self.reachable:
            budget = self.target.value
        candidate = self._paper_candidate(budget, by_macs=True, calibrated=calibrated)
        results = self._judge([candidate])
        return results[0] if results else None

    # -- latency

    def _meet_latency(self) -> None:
        """Resize the best until its measured time just meets the target; only what comes out is judged.

        A measured time corrects the model, and the model tells the next size. Once one size is too slow and another
        one fast enough, the next lies between them: times scatter, so the model alone may go to and fro.
        """
        assert self.best is not None
        start, seen = self.best.candidate, dict[str, Timed]()
        current: Candidate | None = start
        for _ in range(_LATENCY_ROUNDS):
            if current is None or current.key in seen:
                break
            between = len({timed.slow for timed in seen.values()}) > 1
            measured = self._scale(current, patient=between)
            seen[current.key] = Timed(current, measured, measured > self.target.value)
            if self.target.value * _LATENCY_SLACK <= measured <= self.target.value:
                break
            current = self._resized(start, seen)
        # the nearest of those that meet it, else the nearest of all; one that cannot be judged is none
        for timed in sorted(seen.values(), key=lambda timed: (timed.slow, abs(timed.latency - self.target.value))):
            results = self._judge([timed.candidate])
            if results:
                self.best = results[0]
                return

    def _resized(self, start: Candidate, seen: Mapping[str, Timed]) -> Candidate | None:
        """The next size to measure, after those that were; None where there is none."""
        slow = min((timed for timed in seen.values() if timed.slow), key=Timed.by_macs, default=None)
        fast = max((timed for timed in seen.values() if not timed.slow), key=Timed.by_macs, default=None)
        last = list(seen.values())[-1].candidate
        if slow and fast:
            low, high = sorted((fast.candidate.macs, slow.candidate.macs))
            # by the times as far as they tell, but never so near an end that nothing is learned
            gap = slow.latency - fast.latency
            share = min(max((self.target.value * _LATENCY_AIM - fast.latency) / gap, 0.2), 0.8)
            return self._on_budget(start.kept, low + share * (high - low), "resized", by_macs=True, like=start)
        resized = self._on_budget(start.kept, self._budget, "resized", like=start)
        wrong_way = resized is not None and (resized.macs > last.macs if slow else resized.macs < last.macs)
        if resized is not None and not wrong_way and resized.key not in seen:
            return resized
        aim = min(last.macs * (1 - _BLIND_STEP if slow else 1 + _BLIND_STEP), 1.0)
        return self._on_budget(start.kept, aim, "resized", by_macs=True, like=start)

    # -- the result

    def _result(self, begin: float) -> SearchResult:
        assert self.best is not None
        calibrated = not self.interrupted
        paper = self._paper_at_same_macs(calibrated)
        best, is_paper, decided = self._better(self.best, paper)
        if is_paper and self.target.kind == "latency" and not self.interrupted:
            # with the same operations it may be faster than it has to be
            self.best = best
            self._meet_latency()
            best = paper = self.best
        plan = best.candidate.plan
        latency = self._latency(plan) if self.settings.seconds > 0 else None
        given = self._given()
        drawn = plan.with_metric(ComponentSpec.model_validate({"kind": "random", "seed": self.settings.seed}))
        held = self._held([plan, drawn, *([paper.candidate.plan] if paper else [])])
        if held[0] is None:
            raise CheckFailed("the found schedule returns values that are not finite on the images held back")
        found_point = self._point("found", best.candidate, held[0], latency)
        paper_latency = self._paper_latency(paper.candidate.plan, latency) if paper else None
        paper_point = self._point("paper", paper.candidate, held[2], paper_latency) if paper and held[2] else None
        dense = self.bench.dense_point("held")
        met, nearest = self._met(best, latency)
        return SearchResult(
            recipe=self._recipe(best.candidate),
            plan=plan,
            target=self.target,
            met=met,
            nearest=nearest,
            dense=point_of("dense", (), 1.0, 1.0 if latency is not None else None, dense),
            paper=paper_point,
            found=found_point,
            random=self._point("random", best.candidate, held[1], None) if held[1] else None,
            given=given,
            paper_is_found=is_paper,
            held_back_decided=decided,
            paper_calibrated=calibrated,
            tried=tuple(
                self._point(
                    one.candidate.name, one.candidate, one.values, self.latencies.get(plan_key(one.candidate.plan))
                )
                for one in self.tried.values()
            ),
            evaluations=len(self.tried),
            seconds=time.monotonic() - begin,
            interrupted=self.interrupted,
            identity=self.settings.identity,
            seed=self.settings.seed,
        )

    def _paper_latency(self, plan: Plan, found: float | None) -> float | None:
        """Measured for the comparison, where that of the found schedule is; after an interruption what is known."""
        if found is None or self.interrupted:
            return self.latencies.get(plan_key(plan))
        return self._latency(plan)

    def _better(self, found: Evaluated, paper: Evaluated | None) -> tuple[Evaluated, bool, bool]:
        """The found schedule or the paper's, whether it is the paper's, and whether the images held back decided that.

        The found one must be better on the choosing images, and not worse on those held back, which decide nothing but
        this: of the many tried on the first, the best may be so by chance.
        """
        if paper is None or not self._may_be_found(paper):
            return found, False, False
        if found.candidate.key == paper.candidate.key or paper.order < found.order:
            return paper, True, False
        ours, theirs = self._held([found.candidate.plan, paper.candidate.plan])
        worse = theirs is not None and (ours is None or ours["distance"] > theirs["distance"])
        return (paper, True, True) if worse else (found, False, False)

    def _held(self, plans: Sequence[Plan]) -> list[dict[str, Any] | None]:
        """What the plans do to the images held back."""
        keys = [f"held {plan_key(plan)}" for plan in plans]
        with self.progress.task("checking on other images", len(keys)) as task:
            return self.memo.get(keys, lambda index: self.bench.judge(plans[index], "held"), task)

    def _may_be_found(self, paper: Evaluated) -> bool:
        """Whether the paper's schedule meets what the found one does."""
        if self.target.kind == "latency":
            return self._latency(paper.candidate.plan) <= self.target.value
        if self.target.kind == "macs":
            return paper.candidate.macs <= self.target.value + 1e-9 or not self.reachable
        return self._holds(paper) or not self.reachable

    def _met(self, best: Evaluated, latency: float | None) -> tuple[bool, float]:
        if self.target.kind == "macs":
            return best.candidate.macs <= self.target.value + 1e-9, best.candidate.macs
        if self.target.kind == "latency":
            assert latency is not None
            return latency <= self.target.value, latency
        value = self._quality(best)
        return self._holds(best), value if self.target.kind == "agreement" else -value

    def _given(self) -> Point | None:
        """The start recipe with its own layers, its scores chosen along it."""
        start = self.settings.start
        if not start.layers or self.interrupted:
            return None
        try:
            plan = resolve_for(self.bench.model, start)
        except RecipeError:
            return None
        parts = self._choices([plan])[0]
        if parts is None:
            return None
        plan = plan.with_metrics(parts)
        values = self.memo.get([f"judge {plan_key(plan)}"], lambda _: self.bench.judge(plan, "judge"), NoTask())[0]
        return None if values is None else self._point("given", Candidate((), plan, self.bench.macs(plan), ""), values)

    def _recipe(self, candidate: Candidate) -> Recipe:
        text = f"Found by a search for {self.target}: {candidate.macs:.3f} of the dense operations, "
        text += f"tokens in multiples of {self.multiple}, " if self.multiple > 1 else ""
        recipe = to_recipe(
            candidate.kept,
            self.bench.layout,
            self.layers,
            metrics=self._scores_of(candidate),
            reducer=candidate.plan.reducer,
            model=self.settings.start.model,
            description=f"{text}seed {self.settings.seed}",
        )
        return Recipe.parse(recipe.to_yaml(), "the recipe that the search found")

    def _point(self, name: str, candidate: Candidate, values: Mapping[str, Any], latency: float | None = None) -> Point:
        tokens = tuple((site.layer, site.tokens_out) for site in candidate.plan.sites)
        return point_of(name, tokens, candidate.macs, latency, values)


def _share_of(part: int, whole: int, count: int) -> int:
    """As many of `count` as `part` is of `whole`, rounded down, and one at least."""
    return max(1, count * part // whole)


def _least_share(share: float, count: int) -> float:
    """Lower end of Wilson's interval of a share of `count`, which is below 1 also where all agree."""
    return wilson_interval(round(share * count), count, _AGREEMENT_SIGMAS)[0]
