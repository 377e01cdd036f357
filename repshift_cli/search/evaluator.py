"""Measures plans on the images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
from repshift_cli.planning.layout import After
from repshift_cli.planning.plan import Plan
from repshift_cli.planning.recipe import ComponentSpec
from repshift_cli.reduction.compressed_model import attach
from repshift_cli.reduction.families.base import Family
from repshift_cli.search.additive import Kept
from repshift_cli.search.result import SearchSettings
from repshift_cli.utils.progress import Progress, Task

__all__ = ["Candidate", "Evaluated", "Evaluator", "NoTask", "Timed", "plan_key"]

# On two slow cores a ViT-S takes 35 ms for an image, and a search is to end within 10 minutes: 15,000 images.
_CHOICE_IMAGES = 64
"""For the choice among 30 scores at one site: in rounds, so 400 part passes; as many as calibration takes of 128."""


_SENSE_IMAGES = 48
"""For the harm of one layer at one ratio, of which there are 48 for 12 layers; refinement corrects their noise."""


_JUDGE_IMAGES = 128
"""For each evaluation of a schedule. Where the target is a quality all choosing images are used: it needs them."""


_LATENCY_DOUBT = 0.01
"""Of a measured ratio, its standard error above which it is measured for longer: a third of the slack."""


_DECILES_APART = 2.05
"""From the 10th to the 90th percentile in standard errors of a median of one: 2.56 deviations, at 1.25 each."""


_DIGITS = 7


@dataclass(frozen=True)
class ImageSubset:
    """Some of the images, and what the dense model makes of them."""

    images: Tensor
    dense: ReferenceOutputs
    labels: Tensor | None


class Evaluator:
    """The model and the images; every method is a pure function of its arguments, but for latency."""

    def __init__(self, model: nn.Module, family: Family, settings: SearchSettings, progress: Progress) -> None:
        self.model = model
        self.family = family
        self.batch_size = settings.batch_size
        self.seconds = settings.seconds
        self.layout = family.layout(model)
        sample = next(model.parameters())
        self.images = settings.images.to(device=sample.device, dtype=sample.dtype)
        self.labels = None if settings.labels is None else settings.labels.to(sample.device)
        with progress.task("dense model", len(self.images)) as task:
            self.outputs = run_batches(model, self.images, settings.batch_size, task)
        if not bool(self.outputs.isfinite().all()):
            raise CheckFailed("the dense model returns values that are not finite", "Search in float32.")
        half = len(self.images) // 2
        judged = min(half, _JUDGE_IMAGES) if settings.target.limits_cost else half
        self.parts = {
            "choice": self._part(0, min(half, _CHOICE_IMAGES)),
            "sense": self._part(0, min(half, _SENSE_IMAGES)),
            "judge": self._part(0, judged),
            "held": self._part(half, len(self.images)),
        }

    def _part(self, start: int, stop: int) -> ImageSubset:
        labels = None if self.labels is None else self.labels[start:stop]
        return ImageSubset(self.images[start:stop], reference_outputs(self.model, self.outputs[start:stop]), labels)

    @property
    def has_head(self) -> bool:
        """Whether there are predictions that can stay the same."""
        return self.parts["judge"].dense.are_logits

    @cached_property
    def dense_macs(self) -> int:
        """Multiply-accumulates of one image through the dense model."""
        return self.family.macs(self.model, None)

    def macs(self, plan: Plan) -> float:
        """Of one image, those of metric and reducer included, as a fraction of the dense model's.

        Raises:
            RecipeError: the model cannot carry out the plan.
        """
        compressed = attach(self.model, plan)
        try:
            return compressed.macs() / self.dense_macs
        finally:
            compressed.detach()

    def judge(self, plan: Plan, name: str) -> dict[str, Any] | None:
        """How far the plan is from the dense model on a part of the images; None where it cannot be carried out."""
        part = self.parts[name]
        try:
            compressed = attach(self.model, plan)
        except RecipeError:
            return None
        try:
            outputs = run_batches(compressed, part.images, self.batch_size, NoTask())
        finally:
            compressed.detach()
        return _compare(part, part.dense.of(outputs)) if bool(outputs.isfinite().all()) else None

    def dense_point(self, name: str) -> dict[str, Any]:
        """The dense model against itself."""
        part = self.parts[name]
        values = _compare(part, part.dense.reference)
        assert values is not None
        return {**values, "distance": 0.0, "kl": 0.0}

    def choose(self, plan: Plan) -> list[dict[str, Any]] | None:
        """The metric of each site, open fields filled one site after the other; None where a site can feed none."""
        part = self.parts["choice"]
        run = CandidateRunner(self.model, part.images, part.dense, self.batch_size, NoTask())
        sites = {site.name: site for site in self.family.sites(self.model)}
        chosen: list[ComponentSpec] = []
        try:
            for planned in plan.sites:
                variants = runnable(planned, sites[planned.site])
                if len(variants) > 1:
                    so_far = plan.with_metrics([*chosen, planned.metric])
                    chosen.append(choose_metric(run, so_far, variants, len(part.images)).chosen.spec())
                else:
                    chosen.append(variants[0].spec())
        except RecipeError:
            return None
        return [found.model_dump() for found in chosen]

    def fit(self, layers: Sequence[int], after: After, task: Task) -> dict[str, dict[str, Any]]:
        """The fitted metric of each layer, by its number."""
        found = fit_scores(self.model, layers, self.parts["choice"].images, self.batch_size, 0, task, after=after)
        return {str(layer): metric.spec().model_dump() for layer, metric in found.items()}

    @property
    def place(self) -> str:
        """What a latency hangs on beside the plan."""
        device = next(self.model.parameters()).device
        return f"{device_name(device)}, {torch.get_num_threads()} threads, batch {self.batch_size}"

    def latency(self, plan: Plan, progress: Progress, patient: bool = False) -> float:
        """Time of a batch as a fraction of the dense model's, measured in turn with it.

        Args:
            patient: measure as long again where the times spread so much that the median is not sure.
        """
        inputs = full_batch(self.images, self.batch_size)
        compressed = attach(self.model, plan)
        try:
            subjects = [Subject("dense", compressed, compressed.dense), Subject("candidate", compressed)]
            times = measure_latency(subjects, inputs, max_seconds=self.seconds, warmup=2, progress=progress)
            found = compute_speedup(times["dense"], times["candidate"])
            if patient and _doubt(found, len(times["dense"].samples_s)) > _LATENCY_DOUBT:
                more = measure_latency(subjects, inputs, max_seconds=self.seconds, warmup=0, progress=progress)
                both = {name: Timing(times[name].samples_s + more[name].samples_s) for name in times}
                found = compute_speedup(both["dense"], both["candidate"])
        finally:
            compressed.detach()
        return round(1.0 / found.ratio, 5)


def _doubt(found: Speedup, rounds: int) -> float:
    """Standard error of a measured ratio, as a share of it, as far as the spread of the rounds tells."""
    return (found.p90 - found.p10) / (_DECILES_APART * found.ratio * math.sqrt(rounds))


class NoTask:
    """A task that nobody watches: what is shown are whole candidates, not their batches."""

    def advance(self, steps: int = 1) -> None:
        pass


def _compare(part: ImageSubset, given: Tensor) -> dict[str, Any] | None:
    """The numbers of one candidate, rounded so that the number of threads does not decide between two."""
    wanted, head = part.dense.reference, part.dense.are_logits
    far = _mean(distance(wanted, given, head))
    if not math.isfinite(far):
        return None
    found: dict[str, Any] = {"images": len(given), "distance": far, "kl": _mean(divergence(wanted, given, head))}
    same = agreement(wanted, given) if head else None
    found["agreement"], found["agreement_error"] = (None, None) if same is None else (_mean(same), _error(same))
    if part.labels is None or not head:
        return found | {"top1": None, "lost": None, "lost_error": None}
    right, before = (100.0 * (logits.argmax(-1) == part.labels).float() for logits in (given, wanted))
    return found | {"top1": _mean(right), "lost": _mean(before - right), "lost_error": _error(before - right)}


def _mean(values: Tensor) -> float:
    return round(float(values.double().mean()), _DIGITS)


def _error(values: Tensor) -> float:
    """Standard error of the mean."""
    return round(float(values.double().std()) / math.sqrt(len(values)), _DIGITS) if len(values) > 1 else 0.0


@dataclass(frozen=True)
class Candidate:
    """A schedule with all that makes it a plan; `macs` is a fraction of the dense model's."""

    kept: Kept
    plan: Plan
    macs: float
    name: str

    @property
    def key(self) -> str:
        return plan_key(self.plan)


@dataclass(frozen=True)
class Evaluated:
    """A candidate and what it does to the choosing images; `values` as `_compare`."""

    candidate: Candidate
    values: Mapping[str, Any]

    @property
    def order(self) -> tuple[float, int, float, Kept]:
        """The smallest is the best at one cost; among equals the one with the fewest sites."""
        candidate = self.candidate
        return (self.values["distance"], len(candidate.plan.sites), candidate.macs, candidate.kept)


@dataclass(frozen=True)
class Timed:
    """A candidate, its latency as a fraction of the dense model's, and whether that is above the target."""

    candidate: Candidate
    latency: float
    slow: bool

    def by_macs(self) -> float:
        """Its operations, to sort by."""
        return self.candidate.macs


def plan_key(plan: Plan) -> str:
    """Short hash of a plan, the key of its evaluations."""
    return sha256(plan.model_dump_json().encode()).hexdigest()[:20]
