"""Accuracy of models on a labelled dataset. All models of a run see the same decoded batches.

The dataset is cut into batches once, and every batch is a piece of work of its own, with the same pictures whichever
process does it and whenever. So what a model says of a picture does not depend on how many processes there are, or on
where a run was taken up again; whole numbers are added up, and come out the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from repshift_cli import __version__, measure
from repshift_cli.attach import CompressedModel
from repshift_cli.backends import AttentionMode, attention_mode, auto_note
from repshift_cli.data.base import ImageDataset, UnreadableSample
from repshift_cli.data.feeding import Batch, Feed, default_workers
from repshift_cli.digests import digest_of_document, digest_of_tensors
from repshift_cli.errors import CheckFailed, DataError, ModelError, RepshiftError, UsageError
from repshift_cli.files import sha256_of
from repshift_cli.intervals import percent_interval
from repshift_cli.predictions import Predictions
from repshift_cli.preprocessing import Preprocessing
from repshift_cli.processes import Processes
from repshift_cli.progress import Progress
from repshift_cli.resuming import State, clear
from repshift_cli.runtimes import Runtime
from repshift_cli.tally import Count, Part, Rows, Said

__all__ = [
    "Evaluation",
    "Pace",
    "Score",
    "Skipped",
    "evaluate",
    "explained_memory",
    "finite",
    "forget",
    "in_turn",
    "per_second",
    "predictions_of",
]

_TOP = 5
_LOGITS_RANK = 2  # dimensions of logits: [B, K]

_MOST_SHARDS = 256
"""Of a run, each with a file of its own where progress is kept; small runs have one for each batch."""

_NOTABLE_WAITING = 0.1
"""Share of the time above which a device that only waits for data is held up by them."""

_STATE_FORMAT = 1


@dataclass(frozen=True)
class Skipped:
    """A picture that took no part, and why."""

    sample: str
    reason: str


@dataclass(frozen=True)
class Score:
    """What one model reached.

    Attributes:
        images: pictures that were classified.
        top1_correct, top5_correct: how many had their label first, or among the first five (all, where the head has
            fewer classes than five).
        seconds: time in the model alone, for all pictures; of several processes, added up.
        attention: what computed its attention, as `measure.observed_attention` has it; of several processes, joined
            with `+` where they differ. None where all was done in an earlier run.
    """

    images: int
    top1_correct: int
    top5_correct: int
    seconds: float
    attention: str | None

    @property
    def top1(self) -> float:
        """Percent, 0 to 100."""
        return 100.0 * self.top1_correct / self.images

    @property
    def top5(self) -> float:
        """Percent, 0 to 100."""
        return 100.0 * self.top5_correct / self.images

    @property
    def top1_interval(self) -> tuple[float, float]:
        """95% interval of `top1`, in percent."""
        return percent_interval(self.top1_correct, self.images)

    @property
    def top5_interval(self) -> tuple[float, float]:
        """95% interval of `top5`, in percent."""
        return percent_interval(self.top5_correct, self.images)

    @property
    def images_per_s(self) -> float:
        """Images per second of model time: no decoding, no copying; of each process, where there are several."""
        return per_second(self.images, self.seconds)


@dataclass(frozen=True)
class Pace:
    """Where the time of a run went: seconds, added up over its processes, without what was done in an earlier run.

    Attributes:
        total: from the first picture to the last result.
        waited: until a batch was there, the first one left out: for that one nothing can be done.
        decoding: processor time of reading, decoding and transforming.
        models: processor time in the models, and beside them in the process that runs them.
        workers: processes that decoded beside each of the others.
        processes: how many ran models.
        shares_cores: whether the models run on the processor too.
    """

    total: float
    waited: float
    decoding: float
    models: float
    workers: int
    processes: int
    shares_cores: bool

    @property
    def waiting(self) -> float:
        """Share of the time (0 to 1) that was spent waiting for data."""
        return min(1.0, self.waited / self.total) if self.total > 0 else 0.0

    @property
    def bottleneck(self) -> Literal["data", "model"]:
        """Which side holds up the other: on shared cores the one that takes more of them, else data if waited for."""
        if self.shares_cores:
            return "data" if self.decoding > self.models else "model"
        return "data" if self.waiting > _NOTABLE_WAITING else "model"


@dataclass(frozen=True)
class Evaluation:
    """The outcome for all models of a run.

    Attributes:
        dataset: name of the dataset.
        total: pictures of the dataset.
        outputs: of the head, among how many a model chose.
        images: pictures that were classified, by every model.
        skipped: pictures that could not be read.
        scores: by the name of the model.
        same_top1: where there are two models, how many pictures both put into the same class; else None.
        seconds: from the first picture to the last result, decoding and all models included; of several processes, the
            slowest one's.
        fresh: how many of the pictures were read in this run, and not in one that it goes on with.
        interrupted: whether it was; then not all pictures took part.
        pace: where the time went.
        batch_size: pictures at a time in the end; less than was asked for where the memory did not suffice.
        rows: what was said of each picture, where that was asked for.
    """

    dataset: str
    total: int
    outputs: int
    images: int
    skipped: tuple[Skipped, ...]
    scores: Mapping[str, Score]
    same_top1: int | None
    seconds: float
    fresh: int
    interrupted: bool
    pace: Pace
    batch_size: int
    rows: Rows | None = None

    @property
    def agreement(self) -> float | None:
        """Share (0 to 1) of pictures that both models put into the same class; None unless there are two."""
        return None if self.same_top1 is None else self.same_top1 / self.images

    @property
    def images_per_s(self) -> float:
        """Images per second end to end, for all models and processes together."""
        return per_second(self.fresh, self.seconds)


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
    job = _Job(models, dataset, preprocessing, batch_size, device, dtype, num_classes, attention, keep_rows)
    state = None if resume is None else State(resume, job.header(), tuple(models), progress)
    workers = default_workers(device, group.nearby) if workers is None else workers
    with ExitStack() as switched:
        for model in models.values():
            switched.enter_context(attention_mode(model, attention))
        return _Work(job, group, state, _Side(workers, strict, progress)).run()


def predictions_of(result: Evaluation, name: str, dataset: ImageDataset, model: str) -> Predictions:
    """What one of the models said, for a file.

    Args:
        result: of an evaluation with `keep_rows`.
        name: of the model, in the result.
        dataset: what was evaluated, labelled for the head.
        model: what the file is to call it.
    """
    rows = result.rows
    assert rows is not None
    classes = dataset.classes
    return Predictions(
        ids=np.array([dataset.key(index) for index in rows.indices], dtype=np.str_),
        answers=rows.answers,
        top=rows.said[name].top,
        probabilities=rows.said[name].probabilities,
        meta={
            "model": model,
            "dataset": result.dataset,
            "classes": None if classes is None else list(classes),
            "skipped": len(result.skipped),
            "repshift": __version__,
        },
    )


def forget(resume: Path, group: Processes) -> None:
    """Remove the state of a run that is done, when its outcome has been told; every process calls this."""
    group.collect(None)
    clear(resume)


def per_second(count: int, seconds: float) -> float:
    """A rate; 0 where no time has passed."""
    return count / seconds if seconds > 0 else 0.0


@dataclass(frozen=True)
class _Job:
    """What is to be evaluated: all that the outcome depends on. The arguments are those of `evaluate`."""

    models: Mapping[str, nn.Module]
    dataset: ImageDataset
    preprocessing: Preprocessing
    batch_size: int
    device: torch.device
    dtype: torch.dtype
    num_classes: int
    attention: AttentionMode
    keep_rows: bool

    @property
    def batches(self) -> int:
        """How many batches the dataset has."""
        return -(-len(self.dataset) // self.batch_size)

    @property
    def shards(self) -> list[range]:
        """The batches of each shard, which is what progress is kept of and what processes share."""
        size = -(-self.batches // _MOST_SHARDS)
        return [range(first, min(first + size, self.batches)) for first in range(0, self.batches, size)]

    def pictures(self, batch: int) -> range:
        """The pictures of a batch."""
        return range(batch * self.batch_size, min((batch + 1) * self.batch_size, len(self.dataset)))

    def header(self) -> dict[str, Any]:
        """What makes this run the one that it is, in words that tell a user what differs."""
        stamps = sha256()
        for index in range(len(self.dataset)):
            stamps.update(self.dataset.stamp(index).encode("utf-8", "backslashreplace") + b"\n")
        return {
            "evaluation": _STATE_FORMAT,
            "repshift": __version__,
            "torch": str(torch.__version__),
            "models": {name: _digest_of_model(model) for name, model in self.models.items()},
            "data": stamps.hexdigest(),
            "pictures": len(self.dataset),
            "outputs": digest_of_document([self.num_classes, self.dataset.outputs]),
            "preprocessing": _json_form(self.preprocessing.to_dict()),
            "batch size": self.batch_size,
            "device": self.device.type,
            "dtype": str(self.dtype),
            "attention": self.attention,
            "saved predictions": self.keep_rows,
        }


def _json_form(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON would give them back: tuples become lists."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _digest_of_model(model: nn.Module) -> str:
    """SHA-256 of weights, and of the plan by which tokens go; of exported files, of all that is in them."""
    plans = [part.plan.model_dump(mode="json") for part in model.modules() if isinstance(part, CompressedModel)]
    files = [sha256_of(part.path) for part in model.modules() if isinstance(part, Runtime)]
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    return digest_of_document([kind, digest_of_tensors(model.state_dict().items()), plans, files])


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

    job: _Job
    group: Processes
    state: State | None
    side: _Side
    parts: dict[int, Part] = field(default_factory=dict)
    fresh: int = 0
    decoding: float = 0.0

    def run(self) -> Evaluation:
        own = self._own_shards()
        runner = _Runner(self.job, self.side.progress)
        feed = self._feed(own)
        began, processor = time.perf_counter(), time.process_time()
        problem: RepshiftError | None = None
        interrupted = False
        try:
            self._evaluate(own, feed, runner)
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
            waited=feed.waited,
            decoding=self.decoding,
            models=max(0.0, processor - (self.decoding if feed.decodes_here else 0.0)),
            batch_size=runner.limit,
            interrupted=interrupted,
            problem=problem,
        )
        return self._outcome(whole, self.group.collect(told), feed.processes_beside)

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

    def _feed(self, own: Sequence[range]) -> Feed:
        job = self.job
        return Feed(
            job.dataset,
            job.preprocessing,
            {batch: job.pictures(batch) for shard in own for batch in shard},
            workers=self.side.workers,
            pinned=job.device.type == "cuda",
            strict=self.side.strict,
            warn=self.side.progress.warn,
        )

    def _evaluate(self, own: Sequence[range], feed: Feed, runner: _Runner) -> None:
        ends = {shard[-1]: shard for shard in own}
        total = sum(len(pictures) for pictures in feed.batches.values())
        with torch.inference_mode(), self.side.progress.task("evaluate", total) as task:
            for batch in feed:
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


@dataclass
class _Runner:
    """Runs the models over batches, as many pictures at a time as there is memory for.

    Attributes:
        limit: pictures at a time.
        attention: what computed it, by the name of the model, once there was a batch.
    """

    job: _Job
    progress: Progress
    limit: int = field(init=False)
    attention: dict[str, str] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.limit = self.job.batch_size

    def part(self, batch: Batch) -> Part:
        """What the models say of a batch."""
        dataset, skipped = self.job.dataset, tuple(batch.broken)
        if batch.pixels is None:
            return Part(0, {name: Count() for name in self.job.models}, 0, skipped)
        _check_labels(batch, dataset, self.job.num_classes)
        heard = self._heard(batch)
        counts = {name: _count(said, batch.answers) for name, said in heard.items()}
        first = [said.top[:, 0] for said in heard.values()]
        same = int((first[0] == first[1]).sum()) if len(first) == 2 else 0  # noqa: PLR2004
        rows = (_rows(batch, heard),) if self.job.keep_rows else ()
        return Part(len(batch.indices), counts, same, skipped, rows)

    def _heard(self, batch: Batch) -> dict[str, _Heard]:
        """What each model says, with the batch halved until it fits into the memory."""
        assert batch.pixels is not None
        pieces: list[dict[str, _Heard]] = []
        place = 0
        while place < len(batch.pixels):
            pixels = batch.pixels[place : place + self.limit]
            try:
                pieces.append(self._piece(pixels, batch.number))
            except RuntimeError as error:
                if not measure.out_of_memory(error):
                    raise
                if len(pixels) == 1:
                    raise UsageError(
                        "the device has not enough memory for one image at a time", "Use another --device or --dtype."
                    ) from error
            else:
                place += len(pixels)
                continue
            # here, and not above: the error holds on to what the failed pass had in memory
            self._halve(len(pixels))
        return {name: _Heard.joined([piece[name] for piece in pieces]) for name in self.job.models}

    def _piece(self, pixels: Tensor, turn: int) -> dict[str, _Heard]:
        job = self.job
        pixels = pixels.to(device=job.device, non_blocking=True).to(dtype=job.dtype)
        if len(self.attention) < len(job.models):
            # The first pass pays for memory pools and kernel selection; it is not part of the speed, so it can be
            # watched.
            for name, model in job.models.items():
                self.attention[name] = measure.observed_attention(model, pixels)
        found: dict[str, _Heard] = {}
        for name in in_turn(list(job.models), turn):
            logits, seconds = _timed(job.models[name], pixels, job.device)
            _check_logits(name, logits, len(pixels), job.num_classes)
            found[name] = _heard(logits, job.dataset.outputs, seconds)
        return found

    def _halve(self, size: int) -> None:
        if self.limit == self.job.batch_size:
            self.progress.note(
                f"the device has not enough memory for {size} images at a time: the batch is halved until it fits"
            )
        self.limit = (size + 1) // 2
        if self.job.device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class _Heard:
    """The outputs that a model holds likeliest: int64 `[B, K]`; their probabilities float32 `[B, K]`; its seconds."""

    top: Tensor
    probabilities: Tensor
    seconds: float

    @staticmethod
    def joined(pieces: Sequence[_Heard]) -> _Heard:
        """Pieces of a batch, in order."""
        return _Heard(
            torch.cat([piece.top for piece in pieces]),
            torch.cat([piece.probabilities for piece in pieces]),
            sum(piece.seconds for piece in pieces),
        )


def _heard(logits: Tensor, outputs: tuple[int, ...] | None, seconds: float) -> _Heard:
    """The likeliest of the outputs among which is chosen."""
    places = None if outputs is None else torch.tensor(outputs, device=logits.device)
    chosen = logits if places is None else logits[:, places]
    values, top = chosen.topk(min(_TOP, chosen.shape[1]), dim=1)
    # the softmax of the five, without that of all the others
    probabilities = (values.float() - chosen.float().logsumexp(dim=1, keepdim=True)).exp()
    return _Heard((top if places is None else places[top]).cpu(), probabilities.cpu(), seconds)


def _count(said: _Heard, answers: Tensor) -> Count:
    hits = (said.top[:, :, None] == answers[:, None, :]).any(dim=2)
    return Count(int(hits[:, 0].sum()), int(hits.any(dim=1).sum()), said.seconds)


def _rows(batch: Batch, heard: Mapping[str, _Heard]) -> Rows:
    said = {name: Said(each.top.to(torch.int32).numpy(), each.probabilities.numpy()) for name, each in heard.items()}
    return Rows(tuple(batch.indices), batch.answers.to(torch.int32).numpy(), said)


def in_turn(names: list[str], turn: int) -> list[str]:
    """The names, every second time in reverse, so that none always runs on the warmer caches."""
    return names[::-1] if turn % 2 else names


def _timed(model: nn.Module, pixels: Tensor, device: torch.device) -> tuple[Tensor, float]:
    measure.wait_for(device)
    started = time.perf_counter()
    logits = model(pixels)
    measure.wait_for(device)
    return logits, time.perf_counter() - started


def _check_logits(name: str, logits: object, batch: int, num_classes: int) -> None:
    if not isinstance(logits, Tensor) or logits.dim() != _LOGITS_RANK:
        raise ModelError(f"{name}: the model does not return class scores, so it cannot be evaluated on labels")
    if tuple(logits.shape) != (batch, num_classes):
        raise ModelError(f"{name}: the model returns {tuple(logits.shape)} where ({batch}, {num_classes}) is expected")
    finite(name, logits)


def finite(name: str, values: Tensor) -> Tensor:
    """The values as they are.

    Raises:
        CheckFailed: one is not finite; `name` is what the model is called.
    """
    if not bool(torch.isfinite(values).all()):
        raise CheckFailed(
            f"{name}: the model returns values that are not finite in {str(values.dtype).removeprefix('torch.')}",
            "Evaluate with --dtype float32 or bfloat16; if that fails as well, the weights are damaged.",
        )
    return values


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


def _check_labels(batch: Batch, dataset: ImageDataset, num_classes: int) -> None:
    """Refuse labels outside the head, where no list of classes told it beforehand."""
    fits = range(num_classes) if dataset.outputs is None else frozenset(dataset.outputs)
    for index, (label, *_) in zip(batch.indices, batch.answers.tolist(), strict=True):
        if label not in fits:
            raise DataError(
                f"{dataset.sample_id(index)} has label {label}, but the head of the model has {num_classes} outputs",
                f"Labels from 0 to {num_classes - 1} fit. Choose a model that was trained on this dataset.",
            )


@contextmanager
def explained_memory(what: str) -> Iterator[None]:
    """Turn an error of the device's memory into one that says what to do; `what` is in memory at a time."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UsageError(f"the device has not enough memory for {what} at a time", "Lower --batch-size.") from error
