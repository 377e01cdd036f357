"""The main job: a dense checkpoint and a recipe in, a checked, measured and compressed checkpoint out."""

from __future__ import annotations

from dataclasses import replace

from repshift_cli.calibration.calibrate import Calibration
from repshift_cli.checkpoints import artifact
from repshift_cli.compression.inputs import JobImages, choose_metric, is_builtin, is_same_place, load_job_inputs
from repshift_cli.compression.job import CompressionJob, DenseModel, checked_recipe, load_dense
from repshift_cli.compression.measured import CompressReport, check_counts, check_outputs, measure_models
from repshift_cli.compression.settings import Amounts, Settings
from repshift_cli.data.inputs import ImageBatch, Labelled, load_inputs, load_labelled
from repshift_cli.errors import UsageError
from repshift_cli.measure.device import resolve_device, resolve_dtype
from repshift_cli.models.attention_mode import attention_mode, auto_note, check_attention
from repshift_cli.planning.plan import Plan
from repshift_cli.planning.recipe import Recipe
from repshift_cli.reduction.checks import check_parts
from repshift_cli.reduction.compressed_model import attach
from repshift_cli.search.job import FinishedSearch, SearchRequest, find, start_recipe
from repshift_cli.search.target import SearchTarget
from repshift_cli.utils.files import check_output
from repshift_cli.utils.progress import Progress

__all__ = [
    "compress_checkpoint",
    "save_found",
    "search_checkpoint",
]


_QUICK_EVALUATIONS = 12
"""Schedules that the search within `compress` tries, where `search` tries more."""


_MORE_IMAGES = 2
"""How many times as many pictures `search` looks at by itself: half of them check."""


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
    recipe = checked_recipe(settings.recipe)
    target = _target(settings, recipe)
    if target and dry_run:
        raise UsageError(
            f"--dry-run: the plan for {target} is known only after a search",
            "Run `repshift search` first, then look at the recipe that it writes.",
        )
    device, dtype = resolve_device(settings.device), resolve_dtype(settings.dtype)
    loaded = load_dense(name, recipe, settings.model_name, settings.heads, settings.img_size, clips=settings.clips)
    dense = DenseModel.of(loaded, progress, settings.force)
    if target:
        loaded.model.to(device=device, dtype=dtype)
        check_attention(loaded.model, settings.attention)
        return _compress_to_target(dense, recipe, target, settings)
    job = CompressionJob(dense, recipe)
    if dry_run:
        if job.open:
            job.note("the score is left to calibration; shown is what is used without images")
        return job.report(job.default_plan(), None, None, None)
    loaded.model.to(device=device, dtype=dtype)
    check_attention(loaded.model, settings.attention)
    amounts = Amounts.of(settings, loaded, job.family)
    images = JobImages(job, settings, amounts)
    plan, calibration = choose_metric(job, images, settings, amounts.batch)
    return _finish(job, plan, calibration, images.for_agreement, settings, None)


def search_checkpoint(name: str, settings: Settings, request: SearchRequest, progress: Progress) -> FinishedSearch:
    """Carry out the search of `repshift search`: the recipe gives metric and reducer, `data` the pictures.

    Args:
        name: what to search for, see `checkpoint.load`.

    Raises:
        RepshiftError: of the kind and exit code that says what went wrong.
        KeyboardInterrupt: before a first schedule was found.
    """
    recipe = checked_recipe(settings.recipe)
    device, dtype = resolve_device(settings.device), resolve_dtype(settings.dtype)
    loaded = load_dense(name, recipe, settings.model_name, settings.heads, settings.img_size, clips=settings.clips)
    dense = DenseModel.of(loaded, progress, settings.force)
    loaded.model.to(device=device, dtype=dtype)
    count = settings.calibration_images or _MORE_IMAGES * Amounts.of(settings, loaded, dense.family).calibration
    return _search(dense, recipe, request, settings, count)


