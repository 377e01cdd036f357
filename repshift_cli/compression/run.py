"""`repshift compress` and `repshift search`: load, plan, calibrate or search, attach, measure, save."""

from __future__ import annotations

from dataclasses import replace

from repshift_cli.calibration.calibrate import Calibration
from repshift_cli.calibration.fit import is_classifier
from repshift_cli.calibration.recover import Recovery, recover
from repshift_cli.checkpoints import artifact
from repshift_cli.checkpoints.loaded import LoadedModel
from repshift_cli.checkpoints.recovered import recovered_part
from repshift_cli.compression.inputs import draw_images, is_same_folder, load_job_inputs, load_search_inputs
from repshift_cli.compression.job import CompressionJob, load_dense
from repshift_cli.compression.measured import CompressReport, Measured, check_counts, check_outputs, measure_models
from repshift_cli.compression.notes import Notes, not_calibrated
from repshift_cli.compression.recipe import check_recipe_model, checked_recipe, named_parts, with_parts
from repshift_cli.compression.settings import Amounts, Settings
from repshift_cli.data.inputs import ImageBatch
from repshift_cli.errors import CheckFailed, RepshiftError, UsageError
from repshift_cli.measure.device import resolve_device, resolve_dtype
from repshift_cli.models.attention_mode import attention_mode, auto_note, check_attention
from repshift_cli.planning.plan import Plan
from repshift_cli.planning.recipe import Recipe
from repshift_cli.reduction.checks import check_components
from repshift_cli.reduction.compressed_model import CompressedModel, attach
from repshift_cli.reduction.families.base import match
from repshift_cli.search.job import FinishedSearch, SearchRequest, find, start_recipe
from repshift_cli.search.search import check_head
from repshift_cli.search.target import SearchTarget
from repshift_cli.utils.progress import Progress

_QUICK_EVALUATIONS, _QUICK_SECONDS = 12, 3.0
"""Schedules that the search within `compress` tries, and the most seconds of each of its latency measurements."""

_MOST_IMAGES = 1024
"""The most images that a search takes by itself."""

_MORE_IMAGES = 2
"""`search` uses this many times as many images: half of them are held out."""


def compress_checkpoint(name: str, settings: Settings, progress: Progress, dry_run: bool = False) -> CompressReport:
    """Run `repshift compress`.

    Args:
        name: the checkpoint, as for `load_checkpoint`.
        dry_run: stop after the plan: nothing is run, measured or written.

    Raises:
        RepshiftError: its class and exit code say what went wrong.
    """
    if settings.output and not dry_run:
        artifact.check_save(settings.output, settings.force)
    recipe, parts = checked_recipe(settings.recipe), named_parts(settings.metric, settings.reducer)
    target = _target(settings, recipe)
    if target and dry_run:
        raise UsageError(
            f"--dry-run: the plan for {target} is known only after a search",
            "Run `repshift search` first, then read the recipe that it writes.",
        )
    if settings.class_order and not target:
        raise UsageError("--class-order: labels are used by a search only", "Omit it, or add --target.")
    device, dtype = resolve_device(settings.device), resolve_dtype(settings.dtype)
    notes = Notes(progress)
    loaded = load_dense(name, settings.load, recipe, notes, settings.force)
    _check_recover(settings, loaded)
    if settings.output and not dry_run:
        artifact.check_save(settings.output, settings.force, loaded)
    if target:
        loaded.model.to(device=device, dtype=dtype)
        check_attention(loaded.model, settings.attention)
        return _compress_to_target(loaded, recipe and with_parts(recipe, parts), target, settings, notes)
    where = settings.calibration or settings.data
    images = settings.calibrate and (where is not None or loaded.is_builtin)
    job = CompressionJob(loaded, recipe, notes, images=images, parts=parts)
    if dry_run:
        if job.has_open_fields:
            notes.note("calibration chooses the score; shown is the score without images")
        return _report(job, attach(loaded.model, job.default_plan()))
    loaded.model.to(device=device, dtype=dtype)
    check_attention(loaded.model, settings.attention)
    amounts = Amounts.of(settings, loaded)
    for_calibration, for_agreement = draw_images(job, settings, amounts)
    plan, calibration = _choose_metric(job, for_calibration, settings, amounts.batch)
    return _finish(job, plan, for_agreement, settings, calibration=calibration, for_recovery=for_calibration)


def _check_recover(settings: Settings, loaded: LoadedModel) -> None:
    """Raise UsageError if this model cannot be recovered, before any work."""
    reasons = {
        "the model takes clips": loaded.description.preprocessing.frames is not None,
        "only a part of the model is compressed (--tower)": "tower" in loaded.description.args,
        f"training needs float32, not {settings.dtype}": settings.dtype != "float32",
    }
    for reason, holds in reasons.items():
        if settings.recover and holds:
            raise UsageError(f"--recover: {reason}", "Leave it out.")
    if settings.recover and not (settings.calibration or settings.data or loaded.is_builtin):
        raise UsageError("--recover: there are no images of the model's own kind", "Add --calibration DIR.")


