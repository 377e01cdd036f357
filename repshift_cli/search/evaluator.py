"""Evaluates plans on the model: quality on subsets of the images, MACs and latency."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from repshift_cli.calibration.calibrate import CandidateRunner, choose_metric, runnable
from repshift_cli.calibration.fit import fit_scores
from repshift_cli.calibration.outputs import (
    ReferenceOutputs,
    agreement,
    distance,
    divergence,
    reference_outputs,
    run_batches,
)
from repshift_cli.errors import CheckFailed, RecipeError
from repshift_cli.measure.device import device_name
from repshift_cli.measure.latency import Speedup, Subject, Timing, compute_speedup, full_batch, measure_latency
from repshift_cli.ops.neighbours import recall_at
from repshift_cli.planning.layout import After
from repshift_cli.planning.plan import Plan
from repshift_cli.planning.recipe import ComponentSpec
from repshift_cli.reduction.compressed_model import attach
from repshift_cli.reduction.families.base import Family
from repshift_cli.search.additive import Kept
from repshift_cli.search.result import SearchSettings
from repshift_cli.search.state import EvaluationCache
from repshift_cli.utils.progress import Progress, SilentTask, Task

# A ViT-S takes 35 ms per image on two slow cores. A search should end within 10 minutes, so within 15,000 images.
METRIC_IMAGES = 64
"""For the choice among 30 metrics at one site, in rounds: the cost of 400 partial passes."""

SENSITIVITY_IMAGES = 48
"""For the harm of one layer at one ratio, 48 measurements for 12 layers. The refinement corrects their noise."""

SELECTION_IMAGES = 128
"""For each evaluation of a schedule. A target of quality needs all images of the first half."""

_STANDARD_ERROR = 0.01
"""Relative standard error of a latency above which it is measured again: a third of the tolerance of the target."""

_DECILES_APART = 2.05
"""Distance of the 10th and 90th percentile in standard errors of a median: 2.56 deviations / 1.25 deviations."""

_DIGITS = 7
_KEYS = {"sensitivity": "sense", "selection": "judge", "heldout": "held"}
"""First word of the key in the state file, by subset of the images."""


@dataclass(frozen=True)
class Candidate:
    """A schedule and its plan. `macs` is a fraction of the dense model's; `name` is the step that made it."""

    kept: Kept
    plan: Plan
    macs: float
    name: str

    @property
    def key(self) -> str:
        return _key(self.plan)


@dataclass(frozen=True)
class Evaluated:
    """A candidate and its quality on the selection images, as `Evaluator.quality` returns it."""

    candidate: Candidate
    values: Mapping[str, Any]

    @property
    def order(self) -> tuple[float, int, float, Kept]:
        """Sort key, best first: by distance, then by the number of sites and the cost."""
        candidate = self.candidate
        return (self.values["distance"], len(candidate.plan.sites), candidate.macs, candidate.kept)


@dataclass(frozen=True)
class ImageSubset:
    """Some of the images, with the outputs of the dense model."""

    images: Tensor
    dense: ReferenceOutputs
    labels: Tensor | None


