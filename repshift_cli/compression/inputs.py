"""Images of a compression job, and the choice of the metric on them."""

from __future__ import annotations

from pathlib import Path

from repshift_cli.calibration.calibrate import Calibration, calibrate
from repshift_cli.checkpoints.load import BUILTIN
from repshift_cli.checkpoints.loaded import LoadedModel
from repshift_cli.compression.job import CompressionJob, DenseModel
from repshift_cli.compression.settings import Amounts, Settings
from repshift_cli.data.inputs import ImageBatch, load_inputs
from repshift_cli.errors import CheckFailed, DataError
from repshift_cli.planning.plan import Plan

__all__ = [
    "JobImages",
    "choose_metric",
    "is_builtin",
    "is_same_place",
    "load_job_inputs",
    "unclear_choice",
]


_IMAGE_DIMS = 4


class JobImages:
    """The pictures of one run: some for calibration, others for agreement, never the same."""

    def __init__(self, job: CompressionJob, settings: Settings, amounts: Amounts) -> None:
        self.job = job
        self.seed = settings.seed
        self.for_calibration: ImageBatch | None = None
        loaded = job.loaded
        where = settings.calibration or settings.data
        fits = is_builtin(loaded)
        if not (job.open and settings.calibrate) or (where is None and not fits):
            if settings.calibration:
                job.note("nothing is calibrated, so the pictures of --calibration only serve the comparison")
            self.for_agreement = self._load(settings.data or where, amounts.agreement)
        elif settings.data is None or is_same_place(settings.data, where):
            # drawn together and then split, so that no picture serves both ends
            both = self._load(where, amounts.calibration + amounts.agreement)
            self.for_calibration, self.for_agreement = _split(both, amounts.calibration)
        else:
            self.for_calibration = self._load(where, amounts.calibration)
            self.for_agreement = self._load(settings.data, amounts.agreement)

    def _load(self, where: str | None, count: int) -> ImageBatch:
        return load_job_inputs(self.job.dense, where, count, self.seed)


def load_job_inputs(dense: DenseModel, where: str | None, count: int, seed: int) -> ImageBatch:
    """Load images, or built-in scenes, with the preprocessing of the model."""
    batch = load_inputs(where, count, dense.loaded.description.preprocessing, seed)
    dense.tell_skipped(batch)
    return batch


def is_same_place(one: str, other: str | None) -> bool:
    """Whether two names of picture folders mean the same folder."""
    return other is not None and (one == other or Path(one).resolve() == Path(other).resolve())


def is_builtin(loaded: LoadedModel) -> bool:
    """Whether it is one of the built-in models, which the built-in scenes are made for."""
    names = {name.removeprefix("builtin:") for name in BUILTIN}
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


def choose_metric(
    job: CompressionJob, images: JobImages, settings: Settings, batch_size: int
) -> tuple[Plan, Calibration | None]:
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
        problem = unclear_choice(found)
        if not settings.force:
            raise problem
        job.warn(problem.message)
    return job.plan.with_metrics(found.specs), found


def unclear_choice(found: Calibration) -> CheckFailed:
    """The error of a calibration in which no candidate clearly beats random dropping."""
    random, chosen = found.random, found.result
    if random.agreement is None or chosen.agreement is None:
        numbers = f"prediction distance {random.distance:.4f} for random dropping, {chosen.distance:.4f} for the choice"
    else:
        numbers = f"random dropping kept {random.agreement:.1%} of predictions, the chosen score {chosen.agreement:.1%}"
    return CheckFailed(
        f"no score is clearly better than random dropping: {numbers} "
        f"({found.sigmas:.1f} standard errors, {len(chosen.distances)} inputs)",
        "Calibrate on more inputs of the model's own kind, drop fewer tokens, or add --force.",
    )
