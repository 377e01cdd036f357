"""From a dataset to batches of tensors: decoded by worker processes ahead of time, whatever the files are like.

A picture that cannot be read is reported in its batch. So is one that ends the process that decodes it: which one that
was is found by decoding each of the suspects in a process of its own, and the others go on.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from repshift_cli.data.dataset import ImageDataset
from repshift_cli.data.decode import UnreadableSample
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import DataError, RepshiftError

__all__ = ["Batch", "Feed", "available_cores", "default_workers"]

_IDLE = -1
_NO_ANSWER = -1
"""Stands where a picture has fewer right answers than another one of its batch."""

_MOST_LOSSES = 3
"""How often in a row worker processes may end without a picture to blame, before nothing more is tried."""

_ALONE_SECONDS = 60.0
"""For one picture, in a process of its own."""

_MOST_WORKERS = 8
_WORKER_ENDED, _WORKER_RAISED = "DataLoader worker (pid", "Caught "
"""How PyTorch's messages begin, of a worker that is no more and of one that hands an error on."""


@dataclass
class Batch:
    """What was read of some pictures.

    Attributes:
        number: which batch it is.
        pixels: float32 `[B, C, H, W]`; None where none could be read.
        answers: int64 `[B, A]`, the outputs that are right; -1 where there are fewer than A.
        indices: of the pictures in `pixels`, in the dataset.
        broken: what could not be read, and why.
        decoding: seconds of processor time that it took.
    """

    number: int
    pixels: Tensor | None
    answers: Tensor
    indices: list[int]
    broken: list[tuple[int, str]]
    decoding: float
    problem: RepshiftError | None = None

    @property
    def count(self) -> int:
        """How many pictures it was made of."""
        return len(self.indices) + len(self.broken)

    def pin_memory(self) -> Batch:
        """Called by the loader when the device copies faster from pinned memory."""
        return self if self.pixels is None else replace(self, pixels=self.pixels.pin_memory())


@dataclass
class Feed:
    """Batches of a dataset, in order.

    Attributes:
        dataset: pictures and labels.
        preprocessing: the transform of the models.
        batches: by number, which pictures; every process of a run has the same, whichever of them it takes.
        workers: processes that decode beside this one; 0 decodes in this one.
        pinned: whether tensors go to pinned memory.
        strict: stop at the first picture that cannot be read.
        warn: told of worker processes that were lost.
        waited: seconds for which whoever took the batches had to wait so far, but for the first one.
    """

    dataset: ImageDataset
    preprocessing: Preprocessing
    batches: Mapping[int, Sequence[int]]
    workers: int
    pinned: bool
    strict: bool
    warn: Callable[[str], None]
    waited: float = field(default=0.0, init=False)

    @property
    def processes_beside(self) -> int:
        """How many processes decode beside this one, given batches enough for all."""
        return self.workers if self.dataset.random_access else 0

    @property
    def decodes_here(self) -> bool:
        """Whether decoding takes the time of this process."""
        return self.processes_beside == 0

    def __iter__(self) -> Iterator[Batch]:
        """The batches.

        Raises:
            UnreadableSample: `strict`, and a picture cannot be read.
            DataError: worker processes keep ending, and no picture is to blame.
            RepshiftError: what the dataset raises for things that are wrong with more than one picture.
        """
        prepared = _Prepared(self.dataset, self.preprocessing, _marks(self.workers), {})
        left = sorted(self.batches)
        losses = 0
        while left:
            try:
                for batch in self._waited_for(prepared, left):
                    if batch.problem is not None:
                        raise batch.problem
                    if self.strict and batch.broken:
                        index, reason = batch.broken[0]
                        raise UnreadableSample(self.dataset.sample_id(index), reason)
                    left.pop(0)
                    losses = 0
                    yield batch
            except (RuntimeError, OSError, EOFError) as error:
                if self.decodes_here or not _is_loss(error):
                    raise
                losses = self._find_the_culprits(prepared, losses + 1, str(error))

    def _waited_for(self, prepared: _Prepared, numbers: Sequence[int]) -> Iterator[Batch]:
        """The batches of these numbers, the time until each one is there added up."""
        with closing(self._loaded(prepared, numbers)) as loaded:
            began = time.perf_counter()
            for batch in loaded:
                if batch.number != numbers[0]:
                    self.waited += time.perf_counter() - began
                yield batch
                began = time.perf_counter()

    def _loaded(self, prepared: _Prepared, numbers: Sequence[int]) -> Generator[Batch, None, None]:
        workers = min(self.processes_beside, len(numbers))
        # the number of a batch stands before its pictures, so that it comes back with them
        orders = [[(number, index) for index in self.batches[number]] for number in numbers]
        loader: Any = DataLoader(
            prepared, batch_sampler=orders, num_workers=workers, collate_fn=_collate, pin_memory=self.pinned
        )
        with _signals_kept(workers > 0):
            iterator = iter(loader)
        yield from iterator

    def _find_the_culprits(self, prepared: _Prepared, losses: int, told: str) -> int:
        """Take out the pictures that end the process which decodes them; returns how many losses have no reason."""
        suspects = sorted({mark for mark in prepared.marks if mark != _IDLE} - prepared.condemned.keys())
        found = {index: reason for index in suspects if (reason := _dies(prepared, index)) is not None}
        prepared.condemned.update(found)
        if found:
            names = "; ".join(f"{self.dataset.sample_id(index)}: {reason}" for index, reason in found.items())
            self.warn(f"a process that decodes pictures was lost: {names}")
            return 0
        if losses >= _MOST_LOSSES:
            raise DataError(
                f"the processes that decode pictures keep ending, and no picture is to blame ({told})",
                "The machine may be out of memory, or of shared memory (/dev/shm). Fewer --workers need less.",
            )
        self.warn("a process that decodes pictures was lost, and no picture is to blame; the run goes on")
        return losses


