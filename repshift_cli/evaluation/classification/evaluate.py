"""Accuracy of models on a labelled dataset. All models of a run see the same decoded batches.

Data flow: `data/loader.py` decodes and batches it, `runner.py` classifies the batch and counts, `counts.py`
adds up the counts, `result.py` is the outcome. `resume.py` keeps counts of completed shards (consecutive batches).

The dataset is cut into the same batches whichever process runs them and whether or not the run was resumed. So the
predictions do not depend on the number of processes, and the sums of counts are exact.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from repshift_cli.data.dataset import ImageDataset
from repshift_cli.data.decode import UnreadableSample
from repshift_cli.data.loader import BatchLoader, default_workers, image_loader
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.data.sources.folder import MEDIA
from repshift_cli.errors import CheckFailed, DataError, ModelError, RepshiftError, UsageError
from repshift_cli.evaluation.classification.counts import Counts, PredictionRows
from repshift_cli.evaluation.classification.job import EvaluationJob
from repshift_cli.evaluation.classification.result import Evaluation, Pace, Score
from repshift_cli.evaluation.classification.resume import ResumeState, remove_state
from repshift_cli.evaluation.classification.runner import Runner
from repshift_cli.evaluation.common import Skipped
from repshift_cli.models.attention_mode import AttentionMode, attention_mode, auto_note
from repshift_cli.utils.distributed import Processes
from repshift_cli.utils.progress import Progress
from repshift_cli.utils.ranges import check_ranges


def evaluate(
    models: Mapping[str, nn.Module],
    dataset: ImageDataset,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    device: torch.device | str,
    dtype: torch.dtype,
    workers: int | None,
    strict: bool,
    num_classes: int,
    progress: Progress,
    attention: AttentionMode = "auto",
    group: Processes | None = None,
    resume: Path | None = None,
    keep_rows: bool = False,
) -> Evaluation:
    """Classify every image, or every video, with every model.

    Every process of a group calls this with the same arguments and gets the same result. A KeyboardInterrupt stops
    the work and the result of the images until then is returned.

    Args:
        models: by name; each maps `[B, C, H, W]` or `[B, T, C, H, W]` to logits `[B, num_classes]`. They are set to
            eval mode and moved to `device` and `dtype` in place.
        batch_size: images at a time; halved if memory runs out.
        workers: processes that decode; 0 decodes in this one, None chooses by device and cores.
        strict: raise at the first image that cannot be read, instead of skipping it.
        num_classes: outputs of the head.
        group: the processes that share the work; None for this one alone.
        resume: folder for the state of the run; an interrupted run continues from there. None keeps no state.

    Raises:
        DataError: no image, videos for a model of images or the reverse, labels that do not fit the head, or (`strict`)
            an image that cannot be read.
        ModelError: a model does not return logits of that form.
        CheckFailed: a model returns values that are not finite.
        UsageError: not enough memory for one image; unsupported attention; `resume` is the state of another run; or
            several processes share a dataset without random access.
        OutputError: `resume` cannot be written to.
        KeyboardInterrupt: before any image was classified.
    """
    check_ranges(batch_size=batch_size, workers=workers)
    group, device = group or Processes(), torch.device(device)
    job = group.agreed(
        lambda: _prepare(
            EvaluationJob(models, dataset, preprocessing, batch_size, device, dtype, num_classes, attention, keep_rows),
            group,
            progress,
        )
    )
    if group.count > 1:
        options = {"--strict": strict, "--resume": resume is not None}
        group.check_equal({**job.header(with_times=group.nearby == group.count), **options})
    state = None if resume is None else ResumeState(resume, job.header(), tuple(models), progress)
    workers = default_workers(device, group.nearby) if workers is None else workers
    with ExitStack() as switched:
        for model in models.values():
            switched.enter_context(attention_mode(model, attention))
        own = _ProcessRun(job, group, state, workers, strict, progress).run()
    return _combine(job, group.collect(own))


def _prepare(job: EvaluationJob, group: Processes, progress: Progress) -> EvaluationJob:
    """Check the dataset and move the models. Returns the job with the labels of the head."""
    dataset = job.dataset.for_head(job.num_classes)
    _check_classes(dataset, job.num_classes)
    if len(dataset) == 0:
        raise DataError(f"the dataset {dataset.name} has no {dataset.unit}")
    if dataset.unit != MEDIA[job.preprocessing.unit].unit:
        raise DataError(f"the model takes {job.preprocessing.unit}s, but {dataset.name} holds {dataset.unit}")
    if group.count > 1 and not dataset.random_access:
        raise UsageError(
            f"the dataset {dataset.name} can only be read from its start, so processes cannot share it",
            "Evaluate it in one process, or unpack it into class folders or tars.",
        )
    for model in job.models.values():
        model.to(device=job.device, dtype=job.dtype).eval()
    for note in {note for model in job.models.values() if (note := auto_note(model, job.attention))}:
        progress.note(note)
    return replace(job, dataset=dataset)


def finish(resume: Path, group: Processes) -> None:
    """Remove the state of a completed run once its result is saved; every process calls this."""
    group.collect(None)
    remove_state(resume)


@dataclass
class _ProcessResult:
    """Result of one process. `counts` includes completed shards of an earlier run, the other numbers do not."""

    counts: Counts
    attention: dict[str, str]
    fresh: int
    pace: Pace
    batch_size: int
    problem: RepshiftError | KeyboardInterrupt | None


@dataclass
class _ProcessRun:
    job: EvaluationJob
    group: Processes
    state: ResumeState | None
    workers: int
    strict: bool
    progress: Progress

    def run(self) -> _ProcessResult:
        """Classify the images of the shards of this process."""
        job = self.job
        completed, own = self._split_shards()
        runner = Runner(job, self.progress)
        loader = image_loader(
            job.dataset,
            job.preprocessing,
            {batch: job.images(batch) for shard in own for batch in job.shards[shard]},
            workers=self.workers,
            pinned=job.device.type == "cuda",
            strict=self.strict,
            warn=self.progress.warn,
        )
        batches: dict[int, tuple[Counts, float]] = {}
        problem: RepshiftError | KeyboardInterrupt | None = None
        began, processor = time.perf_counter(), time.process_time()
        try:
            self._classify(own, loader, runner, batches)
        except (KeyboardInterrupt, RepshiftError) as error:
            if self.group.count == 1 and isinstance(error, RepshiftError):
                raise
            problem = error
            self.group.stop()
        wall, processor = time.perf_counter() - began, time.process_time() - processor
        decoding = sum(seconds for _, seconds in batches.values())
        return _ProcessResult(
            counts=Counts.joined([*completed, *(counts for counts, _ in batches.values())], job.models),
            attention=runner.attention,
            fresh=sum(counts.images for counts, _ in batches.values()),
            pace=Pace(
                total=wall,
                waited=loader.waited,
                decoding=decoding,
                models=max(0.0, processor - (decoding if loader.workers == 0 else 0.0)),
                workers=loader.workers,
                processes=1,
                shares_cores=job.device.type == "cpu",
            ),
            batch_size=runner.limit,
            problem=problem,
        )

    def _split_shards(self) -> tuple[list[Counts], list[int]]:
        """Counts of completed shards, each in one process only, and the numbers of the shards that this one runs."""
        completed = {} if self.state is None else self._load_completed(self.state)
        by_rank = self.group.collect(sorted(completed))
        owner = {shard: rank for rank, shards in reversed(list(enumerate(by_rank))) for shard in shards}
        left = [shard for shard in range(len(self.job.shards)) if shard not in owner]
        first, last = (len(left) * rank // self.group.count for rank in (self.group.rank, self.group.rank + 1))
        return [counts for shard, counts in completed.items() if owner[shard] == self.group.rank], left[first:last]

    def _load_completed(self, state: ResumeState) -> dict[int, Counts]:
        if self.group.is_first:
            state.remove_partial_files()
        self.group.collect(None)  # waits for the first process
        self.group.agreed(state.open)
        shards = {shard: self.job.images_of_shard(shard) for shard in range(len(self.job.shards))}
        completed = state.load(shards, self.job.keep_rows)
        if self.strict:
            self.group.agreed(lambda: self._refuse_skipped(completed))
        return completed

    def _refuse_skipped(self, completed: Mapping[int, Counts]) -> None:
        if skipped := [entry for counts in completed.values() for entry in counts.skipped]:
            index, reason = min(skipped)
            raise UnreadableSample(self.job.dataset.sample_id(index), reason)

    def _classify(
        self, own: Sequence[int], loader: BatchLoader, runner: Runner, batches: dict[int, tuple[Counts, float]]
    ) -> None:
        """Fill `batches`: counts and seconds of decoding by number of the batch; save each completed shard."""
        shard_of = {self.job.shards[shard][-1]: shard for shard in own}
        total = sum(len(images) for images in loader.batches.values())
        with (
            torch.inference_mode(),
            self.progress.task("evaluate", total) as task,
            closing(iter(loader)) as loaded,
        ):
            for batch in loaded:
                if self.group.stopped():
                    return
                # one assignment, so that an interrupt leaves whole batches
                batches[batch.number] = runner.classify(batch), batch.decoding
                if self.state is not None and batch.number in shard_of:
                    shard = shard_of[batch.number]
                    parts = (batches[number][0] for number in self.job.shards[shard])
                    self.state.save(shard, Counts.joined(parts, self.job.models))
                task.advance(batch.count)


def _combine(job: EvaluationJob, results: Sequence[_ProcessResult]) -> Evaluation:
    """The evaluation, summed over all processes."""
    problems = [each.problem for each in results if each.problem is not None]
    for problem in problems:
        if isinstance(problem, RepshiftError):
            raise problem
    counts = Counts.joined((each.counts for each in results), job.models)
    skipped = [Skipped(job.dataset.sample_id(index), reason) for index, reason in sorted(counts.skipped)]
    _check_total(job.dataset, counts.images, skipped, interrupted=bool(problems))
    kernels = {
        name: sorted({each.attention[name] for each in results if name in each.attention}) for name in job.models
    }
    return Evaluation(
        dataset=job.dataset.name,
        total=len(job.dataset),
        outputs=job.num_classes if job.dataset.outputs is None else len(job.dataset.outputs),
        images=counts.images,
        skipped=tuple(skipped),
        scores={
            name: Score(counts.images, each.top1, each.top5, each.seconds, "+".join(kernels[name]) or None)
            for name, each in counts.models.items()
        },
        same_top1=counts.same if len(job.models) == 2 else None,  # noqa: PLR2004
        seconds=max(each.pace.total for each in results),
        fresh=sum(each.fresh for each in results),
        interrupted=bool(problems),
        pace=Pace.joined([each.pace for each in results]),
        batch_size=min(each.batch_size for each in results),
        unit=job.dataset.unit,
        padded=tuple(job.dataset.sample_id(index) for index in sorted(counts.padded)),
        rows=PredictionRows.joined(counts.rows) if counts.rows else None,
    )


def _check_total(dataset: ImageDataset, images: int, skipped: Sequence[Skipped], interrupted: bool) -> None:
    if images == 0 and interrupted:
        raise KeyboardInterrupt
    if images == 0:
        raise DataError(
            f"none of the {len(skipped)} {dataset.unit} of {dataset.name} can be read",
            f"The first: {skipped[0].sample}: {skipped[0].reason}",
        )
    if not interrupted and images + len(skipped) != len(dataset):
        raise CheckFailed(f"{images} {dataset.unit} were classified and {len(skipped)} skipped, of {len(dataset)}")


def _check_classes(dataset: ImageDataset, num_classes: int) -> None:
    """Refuse a dataset with another number of classes than the head: its labels would be wrong without any error."""
    if num_classes < 1:
        raise ModelError(
            "the model has no classification head, so it cannot be evaluated on labels",
            "Use a checkpoint that was trained for classification.",
        )
    classes = dataset.classes
    if classes is None or len(classes) == num_classes:
        return
    raise DataError(
        f"the dataset {dataset.name} has {len(classes)} classes, but the head of the model has {num_classes}",
        "Choose a model that was trained on these classes. Labels are indices into the list of classes, so every class "
        "of the model must exist, if need be as an empty folder; a head with a background class is not supported.",
    )
