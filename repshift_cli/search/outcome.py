"""The end of a search: comparison with the paper's schedule, evaluation on held-out images, and the result."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from repshift_cli.errors import CheckFailed, RecipeError
from repshift_cli.planning.plan import Plan
from repshift_cli.planning.recipe import PAPER_DROP_RATIO, ComponentSpec, Recipe, default_recipe
from repshift_cli.reduction.checks import resolve_for
from repshift_cli.search.candidates import Method, choose_metrics
from repshift_cli.search.cost_model import CostModel
from repshift_cli.search.evaluator import Candidate, Evaluated, NoTask, Trials
from repshift_cli.search.latency_target import LatencyTarget
from repshift_cli.search.result import Point, SearchResult, SearchSettings
from repshift_cli.search.schedule import paper_schedule, to_recipe
from repshift_cli.search.target import COST_TOLERANCE, Target

__all__ = ["Outcome", "paper_candidate"]


def paper_candidate(
    costs: CostModel, trials: Trials, method: Method, budget: float, *, by_macs: bool, choose: bool = True
) -> Candidate | None:
    """The paper's schedule, scaled to the budget by one factor, with the reducer of the start recipe.

    Args:
        choose: choose its metrics along it; otherwise those of `method` are used.

    Returns:
        None if the model lacks the sites of the schedule, or if it cannot be scaled to the budget.
    """
    planner = costs.planner
    layers = [site.layer for site in planner.layout.sites]
    dropping = {drop.layer for drop in default_recipe(len(layers), layers).layers}
    ratios = {index: PAPER_DROP_RATIO for index, layer in enumerate(planner.layers) if layer in dropping}
    if not ratios:
        return None
    kept = paper_schedule(len(planner.layers), planner.tokens, ratios)
    method = replace(method, reducer=planner.start.reducer)
    candidate = costs.on_budget(kept, budget, method, "paper", by_macs=by_macs)
    if candidate is None or not choose:
        return candidate
    metrics = choose_metrics(planner, trials, [candidate.plan])[0]
    if metrics is None:
        return candidate
    return planner.candidate(candidate.kept, replace(method, metrics=metrics), "paper") or candidate


@dataclass(frozen=True)
class Outcome:
    """What a search has found at its end, or when it was interrupted.

    Attributes:
        method: the metrics and the reducer of the last step.
        best: the best schedule on the selection images.
        reachable: whether the target can be met; if not, `best` is the nearest schedule.
    """

    settings: SearchSettings
    trials: Trials
    costs: CostModel
    method: Method
    best: Evaluated
    reachable: bool
    interrupted: bool = False

    @property
    def target(self) -> Target:
        return self.settings.target

    def paper(self) -> Evaluated | None:
        """The paper's schedule at the MACs of the best one; None if it cannot be evaluated."""
        at_target = self.target.kind == "macs" and self.reachable
        budget = self.target.value if at_target else self.best.candidate.macs
        candidate = paper_candidate(
            self.costs, self.trials, self.method, budget, by_macs=True, choose=not self.interrupted
        )
        results = self.trials.evaluate([candidate])
        return results[0] if results else None

    def result(self, begin: float) -> SearchResult:
        """Choose between the best schedule and the paper's, evaluate both on the held-out images, and report.

        Args:
            begin: start of the search, by `time.monotonic`.

        Raises:
            CheckFailed: the found schedule returns values that are not finite on the held-out images.
        """
        paper = self.paper()
        best, paper_is_found, heldout_decided = self._better(paper)
        if paper_is_found and self.target.kind == "latency" and not self.interrupted:
            # at equal MACs it may be faster than the target asks for
            latency_target = LatencyTarget(self.target, self.trials)
            best = paper = latency_target.meet(self.costs, best.candidate, self.method)[1] or best
        plan = best.candidate.plan
        latency = self.trials.latency(plan) if self.settings.seconds > 0 else None
        given = self._given()
        random = plan.with_metric(ComponentSpec.model_validate({"kind": "random", "seed": self.settings.seed}))
        heldout = self._heldout([plan, random, *([paper.candidate.plan] if paper else [])])
        if heldout[0] is None:
            raise CheckFailed("the found schedule returns values that are not finite on the held-out images")
        met, nearest = self._met(best, latency)
        paper_point = None
        if paper and heldout[2]:
            measure = self.trials.known_latency if latency is None or self.interrupted else self.trials.latency
            paper_point = _point("paper", paper.candidate, measure(paper.candidate.plan), heldout[2])
        dense_latency = None if latency is None else 1.0
        tried = self.trials.tried.values()
        return SearchResult(
            recipe=self._recipe(best.candidate),
            plan=plan,
            target=self.target,
            met=met,
            nearest=nearest,
            dense=Point.of("dense", None, 1.0, dense_latency, self.trials.evaluator.dense_quality("heldout")),
            paper=paper_point,
            found=_point("found", best.candidate, latency, heldout[0]),
            random=_point("random", best.candidate, None, heldout[1]) if heldout[1] else None,
            given=given,
            paper_is_found=paper_is_found,
            held_back_decided=heldout_decided,
            paper_calibrated=not self.interrupted,
            tried=tuple(
                _point(one.candidate.name, one.candidate, self.trials.known_latency(one.candidate.plan), one.values)
                for one in tried
            ),
            evaluations=len(tried),
            seconds=time.monotonic() - begin,
            interrupted=self.interrupted,
            identity=self.settings.identity,
            seed=self.settings.seed,
        )

    def _better(self, paper: Evaluated | None) -> tuple[Evaluated, bool, bool]:
        """The best schedule or the paper's, whether it is the paper's, and whether the held-out images decided that.

        The best of many schedules may be the best on the selection images by chance. So it must also be at least as
        good as the paper's on the held-out images. They decide nothing else.
        """
        best = self.best
        if paper is None:
            return best, False, False
        latency = self.trials.latency(paper.candidate.plan) if self.target.kind == "latency" else None
        met = self._met(paper, latency)[0]
        if not met and (self.reachable or latency is not None):
            return best, False, False
        if best.candidate.key == paper.candidate.key or paper.order < best.order:
            return paper, True, False
        ours, theirs = self._heldout([best.candidate.plan, paper.candidate.plan])
        worse = theirs is not None and (ours is None or ours["distance"] > theirs["distance"])
        return (paper, True, True) if worse else (best, False, False)

    def _heldout(self, plans: Sequence[Plan]) -> list[dict[str, Any] | None]:
        with self.trials.progress.task("evaluating on held-out images", len(plans)) as task:
            return self.trials.quality(plans, "heldout", task)

    def _met(self, best: Evaluated, latency: float | None) -> tuple[bool, float]:
        """Whether a schedule meets the target, and what it reaches."""
        if self.target.kind == "macs":
            return best.candidate.macs <= self.target.value + COST_TOLERANCE, best.candidate.macs
        if self.target.kind == "latency":
            assert latency is not None
            return latency <= self.target.value, latency
        quality = self.target.quality(best.values)
        return self.target.holds(best.values), quality if self.target.kind == "agreement" else -quality

    def _given(self) -> Point | None:
        """The start recipe with its own layers and metrics chosen along them, on the selection images."""
        start, planner = self.settings.start, self.costs.planner
        if not start.layers or self.interrupted:
            return None
        try:
            plan = resolve_for(planner.evaluator.model, start)
        except RecipeError:
            return None
        metrics = choose_metrics(planner, self.trials, [plan])[0]
        if metrics is None:
            return None
        plan = plan.with_metrics([metrics[site.layer] for site in plan.sites])
        values = self.trials.quality([plan], "selection", NoTask())[0]
        return None if values is None else Point.of("given", plan, planner.evaluator.macs(plan), None, values)

    def _recipe(self, candidate: Candidate) -> Recipe:
        planner = self.costs.planner
        rounded = f"token counts in multiples of {planner.multiple}, " if planner.multiple > 1 else ""
        recipe = to_recipe(
            candidate.kept,
            planner.layout,
            planner.layers,
            metrics=self.method.along(candidate.plan).metrics,
            reducer=candidate.plan.reducer,
            model=self.settings.start.model,
            description=f"Found by a search for {self.target}: {candidate.macs:.3f} of the dense MACs, {rounded}"
            f"seed {self.settings.seed}",
        )
        return Recipe.parse(recipe.to_yaml(), "the recipe that the search found")


def _point(name: str, candidate: Candidate, latency: float | None, values: Any) -> Point:
    return Point.of(name, candidate.plan, candidate.macs, latency, values)
