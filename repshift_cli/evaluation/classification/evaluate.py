"""Accuracy of models on a labelled dataset. All models of a run see the same decoded batches.

The dataset is cut into batches once, and every batch is a piece of work of its own, with the same pictures whichever
process does it and whenever. So what a model says of a picture does not depend on how many processes there are, or on
where a run was taken up again; whole numbers are added up, and come out the same.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from repshift_cli.data.dataset import ImageDataset
from repshift_cli.data.decode import UnreadableSample
from repshift_cli.data.loader import BatchLoader, default_workers, image_loader
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import CheckFailed, DataError, ModelError, RepshiftError, UsageError
from repshift_cli.evaluation.classification.counts import Part, Rows
from repshift_cli.evaluation.classification.job import EvaluationJob
from repshift_cli.evaluation.classification.result import Evaluation, Pace, Score
from repshift_cli.evaluation.classification.resume import State, clear
from repshift_cli.evaluation.classification.runner import Runner
from repshift_cli.evaluation.common import Skipped
from repshift_cli.models.attention_mode import AttentionMode, attention_mode, auto_note
from repshift_cli.utils.distributed import Processes
from repshift_cli.utils.progress import Progress

__all__ = [
    "evaluate",
    "forget",
]


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
    """Classify every picture with every model.

    Every process of a group calls this with the same arguments, and gets the same outcome. A KeyboardInterrupt ends
    the work, not the call: the outcome is that of the pictures until then.

    Args:
        models: by name; each maps `[B, C, H, W]` to logits `[B, num_classes]`. They are set to eval mode and moved
            to `device` and `dtype` in place.
        dataset: pictures and labels.
        preprocessing: the transform of the models.
        batch_size: pictures at a time; the last batch may have fewer. Where the memory does not suffice it is halved.
        workers: processes that decode beside this one; 0 decodes in this one, None as many as are of use.
        strict: stop at the first picture that cannot be read, instead of leaving it out.
        num_classes: outputs of the head.
        progress: told by each process of its own part.
        attention: what is to compute the attention of all models.
        group: the processes that share the work; None for this one alone.
        resume: folder that keeps how far it came; a run that was cut off goes on from there. None for none.
        keep_rows: whether `Evaluation.rows` are wanted.

    Raises:
        DataError: no picture, labels that do not fit the head, or (`strict`) a picture that cannot be read.
        ModelError: a model does not return logits of that form.
        CheckFailed: a model returns values that are not finite.
        UsageError: not enough memory for one picture; attention cannot be computed as asked; `resume` is the state of
            another run; or several processes are to share a dataset that can only be read from its start.
        OutputError: `resume` cannot be written to.
        KeyboardInterrupt: before any picture was classified.
    """
    dataset = dataset.for_head(num_classes)
    _check_classes(dataset, num_classes)
    if len(dataset) == 0:
        raise DataError(f"the dataset {dataset.name} has no pictures")
    group = group or Processes()
    if group.count > 1 and not dataset.random_access:
        raise UsageError(
            f"the dataset {dataset.name} can only be read from its start, so processes cannot share it",
            "Evaluate it in one process, or unpack it into class folders or tars.",
        )
    device = torch.device(device)
    for model in models.values():
        model.to(device=device, dtype=dtype).eval()
    for note in {note for model in models.values() if (note := auto_note(model, attention))}:
        progress.note(note)
    job = EvaluationJob(models, dataset, preprocessing, batch_size, device, dtype, num_classes, attention, keep_rows)
    state = None if resume is None else State(resume, job.header(), tuple(models), progress)
    workers = default_workers(device, group.nearby) if workers is None else workers
    with ExitStack() as switched:
        for model in models.values():
            switched.enter_context(attention_mode(model, attention))
        return _Work(job, group, state, _Side(workers, strict, progress)).run()


def forget(resume: Path, group: Processes) -> None:
    """Remove the state of a run that is done, when its outcome has been told; every process calls this."""
    group.collect(None)
    clear(resume)


@dataclass(frozen=True)
class _Side:
    """What does not change the outcome: how data come, and who is told."""

    workers: int
    strict: bool
    progress: Progress


@dataclass
class _Told:
    """What one process has to tell the others in the end."""

    skipped: tuple[tuple[int, str], ...]
    rows: tuple[Rows, ...]
    seconds: dict[str, float]
    attention: dict[str, str]
    fresh: int
    wall: float
    waited: float
    decoding: float
    models: float
    batch_size: int
    interrupted: bool
    problem: RepshiftError | None


@dataclass
class _Work:
    """The part of the work that this process does, and what became of all parts.

    Attributes:
        parts: by the number of a batch; what an earlier run did of a shard stands under its first batch.
    """

    job: EvaluationJob
    group: Processes
    state: State | None
    side: _Side
    parts: dict[int, Part] = field(default_factory=dict)
    fresh: int = 0
    decoding: float = 0.0

    def run(self) -> Evaluation:
        own = self._own_shards()
        runner = Runner(self.job, self.side.progress)
        loader = self._loader(own)
        began, processor = time.perf_counter(), time.process_time()
        problem: RepshiftError | None = None
        interrupted = False
        try:
            self._evaluate(own, loader, runner)
        except KeyboardInterrupt:
            interrupted = True
            self.group.stop()
        except RepshiftError as error:
            if self.group.count == 1:
                raise
            problem = error
            self.group.stop()
        wall, processor = time.perf_counter() - began, time.process_time() - processor
        whole = Part.joined(self.parts.values(), tuple(self.job.models))
        told = _Told(
            skipped=whole.skipped,
            rows=whole.rows,
            seconds={name: count.seconds for name, count in whole.counts.items()},
            attention=runner.attention,
            fresh=self.fresh,
            wall=wall,
            waited=loader.waited,
            decoding=self.decoding,
            models=max(0.0, processor - (self.decoding if loader.workers == 0 else 0.0)),
            batch_size=runner.limit,
            interrupted=interrupted,
            problem=problem,
        )
        return self._outcome(whole, self.group.collect(told), loader.workers)

    def _own_shards(self) -> list[range]:
        """The shards that this process is to do; those that are done already are counted by one process each."""
        shards = self.job.shards
        if self.state is not None:
            known = self._known(self.state, len(shards))
            held = self.group.collect(sorted(known))
            holder = {shard: rank for rank, numbers in reversed(list(enumerate(held))) for shard in numbers}
            self.parts = {
                shards[shard].start: part for shard, part in known.items() if holder[shard] == self.group.rank
            }
            shards = [shard for number, shard in enumerate(shards) if number not in holder]
        first, last = (len(shards) * rank // self.group.count for rank in (self.group.rank, self.group.rank + 1))
        return shards[first:last]

    def _known(self, state: State, shards: int) -> dict[int, Part]:
        if self.group.is_first:
            state.tidy()
        self.group.collect(None)
        self.group.agreed(state.begin)
        known = state.known(range(shards))
        if self.side.strict:
            self.group.agreed(lambda: self._refuse_skipped(known))
        return known

    def _refuse_skipped(self, known: Mapping[int, Part]) -> None:
        skipped = sorted(entry for part in known.values() for entry in part.skipped)
        if skipped:
            index, reason = skipped[0]
            raise UnreadableSample(self.job.dataset.sample_id(index), reason)

    def _loader(self, own: Sequence[range]) -> BatchLoader:
        job = self.job
        return image_loader(
            job.dataset,
            job.preprocessing,
            {batch: job.pictures(batch) for shard in own for batch in shard},
            workers=self.side.workers,
            pinned=job.device.type == "cuda",
            strict=self.side.strict,
            warn=self.side.progress.warn,
        )

    def _evaluate(self, own: Sequence[range], loader: BatchLoader, runner: Runner) -> None:
        ends = {shard[-1]: shard for shard in own}
        total = sum(len(pictures) for pictures in loader.batches.values())
        with torch.inference_mode(), self.side.progress.task("evaluate", total) as task:
            for batch in loader:
                if self.group.stopped():
                    return
                # one assignment, so that an interruption leaves whole batches, each of them once
                self.parts[batch.number] = runner.part(batch)
                self.fresh += len(batch.indices)
                self.decoding += batch.decoding
                if self.state is not None and batch.number in ends:
                    shard = ends[batch.number]
                    done = Part.joined((self.parts[number] for number in shard), tuple(self.job.models))
                    self.state.keep(self.job.shards.index(shard), done)
                task.advance(batch.count)

    def _outcome(self, whole: Part, told: Sequence[_Told], workers: int) -> Evaluation:
        """The sum over all processes."""
        job = self.job
        for each in told:
            if each.problem is not None:
                raise each.problem
        images, same, *correct = self.group.added(
            [whole.images, whole.same, *(n for count in whole.counts.values() for n in (count.top1, count.top5))]
        )
        interrupted = any(each.interrupted for each in told)
        skipped = sorted(entry for each in told for entry in each.skipped)
        self._check_sum(images, skipped, interrupted)
        pairs = zip(correct[::2], correct[1::2], strict=True)
        scores = {
            name: Score(images, top1, top5, sum(each.seconds[name] for each in told), _attention(told, name))
            for name, (top1, top5) in zip(job.models, pairs, strict=True)
        }
        rows = [rows for each in told for rows in each.rows]
        return Evaluation(
            dataset=job.dataset.name,
            total=len(job.dataset),
            outputs=job.num_classes if job.dataset.outputs is None else len(job.dataset.outputs),
            images=images,
            skipped=tuple(Skipped(job.dataset.sample_id(index), reason) for index, reason in skipped),
            scores=scores,
            same_top1=same if len(scores) == 2 else None,  # noqa: PLR2004
            seconds=max(each.wall for each in told),
            fresh=sum(each.fresh for each in told),
            interrupted=interrupted,
            pace=Pace(
                total=sum(each.wall for each in told),
                waited=sum(each.waited for each in told),
                decoding=sum(each.decoding for each in told),
                models=sum(each.models for each in told),
                workers=workers,
                processes=self.group.count,
                shares_cores=job.device.type == "cpu",
            ),
            batch_size=min(each.batch_size for each in told),
            rows=Rows.joined(rows) if rows else None,
        )

    def _check_sum(self, images: int, skipped: Sequence[tuple[int, str]], interrupted: bool) -> None:
        dataset = self.job.dataset
        if images == 0 and interrupted:
            raise KeyboardInterrupt
        if images == 0:
            index, reason = skipped[0]
            raise DataError(
                f"none of the {len(skipped)} pictures of {dataset.name} can be read",
                f"The first: {dataset.sample_id(index)}: {reason}",
            )
        if not interrupted and images + len(skipped) != len(dataset):
            raise CheckFailed(f"{images} and {len(skipped)} pictures were counted, of {len(dataset)}")


def _attention(told: Sequence[_Told], name: str) -> str | None:
    """What computed the attention of a model in the processes that ran it; None where none did."""
    return "+".join(sorted({each.attention[name] for each in told if name in each.attention})) or None


def _check_classes(dataset: ImageDataset, num_classes: int) -> None:
    """Refuse a dataset whose classes are not those of the head: labels would be off without anyone noticing."""
    if num_classes < 1:
        raise ModelError(
            "the model has no classification head, so it cannot be evaluated on labels",
            "Use a checkpoint that was trained to classify.",
        )
    classes = dataset.classes
    if classes is None or len(classes) == num_classes:
        return
    raise DataError(
        f"the dataset {dataset.name} has {len(classes)} classes, but the head of the model has {num_classes}",
        _advice(len(classes), num_classes),
    )


def _advice(classes: int, outputs: int) -> str:
    if outputs == classes + 1:
        return (
            "One output more may be a background class, first or last; which one is not guessed. Use a checkpoint "
            "whose head has the classes of the dataset alone."
        )
    if outputs > classes:
        return (
            "Labels are places in the sorted list of classes, so every class of the model has to be there: add empty "
            "folders for classes without pictures, or choose a model that was trained on these classes."
        )
    return "Choose a model that was trained on these classes, or a dataset with the classes of the model."