def available_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers(device: torch.device, processes: int) -> int:
    """How many processes decode where nobody says.

    Args:
        device: where the models run.
        processes: that share the cores of this machine.
    """
    cores = max(1, available_cores() // processes)
    # a model on the CPU takes all cores for itself; one worker fills the gaps between its operations
    return min(cores - 1, _MOST_WORKERS if device.type == "cuda" else 1)


@dataclass
class _Sample:
    """A preprocessed picture, or the reason why there is none."""

    batch: int
    index: int
    answers: tuple[int, ...]
    pixels: Tensor | None
    reason: str | None
    decoding: float
    problem: RepshiftError | None = None


class _Prepared(TorchDataset[_Sample]):
    """The dataset through the transform. A picture that cannot be read is reported, not raised.

    Args:
        marks: shared by all processes: for each worker the picture that it is at.
        condemned: pictures that are not tried again, each with the reason.
    """

    def __init__(
        self, dataset: ImageDataset, preprocessing: Preprocessing, marks: Any, condemned: dict[int, str]
    ) -> None:
        self.dataset = dataset
        self.transform = preprocessing.transform()
        self.marks = marks
        self.condemned = condemned

    def __getitem__(self, place: tuple[int, int]) -> _Sample:
        batch, index = place
        worker = get_worker_info()
        if worker is not None:
            self.marks[worker.id] = index
        began = time.thread_time()
        sample = self._loaded(batch, index)
        if worker is not None:
            self.marks[worker.id] = _IDLE
        return replace(sample, decoding=time.thread_time() - began)

    def _loaded(self, batch: int, index: int) -> _Sample:
        if index in self.condemned:
            return _Sample(batch, index, (), None, self.condemned[index], 0.0)
        try:
            picture, label = self.dataset.load(index)
        except UnreadableSample as problem:
            return _Sample(batch, index, (), None, problem.reason, 0.0)
        except RepshiftError as problem:
            return _Sample(batch, index, (), None, problem.message, 0.0, problem)
        return _Sample(batch, index, self.dataset.answers(index, label), self.transform(picture), None, 0.0)


def _marks(workers: int) -> Any:
    """A place in shared memory for each worker."""
    return multiprocessing.RawArray("q", [_IDLE] * max(workers, 1))


def _collate(samples: list[_Sample]) -> Batch:
    good = [(sample, sample.pixels) for sample in samples if sample.pixels is not None]
    most = max((len(sample.answers) for sample, _ in good), default=1)
    answers = [[*sample.answers, *[_NO_ANSWER] * (most - len(sample.answers))] for sample, _ in good]
    return Batch(
        number=samples[0].batch,
        pixels=torch.stack([pixels for _, pixels in good]) if good else None,
        answers=torch.tensor(answers, dtype=torch.int64).reshape(len(good), most),
        indices=[sample.index for sample, _ in good],
        broken=[(sample.index, sample.reason) for sample in samples if sample.reason is not None],
        decoding=sum(sample.decoding for sample in samples),
        problem=next((sample.problem for sample in samples if sample.problem is not None), None),
    )


def _is_loss(error: Exception) -> bool:
    """Whether an error tells that a worker is no more; one that ends while it hands something over breaks a pipe."""
    if isinstance(error, RuntimeError):
        return str(error).startswith(_WORKER_ENDED)
    return not str(error).startswith(_WORKER_RAISED)


@contextmanager
def _signals_kept(starting: bool) -> Iterator[None]:
    """Keep PyTorch from raising out of a signal handler, wherever this process is by then, when a worker ends.

    Where its batch is waited for, it is missed all the same, and there it can be dealt with.
    """
    if not starting or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def _dies(prepared: _Prepared, index: int) -> str | None:
    """How a process of its own ends that decodes a picture; None where nothing is wrong."""
    process = multiprocessing.Process(target=_decode_alone, args=(prepared, index), daemon=True)
    process.start()
    process.join(_ALONE_SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
        return f"decoding it takes more than {_ALONE_SECONDS:.0f} s"
    if process.exitcode == 0:
        return None
    return f"the process that decodes it ends with {_exit_words(process.exitcode)}"


def _exit_words(code: int) -> str:
    try:
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
    except ValueError:
        return f"signal {-code}"


def _decode_alone(prepared: _Prepared, index: int) -> None:
    prepared[0, index]
