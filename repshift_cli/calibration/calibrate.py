"""Choose the metric of each site by its effect on the predictions for unlabelled images.

The best operation, distance, reading and polarity of the shift depend on the model and the layer: in the built-in ViT,
the tokens to keep are those with the largest shift in block 0 and those with the smallest in block 3 (docs/results.md).
So at the first site every way to fill the open fields is tried, and the one with predictions nearest to the dense
model's is chosen; then the next site, given the earlier choices, and so on.

At each site the candidates run in rounds: all on a few images, then fewer on more. The paper's choice runs to the end,
and is kept unless another is better by more than chance. Candidates share the layers before the site (`branch`).
Finally all choices together are compared on held-out images with random dropping and with the paper's choice.

Where the user names no metric (`cover`), even coverage of the image and random dropping are candidates too, and replace
the choice at all sites if they are better. So the result is not worse than random but for chance.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from repshift_cli.calibration.fit import fit_scores
from repshift_cli.calibration.outputs import ReferenceOutputs, agreement, distance, reference_outputs, run_batches
from repshift_cli.errors import CheckFailed, DataError, RecipeError
from repshift_cli.planning.plan import Plan, PlanSite
from repshift_cli.planning.recipe import ComponentSpec
from repshift_cli.reduction.checks import feeds
from repshift_cli.reduction.compressed_model import attach, branch
from repshift_cli.reduction.families.base import Family, Site
from repshift_cli.reduction.metrics.base import Metric, build_metric
from repshift_cli.reduction.metrics.coverage import Coverage
from repshift_cli.reduction.metrics.fitted import Fitted
from repshift_cli.reduction.metrics.grid import Grid
from repshift_cli.reduction.metrics.random import Random
from repshift_cli.reduction.plans import with_defaults
from repshift_cli.utils.progress import Progress, Task

_ROUNDS = ((1 / 8, 5), (3 / 8, 2), (1.0, 1))
"""After each round: the share of the images for choosing that were used, and the number of candidates kept."""

_CHOOSING_SHARE = 0.5
"""Share of all images for choosing; the others are held out."""

_MARGIN_SIGMAS = 1.0
"""A candidate replaces the paper's choice if it is better by this many standard errors."""

_RANDOM_SEEDS = (0, 1)
_COVERING = {"grid", "random"}
_FIT_SEED = 0
CLEAR_SIGMAS = 3.0
_CLEAR_SHARE = 0.9
MIN_IMAGES = 8
_MILD_AGREEMENT = 0.9
_MIN_MILD = 16
"""Minimum number of images to judge how often predictions change."""


@dataclass
class Deviation:
    """Distance of predictions from the dense model's, per image.

    Attributes:
        distances: squared Hellinger distance between the probabilities, or one minus the cosine of features.
        agreeing: 1.0 if the predicted class is the same. Empty for features.
        outputs: of the model, by batch.
    """

    distances: list[float] = field(default_factory=list)
    agreeing: list[float] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def distance(self) -> float:
        """Mean distance over the images."""
        return math.fsum(self.distances) / len(self.distances) if self.distances else math.inf

    @property
    def agreement(self) -> float | None:
        """Share of unchanged predictions."""
        return math.fsum(self.agreeing) / len(self.agreeing) if self.agreeing else None

    def compare(self, dense: ReferenceOutputs, start: int) -> None:
        """Compare all outputs, from image `start` on, with those of the dense model."""
        given = dense.of(torch.cat(self.outputs))
        wanted = dense.reference[start : start + len(given)]
        far = distance(wanted, given, dense.are_logits)
        self.distances = torch.where(far.isfinite(), far, math.inf).tolist()
        if dense.are_logits:
            self.agreeing = agreement(wanted, given).tolist()

    def numbers(self) -> dict[str, Any]:
        """Number of images, mean distance and share of unchanged predictions."""
        return {
            "images": len(self.distances),
            "distance": round(self.distance, 6) if math.isfinite(self.distance) else None,
            "agreement": None if self.agreement is None else round(self.agreement, 6),
        }


@dataclass
class CandidateResult(Deviation):
    """The deviation of one candidate."""

    metric: Metric = field(kw_only=True)

    def to_dict(self) -> dict[str, Any]:
        return {"metric": self.metric.spec().model_dump(), **self.numbers()}


@dataclass(frozen=True)
class SiteChoice:
    """The candidates at one site: the chosen one, then the others, best first. Those dropped early saw fewer images."""

    site: str
    candidates: tuple[CandidateResult, ...]

    @property
    def chosen(self) -> Metric:
        """The best candidate."""
        return self.candidates[0].metric

    def to_dict(self) -> dict[str, Any]:
        candidates = [candidate.to_dict() for candidate in self.candidates]
        return {"site": self.site, "chosen": self.chosen.spec().model_dump(), "candidates": candidates}


