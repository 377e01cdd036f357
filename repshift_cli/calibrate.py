"""Choose the score by what it does to the predictions on unlabelled images.

Which operation, distance, reading and sign of the shift is the right one is a property of the model: on some the
paper's choice is far worse than chance and its opposite nearly lossless (docs/results.md). So every way to fill the
fields that the recipe leaves open is tried, and the one whose predictions stay nearest to the dense model's is taken.

The candidates run in rounds, all on a few images, then fewer on more: bad ones show at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from repshift_cli.attach import attach
from repshift_cli.errors import DataError, RecipeError
from repshift_cli.families import Family
from repshift_cli.metrics import Metric, build_metric
from repshift_cli.plan import Plan
from repshift_cli.progress import Progress, Task
from repshift_cli.recipe import Part

__all__ = ["Calibration", "CandidateResult", "agreement", "calibrate", "divergence"]

_ROUNDS = ((1 / 8, 6), (3 / 8, 3), (1.0, 1))
"""Share of the images that have been seen after each round, and how many candidates survive it."""

_RANDOM_SEEDS = (0, 1)
_CLEAR_SIGMAS = 3.0
_CLEAR_SHARE = 0.9
_MIN_IMAGES = 8


@dataclass
class CandidateResult:
    """One candidate and how far its predictions are from the dense model's, image by image.

    Attributes:
        divergences: per image: KL(dense || compressed) in nats, or one minus the cosine where there is no head.
        agreeing: per image: 1.0 where the predicted class is the same. Empty where there is no head.
    """

    metric: Metric
    divergences: list[float] = field(default_factory=list)
    agreeing: list[float] = field(default_factory=list)

    @property
    def divergence(self) -> float:
        """Mean divergence over the images seen."""
        return math.fsum(self.divergences) / len(self.divergences) if self.divergences else math.inf

    @property
    def agreement(self) -> float | None:
        """Share of unchanged predictions."""
        return math.fsum(self.agreeing) / len(self.agreeing) if self.agreeing else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "metric": self.metric.part().model_dump(),
            "images": len(self.divergences),
            "divergence": round(self.divergence, 6),
            "agreement": None if self.agreement is None else round(self.agreement, 6),
        }


@dataclass(frozen=True)
class Calibration:
    """What calibration found.

    Attributes:
        chosen: the metric to use, all fields filled.
        candidates: every candidate, best first; those that were dropped early saw fewer images.
        random: the same cost with tokens dropped at random, mean of several draws.
        sigmas: how many standard errors the chosen one is better than random, over paired images.
        clear: whether that is a clear margin.
    """

    chosen: Metric
    candidates: tuple[CandidateResult, ...]
    random: CandidateResult
    sigmas: float
    clear: bool
    images: int
    identity: Mapping[str, Any]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "chosen": self.chosen.part().model_dump(),
            "clear": self.clear,
            "sigmas": round(self.sigmas, 2),
            "images": self.images,
            "data": dict(self.identity),
            "random": {key: value for key, value in self.random.to_dict().items() if key != "metric"},
            "candidates": [candidate.to_dict() for candidate in self.candidates],
        }


@torch.inference_mode()
def calibrate(
    model: nn.Module,
    family: Family,
    plan: Plan,
    metric: Metric,
    *,
    images: Tensor,
    identity: Mapping[str, Any],
    batch_size: int,
    progress: Progress,
) -> Calibration:
    """Fill the open fields of a metric.

    Args:
        model: dense, in eval mode, on the device and in the dtype to calibrate in.
        family: the model's family.
        plan: how many tokens go where.
        metric: some of its fields are open.
        images: `[n, C, H, W]`, preprocessed, unlabelled; at least 8.
        identity: what the images are, for the record.

    Raises:
        DataError: too few images.
        RecipeError: no candidate can run on this model.
    """
    if len(images) < _MIN_IMAGES:
        raise DataError(f"calibration needs at least {_MIN_IMAGES} images, there are {len(images)}")
    begin = time.monotonic()
    candidates = [CandidateResult(variant) for variant in _runnable(metric, family, model, plan)]
    draws = [
        CandidateResult(build_metric(Part.model_validate({"kind": "random", "seed": seed}))) for seed in _RANDOM_SEEDS
    ]
    with progress.task("calibrating", _steps(len(candidates), len(images))) as task:
        reference = _outputs(model, images, batch_size, task)
        runner = _Runner(model, plan, images, reference, batch_size=batch_size, task=task)
        alive, seen = candidates, 0
        for share, survivors in _ROUNDS:
            until = max(seen, math.ceil(share * len(images)))
            for candidate in [*alive, *draws]:
                runner.run(candidate, seen, until)
            alive = sorted(alive, key=lambda candidate: candidate.divergence)[:survivors]
            seen = until
    best, random = alive[0], _mean_of(draws)
    sigmas = _sigmas(random.divergences, best.divergences)
    clear = sigmas >= _CLEAR_SIGMAS and best.divergence <= _CLEAR_SHARE * random.divergence
    ranked = sorted(candidates, key=lambda result: (-len(result.divergences), result.divergence))
    seconds = time.monotonic() - begin
    return Calibration(best.metric, tuple(ranked), random, sigmas, clear, len(images), identity, seconds)


def divergence(reference: Tensor, output: Tensor, has_head: bool) -> Tensor:
    """How far outputs are from the dense model's, per image, in float32.

    Args:
        reference, output: `[B, classes]` logits, or `[B, channels]` features where `has_head` is off.

    Returns:
        `[B]`: KL(reference || output) in nats for logits, `1 - cosine` for features.
    """
    if not has_head:
        return 1.0 - torch.nn.functional.cosine_similarity(reference.float(), output.float(), dim=-1)
    wanted, given = reference.float().log_softmax(-1), output.float().log_softmax(-1)
    return (wanted.exp() * (wanted - given)).sum(-1).clamp_min(0.0)


def agreement(reference: Tensor, output: Tensor) -> Tensor:
    """1.0 for each image whose predicted class is the same, else 0.0: `[B, classes]` twice to float32 `[B]`."""
    return (reference.argmax(-1) == output.argmax(-1)).float()


class _Runner:
    """Runs candidates on slices of the images and appends what comes out to their results."""

    def __init__(
        self, model: nn.Module, plan: Plan, images: Tensor, reference: Tensor, *, batch_size: int, task: Task
    ) -> None:
        self.model = model
        self.plan = plan
        self.images = images
        self.reference = reference
        self.batch_size = batch_size
        self.task = task
        self.has_head = getattr(model, "num_classes", 0) > 0

    def run(self, candidate: CandidateResult, start: int, stop: int) -> None:
        compressed = attach(self.model, self.plan.with_metric(candidate.metric.part()))
        try:
            output = _outputs(compressed, self.images[start:stop], self.batch_size, self.task)
        finally:
            compressed.detach()
        wanted = self.reference[start:stop]
        candidate.divergences += divergence(wanted, output, self.has_head).tolist()
        if self.has_head:
            candidate.agreeing += agreement(wanted, output).tolist()


def _runnable(metric: Metric, family: Family, model: nn.Module, plan: Plan) -> Iterator[Metric]:
    """The variants that every site of the plan can feed."""
    sites = {site.name: site for site in family.sites(model)}
    always = {"block_input", "block_output"}
    found = False
    for variant in metric.variants():
        if all(variant.taps() <= always | set(sites[planned.site].probes) for planned in plan.sites):
            found = True
            yield variant
    if not found:
        raise RecipeError(f"no variant of {metric.kind} can run on this model", "operation: block always can.")


def _outputs(model: nn.Module, images: Tensor, batch_size: int, task: Task) -> Tensor:
    parts = []
    for batch in images.split(batch_size):
        parts.append(model(batch))
        task.advance(len(batch))
    return torch.cat(parts)


def _steps(candidates: int, images: int) -> int:
    """Forward passes of single images that all rounds take together, the dense one included."""
    steps, seen, alive = images, 0, candidates
    for share, survivors in _ROUNDS:
        until = max(seen, math.ceil(share * images))
        steps += (alive + len(_RANDOM_SEEDS)) * (until - seen)
        seen, alive = until, min(alive, survivors)
    return steps


def _mean_of(draws: list[CandidateResult]) -> CandidateResult:
    columns = zip(*(draw.divergences for draw in draws), strict=True)
    agreeing = zip(*(draw.agreeing for draw in draws), strict=True)
    return CandidateResult(
        draws[0].metric,
        [math.fsum(column) / len(column) for column in columns],
        [math.fsum(column) / len(column) for column in agreeing],
    )


def _sigmas(worse: list[float], better: list[float]) -> float:
    """By how many standard errors the paired mean of `worse - better` lies above zero."""
    gaps = [first - second for first, second in zip(worse, better, strict=True)]
    mean = math.fsum(gaps) / len(gaps)
    variance = math.fsum((gap - mean) ** 2 for gap in gaps) / max(len(gaps) - 1, 1)
    if variance == 0.0:
        return math.copysign(99.0, mean) if mean else 0.0
    return mean / math.sqrt(variance / len(gaps))
