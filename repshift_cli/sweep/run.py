"""Run the combinations of a sweep: plan, calibrate, and compare with the dense model on the same images."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repshift_cli.calibration.outputs import ReferenceOutputs, agreement, distance, reference_outputs
from repshift_cli.checkpoints.loaded import LoadedModel
from repshift_cli.compression.inputs import is_same_folder, load_job_inputs
from repshift_cli.compression.notes import Notes
from repshift_cli.data.inputs import ImageBatch
from repshift_cli.errors import CheckFailed, ModelError, RecipeError, RepshiftError, UsageError
from repshift_cli.evaluation.common import explain_out_of_memory
from repshift_cli.models.tensor_model import class_names
from repshift_cli.reduction.compressed_model import attach
from repshift_cli.reduction.families.base import match
from repshift_cli.reduction.families.transformer import as_function
from repshift_cli.sweep.combinations import Combination, job_of
from repshift_cli.sweep.report import SweepReport, Unsupported
from repshift_cli.sweep.results import Result, ResultsFile, key_of, to_bits
from repshift_cli.utils.distributed import Processes
from repshift_cli.utils.hashing import digest_of_tensors
from repshift_cli.utils.progress import Progress, Silent
from repshift_cli.version import __version__

_FORMAT = 1


def load_images(
    loaded: LoadedModel, where: str | None, count: int, notes: Notes, class_order: str | None = None
) -> ImageBatch:
    """The images of all combinations, with labels if they have any for the head; of the test split if there is one."""
    return load_job_inputs(
        loaded,
        where,
        count,
        0,
        notes,
        num_classes=getattr(loaded.model, "num_classes", None),
        class_names=class_names(loaded.model),
        test_scenes=True,
        class_order=class_order,
    )


def calibration_images(
    loaded: LoadedModel, where: str | None, data: str | None, count: int, *, images: ImageBatch, notes: Notes
) -> Callable[[int], ImageBatch]:
    """A function from a seed to calibration images: from `where`, else from `data` without the evaluated `images`."""
    own = where is None or is_same_folder(where, data)
    without: Collection[str] = frozenset(images.names) if own and not images.builtin else ()
    return lambda seed: load_job_inputs(loaded, data if own else where, count, seed, notes, without=without)


def sweep(
    loaded: LoadedModel,
    images: ImageBatch,
    combinations: Sequence[Combination],
    *,
    calibration: Callable[[int], ImageBatch] | None = None,
    folder: Path | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
    group: Processes | None = None,
) -> SweepReport:
    """Measure every combination on the same images. Processes of a group share the combinations.

    A KeyboardInterrupt stops the work, and the results until then are returned.

    Args:
        loaded: dense, on the device and in the dtype to measure in.
        images: those of all combinations, see `load_images`.
        combinations: see `combinations_of`.
        calibration: the calibration images of a seed.
        folder: keeps finished combinations in `sweep.jsonl`; those that it has are not run again.

    Raises:
        RepshiftError: of the first combination if the model supports none.
        CheckFailed: the dense model returns values that are not finite.
        UsageError: the folder is of another sweep, there are no calibration images, or the memory does not suffice.
        KeyboardInterrupt: before the first result.
    """
    group, progress = group or Processes(), progress or Silent()
    seeds = sorted({each.seed for each in combinations if each.calibrated and each.seed is not None})
    if seeds and calibration is None:
        raise UsageError("a metric has open fields, and there are no images for calibration", "Give calibration.")
    drawn = {seed: group.agreed(partial(calibration, seed)) for seed in seeds} if calibration else {}
    run = _Run(replace(loaded, model=as_function(loaded.model)), images, drawn, batch_size)
    identity = run.identity()
    group.check_equal({**identity, "combinations": [each.model_dump_json() for each in combinations]})
    file = None if folder is None else ResultsFile(folder, identity, group.rank)
    known = group.collect(group.agreed(lambda: file.open() if file and group.is_first else {}))[0]
    pending = [each for each in combinations if run.key(each) not in known]
    own = _Share([], [], None)
    try:
        if pending or run.key(None) not in known:
            own.results.append(run.measure_dense(progress))
        _run_share(run, pending[group.rank :: group.count], own, file, progress, group)
    except (KeyboardInterrupt, RepshiftError) as error:
        if group.count == 1 and isinstance(error, RepshiftError):
            raise
        own.problem = error
        group.stop()
    shares = group.collect(own)
    if failed := [share.problem for share in shares if isinstance(share.problem, RepshiftError)]:
        raise failed[0]
    found = known | {result.key: result for share in shares for result in share.results}
    refused = [each for share in shares for each in share.refused]
    results = tuple(found[run.key(each)] for each in combinations if run.key(each) in found)
    interrupted = any(share.problem is not None for share in shares)
    if not results and refused and not interrupted:
        raise refused[0][1]
    if not results:
        raise KeyboardInterrupt
    if file and group.is_first:
        file.add(found.values())
    group.collect(None)  # the first process has written all results
    if file and not group.is_first:
        file.path.unlink(missing_ok=True)
    return SweepReport(
        model=loaded.description.name,
        family=match(loaded.model).name,
        data=images.description,
        identity=dict(images.identity),
        images=len(images.tensor),
        dense=found[run.key(None)],
        results=results,
        unsupported=Unsupported.of(refused),
        interrupted=interrupted,
    )


@dataclass
class _Share:
    """What one process has done."""

    results: list[Result]
    refused: list[tuple[Combination, RepshiftError]]
    problem: RepshiftError | KeyboardInterrupt | None


def _run_share(  # noqa: PLR0917
    run: _Run, own: Sequence[Combination], done: _Share, file: ResultsFile | None, progress: Progress, group: Processes
) -> None:
    with progress.task("sweep", len(own)) as task:
        for combination in own:
            if group.stopped():
                return
            try:
                done.results.append(run.measure(combination))
            except (RecipeError, ModelError, CheckFailed) as error:
                error.message = re.sub(
                    r"^\w+:1:1: ", "", error.message
                )  # a place in a recipe that the user does not have
                done.refused.append((combination, error))
            else:
                if file is not None:
                    file.add(done.results)
            task.advance()


class _Run:
    """The dense model with the images, and its outputs after `measure_dense`."""

    def __init__(
        self, loaded: LoadedModel, images: ImageBatch, calibration: Mapping[int, ImageBatch], batch_size: int
    ) -> None:
        self.loaded, self.images, self.calibration, self.batch_size = loaded, images, calibration, batch_size
        self.model = loaded.model
        self.dense: ReferenceOutputs

    def identity(self) -> dict[str, Any]:
        """What the result of a combination depends on besides the combination."""
        sample, labels = next(self.model.parameters()), self.images.labels
        labelled = [] if labels is None else [("labels", labels)]
        return {
            "sweep": _FORMAT,
            "repshift": __version__,
            "torch": str(torch.__version__),
            "model": digest_of_tensors(self.model.state_dict().items()),
            "images": len(self.images.tensor),
            "data": digest_of_tensors([("images", self.images.tensor), *labelled]),
            "batch size": self.batch_size,
            "device": sample.device.type,
            "dtype": str(sample.dtype),
        }

    def key(self, combination: Combination | None) -> str:
        """The key of its result."""
        batch = self._calibration(combination)
        return key_of(combination, None if batch is None else batch.identity["sha256"])

    def _calibration(self, combination: Combination | None) -> ImageBatch | None:
        if combination is None or combination.seed is None or not combination.calibrated:
            return None
        return self.calibration[combination.seed]

    @torch.inference_mode()
    def measure_dense(self, progress: Progress) -> Result:
        """Run the dense model; raises CheckFailed if its outputs are not finite."""
        with progress.task("dense model", 1) as task:
            outputs = self._outputs(self.model)
            task.advance()
        self.dense = reference_outputs(self.model, outputs)
        return Result(macs=match(self.model).macs(self.model, None), **self._quality(outputs))

    @torch.inference_mode()
    def measure(self, combination: Combination) -> Result:
        """Plan, calibrate and run a combination.

        Raises:
            RecipeError, ModelError: the model does not support it.
            CheckFailed: outputs are not finite.
        """
        job, ratio = job_of(self.loaded, combination)
        plan, clear = job.default_plan(), None
        batch = self._calibration(combination)
        if batch is not None and job.has_open_fields:
            found = job.calibrate(batch.tensor, batch.identity, batch_size=self.batch_size)
            plan, clear = job.plan.with_metrics(found.specs), found.clear or found.mild
        compressed = attach(self.model, plan)
        try:
            macs, outputs = compressed.macs(), self._outputs(compressed)
        finally:
            compressed.detach()
        return Result(
            combination=combination,
            calibration=None if batch is None else batch.identity["sha256"],
            ratio=ratio,
            macs=macs,
            clear=clear,
            **self._quality(outputs),
        )

    def _outputs(self, model: nn.Module) -> Tensor:
        sample = next(self.model.parameters())
        with explain_out_of_memory(f"{self.batch_size} {self.loaded.description.preprocessing.unit}s"):
            parts = [
                model(batch.to(device=sample.device, dtype=sample.dtype))
                for batch in self.images.tensor.split(self.batch_size)
            ]
        outputs = torch.cat(parts)
        if not bool(outputs.isfinite().all()):
            raise CheckFailed("the model returns values that are not finite", "Use --dtype float32.")
        return outputs

    def _quality(self, outputs: Tensor) -> dict[str, Any]:
        given, labels = self.dense.of(outputs), self.images.labels
        if not self.dense.are_logits:
            cosines = 1.0 - distance(self.dense.reference, given, has_head=False).double().clamp_min(0.0)
            error = float(cosines.std()) / math.sqrt(len(cosines)) if len(cosines) > 1 else 0.0
            return {"cosine": float(cosines.mean()), "cosine_error": error}
        correct = None if labels is None else to_bits((outputs.argmax(-1).cpu() == labels).numpy())
        return {"correct": correct, "same": to_bits(agreement(self.dense.reference, given).bool().cpu().numpy())}
