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

import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from repshift_cli import __version__
from repshift_cli.attach import acts_after, attach, resolve_for
from repshift_cli.calibrate import (
    Predictions,
    Run,
    agreement,
    choose_metric,
    distance,
    divergence,
    predictions,
    run_batches,
    runnable,
    unfitted,
)
from repshift_cli.digests import digest_of_tensors
from repshift_cli.errors import CheckFailed, DataError, RecipeError, UsageError
from repshift_cli.families import Family
from repshift_cli.files import atomic_output
from repshift_cli.fitting import fit_scores
from repshift_cli.intervals import percent_interval, wilson_interval
from repshift_cli.measure import Speedup, Subject, Timing, device_name, full_batch, measure_latency, speedup
from repshift_cli.metrics import build_metric
from repshift_cli.plan import After, Plan, resolve
from repshift_cli.processes import Processes, together
from repshift_cli.progress import Progress, Silent, Task
from repshift_cli.recipe import PAPER_DROP_RATIO, Part, Recipe, default_recipe
from repshift_cli.schedule import (
    Additive,
    Curve,
    Front,
    Kept,
    Solution,
    Target,
    fit,
    neighbours,
    on_tiles,
    paper_schedule,
    solve,
    to_recipe,
)

__all__ = [
    "Point",
    "SearchResult",
    "SearchSettings",
    "keep_outputs",
    "kept_outputs",
    "search",
]

_MIN_IMAGES = 16

# On two slow cores a ViT-S takes 35 ms for an image, and a search is to end within 10 minutes: 15,000 images.
_CHOICE_IMAGES = 64
"""For the choice among 30 scores at one site: in rounds, so 400 part passes; as many as calibration takes of 128."""

_SENSE_IMAGES = 48
"""For the harm of one layer at one ratio, of which there are 48 for 12 layers; refinement corrects their noise."""

_JUDGE_IMAGES = 128
"""For each evaluation of a schedule. Where the target is a quality all choosing images are used: it needs them."""

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
_LATENCY_DOUBT = 0.01
"""Of a measured ratio, its standard error above which it is measured for longer: a third of the slack."""

_DECILES_APART = 2.05
"""From the 10th to the 90th percentile in standard errors of a median of one: 2.56 deviations, at 1.25 each."""

_BLIND_STEP = 0.06
"""Of the operations, the step where the model sees no way on."""
_DIGITS = 7
_QUALITY_SLACK = 1e-6
"""Points of top-1 that rounding may cost."""

_FORMAT = 2
_OUTPUTS = "outputs"
_ALWAYS = frozenset({"images", "distance", "kl"})
_VALUES = _ALWAYS | {"agreement", "agreement_error", "top1", "lost", "lost_error"}
"""What `_compare` tells of a candidate; `_ALWAYS` is never None."""

_LARGEST = 1e300


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
    reducers: tuple[Part, ...] = ()
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
            return dense.top1 - found.top1 <= value + _QUALITY_SLACK
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
        bench = _Bench(model, family, settings, listener)
        memo = _Memo(settings.state, lambda: _header(model, settings), processes)
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