@dataclass(frozen=True)
class Calibration:
    """The result of calibration.

    Attributes:
        result: all choices together, on the held-out images.
        random: random dropping with the same token counts, mean of several draws, on the same images.
        default: the paper's choice, on the same images: its metrics, or `usual`.
        sigmas: by how many standard errors the result is better than random, over paired images.
        clear: whether that is a clear margin.
        images: number of images for choosing and checking together; `identity` is theirs, for the record.
        covers: whether even coverage and random dropping were candidates.
    """

    sites: tuple[SiteChoice, ...]
    result: Deviation
    random: Deviation
    default: Deviation
    sigmas: float
    clear: bool
    images: int
    identity: Mapping[str, Any]
    seconds: float
    covers: bool = False

    @property
    def accepted(self) -> bool:
        """Whether the choice can be used: it is clear or mild, or the tool was free to cover and it is not worse."""
        return self.clear or self.mild or (self.covers and self.sigmas > -_MARGIN_SIGMAS)

    def coverage_note(self) -> str:
        """What is used where no score is clearly better than random dropping, but the choice is accepted."""
        even = [choice.site for choice in self.sites if choice.chosen.kind in _COVERING]
        used = f". At {', '.join(even)} tokens are dropped by their position alone" if even else ""
        return f"no score is clearly better than random dropping ({self.sigmas:.1f} standard errors), nor worse{used}"

    @property
    def mild(self) -> bool:
        """Whether random dropping keeps nine of ten predictions, and the choice is not worse by more than chance."""
        enough = len(self.random.agreeing) >= _MIN_MILD
        return enough and (self.random.agreement or 0.0) >= _MILD_AGREEMENT and self.sigmas > -_MARGIN_SIGMAS

    @property
    def specs(self) -> list[ComponentSpec]:
        """The chosen metric of each site, as in a plan."""
        return [choice.chosen.spec() for choice in self.sites]

    def unclear_error(self) -> CheckFailed:
        """The error if no candidate is clearly better than random dropping."""
        random, chosen = self.random, self.result
        if random.agreement is None or chosen.agreement is None:
            numbers = (
                f"prediction distance {random.distance:.4f} for random dropping, {chosen.distance:.4f} for the choice"
            )
        else:
            numbers = (
                f"random dropping kept {random.agreement:.1%} of predictions, the chosen score {chosen.agreement:.1%}"
            )
        found = "no score is clearly better" if self.sigmas >= 0 else "the chosen score is worse"
        return CheckFailed(
            f"{found} than random dropping: {numbers} "
            f"({self.sigmas:.1f} standard errors, {len(chosen.distances)} inputs)",
            "Calibrate on more inputs of the model's own kind, drop fewer tokens, or add --force.",
        )

    def to_dict(self) -> dict[str, Any]:
        checked = {"chosen": self.result, "random": self.random, "default": self.default}
        return {
            "clear": self.clear,
            "mild": self.mild,
            "sigmas": round(self.sigmas, 2),
            "images": self.images,
            "data": dict(self.identity),
            "checked": {name: result.numbers() for name, result in checked.items()},
            "sites": [choice.to_dict() for choice in self.sites],
        }