class Evaluator:
    """The dense model, the images, and the cache of evaluations.

    `quality`, `latency`, `choose_metrics` and `fit_metrics` run the model. The other methods use cached results.

    Attributes:
        tried: all candidates evaluated on the selection images by key, in order.
    """

    def __init__(self, model: nn.Module, family: Family, settings: SearchSettings, progress: Progress) -> None:
        """Run the dense model on all images.

        Raises:
            CheckFailed: its outputs are not finite.
            UsageError: the state file is not that of this search.
        """
        self.model = model
        self.family = family
        self.progress = progress
        self.batch_size = settings.batch_size
        self.seconds = settings.seconds
        self.neighbours = settings.target.neighbours
        self.layout = family.layout(model)
        self.tried: dict[str, Evaluated] = {}
        sample = next(model.parameters())
        self.images = settings.images.to(device=sample.device, dtype=sample.dtype)
        self.labels = None if settings.labels is None else settings.labels.to(sample.device)
        with progress.task("dense model", len(self.images)) as task:
            self.outputs = run_batches(model, self.images, settings.batch_size, task)
        if not bool(self.outputs.isfinite().all()):
            raise CheckFailed("the dense model returns values that are not finite", "Search in float32.")
        half = len(self.images) // 2
        self.subsets = {
            "metrics": self._subset(0, min(half, METRIC_IMAGES)),
            "sensitivity": self._subset(0, min(half, SENSITIVITY_IMAGES)),
            "selection": self._subset(0, min(half, SELECTION_IMAGES) if settings.target.limits_cost else half),
            "heldout": self._subset(half, len(self.images)),
        }
        self._cache = EvaluationCache(model, settings)
        self._latencies: dict[str, float] = {}
        self._measured_on = f"{device_name(sample.device)}, {torch.get_num_threads()} threads, batch {self.batch_size}"

    def _subset(self, start: int, stop: int) -> ImageSubset:
        labels = None if self.labels is None else self.labels[start:stop]
        return ImageSubset(self.images[start:stop], reference_outputs(self.model, self.outputs[start:stop]), labels)

    @cached_property
    def dense_macs(self) -> int:
        """MACs of the dense model for one image."""
        return self.family.macs(self.model, None)

    def macs(self, plan: Plan) -> float:
        """MACs with metric and reducer, as a fraction of the dense model's.

        Raises:
            RecipeError: the plan does not fit the model.
        """
        compressed = attach(self.model, plan)
        try:
            return compressed.macs() / self.dense_macs
        finally:
            compressed.detach()

    def quality(self, plan: Plan, subset: str) -> dict[str, Any] | None:
        """The quality of a plan on a subset of the images; None if the plan does not fit or a value is not finite."""
        chosen = self.subsets[subset]
        try:
            compressed = attach(self.model, plan)
        except RecipeError:
            return None
        try:
            outputs = run_batches(compressed, chosen.images, self.batch_size, SilentTask())
        finally:
            compressed.detach()
        if not bool(outputs.isfinite().all()):
            return None
        given = chosen.dense.of(outputs)
        found = _compare(chosen, given, self.neighbours)
        if found is not None and subset == "heldout":  # for a comparison image by image
            far = distance(chosen.dense.reference, given, chosen.dense.are_logits)
            found["distances"] = [round(value, _DIGITS) for value in far.double().tolist()]
        return found

    def dense_quality(self, subset: str) -> dict[str, Any]:
        """The quality of the dense model itself."""
        values = _compare(self.subsets[subset], self.subsets[subset].dense.reference, self.neighbours)
        assert values is not None
        return {**values, "distance": 0.0, "kl": 0.0}

    def choose_metrics(self, plan: Plan) -> list[dict[str, Any]] | None:
        """Choose the open fields of the metric of each site, in order; None if a site can run no variant."""
        subset = self.subsets["metrics"]
        run = CandidateRunner(self.model, subset.images, subset.dense, self.batch_size, SilentTask())
        sites = {site.name: site for site in self.family.sites(self.model)}
        chosen: list[ComponentSpec] = []
        try:
            for planned in plan.sites:
                variants = runnable(planned, sites[planned.site])
                if len(variants) > 1:
                    so_far = plan.with_metrics([*chosen, planned.metric])
                    chosen.append(choose_metric(run, so_far, variants, len(subset.images)).chosen.spec())
                else:
                    chosen.append(variants[0].spec())
        except RecipeError:
            return None
        return [metric.model_dump() for metric in chosen]

    def fit_metrics(self, layers: Sequence[int], after: After) -> dict[int, ComponentSpec]:
        """Fit the metric of each layer, or take the fitted ones from the cache."""
        images = self.subsets["metrics"].images

        def fit(_: int) -> dict[str, Any]:
            fitted = fit_scores(self.model, layers, images, self.batch_size, 0, task, after=after)
            return {str(layer): metric.spec().model_dump() for layer, metric in fitted.items()}

        with self.progress.task("fitting metrics", len(images)) as task:
            fitted = self._cache.get(["fit"], fit, SilentTask())[0]
        return {layer: ComponentSpec.model_validate(fitted[str(layer)]) for layer in layers}

    def latency(self, plan: Plan, remeasure: bool = False) -> float:
        """Time of a batch as a fraction of the dense model's, both measured in turn.

        Args:
            remeasure: measure for twice the time if the standard error is large.
        """
        inputs = full_batch(self.images, self.batch_size)
        compressed = attach(self.model, plan)
        try:
            subjects = [Subject("dense", compressed, compressed.dense), Subject("candidate", compressed)]
            times = measure_latency(subjects, inputs, max_seconds=self.seconds, warmup=2, progress=self.progress)
            speedup = compute_speedup(times["dense"], times["candidate"])
            if remeasure and _relative_error(speedup, len(times["dense"].samples_s)) > _STANDARD_ERROR:
                more = measure_latency(subjects, inputs, max_seconds=self.seconds, warmup=0, progress=self.progress)
                both = {name: Timing(times[name].samples_s + more[name].samples_s) for name in times}
                speedup = compute_speedup(both["dense"], both["candidate"])
        finally:
            compressed.detach()
        return round(1.0 / speedup.ratio, 5)

    def cached(self, kind: str, plans: Sequence[Plan], evaluate: Callable[[Plan], Any], task: Task) -> list[Any]:
        """The results of an evaluation of plans, from the cache if it has them."""
        keys = [f"{kind} {_key(plan)}" for plan in plans]
        return self._cache.get(keys, lambda index: evaluate(plans[index]), task)

    def cached_quality(self, plans: Sequence[Plan], subset: str, task: Task) -> list[dict[str, Any] | None]:
        """As `quality`, for several plans."""
        return self.cached(_KEYS[subset], plans, lambda plan: self.quality(plan, subset), task)

    def cached_latency(self, plan: Plan, remeasure: bool = False) -> float:
        """As `latency`; a cached value is used only if device, threads and batch size are the same."""
        kind = f"latency {self._measured_on}:"
        latency: float = self.cached(kind, [plan], lambda plan: self.latency(plan, remeasure), SilentTask())[0]
        self._latencies[_key(plan)] = latency
        return latency

    def known_latency(self, plan: Plan) -> float | None:
        """The latency of a plan if this run has measured it."""
        return self._latencies.get(_key(plan))

    def try_candidates(self, candidates: Sequence[Candidate | None], task: Task | None = None) -> list[Evaluated]:
        """Evaluate candidates on the selection images and record them; those that do not fit are left out."""
        distinct = list({one.key: one for one in candidates if one is not None}.values())
        values = self.cached_quality([one.plan for one in distinct], "selection", task or SilentTask())
        results = [Evaluated(one, found) for one, found in zip(distinct, values, strict=True) if found is not None]
        for result in results:
            self.tried.setdefault(result.candidate.key, result)
        return results