class _Memo:
    """What is known, by key; on disk where there is a file."""

    def __init__(self, path: Path | None, header: Callable[[], dict[str, Any]], processes: Processes) -> None:
        self._path = path
        self._processes = processes
        self._writes = path is not None and processes.rank == 0
        self._header = header() if self._writes else {}
        self._outputs: dict[str, str] = {}
        self._known: dict[str, Any] = {}
        self._load()

    def get(
        self, keys: Sequence[str], compute: Callable[[int], Any], task: Task, *, first_only: bool = False
    ) -> list[Any]:
        """The values of the keys; what is not known is computed, each by one of the processes.

        Args:
            compute: given the place of a key; what it returns has a form in JSON.
            task: advances by the number of keys.
            first_only: the first process computes them all.
        """
        missing = {key: index for index, key in reversed(list(enumerate(keys))) if key not in self._known}
        order = sorted(missing.values())
        count, rank = self._processes.count, self._processes.rank
        own = (order if rank == 0 else []) if first_only else order[rank::count]
        mine: dict[str, Any] = {}
        try:
            task.advance(len(keys) - len(order))
            for index in own:
                mine[keys[index]] = compute(index)
                task.advance()
        except BaseException:
            self._add(mine)
            raise
        gathered = _joined(self._processes.collect(mine))
        task.advance(len(order) - len(own))
        self._add({keys[index]: gathered[keys[index]] for index in order})
        return [self._known[key] for key in keys]

    def of_first(self, text: str) -> str:
        """What the first process says; every process calls this at the same point."""
        return self._processes.collect(text)[0]

    def alone(self) -> None:
        """As `Processes.alone`."""
        self._processes.alone()

    def _add(self, found: Mapping[str, Any]) -> None:
        # through JSON, so that what is read back later is what is used now
        self._known |= json.loads(json.dumps(found))
        if found and self._writes and self._path is not None:
            with atomic_output(self._path, force=True) as temporary:
                document = {**self._header, _OUTPUTS: self._outputs, "known": self._known}
                temporary.write_text(json.dumps(document), encoding="utf-8")

    def _load(self) -> None:
        mine: dict[str, Any] = {}
        if self._writes and self._path is not None and self._path.exists():
            self._outputs = kept_outputs(self._path)
            try:
                mine = {"known": _read_state(self._path, self._header)}
            except UsageError as error:
                mine = {"error": [error.message, error.hint]}
        found = _joined(self._processes.collect(mine))
        if "error" in found:
            raise UsageError(*found["error"])
        self._known = found.get("known", {})