@torch.inference_mode()
def calibrate(
    model: nn.Module,
    family: Family,
    plan: Plan,
    *,
    usual: Plan | None = None,
    images: Tensor,
    identity: Mapping[str, Any],
    batch_size: int,
    progress: Progress,
    cover: bool = False,
) -> Calibration:
    """Fill the open fields of the metrics of a plan, site by site.

    Args:
        model: dense, in eval mode, on the device and in the dtype to calibrate in.
        usual: the plan to compare with; None for this plan with the paper's choice for its open fields.
        images: `[n, C, H, W]`, preprocessed, unlabelled; at least 8.
        identity: of the images, for the record.
        cover: also try even coverage and random dropping, since the user names no metric.

    Raises:
        DataError: too few images.
        RecipeError: no candidate can run on this model.
        CheckFailed: the dense model returns values that are not finite.
    """
    if len(images) < MIN_IMAGES:
        raise DataError(f"calibration needs at least {MIN_IMAGES} images, there are {len(images)}")
    begin = time.monotonic()
    sample = next(model.parameters())
    images = images.to(device=sample.device, dtype=sample.dtype)
    sites = {site.name: site for site in family.sites(model)}
    border = math.ceil(_CHOOSING_SHARE * len(images))
    with ExitStack() as stack:
        stack.callback(family.adapt(model))  # compare with the dense model as adapted for reduction
        unfitted_plan, plan = plan, fit_open(model, plan, images[:border], batch_size, progress)
        variants = [runnable(planned, sites[planned.site]) for planned in plan.sites]
        if cover:
            variants = [
                [*found, *covering(found[0], sites[planned.site], planned)]
                for found, planned in zip(variants, plan.sites, strict=True)
            ]
        steps = _steps([len(found) for found in variants], len(images)) + cover * border
        task = stack.enter_context(progress.task("calibrating", steps))
        reference = run_batches(model, images, batch_size, task)
        if not bool(reference.isfinite().all()):
            raise CheckFailed("the dense model returns values that are not finite", "Calibrate in float32.")
        run = CandidateRunner(model, images, reference_outputs(model, reference), batch_size, task)
        choices: list[SiteChoice] = []
        for planned, candidates in zip(plan.sites, variants, strict=True):
            before = [choice.chosen.spec() for choice in choices]
            choices.append(choose_metric(run, plan.with_metrics([*before, planned.metric]), candidates, border))
        if cover:
            choices = _covered(run, plan, choices, [found[-1] for found in variants], border)
        result = run.check(plan.with_metrics([choice.chosen.spec() for choice in choices]), border)
        specs = [ComponentSpec.model_validate({"kind": "random", "seed": seed}) for seed in _RANDOM_SEEDS]
        draws = [run.check(plan.with_metric(spec), border) for spec in specs]
        default = run.check(with_defaults(usual or unfitted_plan, sites), border)
    random = _mean_of(draws)
    sigmas = paired_sigmas(random.distances, result.distances)
    clear = sigmas >= CLEAR_SIGMAS and result.distance <= _CLEAR_SHARE * random.distance
    seconds = time.monotonic() - begin
    return Calibration(tuple(choices), result, random, default, sigmas, clear, len(images), identity, seconds, cover)


def covering(metric: Metric, site: Site, planned: PlanSite) -> list[Metric]:
    """Candidates that leave no region empty: by similarity, at random, and last by position where it is known."""
    # a map of similarities is costly for a large feature map
    own = [] if planned.grid_in or isinstance(metric, Coverage) else [Coverage(of=metric.spec())]
    found: list[Metric] = [*own, Random(seed=len(_RANDOM_SEEDS)), Grid()]
    return [candidate for candidate in found if feeds(candidate, site, planned.after)]


def _covered(
    run: CandidateRunner, plan: Plan, choices: list[SiteChoice], even: Sequence[Metric], border: int
) -> list[SiteChoice]:
    """The choices, or even coverage at every site if it is better by more than chance on the images for choosing."""
    together = run.check(plan.with_metrics([metric.spec() for metric in even]), 0, border)
    # the candidates at the last site ran with all earlier choices
    if paired_sigmas(choices[-1].candidates[0].distances, together.distances) < _MARGIN_SIGMAS:
        return choices
    results = [CandidateResult(together.distances, together.agreeing, metric=metric) for metric in even]
    return [SiteChoice(old.site, (new, *old.candidates)) for old, new in zip(choices, results, strict=True)]


def fit_open(model: nn.Module, plan: Plan, images: Tensor, batch_size: int, progress: Progress) -> Plan:
    """The plan with its unfitted scores fitted; errors as `fit_scores`."""
    metrics = [build_metric(planned.metric) for planned in plan.sites]
    wanted = [index for index, metric in enumerate(metrics) if unfitted(metric)]
    if not wanted:
        return plan
    with progress.task("fitting the score", len(images)) as task:
        layers, after = [plan.sites[index].layer for index in wanted], plan.sites[0].after
        found = fit_scores(model, layers, images, batch_size, _FIT_SEED, task, after=after)
    parts = [planned.metric for planned in plan.sites]
    for index, layer in zip(wanted, layers, strict=True):
        parts[index] = with_weights(parts[index], found[layer].spec())
    return plan.with_metrics(parts)


def unfitted(metric: Metric) -> bool:
    """Whether the metric, or the one inside it, needs weights and has none yet."""
    return isinstance(inner(metric), Fitted) and metric.open


def inner(metric: Metric) -> Metric:
    """The score that a metric is computed from."""
    return metric.inner if isinstance(metric, Coverage) else metric


def with_weights(spec: ComponentSpec, fitted: ComponentSpec) -> ComponentSpec:
    """An unfitted metric with the fitted score in place of its own."""
    metric = build_metric(spec)
    return metric.around(fitted).spec() if isinstance(metric, Coverage) else fitted