def search_checkpoint(name: str, settings: Settings, request: SearchRequest, progress: Progress) -> FinishedSearch:
    """Run the search of `repshift search`: the recipe gives metric and reducer, `data` the images.

    Args:
        name: the checkpoint, as for `load_checkpoint`.

    Raises:
        RepshiftError: its class and exit code say what went wrong.
        KeyboardInterrupt: before a first schedule was found.
    """
    recipe = checked_recipe(settings.recipe)
    device, dtype = resolve_device(settings.device), resolve_dtype(settings.dtype)
    notes = Notes(progress)
    loaded = load_dense(name, settings.load, recipe, notes, settings.force)
    loaded.model.to(device=device, dtype=dtype)
    return search_loaded(loaded, recipe, request, settings, notes)


def search_loaded(
    loaded: LoadedModel, recipe: Recipe | None, request: SearchRequest, settings: Settings, notes: Notes
) -> FinishedSearch:
    """As `search_checkpoint` for a model that is loaded, on its device and in its dtype."""
    count = _search_images(settings, loaded, request.target, _MORE_IMAGES * Amounts.of(settings, loaded).calibration)
    inputs = load_search_inputs(loaded, settings, count, notes)
    return _search(loaded, recipe, request, settings, inputs, notes)


def save_found(found: FinishedSearch, settings: Settings, progress: Progress) -> CompressReport:
    """Check, measure and write the compressed checkpoint of a finished search; errors as `compress_checkpoint`."""
    job = CompressionJob(found.loaded, found.recipe, Notes(progress))
    return _finish(job, job.default_plan(), found.heldout, settings, found=found)


def _compress_to_target(
    loaded: LoadedModel, recipe: Recipe | None, target: SearchTarget, settings: Settings, notes: Notes
) -> CompressReport:
    goals = [target, *([settings.limit] if settings.limit else [])]
    for goal in goals:
        check_head(goal, is_classifier(loaded.model))
    if not settings.calibrate:
        raise UsageError(f"--no-calibrate: the search for {target} needs images", "Leave it out.")
    if recipe is not None and recipe.layers:
        notes.note(f"the layers of {recipe.place.name} are not used: a search finds those for {target}")
    amounts = Amounts.of(settings, loaded)
    count = max(_search_images(settings, loaded, goal, amounts.calibration) for goal in goals)
    inputs = load_search_inputs(loaded, settings, count, notes)
    target, *limits = (_without_labels(goal, inputs, notes) for goal in goals)
    reducers = (settings.reducer,) if settings.reducer else ()
    request = SearchRequest(target, _QUICK_EVALUATIONS, reducers, seconds=min(settings.seconds, _QUICK_SECONDS))
    found = _search(loaded, recipe, request, settings, inputs, notes)
    if found.result.interrupted:
        raise KeyboardInterrupt
    found = replace(found, limit=limits[0] if limits else None)
    job = CompressionJob(loaded, found.recipe, notes)
    try:
        found.result.check_met(settings.force, notes.warn)
        for limit in limits:
            found.result.check_limit(limit, settings.force, notes.warn)
    except CheckFailed as failed:
        failed.document = _report(job, attach(loaded.model, job.default_plan()), found=found).to_dict()
        raise
    images = found.heldout
    if settings.data and settings.calibration and not is_same_folder(settings.data, settings.calibration):
        images = load_job_inputs(loaded, settings.data, amounts.agreement, settings.seed, notes)
    return _finish(job, job.default_plan(), images, settings, found=found, for_recovery=inputs)


def _without_labels(goal: SearchTarget, inputs: ImageBatch, notes: Notes) -> SearchTarget:
    """Without labels, instead of a loss of top-1 the share of changed predictions, which is at least as large."""
    if goal.kind != "max-drop" or inputs.labels is not None:
        return goal
    changed = SearchTarget("agreement", round(1 - goal.value / 100, 12))
    notes.note(f"there are no labels ({inputs.unlabelled}): {goal} is taken as {changed}, which is stricter")
    return changed


def _search_images(settings: Settings, loaded: LoadedModel, target: SearchTarget, usual: int) -> int:
    """The number of images of the user, else the usual one, or more where that cannot decide the target."""
    if settings.calibration_images or loaded.description.preprocessing.frames is not None:
        return settings.calibration_images or usual
    return max(usual, min(2 * target.images_needed, _MOST_IMAGES))