def _joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Everything that the processes know."""
    return {key: value for part in parts for key, value in part.items()}


def _read_state(path: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    other = "Give another file, or remove it to begin anew."
    document = _state_document(path)
    if document is None or "known" not in document:
        raise UsageError(f"{path} is not the state of a search", other)
    known = document.pop("known")
    document.pop(_OUTPUTS, None)
    if document != json.loads(json.dumps(header)):
        differing = [key for key in header if document.get(key) != header[key]] or ["what it holds"]
        raise UsageError(f"{path} is the state of another search: it differs in {', '.join(differing)}", other)
    if not isinstance(known, dict) or not all(_can_be_known(key, value) for key, value in known.items()):
        raise UsageError(f"{path} is not the state of a search", other)
    return known


def _state_document(path: Path) -> dict[str, Any] | None:
    """What a state file holds; None where it is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _can_be_known(key: str, value: Any) -> bool:
    """Whether a value has the form that its kind of evaluation gives."""
    kind = key.partition(" ")[0]
    if kind == "latency":
        return _is_number(value) and value > 0
    if kind == "fit":
        return isinstance(value, dict) and all(_is_part(part) for part in value.values())
    if kind == "choose":
        return value is None or (isinstance(value, list) and all(_is_part(part) for part in value))
    if kind not in ("judge", "sense", "held"):
        return False
    return value is None or (
        isinstance(value, dict)
        and value.keys() >= _VALUES
        and all(_is_number(value[name]) for name in _ALWAYS)
        and all(value[name] is None or _is_number(value[name]) for name in _VALUES)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST


def _is_part(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("kind"), str)


def kept_outputs(state: Path) -> dict[str, str]:
    """What was written before this state was left: absolute path and SHA-256 of each file."""
    found = (_state_document(state) or {}).get(_OUTPUTS)
    return found if isinstance(found, dict) and all(isinstance(value, str) for value in found.values()) else {}


def keep_outputs(state: Path, outputs: Mapping[str, str]) -> None:
    """Note in a state what was written, beside what it knows already, as `kept_outputs` reads it."""
    document = _state_document(state)
    if document is not None:
        with atomic_output(state, force=True) as temporary:
            temporary.write_text(
                json.dumps({**document, _OUTPUTS: {**kept_outputs(state), **outputs}}), encoding="utf-8"
            )


def _header(model: nn.Module, settings: SearchSettings) -> dict[str, Any]:
    """What makes a search this one. More evaluations or more time to measure continue it."""
    sample = next(model.parameters())
    labels = [] if settings.labels is None else [("labels", settings.labels)]
    return {
        "search": _FORMAT,
        "repshift": __version__,
        "torch": str(torch.__version__),
        "model": digest_of_tensors(model.state_dict().items()),
        "images": digest_of_tensors([("images", settings.images), *labels]),
        "target": str(settings.target),
        "start": settings.start.to_yaml(),
        "reducers": [part.model_dump() for part in settings.reducers],
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "device": sample.device.type,
        "dtype": str(sample.dtype),
    }


# ---------------------------------------------------------------------------------------------------------------------
# What candidates are judged by


@dataclass(frozen=True)
class _Part:
    """Some of the images, and what the dense model makes of them."""

    images: Tensor
    dense: Predictions
    labels: Tensor | None


class _Bench:
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

    def _part(self, start: int, stop: int) -> _Part:
        labels = None if self.labels is None else self.labels[start:stop]
        return _Part(self.images[start:stop], predictions(self.model, self.outputs[start:stop]), labels)

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
            outputs = run_batches(compressed, part.images, self.batch_size, _Unseen())
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
        run = Run(self.model, part.images, part.dense, self.batch_size, _Unseen())
        sites = {site.name: site for site in self.family.sites(self.model)}
        chosen: list[Part] = []
        try:
            for planned in plan.sites:
                variants = runnable(planned, sites[planned.site])
                if len(variants) > 1:
                    so_far = plan.with_metrics([*chosen, planned.metric])
                    chosen.append(choose_metric(run, so_far, variants, len(part.images)).chosen.part())
                else:
                    chosen.append(variants[0].part())
        except RecipeError:
            return None
        return [found.model_dump() for found in chosen]

    def fit(self, layers: Sequence[int], after: After, task: Task) -> dict[str, dict[str, Any]]:
        """The fitted metric of each layer, by its number."""
        found = fit_scores(self.model, layers, self.parts["choice"].images, self.batch_size, 0, task, after=after)
        return {str(layer): metric.part().model_dump() for layer, metric in found.items()}

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
            found = speedup(times["dense"], times["candidate"])
            if patient and _doubt(found, len(times["dense"].samples_s)) > _LATENCY_DOUBT:
                more = measure_latency(subjects, inputs, max_seconds=self.seconds, warmup=0, progress=progress)
                both = {name: Timing(times[name].samples_s + more[name].samples_s) for name in times}
                found = speedup(both["dense"], both["candidate"])
        finally:
            compressed.detach()
        return round(1.0 / found.ratio, 5)


def _doubt(found: Speedup, rounds: int) -> float:
    """Standard error of a measured ratio, as a share of it, as far as the spread of the rounds tells."""
    return (found.p90 - found.p10) / (_DECILES_APART * found.ratio * math.sqrt(rounds))


class _Unseen:
    """A task that nobody watches: what is shown are whole candidates, not their batches."""

    def advance(self, steps: int = 1) -> None:
        pass


def _compare(part: _Part, given: Tensor) -> dict[str, Any] | None:
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


# ---------------------------------------------------------------------------------------------------------------------
# The search


@dataclass(frozen=True)
class _Candidate:
    """A schedule with all that makes it a plan; `macs` is a fraction of the dense model's."""

    kept: Kept
    plan: Plan
    macs: float
    name: str

    @property
    def key(self) -> str:
        return _plan_key(self.plan)


@dataclass(frozen=True)
class _Tried:
    """A candidate and what it does to the choosing images; `values` as `_compare`."""

    candidate: _Candidate
    values: Mapping[str, Any]

    @property
    def order(self) -> tuple[float, int, float, Kept]:
        """The smallest is the best at one cost; among equals the one with the fewest sites."""
        candidate = self.candidate
        return (self.values["distance"], len(candidate.plan.sites), candidate.macs, candidate.kept)


@dataclass(frozen=True)
class _Timed:
    """A candidate, its latency as a fraction of the dense model's, and whether that is above the target."""

    candidate: _Candidate
    latency: float
    slow: bool

    def by_macs(self) -> float:
        """Its operations, to sort by."""
        return self.candidate.macs


class _Search:
    """One run of the search."""

    def __init__(self, bench: _Bench, memo: _Memo, settings: SearchSettings, progress: Progress) -> None:
        self.bench = bench
        self.memo = memo
        self.settings = settings
        self.target = settings.target
        self.progress = progress
        self.random = random.Random(settings.seed)  # noqa: S311 (a search, not a secret)
        self.reducer = settings.start.reducer
        self.open = self._open_metrics()
        self.scores: dict[int, Part] = {}  # by layer, the metric that is used there now
        self.layers: list[int] = []
        self.tried: dict[str, _Tried] = {}
        self.latencies: dict[str, float] = {}
        self.best: _Tried | None = None
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

    def _open_metrics(self) -> dict[int, Part]:
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
            found = self.memo.get(["fit"], lambda _: self.bench.fit(layers, self._after, task), _Unseen())[0]
        self.open |= {layer: Part.model_validate(found[str(layer)]) for layer in layers}

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

    def _choices(self, plans: Sequence[Plan]) -> list[list[Part] | None]:
        """For each plan the metrics of its sites, chosen along it."""
        asked = [plan.with_metrics([self.open[site.layer] for site in plan.sites]) for plan in plans]
        keys = [f"choose {_plan_key(plan)}" for plan in asked]
        with self.progress.task("choosing scores", len(asked)) as task:
            found = self.memo.get(keys, lambda index: self.bench.choose(asked[index]), task)
        return [None if parts is None else [Part.model_validate(part) for part in parts] for parts in found]

    def _sense(self) -> None:
        """The harm of each layer, and with it the additive model."""
        counts = sorted({round(share * self.tokens) for share in _SENSE_SHARES} - {0, self.tokens}, reverse=True)
        asked = [(layer, count) for layer in self.layers for count in counts]
        plans = [self._single(layer, count) for layer, count in asked]
        possible = [(place, plan) for place, plan in zip(asked, plans, strict=True) if plan is not None]
        keys = [f"sense {_plan_key(plan)}" for _, plan in possible]
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

    def _single(self, layer: int, kept: int, reducer: Part | None = None) -> Plan | None:
        """The plan whose only site is this layer; None where it cannot be."""
        index = [site.layer for site in self.bench.layout.sites]
        schedule = tuple(kept if other >= layer else self.tokens for other in index)
        return self._plan(schedule, index, self.scores or self.open, reducer or self.reducer)

    def _plan(self, kept: Kept, layers: Sequence[int], metrics: Mapping[int, Part], reducer: Part) -> Plan | None:
        parts = {layer: metrics.get(layer, self.open[layer]) for layer in layers}
        try:
            recipe = to_recipe(kept, self.bench.layout, layers, metrics=parts, reducer=reducer)
            return resolve_for(self.bench.model, recipe)
        except UsageError:
            return None

    def _by_macs(self, reducer: Part) -> Additive:
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
                schedule, self.bench.layout, list(self.open), metrics=self.open, reducer=Part(kind="prune")
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

    def _most(self, reducer: Part) -> Callable[[int], int]:
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

    def _model(self, reducer: Part | None = None) -> Additive:
        """The additive model of what the target limits, latency or else operations, within what a reducer can take."""
        base = self._by_macs(reducer or self.reducer)
        if self.rate is None:
            return base
        rate, factor = self.rate, self.factor
        return replace(base, gain=lambda site, kept: base.gain(site, kept) * rate(kept) * factor)

    def _front(self) -> Front:
        return solve(replace(self._model(), site_cost=_SITE_COST), max_sites=None)

    # -- candidates

    def _candidate(self, kept: Kept, name: str) -> _Candidate | None:
        """The schedule as a plan, with the scores of now; None where the model cannot carry it out."""
        return self._with(kept, self.scores, self.reducer, name)

    def _scores_of(self, candidate: _Candidate | None) -> dict[int, Part]:
        """The scores of a candidate, at other layers those of now."""
        return self.scores | {site.layer: site.metric for site in candidate.plan.sites} if candidate else self.scores

    def _with(self, kept: Kept, metrics: Mapping[int, Part], reducer: Part, name: str) -> _Candidate | None:
        kept = on_tiles(kept, self.tokens, self.bench.layout.prefix_tokens, self.multiple)
        plan = self._plan(kept, self.layers, metrics, reducer)
        if plan is None:
            return None
        try:
            return _Candidate(kept, plan, self.bench.macs(plan), name)
        except RecipeError:
            return None

    def _on_budget(
        self,
        kept: Kept,
        budget: float,
        name: str,
        *,
        by_macs: bool = False,
        reducer: Part | None = None,
        like: _Candidate | None = None,
    ) -> _Candidate | None:
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

    def _judge(self, candidates: Sequence[_Candidate | None], task: Task | None = None) -> list[_Tried]:
        """Evaluate on the choosing images; those that cannot be carried out are left out."""
        asked = list({one.key: one for one in candidates if one is not None}.values())
        keys = [f"judge {one.key}" for one in asked]
        found = self.memo.get(keys, lambda index: self.bench.judge(asked[index].plan, "judge"), task or _Unseen())
        results = [_Tried(one, values) for one, values in zip(asked, found, strict=True) if values is not None]
        for result in results:
            self.tried.setdefault(result.candidate.key, result)
        return results

    def _latency(self, plan: Plan, patient: bool = False) -> float:
        key = f"latency {self.place}: {_plan_key(plan)}"
        found: float = self.memo.get(
            [key], lambda _: self.bench.latency(plan, self.progress, patient), _Unseen(), first_only=True
        )[0]
        self.latencies[_plan_key(plan)] = found
        return found

    def _holds(self, tried: _Tried) -> bool:
        """Whether it meets a target of quality, with a margin for chance."""
        values = tried.values
        if self.target.kind == "agreement":
            share, count = values["agreement"], values["images"]
            return share == 1.0 or _least_share(share, count) >= self.target.value
        worst: float = values["lost"] + _DROP_SIGMAS * values["lost_error"]
        return worst <= self.target.value + _QUALITY_SLACK

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

    def _cheapest(self) -> _Candidate | None:
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

    def _scale(self, candidate: _Candidate, patient: bool = False) -> float:
        """Take a measured latency into the model; returns it."""
        measured, predicted = self._latency(candidate.plan, patient), self._model().cost(candidate.kept)
        if measured < 1.0 and predicted < 1.0:
            self.factor *= (1.0 - measured) / (1.0 - predicted)
        return measured

    def _start_at_quality(self) -> None:
        front, judged = self._front(), len(self.bench.parts["judge"].images)
        if self.target.kind == "agreement" and _least_share(1.0, judged) < self.target.value:
            self.progress.warn(f"{judged} images are too few to tell whether {self.target} holds; give more")

        def at(budget: float) -> _Candidate | None:
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

    def _quality(self, tried: _Tried) -> float:
        value: float = tried.values["agreement"] if self.target.kind == "agreement" else -tried.values["lost"]
        return value

    def _sections(
        self, at: Callable[[float], _Candidate | None], low: float, high: float, label: str, rounds: int | None = None
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

    def _keep(self, results: Sequence[_Tried]) -> None:
        """Remember the best so far: the nearest to the dense model at the budget, or the cheapest that holds."""
        for result in results:
            if not self.target.limits_cost and not self._holds(result):
                continue
            if self.best is None or self._rank(result) < self._rank(self.best):
                self.best = result

    def _rank(self, tried: _Tried) -> tuple[Any, ...]:
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

    def _pick(self, current: _Candidate, model: Additive, budget: float, step: int) -> list[_Candidate]:
        """Some neighbours that were not tried: most by prediction, one by chance."""
        scored = self._scores_of(current)
        # what scores and reducers cost is not in the model
        aside = current.macs - model.cost(current.kept) if self.rate is None else 0.0
        fresh = neighbours(current.kept, model, budget - max(aside, 0.0), step)
        made: list[_Candidate] = []
        while fresh and len(made) < _BATCH:
            by_chance = len(made) == _BATCH - 1
            kept = fresh.pop(self.random.randrange(len(fresh)) if by_chance else 0)
            candidate = self._with(kept, scored, current.plan.reducer, "neighbour")
            over = candidate is not None and self.rate is None and candidate.macs > budget + 1e-9
            if candidate is not None and not over and candidate.key not in self.tried:
                made.append(candidate)
        return made

    def _cheapen(self, current: _Tried) -> None:
        """Shrink the cost of a schedule as far as the quality holds."""
        cost = current.candidate.macs
        if not self._holds(current):
            return

        def at(budget: float) -> _Candidate | None:
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

    def _with_reducer(self, best: _Candidate, budget: float, reducer: Part) -> list[_Candidate | None]:
        """The schedule on the budget with another reducer; with one that can take fewer, also its own best one."""
        model = self._model(reducer)
        schedules = [best.kept]
        if not model.possible(best.kept):
            own = solve(replace(model, site_cost=_SITE_COST)).best(budget)
            schedules += [] if own is None else [own.kept]
        name = f"reducer {reducer.kind}"
        return [self._on_budget(one, budget, name, reducer=reducer, like=best) for one in schedules]

    # -- the paper's schedule

    def _paper_candidate(self, budget: float, *, by_macs: bool, calibrated: bool = True) -> _Candidate | None:
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

    def _paper_at_same_macs(self, calibrated: bool = True) -> _Tried | None:
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
        start, seen = self.best.candidate, dict[str, _Timed]()
        current: _Candidate | None = start
        for _ in range(_LATENCY_ROUNDS):
            if current is None or current.key in seen:
                break
            between = len({timed.slow for timed in seen.values()}) > 1
            measured = self._scale(current, patient=between)
            seen[current.key] = _Timed(current, measured, measured > self.target.value)
            if self.target.value * _LATENCY_SLACK <= measured <= self.target.value:
                break
            current = self._resized(start, seen)
        # the nearest of those that meet it, else the nearest of all; one that cannot be judged is none
        for timed in sorted(seen.values(), key=lambda timed: (timed.slow, abs(timed.latency - self.target.value))):
            results = self._judge([timed.candidate])
            if results:
                self.best = results[0]
                return

    def _resized(self, start: _Candidate, seen: Mapping[str, _Timed]) -> _Candidate | None:
        """The next size to measure, after those that were; None where there is none."""
        slow = min((timed for timed in seen.values() if timed.slow), key=_Timed.by_macs, default=None)
        fast = max((timed for timed in seen.values() if not timed.slow), key=_Timed.by_macs, default=None)
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
        drawn = plan.with_metric(Part.model_validate({"kind": "random", "seed": self.settings.seed}))
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
            dense=_point("dense", (), 1.0, 1.0 if latency is not None else None, dense),
            paper=paper_point,
            found=found_point,
            random=self._point("random", best.candidate, held[1], None) if held[1] else None,
            given=given,
            paper_is_found=is_paper,
            held_back_decided=decided,
            paper_calibrated=calibrated,
            tried=tuple(
                self._point(
                    one.candidate.name, one.candidate, one.values, self.latencies.get(_plan_key(one.candidate.plan))
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
            return self.latencies.get(_plan_key(plan))
        return self._latency(plan)

    def _better(self, found: _Tried, paper: _Tried | None) -> tuple[_Tried, bool, bool]:
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
        keys = [f"held {_plan_key(plan)}" for plan in plans]
        with self.progress.task("checking on other images", len(keys)) as task:
            return self.memo.get(keys, lambda index: self.bench.judge(plans[index], "held"), task)

    def _may_be_found(self, paper: _Tried) -> bool:
        """Whether the paper's schedule meets what the found one does."""
        if self.target.kind == "latency":
            return self._latency(paper.candidate.plan) <= self.target.value
        if self.target.kind == "macs":
            return paper.candidate.macs <= self.target.value + 1e-9 or not self.reachable
        return self._holds(paper) or not self.reachable

    def _met(self, best: _Tried, latency: float | None) -> tuple[bool, float]:
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
        values = self.memo.get([f"judge {_plan_key(plan)}"], lambda _: self.bench.judge(plan, "judge"), _Unseen())[0]
        return None if values is None else self._point("given", _Candidate((), plan, self.bench.macs(plan), ""), values)

    def _recipe(self, candidate: _Candidate) -> Recipe:
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

    def _point(
        self, name: str, candidate: _Candidate, values: Mapping[str, Any], latency: float | None = None
    ) -> Point:
        tokens = tuple((site.layer, site.tokens_out) for site in candidate.plan.sites)
        return _point(name, tokens, candidate.macs, latency, values)


def _point(
    name: str, tokens: tuple[tuple[int, int], ...], macs: float, latency: float | None, values: Mapping[str, Any]
) -> Point:
    shown = {key: values[key] for key in ("distance", "kl", "agreement", "top1", "images")}
    return Point(name=name, tokens=tokens, macs=macs, latency=latency, **shown)


def _share_of(part: int, whole: int, count: int) -> int:
    """As many of `count` as `part` is of `whole`, rounded down, and one at least."""
    return max(1, count * part // whole)


def _least_share(share: float, count: int) -> float:
    """Lower end of Wilson's interval of a share of `count`, which is below 1 also where all agree."""
    return wilson_interval(round(share * count), count, _AGREEMENT_SIGMAS)[0]


def _plan_key(plan: Plan) -> str:
    return sha256(plan.model_dump_json().encode()).hexdigest()[:20]