def choose_metric(run: CandidateRunner, plan: Plan, variants: Sequence[Metric], count: int) -> SiteChoice:
    """The best metric for the last site of the plan, on the first `count` images."""
    candidates = [CandidateResult(metric=variant) for variant in variants]
    if len(candidates) == 1:
        return SiteChoice(plan.sites[-1].site, tuple(candidates))
    usual, alive, seen = candidates[0], candidates, 0
    for until, survivors in _rounds(count):
        run.compare(plan, alive, seen, until)
        best = sorted(alive, key=lambda candidate: candidate.distance)[:survivors]
        alive = best if usual in best else [*best[:-1], usual]
        seen = until
    ranked = sorted(candidates, key=lambda result: (-len(result.distances), result.distance))
    # with few images one or two may decide, so the paper's choice is only replaced by a clearly better one
    if paired_sigmas(usual.distances, ranked[0].distances) < _MARGIN_SIGMAS:
        ranked.remove(usual)
        ranked.insert(0, usual)
    return SiteChoice(plan.sites[-1].site, tuple(ranked))


def _rounds(count: int) -> list[tuple[int, int]]:
    return [(math.ceil(share * count), survivors) for share, survivors in _ROUNDS]


@dataclass(frozen=True)
class CandidateRunner:
    """Runs plans on the images and measures the deviation from the dense model."""

    model: nn.Module
    images: Tensor
    dense: ReferenceOutputs
    batch_size: int
    task: Task

    def compare(self, plan: Plan, candidates: Sequence[CandidateResult], start: int, stop: int) -> None:
        """Run the candidates for the last site, which have seen the images before `start`, on those up to `stop`."""
        branched = branch(self.model, plan, [candidate.metric for candidate in candidates])
        # about as many rows as four plain batches, for any number of candidates
        size = max(1, 4 * self.batch_size // len(candidates))
        try:
            for first in range(start, stop, size):
                last = min(first + size, stop)
                outputs = branched(self.images[first:last]).unflatten(0, (len(candidates), last - first))
                for candidate, output in zip(candidates, outputs, strict=True):
                    candidate.outputs.append(output)
                self.task.advance(len(candidates) * (last - first))
        finally:
            branched.detach()
        for candidate in candidates:
            candidate.compare(self.dense, 0)

    def check(self, plan: Plan, start: int, stop: int | None = None) -> Deviation:
        """The deviation of a plan on the images from `start` on, up to `stop`."""
        compressed = attach(self.model, plan)
        try:
            output = run_batches(compressed, self.images[start:stop], self.batch_size, self.task)
        finally:
            compressed.detach()
        result = Deviation(outputs=[output])
        result.compare(self.dense, start)
        return result


def runnable(planned: PlanSite, site: Site) -> list[Metric]:
    """The variants that the site supports."""
    metric = build_metric(planned.metric)
    found = [variant for variant in metric.variants() if feeds(variant, site, planned.after)]
    if not found:
        raise RecipeError(
            f"no variant of {metric.kind} can run at {site.name} of this model", "operation: block always can."
        )
    return found


def _steps(variants: Sequence[int], images: int) -> int:
    """Number of images in the dense pass, all rounds and the final checks."""
    border = math.ceil(_CHOOSING_SHARE * images)
    checks = 2 + len(_RANDOM_SEEDS)
    steps = images + checks * (images - border)
    for count in (count for count in variants if count > 1):
        seen, alive = 0, count
        for until, survivors in _rounds(border):
            steps += alive * (until - seen)
            seen, alive = until, min(alive, survivors)
    return steps


def _mean_of(draws: list[Deviation]) -> Deviation:
    def mean(columns: list[list[float]]) -> list[float]:
        return [math.fsum(image) / len(image) for image in zip(*columns, strict=True)]

    return Deviation(mean([draw.distances for draw in draws]), mean([draw.agreeing for draw in draws]))


def paired_sigmas(worse: list[float], better: list[float]) -> float:
    """The paired mean of `worse - better` in standard errors."""
    if not all(map(math.isfinite, (*worse, *better))):
        lost = sum(map(math.isinf, worse)) - sum(map(math.isinf, better))
        return math.copysign(99.0, lost) if lost else 0.0
    gaps = [first - second for first, second in zip(worse, better, strict=True)]
    mean = math.fsum(gaps) / len(gaps)
    variance = math.fsum((gap - mean) ** 2 for gap in gaps) / max(len(gaps) - 1, 1)
    if variance == 0.0:
        return math.copysign(99.0, mean) if mean else 0.0
    return mean / math.sqrt(variance / len(gaps))