def _search(  # noqa: PLR0917
    loaded: LoadedModel,
    recipe: Recipe | None,
    request: SearchRequest,
    settings: Settings,
    inputs: ImageBatch,
    notes: Notes,
) -> FinishedSearch:
    family = match(loaded.model)
    start, reducers = start_recipe(recipe, request, loaded, family)
    if settings.metric:
        start = with_parts(start, named_parts(settings.metric, None))
    check_components(start)
    check_recipe_model(start, loaded.description)
    notes.note(f"searching for {request.target} on {inputs.description}")
    with attention_mode(loaded.model, settings.attention):
        return find(
            loaded,
            family,
            start,
            request,
            inputs,
            reducers=reducers,
            batch_size=Amounts.of(settings, loaded).batch,
            seed=settings.seed,
            progress=notes.progress,
        )


def _choose_metric(
    job: CompressionJob, images: ImageBatch | None, settings: Settings, batch_size: int
) -> tuple[Plan, Calibration | None]:
    """Set the open fields of the metric, by calibration if there are images for it."""
    if not job.has_open_fields:
        return job.default_plan(), None
    if images is None or not settings.calibrate:
        why = "--no-calibrate was given" if not settings.calibrate else "there are no images of the model's own kind"
        job.notes.warn(not_calibrated(why, "Give unlabelled images with --calibration DIR"))
        return job.default_plan(), None
    found = job.calibrate(images.tensor, images.identity, batch_size=batch_size)
    if found.mild and not found.clear:
        job.notes.note(
            f"so few tokens are dropped that random dropping changes {1 - (found.random.agreement or 0):.1%} of the "
            "predictions: the choice of tokens hardly matters and was not checked"
        )
    elif not found.clear and found.accepted:
        job.notes.note(found.coverage_note())
    elif not found.clear:
        problem = found.unclear_error()
        if not settings.force:
            unclear = attach(job.loaded.model, job.plan.with_metrics(found.specs))
            problem.document = _report(job, unclear, found).to_dict()
            raise problem
        job.notes.warn(problem.message)
    return job.plan.with_metrics(found.specs), found


def _finish(
    job: CompressionJob,
    plan: Plan,
    images: ImageBatch,
    settings: Settings,
    *,
    calibration: Calibration | None = None,
    found: FinishedSearch | None = None,
    for_recovery: ImageBatch | None = None,
) -> CompressReport:
    loaded, sample = job.loaded, next(job.loaded.model.parameters())
    recovery: Recovery | None = None
    compressed = attach(loaded.model, plan)
    checked = images.tensor.to(device=sample.device, dtype=sample.dtype)
    check_counts(compressed, loaded)
    if note := auto_note(compressed, settings.attention):
        job.notes.note(note)
    with attention_mode(compressed, settings.attention):
        check_outputs(compressed, checked[:2])
        if settings.recover and for_recovery is not None:
            inputs, identity = for_recovery.tensor.to(sample), for_recovery.identity
            recovery = recover(compressed, inputs, identity, settings.recover, settings.seed, job.notes.progress)
            if not recovery.kept:
                job.notes.warn("--recover: not clearly better on the held-out images, so the weights are unchanged")
        batch_size = Amounts.of(settings, loaded).batch
        measured = measure_models(compressed, images, checked, settings, batch_size, job.notes.progress)
    if images.builtin and not loaded.is_builtin:
        measured = replace(measured, agreement=None)  # predictions on images of another kind say nothing
    report = replace(_report(job, compressed, calibration, measured, found), recovery=recovery)
    if settings.output is None:
        return report
    document = artifact.make_document(
        loaded,
        plan,
        job.recipe,
        calibration.to_dict() if calibration else None,
        measured.to_dict(),
        found.provenance() if found else None,
        recovered_part(recovery.to_dict(), compressed.replaced.parameters())
        if recovery and compressed.replaced
        else None,
    )
    try:
        artifact.save(settings.output, loaded, document, settings.force)
    except RepshiftError as error:
        error.document = report.to_dict()
        raise
    return replace(report, output=settings.output)


def _report(
    job: CompressionJob,
    compressed: CompressedModel,
    calibration: Calibration | None = None,
    measured: Measured | None = None,
    found: FinishedSearch | None = None,
) -> CompressReport:
    return CompressReport(
        loaded=job.loaded,
        family=job.family.name,
        recipe=job.recipe,
        plan=compressed.plan,
        dense_macs=compressed.dense_macs(),
        macs=compressed.macs(),
        calibration=calibration,
        measured=measured,
        output=None,
        notes=tuple(job.notes.texts),
        found=found,
    )


def _target(settings: Settings, recipe: Recipe | None) -> SearchTarget | None:
    """The target of the user, else the budget of the recipe; None for a recipe with layers."""
    if settings.target is not None:
        return settings.target
    return SearchTarget.parse(str(recipe.budget)) if recipe is not None and recipe.budget is not None else None
