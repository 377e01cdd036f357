"""The main job: a dense checkpoint and a recipe in, a checked, measured and compressed checkpoint out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repshift_cli import artifact, checkpoint, measure
from repshift_cli.artifact import Opened
from repshift_cli.attach import (
    CompressedModel,
    attach,
    check_feeds,
    check_parts,
    has_open_fields,
    resolve_for,
    with_defaults,
)
from repshift_cli.backends import AttentionMode, attention_mode, auto_note, check_attention
from repshift_cli.calibrate import Calibration, agreement, calibrate, divergence, predictions
from repshift_cli.checkpoint import LoadedModel, ModelDescription, Source
from repshift_cli.data.clips import load_inputs
from repshift_cli.data.images import ImageBatch
from repshift_cli.data.labelled import Labelled, load_labelled
from repshift_cli.errors import CheckFailed, CheckpointError, DataError, RecipeError, UsageError
from repshift_cli.families import Family, Site, match
from repshift_cli.files import check_output
from repshift_cli.identify import Clips, canonical_name, encoder_name
from repshift_cli.measure import Speedup, Spread, Subject
from repshift_cli.metrics import build_metric
from repshift_cli.plan import Plan
from repshift_cli.preprocessing import Preprocessing
from repshift_cli.progress import Progress, Silent
from repshift_cli.recipe import Recipe, default_recipe
from repshift_cli.search.job import Found, Request, find, start_recipe, with_reducers
from repshift_cli.search.target import Target

__all__ = [
    "CompressReport",
    "Measured",
    "Settings",
    "Side",
    "compress",
    "compress_checkpoint",
    "compress_dense",
    "save_found",
    "search_checkpoint",
]

_MIN_RUNS = 5
_WARMUP_ROUNDS = 1
_QUICK_EVALUATIONS = 12
"""Schedules that the search within `compress` tries, where `search` tries more."""

_MORE_IMAGES = 2
"""How many times as many pictures `search` looks at by itself: half of them check."""

_HEAVY_MACS = 20_000_000_000
_IMAGE_DIMS = 4


@dataclass(frozen=True)
class Settings:
    """How to compress and measure.

    Attributes:
        recipe: file or shipped name; None for the default schedule.
        target: what a search is to reach (`macs=0.65`), in place of the layers of the recipe; None for its own budget
            or its layers.
        output: where the checkpoint goes; None to write none.
        data: pictures on which agreement is measured (folder or dataset); None for built-in scenes.
        calibration: pictures for calibration; None for `data`, or built-in scenes where the model is built in.
        calibrate: whether open fields of the metric are calibrated at all.
        calibration_images, agreement_images, batch_size: None for the `_Amounts` that suit the model.
        seconds: time for the latency measurement.
        attention: what is to compute attention while a search looks and while both sides are measured; the file that
            is written does not depend on it.
    """

    recipe: str | None = None
    target: str | None = None
    model_name: str | None = None
    heads: int | None = None
    img_size: int | None = None
    clips: Clips = field(default_factory=Clips)
    output: Path | None = None
    data: str | None = None
    calibration: str | None = None
    calibrate: bool = True
    calibration_images: int | None = None
    agreement_images: int | None = None
    device: str = "cpu"
    dtype: str = "float32"
    batch_size: int | None = None
    seconds: float = 10.0
    attention: AttentionMode = "auto"
    seed: int = 0
    force: bool = False


@dataclass(frozen=True)
class Side:
    """What was measured of one side of the comparison."""

    macs: int
    latency: Spread
    throughput: float
    peak_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "gmacs": self.macs / 1e9,
            "latency_ms": self.latency.to_dict(),
            "throughput": float(f"{self.throughput:.4g}"),
            "peak_memory_mb": round(self.peak_bytes / 1e6, 3),
        }


@dataclass(frozen=True)
class Measured:
    """Dense and compressed, side by side, on one machine in one run.

    Attributes:
        agreement: share of images whose predicted class is unchanged, or of clips that are still most like themselves
            among all; None where the model has no head.
        divergence: mean KL in nats (or one minus the cosine of features) against the dense model.
        images: what agreement was measured on.
    """

    dense: Side
    compressed: Side
    speedup: Speedup
    agreement: float | None
    divergence: float
    images: ImageBatch
    batch_size: int
    device: str
    dtype: str
    attention: str
    threads: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "dense": self.dense.to_dict(),
            "compressed": self.compressed.to_dict(),
            "ratio": {
                "macs": float(f"{self.dense.macs / self.compressed.macs:.4g}"),
                "latency": float(f"{self.speedup.ratio:.4g}"),
                "latency_clear": self.speedup.clear,
            },
            "agreement": self.agreement,
            "divergence": round(self.divergence, 6),
            "images": self.images.identity,
            "batch": self.batch_size,
            "device": self.device,
            "dtype": self.dtype,
            "threads": self.threads,
            "attention": self.attention,
        }


@dataclass(frozen=True)
class CompressReport:
    """All that `repshift compress` tells.

    Attributes:
        measured: None for a dry run.
        calibration: None where nothing was calibrated.
        found: the search for a budget; None where the recipe has layers.
        notes: what was assumed or not checked.
    """

    loaded: LoadedModel
    family: str
    recipe: Recipe
    plan: Plan
    dense_macs: int
    macs: int
    calibration: Calibration | None
    measured: Measured | None
    output: Path | None
    notes: tuple[str, ...]
    found: Found | None = None

    def to_dict(self) -> dict[str, Any]:
        document: dict[str, Any] = {
            "output": str(self.output) if self.output else None,
            "model": {
                "name": self.loaded.description.name,
                "family": self.family,
                "params": sum(parameter.numel() for parameter in self.loaded.model.parameters()),
            },
            "recipe": self.recipe.place.name,
            "plan": self.plan.summary(),
            "dense": {"gmacs": self.dense_macs / 1e9},
            "compressed": {"gmacs": self.macs / 1e9},
            "ratio": {"macs": float(f"{self.dense_macs / self.macs:.4g}")},
            "calibration": self.calibration.to_dict() if self.calibration else None,
            "notes": list(self.notes),
        }
        if self.found:
            document["search"] = self.found.provenance()
        return document | (self.measured.to_dict() if self.measured else {})


def compress(
    model: nn.Module | str | Path,
    recipe: Recipe | str | Path | None = None,
    *,
    calibration: Tensor | str | Path | None = None,
    img_size: int | None = None,
    progress: Progress | None = None,
) -> CompressedModel:
    """Attach a recipe to a model, without measuring or writing anything.

    Args:
        model: a supported model in eval mode, or whatever `checkpoint.load` takes.
        recipe: a recipe, its file or shipped name; None for the default schedule.
        calibration: images for open fields of the metric: `[n, C, H, W]` preprocessed, or a folder or dataset.
            Without them open fields are as the paper has them.
        img_size: side of the images that a convolutional network is to take, which the plan then holds for. The images
            of other models are as large as their weights have it.

    Raises:
        CheckFailed: calibration found nothing that beats random dropping clearly.
        RecipeError: the recipe has a budget in place of layers.
        UsageError: the weights do not fit `img_size`.
        RepshiftError: as the parts that it calls.
    """
    recipe = _with_layers(_checked(recipe))
    listener = progress or Silent()
    wrapped = _wrap(model, img_size) if isinstance(model, nn.Module) else _load(model, recipe, img_size=img_size)
    job = _Job(_Dense.of(wrapped, listener), recipe)
    loaded, plan = job.loaded, job.default_plan()
    if calibration is not None and job.open:
        if isinstance(calibration, Tensor):
            images, identity = calibration, {"where": "tensor", "count": len(calibration)}
        else:
            batch = load_inputs(str(calibration), 128, loaded.description.preprocessing, 0)
            images, identity = batch.tensor, batch.identity
        found = calibrate(
            loaded.model,
            job.family,
            job.plan,
            images=images,
            identity=identity,
            batch_size=16,
            progress=listener,
        )
        if not (found.clear or found.mild):
            raise _not_clear(found)
        plan = job.plan.with_metrics(found.parts)
    return artifact.attach_loaded(loaded, plan)


def compress_dense(
    name: str | Path,
    recipe_name: str | Path,
    model_name: str | None = None,
    heads: int | None = None,
    img_size: int | None = None,
    *,
    clips: Clips | None = None,
    progress: Progress | None = None,
) -> Opened:
    """Load a dense model and attach a recipe, uncalibrated: open fields are as the paper has them.

    Raises:
        CheckpointError: the checkpoint cannot be loaded or is compressed already.
        RecipeError: the recipe cannot be followed, or has a budget in place of layers.
        UsageError: the weights do not fit `img_size`.
    """
    recipe = _with_layers(_checked(recipe_name))
    loaded = _load(name, recipe, model_name, heads, img_size, clips=clips)
    job = _Job(_Dense.of(loaded, progress or Silent()), recipe)
    return Opened(job.loaded, artifact.attach_loaded(job.loaded, job.default_plan()))


def compress_checkpoint(name: str, settings: Settings, progress: Progress, dry_run: bool = False) -> CompressReport:
    """Carry out `repshift compress`.

    Args:
        name: what to compress, see `checkpoint.load`.
        dry_run: stop after the plan: nothing is run, measured or written.

    Raises:
        RepshiftError: of the kind and exit code that says what went wrong.
    """
    if settings.output and not dry_run:
        check_output(settings.output, settings.force)
    recipe = _checked(settings.recipe)
    target = _target(settings, recipe)
    if target and dry_run:
        raise UsageError(
            f"--dry-run: the plan for {target} is known only after a search",
            "Run `repshift search` first, then look at the recipe that it writes.",
        )
    device, dtype = measure.resolve_device(settings.device), measure.resolve_dtype(settings.dtype)
    loaded = _load(name, recipe, settings.model_name, settings.heads, settings.img_size, clips=settings.clips)
    dense = _Dense.of(loaded, progress, settings.force)
    if target:
        loaded.model.to(device=device, dtype=dtype)
        check_attention(loaded.model, settings.attention)
        return _compress_to_target(dense, recipe, target, settings)
    job = _Job(dense, recipe)
    if dry_run:
        if job.open:
            job.note("the score is left to calibration; shown is what is used without images")
        return job.report(job.default_plan(), None, None, None)
    loaded.model.to(device=device, dtype=dtype)
    check_attention(loaded.model, settings.attention)
    amounts = _Amounts.of(settings, loaded, job.family)
    images = _Images(job, settings, amounts)
    plan, calibration = _choose_metric(job, images, settings, amounts.batch)
    return _finish(job, plan, calibration, images.for_agreement, settings, None)


def search_checkpoint(name: str, settings: Settings, request: Request, progress: Progress) -> Found:
    """Carry out the search of `repshift search`: the recipe gives metric and reducer, `data` the pictures.

    Args:
        name: what to search for, see `checkpoint.load`.

    Raises:
        RepshiftError: of the kind and exit code that says what went wrong.
        KeyboardInterrupt: before a first schedule was found.
    """
    recipe = _checked(settings.recipe)
    device, dtype = measure.resolve_device(settings.device), measure.resolve_dtype(settings.dtype)
    loaded = _load(name, recipe, settings.model_name, settings.heads, settings.img_size, clips=settings.clips)
    dense = _Dense.of(loaded, progress, settings.force)
    loaded.model.to(device=device, dtype=dtype)
    count = settings.calibration_images or _MORE_IMAGES * _Amounts.of(settings, loaded, dense.family).calibration
    return _search(dense, recipe, request, settings, count)


def save_found(found: Found, settings: Settings, progress: Progress) -> CompressReport:
    """Check, measure and write the compressed checkpoint of a finished search; errors as `compress_checkpoint`."""
    job = _Job(_Dense(found.loaded, progress), found.recipe)
    return _finish(job, job.default_plan(), None, found.held_back, settings, found)


def _compress_to_target(dense: _Dense, recipe: Recipe | None, target: Target, settings: Settings) -> CompressReport:
    """Search for the layers, then go on as with any recipe.

    Raises:
        KeyboardInterrupt: also where there is a best so far, which is not what was asked for.
    """
    if not settings.calibrate:
        raise UsageError(f"--no-calibrate: the search for {target} chooses by pictures", "Leave it out.")
    if recipe is not None and recipe.layers:
        dense.note(f"the layers of {recipe.place.name} are not used: a search looks for those that reach {target}")
    request = Request(target, _QUICK_EVALUATIONS, seconds=settings.seconds)
    amounts = _Amounts.of(settings, dense.loaded, dense.family)
    found = _search(dense, recipe, request, settings, amounts.calibration)
    if found.result.interrupted:
        raise KeyboardInterrupt
    if not settings.force:
        found.result.require_met()
    elif not found.result.met:
        dense.warn(f"the target {target} is not met: the nearest is {target.kind}={found.result.nearest:.4g}")
    if missed := found.missed_on_others():
        dense.warn(missed)
    job = _Job(dense, found.recipe)
    where = settings.calibration
    apart = settings.data is not None and where is not None and not _same_place(settings.data, where)
    images = _load_inputs(dense, settings.data, amounts.agreement, settings.seed) if apart else found.held_back
    return _finish(job, job.default_plan(), None, images, settings, found)


def _search(dense: _Dense, recipe: Recipe | None, request: Request, settings: Settings, count: int) -> Found:
    """Draw `count` pictures, say which they are, and search."""
    loaded = dense.loaded
    request = with_reducers(recipe, request, loaded, dense.family)
    start = start_recipe(recipe, request, loaded)
    check_parts(start)
    dense.check_name(start)
    inputs = _labelled(dense, settings, count)
    dense.note(f"searching for {request.target} on {inputs.batch.description}")
    with attention_mode(loaded.model, settings.attention):
        return find(
            loaded,
            dense.family,
            start,
            request,
            inputs,
            batch_size=_Amounts.of(settings, loaded, dense.family).batch,
            seed=settings.seed,
            progress=dense.progress,
        )


def _labelled(dense: _Dense, settings: Settings, count: int) -> Labelled:
    where, loaded = settings.calibration or settings.data, dense.loaded
    preprocessing = loaded.description.preprocessing
    if where is None and not _is_builtin(loaded):
        dense.warn(
            "no pictures were named, so the search looks at built-in scenes, which this model was not made for: what "
            "it finds need not hold. Name unlabelled pictures of the model's own kind"
        )
        scenes = load_inputs(where, count, preprocessing, settings.seed)
        return Labelled(scenes, None, "the built-in scenes show other classes than those of this model")
    inputs = load_labelled(where, count, preprocessing, getattr(loaded.model, "num_classes", None), settings.seed)
    dense.tell_skipped(inputs.batch)
    return inputs


def _finish(  # noqa: PLR0917
    job: _Job,
    plan: Plan,
    calibration: Calibration | None,
    images: ImageBatch,
    settings: Settings,
    found: Found | None,
) -> CompressReport:
    """Attach the plan, check and measure the compressed model, and write it."""
    loaded, sample = job.loaded, next(job.loaded.model.parameters())
    compressed = attach(loaded.model, plan)
    checked = images.tensor.to(device=sample.device, dtype=sample.dtype)
    _check_counts(compressed, loaded)
    batch = _Amounts.of(settings, loaded, job.family).batch
    if note := auto_note(compressed, settings.attention):
        job.note(note)
    with attention_mode(compressed, settings.attention):
        _check_outputs(compressed, checked[:2])
        measured = _measure(compressed, images, checked, settings, batch, job.progress)
    if settings.output:
        kept = calibration.to_dict() if calibration else None
        document = artifact.make_document(loaded, plan, job.recipe, kept, measured.to_dict())
        if found:
            document["search"] = found.provenance()
        artifact.save(settings.output, loaded, document, settings.force)
    return replace(job.report(plan, calibration, measured, settings.output), found=found)


def _target(settings: Settings, recipe: Recipe | None) -> Target | None:
    """What a search is to reach: as the user says, else as the recipe does; None where the recipe has layers.

    Raises:
        UsageError: it cannot be.
    """
    if settings.target is not None:
        return Target.parse(settings.target)
    return Target.parse(str(recipe.budget)) if recipe is not None and recipe.budget is not None else None


def _with_layers(recipe: Recipe | None) -> Recipe | None:
    """The recipe, where it says which layers reduce.

    Raises:
        RecipeError: it has a budget, and no search is run here.
    """
    if recipe is not None and recipe.budget is not None:
        raise RecipeError(
            f"{recipe.place.at(('budget',))}: the recipe has a budget in place of layers, and no search is run here",
            "`repshift search MODEL --recipe FILE` finds the layers and writes a recipe that has them.",
        )
    return recipe


def _checked(recipe: Recipe | str | Path | None) -> Recipe | None:
    """The recipe, loaded and with its parts checked: what cannot be is said before any weights are read."""
    if recipe is not None and not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe)
    if recipe is not None:
        check_parts(recipe)
    return recipe


class _Dense:
    """A model that may be compressed, and what the user is told about it."""

    def __init__(self, loaded: LoadedModel, progress: Progress) -> None:
        self.loaded = loaded
        self.progress = progress
        self.notes: list[str] = []
        self.family: Family = match(loaded.model)

    @classmethod
    def of(cls, loaded: LoadedModel, progress: Progress, force: bool = False) -> _Dense:
        """A model that was just loaded: what was assumed of it is told, and it is refused if it is compressed."""
        dense = cls(loaded, progress)
        for text in loaded.notes:
            (dense.warn if loaded.source.origin == "random" else dense.note)(text)
        dense._refuse_compressed(force)
        return dense

    def note(self, text: str) -> None:
        """Tell the user at once, and keep it for the report."""
        self.notes.append(text)
        self.progress.note(text)

    def warn(self, text: str) -> None:
        """As `note`, so that it is not missed."""
        self.notes.append(text)
        self.progress.warn(text)

    def check_name(self, recipe: Recipe) -> None:
        """Refuse a recipe that was written for another model.

        Raises:
            RecipeError: with its place.
        """
        wanted, description = recipe.model, self.loaded.description
        # the tag of the weights (.augreg_in21k) does not change what the recipe is for
        names = {encoder_name((name or "").partition(".")[0]) for name in (description.name, description.architecture)}
        if wanted is None or encoder_name(canonical_name(wanted.partition(".")[0])) in names:
            return
        where = recipe.place.at(("model",))
        raise RecipeError(
            f"{where}: the recipe is for {wanted}, but the model is {description.name}",
            f"Use a recipe for {description.name}, or take the key `model` out of a copy of this one.",
        )

    def tell_skipped(self, batch: ImageBatch) -> None:
        """Warn of pictures that could not be read."""
        if batch.skipped:
            self.warn(f"{len(batch.skipped)} pictures could not be read: {'; '.join(batch.skipped[:3])}")

    def _refuse_compressed(self, force: bool) -> None:
        if artifact.stored_plan(self.loaded) is None:
            return
        where = self.loaded.source.path or "the model"
        if not force:
            raise CheckpointError(
                f"{where} is compressed already: its own plan would be lost",
                "Start from the dense checkpoint, or add --force to compress its dense weights anew.",
            )
        self.note(f"{where} was compressed already; its dense weights are compressed anew")


class _Job:
    """A model and a checked recipe that were found to go together."""

    def __init__(self, dense: _Dense, recipe: Recipe | None) -> None:
        self.dense = dense
        self.loaded, self.family, self.progress = dense.loaded, dense.family, dense.progress
        self.note, self.warn = dense.note, dense.warn
        loaded = self.loaded
        layout = self.family.layout(loaded.model)
        if recipe is None:
            blocks, layers = len(layout.sites), [site.layer for site in layout.sites]
            recipe = default_recipe(blocks, layers)
            told = ", ".join(f"{{layer: {drop.layer}, drop_ratio: {drop.drop_ratio}}}" for drop in recipe.layers)
            if layers == list(range(blocks)):
                told = f"to see or change it: repshift recipes show default --blocks {blocks}"
            self.note(f"no recipe was given: the paper's schedule scaled to {blocks} blocks is used ({told})")
        self.recipe = recipe
        dense.check_name(recipe)
        self.plan = resolve_for(loaded.model, recipe)
        self._check_feeds()

    @property
    def open(self) -> bool:
        """Whether the recipe leaves something for calibration to choose."""
        return has_open_fields(self.plan)

    def default_plan(self) -> Plan:
        """The plan with open fields as the paper has them, or as the model allows."""
        return with_defaults(self.plan, self._sites())

    def report(
        self, plan: Plan, calibration: Calibration | None, measured: Measured | None, output: Path | None
    ) -> CompressReport:
        """Gather what was found."""
        if measured:
            macs, dense_macs = measured.compressed.macs, measured.dense.macs
        else:
            compressed = attach(self.loaded.model, plan)
            macs, dense_macs = compressed.macs(), compressed.dense_macs()
        return CompressReport(
            loaded=self.loaded,
            family=self.family.name,
            recipe=self.recipe,
            plan=plan,
            dense_macs=dense_macs,
            macs=macs,
            calibration=calibration,
            measured=measured,
            output=output,
            notes=tuple(self.dense.notes),
        )

    def _check_feeds(self) -> None:
        sites = self._sites()
        for planned in self.plan.sites:
            own = [
                index
                for index, drop in enumerate(self.recipe.layers)
                if drop.metric is not None and drop.layer in (planned.layer, planned.site)
            ]
            path = ("layers", own[0], "metric") if own else ("metric",)
            check_feeds(build_metric(planned.metric), sites[planned.site], planned.after, self.recipe.place, path)

    def _sites(self) -> dict[str, Site]:
        return {site.name: site for site in self.family.sites(self.loaded.model)}


@dataclass(frozen=True)
class _Amounts:
    """How many inputs serve what: a clip of a large video model is as much work as a hundred pictures.

    Attributes:
        batch: at a time.
        agreement: for the comparison with the dense model.
        calibration: for calibration.
    """

    batch: int = 8
    agreement: int = 32
    calibration: int = 128

    @classmethod
    def of(cls, settings: Settings, loaded: LoadedModel, family: Family) -> _Amounts:
        """What the user asks for, else what suits the model."""
        clips = loaded.description.preprocessing.frames is not None
        usual = cls(1, 4, 32) if clips and family.macs(loaded.model, None) > _HEAVY_MACS else cls()
        return cls(
            settings.batch_size or usual.batch,
            settings.agreement_images or usual.agreement,
            settings.calibration_images or usual.calibration,
        )


class _Images:
    """The pictures of one run: some for calibration, others for agreement, never the same."""

    def __init__(self, job: _Job, settings: Settings, amounts: _Amounts) -> None:
        self.job = job
        self.seed = settings.seed
        self.for_calibration: ImageBatch | None = None
        loaded = job.loaded
        where = settings.calibration or settings.data
        fits = _is_builtin(loaded)
        if not (job.open and settings.calibrate) or (where is None and not fits):
            if settings.calibration:
                job.note("nothing is calibrated, so the pictures of --calibration only serve the comparison")
            self.for_agreement = self._load(settings.data or where, amounts.agreement)
        elif settings.data is None or _same_place(settings.data, where):
            # drawn together and then split, so that no picture serves both ends
            both = self._load(where, amounts.calibration + amounts.agreement)
            self.for_calibration, self.for_agreement = _split(both, amounts.calibration)
        else:
            self.for_calibration = self._load(where, amounts.calibration)
            self.for_agreement = self._load(settings.data, amounts.agreement)

    def _load(self, where: str | None, count: int) -> ImageBatch:
        return _load_inputs(self.job.dense, where, count, self.seed)


def _load_inputs(dense: _Dense, where: str | None, count: int, seed: int) -> ImageBatch:
    batch = load_inputs(where, count, dense.loaded.description.preprocessing, seed)
    dense.tell_skipped(batch)
    return batch


def _same_place(one: str, other: str | None) -> bool:
    """Whether two names of picture folders mean the same folder."""
    return other is not None and (one == other or Path(one).resolve() == Path(other).resolve())


def _is_builtin(loaded: LoadedModel) -> bool:
    """Whether it is one of the built-in models, which the built-in scenes are made for."""
    names = {name.removeprefix("builtin:") for name in checkpoint.BUILTIN}
    return loaded.source.origin == "builtin" or loaded.description.name in names


def _split(batch: ImageBatch, count: int) -> tuple[ImageBatch, ImageBatch]:
    """The first `count` pictures and the rest; where there are few, a fifth goes to the rest."""
    total = len(batch.tensor)
    border = min(count, max(total - max(total // 5, 1), 1))
    if border >= total:
        raise DataError(f"{total} pictures are too few to calibrate on some and check on others", "Give more.")
    parts = []
    for name, part in (("calibration", batch.tensor[:border]), ("agreement", batch.tensor[border:])):
        identity = {**batch.identity, "count": len(part), "part": name}
        own, others = (
            ("built-in clips", "clips") if batch.tensor.ndim > _IMAGE_DIMS else ("built-in scenes", "pictures")
        )
        kind = own if batch.builtin else f"{others} of {batch.identity['where']}"
        parts.append(ImageBatch(part, identity, f"{len(part)} {kind}, seed {batch.identity['seed']}", batch.builtin))
    return parts[0], parts[1]


def _choose_metric(job: _Job, images: _Images, settings: Settings, batch_size: int) -> tuple[Plan, Calibration | None]:
    """Fill the open fields of the metric, by calibration where there are pictures for it."""
    if not job.open:
        return job.default_plan(), None
    if images.for_calibration is None:
        why = "--no-calibrate was given" if not settings.calibrate else "there are no images of the model's own kind"
        job.warn(
            f"NOT CALIBRATED: {why}. The paper's choice is used; whether it keeps the right tokens of this "
            "model was not checked. Give unlabelled images with --calibration DIR"
        )
        return job.default_plan(), None
    found = calibrate(
        job.loaded.model,
        job.family,
        job.plan,
        images=images.for_calibration.tensor,
        identity=images.for_calibration.identity,
        batch_size=batch_size,
        progress=job.progress,
    )
    if found.mild and not found.clear:
        job.note(
            f"so few tokens go that dropping them at random changes {1 - (found.random.agreement or 0):.1%} of the "
            "predictions: which ones go hardly matters, and was not put to the test"
        )
    elif not found.clear:
        problem = _not_clear(found)
        if not settings.force:
            raise problem
        job.warn(problem.message)
    return job.plan.with_metrics(found.parts), found


def _not_clear(found: Calibration) -> CheckFailed:
    return CheckFailed(
        f"no candidate beats random dropping clearly: the best at each site together change predictions by "
        f"{found.result.distance:.4f} against {found.random.distance:.4f} of random "
        f"(Hellinger; {found.sigmas:.1f} standard errors, on {len(found.result.distances)} inputs)",
        "Calibrate on more inputs of the model's own kind, drop fewer tokens, or add --force.",
    )


@torch.inference_mode()
def _check_counts(compressed: CompressedModel, loaded: LoadedModel) -> None:
    """The count of operations against the analytic one.

    Raises:
        CheckFailed: they differ.
    """
    size = loaded.description.preprocessing.shape
    with compressed.dense():
        _check_count("dense", measure.count_macs(compressed.model, size), compressed.dense_macs(counted=True))
    _check_count("compressed", measure.count_macs(compressed.model, size), compressed.macs(counted=True))


@torch.inference_mode()
def _check_outputs(compressed: CompressedModel, images: Tensor) -> None:
    """One real forward: shapes and finite values.

    Raises:
        CheckFailed: something is off.
    """
    with compressed.dense():
        wanted = compressed(images)
    output = compressed(images)
    if output.shape != wanted.shape:
        raise CheckFailed(f"the compressed model returns {list(output.shape)}, the dense one {list(wanted.shape)}")
    if not bool(output.isfinite().all()):
        raise CheckFailed("the compressed model returns values that are not finite", "Does the dense one? Try float32.")


def _check_count(side: str, counted: int, planned: int) -> None:
    if counted != planned:
        raise CheckFailed(f"the {side} model runs {counted} multiply-accumulates, by its plan it should be {planned}")


@torch.inference_mode()
def _measure(  # noqa: PLR0917
    compressed: CompressedModel,
    batch: ImageBatch,
    images: Tensor,
    settings: Settings,
    batch_size: int,
    progress: Progress,
) -> Measured:
    """Latency in turn, memory, and agreement of predictions."""
    inputs = measure.full_batch(images, batch_size)
    subjects = [Subject("dense", compressed, compressed.dense), Subject("compressed", compressed)]
    times = measure.measure_latency(
        subjects,
        inputs,
        max_seconds=settings.seconds,
        warmup=_WARMUP_ROUNDS,
        min_runs=_MIN_RUNS,
        progress=progress,
    )
    weights = measure.parameter_bytes(compressed.model)
    sides = {}
    for subject, macs in zip(subjects, (compressed.dense_macs(), compressed.macs()), strict=True):
        latency = times[subject.name].spread
        with subject.context():
            peak = weights + measure.peak_memory(subject.run, inputs)
        sides[subject.name] = Side(macs, latency, batch_size * 1e3 / latency.median, peak)
    unchanged, distance = _compare(compressed, images, batch_size, progress)
    return Measured(
        dense=sides["dense"],
        compressed=sides["compressed"],
        speedup=measure.speedup(times["dense"], times["compressed"]),
        agreement=unchanged,
        divergence=distance,
        images=batch,
        batch_size=batch_size,
        device=measure.device_name(inputs.device),
        dtype=settings.dtype,
        attention=measure.observed_attention(compressed, inputs[:1]),
        threads=torch.get_num_threads(),
    )


def _compare(
    compressed: CompressedModel, images: Tensor, batch_size: int, progress: Progress
) -> tuple[float | None, float]:
    """Share of unchanged predictions (None where there are none) and mean divergence from the dense model."""
    dense, outputs = [], []
    with progress.task("comparing predictions", len(images)) as task:
        for part in images.split(batch_size):
            with compressed.dense():
                dense.append(compressed(part))
            outputs.append(compressed(part))
            task.advance(len(part))
    wanted = predictions(compressed.model, torch.cat(dense))
    given = wanted.of(torch.cat(outputs))
    distance = float(divergence(wanted.reference, given, wanted.are_logits).mean())
    return (float(agreement(wanted.reference, given).mean()) if wanted.are_logits else None), distance


def _load(
    name: str | Path,
    recipe: Recipe | None,
    model_name: str | None = None,
    heads: int | None = None,
    img_size: int | None = None,
    *,
    clips: Clips | None = None,
) -> LoadedModel:
    """Load a checkpoint; where nothing else tells which model it is, the recipe does."""
    return checkpoint.load(name, model_name, heads, img_size, recipe.model if recipe else None, clips=clips)


def _wrap(model: nn.Module, img_size: int | None) -> LoadedModel:
    """A model in memory, described as far as it tells; where it tells no image size, 224 is assumed, as timm does."""
    match(model)
    config: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    name = str(config.get("architecture") or type(model).__name__)
    description = ModelDescription(name, None, {}, Preprocessing.of_model(model))
    loaded = LoadedModel(model, description, Source("object", None, None), dict(model.state_dict()))
    checkpoint.set_image_size(loaded, img_size)
    return loaded