def save_found(found: FinishedSearch, settings: Settings, progress: Progress) -> CompressReport:
    """Check, measure and write the compressed checkpoint of a finished search; errors as `compress_checkpoint`."""
    job = CompressionJob(DenseModel(found.loaded, progress), found.recipe)
    return _finish(job, job.default_plan(), None, found.heldout, settings, found)


def _compress_to_target(
    dense: DenseModel, recipe: Recipe | None, target: SearchTarget, settings: Settings
) -> CompressReport:
    """Search for the layers, then go on as with any recipe.

    Raises:
        KeyboardInterrupt: also where there is a best so far, which is not what was asked for.
    """
    if not settings.calibrate:
        raise UsageError(f"--no-calibrate: the search for {target} chooses by pictures", "Leave it out.")
    if recipe is not None and recipe.layers:
        dense.note(f"the layers of {recipe.place.name} are not used: a search looks for those that reach {target}")
    request = SearchRequest(target, _QUICK_EVALUATIONS, seconds=settings.seconds)
    amounts = Amounts.of(settings, dense.loaded, dense.family)
    found = _search(dense, recipe, request, settings, amounts.calibration)
    if found.result.interrupted:
        raise KeyboardInterrupt
    found.result.check_met(settings.force, dense.warn)
    job = CompressionJob(dense, found.recipe)
    where = settings.calibration
    apart = settings.data is not None and where is not None and not is_same_place(settings.data, where)
    images = load_job_inputs(dense, settings.data, amounts.agreement, settings.seed) if apart else found.heldout
    return _finish(job, job.default_plan(), None, images, settings, found)


def _search(
    dense: DenseModel, recipe: Recipe | None, request: SearchRequest, settings: Settings, count: int
) -> FinishedSearch:
    """Draw `count` pictures, say which they are, and search."""
    loaded = dense.loaded
    start, reducers = start_recipe(recipe, request, loaded, dense.family)
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
            reducers=reducers,
            batch_size=Amounts.of(settings, loaded, dense.family).batch,
            seed=settings.seed,
            progress=dense.progress,
        )


def _labelled(dense: DenseModel, settings: Settings, count: int) -> Labelled:
    where, loaded = settings.calibration or settings.data, dense.loaded
    preprocessing = loaded.description.preprocessing
    if where is None and not is_builtin(loaded):
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
    job: CompressionJob,
    plan: Plan,
    calibration: Calibration | None,
    images: ImageBatch,
    settings: Settings,
    found: FinishedSearch | None,
) -> CompressReport:
    """Attach the plan, check and measure the compressed model, and write it."""
    loaded, sample = job.loaded, next(job.loaded.model.parameters())
    compressed = attach(loaded.model, plan)
    checked = images.tensor.to(device=sample.device, dtype=sample.dtype)
    check_counts(compressed, loaded)
    batch = Amounts.of(settings, loaded, job.family).batch
    if note := auto_note(compressed, settings.attention):
        job.note(note)
    with attention_mode(compressed, settings.attention):
        check_outputs(compressed, checked[:2])
        measured = measure_models(compressed, images, checked, settings, batch, job.progress)
    if settings.output:
        kept = calibration.to_dict() if calibration else None
        document = artifact.make_document(loaded, plan, job.recipe, kept, measured.to_dict())
        if found:
            document["search"] = found.provenance()
        artifact.save(settings.output, loaded, document, settings.force)
    return replace(job.report(plan, calibration, measured, settings.output), found=found)


def _target(settings: Settings, recipe: Recipe | None) -> SearchTarget | None:
    """What a search is to reach: as the user says, else as the recipe does; None where the recipe has layers.

    Raises:
        UsageError: it cannot be.
    """
    if settings.target is not None:
        return SearchTarget.parse(settings.target)
    return SearchTarget.parse(str(recipe.budget)) if recipe is not None and recipe.budget is not None else None