def _key(plan: Plan) -> str:
    return sha256(plan.model_dump_json().encode()).hexdigest()[:20]


def _relative_error(speedup: Speedup, rounds: int) -> float:
    """Relative standard error of a measured ratio, from the spread of the rounds."""
    return (speedup.p90 - speedup.p10) / (_DECILES_APART * speedup.ratio * math.sqrt(rounds))


def _compare(subset: ImageSubset, outputs: Tensor, neighbours: int) -> dict[str, Any] | None:
    """The quality of outputs, rounded so that the number of threads does not decide between two candidates."""
    dense, head = subset.dense.reference, subset.dense.are_logits
    mean_distance = _mean(distance(dense, outputs, head))
    if not math.isfinite(mean_distance):
        return None
    far = divergence(dense, outputs, head)
    found: dict[str, Any] = {"images": len(outputs), "distance": mean_distance, "kl": _mean(far)}
    recall = None
    if not head and len(outputs) >= 2 * neighbours:  # with fewer entries it would be high by chance
        own = torch.arange(len(dense), device=dense.device)
        vectors, given = dense.flatten(1), {"": outputs.flatten(1)}  # of a tower all tokens
        recall = recall_at(vectors, given, vectors, [neighbours], own)[""][neighbours]
    found["cosine_error"] = None if head else _error(far)
    found["recall"], found["recall_error"] = (None, None) if recall is None else (_mean(recall), _error(recall))
    same = agreement(dense, outputs) if head else None
    found["agreement"], found["agreement_error"] = (None, None) if same is None else (_mean(same), _error(same))
    if subset.labels is None or not head:
        return found | {"top1": None, "lost": None, "lost_error": None}
    correct, before = (100.0 * (logits.argmax(-1) == subset.labels).float() for logits in (outputs, dense))
    return found | {"top1": _mean(correct), "lost": _mean(before - correct), "lost_error": _error(before - correct)}


def _mean(values: Tensor) -> float:
    return round(float(values.double().mean()), _DIGITS)


def _error(values: Tensor) -> float:
    """Standard error of the mean."""
    return round(float(values.double().std()) / math.sqrt(len(values)), _DIGITS) if len(values) > 1 else 0.0
