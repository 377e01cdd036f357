"""Batches of decoded and preprocessed inputs, loaded ahead of time by worker processes.

An input that cannot be decoded is reported in its batch. If a worker process dies, each input that was being decoded is
decoded again in a process of its own: those that kill that process too are reported as broken, and loading continues.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.util import get_temp_dir
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from repshift_cli.data.dataset import EncodedFile, ImageDataset
from repshift_cli.data.decode import UnreadableSample
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.data.spectrogram import read_spectrogram
from repshift_cli.data.video.decode import read_clip
from repshift_cli.errors import DataError, RepshiftError
from repshift_cli.utils.interrupts import held_interrupts

_IDLE = -1
_NO_ANSWER = -1
"""Padding for images that have fewer correct outputs than another image of the batch."""

_MAX_UNEXPLAINED_DEATHS = 3
"""Worker deaths in a row that no input explains, before loading gives up."""

_SINGLE_DECODE_SECONDS = 60.0
"""Time limit for one input that is decoded in a process of its own."""

_MAX_WORKERS = 8
_BROKEN = (OSError, EOFError)
_WORKER_DIED, _WORKER_RAISED = "DataLoader worker (pid", "Caught "
"""How PyTorch's messages begin for a worker that died, and for an error that a worker passed on."""


class Sample(NamedTuple):
    """One preprocessed input.

    Attributes:
        pixels: float32 `[C, H, W]`, `[T, C, H, W]` for a clip, or `[time, frequency]` for a spectrogram.
        answers: the correct outputs of the head; empty if there are no labels.
        padded: whether the video is shorter than the clip, see `video.decode.Clip`.
    """

    pixels: Tensor
    answers: tuple[int, ...] = ()
    padded: bool = False


@dataclass
class Batch:
    """The inputs of one batch.

    Attributes:
        number: the key of the batch in `BatchLoader.batches`.
        pixels: float32 `[B, C, H, W]` or `[B, T, C, H, W]`; None if no input could be read.
        answers: int64 `[B, A]`, the correct outputs; -1 where there are fewer than A.
        indices: dataset indices of the inputs in `pixels`.
        broken: dataset index and reason of each input that could not be read.
        padded: dataset indices of videos that are shorter than the clip.
        decoding: processor seconds spent on decoding and preprocessing.
        problem: an error that concerns more than one input.
    """

    number: int
    pixels: Tensor | None
    answers: Tensor
    indices: list[int]
    broken: list[tuple[int, str]]
    padded: list[int]
    decoding: float
    problem: RepshiftError | None = None

    @property
    def count(self) -> int:
        """Number of inputs, readable or not."""
        return len(self.indices) + len(self.broken)

    def pin_memory(self) -> Batch:
        """Called by PyTorch's loader when the device copies faster from pinned memory."""
        return self if self.pixels is None else replace(self, pixels=self.pixels.pin_memory())


@dataclass
class BatchLoader:
    """Iterates over batches in the order of their numbers. It can be iterated again.

    Attributes:
        load: loads one input; raises `UnreadableSample` for a broken one.
        sample_id: path or name of an input.
        batches: dataset indices by batch number.
        workers: worker processes; 0 decodes in this process.
        pinned: whether tensors go to pinned memory.
        warn: receives a message for every worker process that died.
        strict: stop at the first input that cannot be read.
        persistent: keep the workers alive between iterations.
        waited: total seconds spent waiting for batches, except the first of each iteration.
    """

    load: Callable[[int], Sample]
    sample_id: Callable[[int], str]
    batches: Mapping[int, Sequence[int]]
    workers: int
    pinned: bool
    warn: Callable[[str], None]
    strict: bool = False
    persistent: bool = False
    waited: float = field(default=0.0, init=False)
    _samples: _Samples = field(init=False)
    _kept: Any = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._samples = _Samples(self.load, self.workers)

    def __iter__(self) -> Generator[Batch, None, None]:
        """Load the batches.

        Raises:
            UnreadableSample: `strict`, and an input cannot be read.
            DataError: worker processes keep dying, and no input is the reason.
            RepshiftError: raised by `load` for a problem that concerns more than one input.
        """
        left = sorted(self.batches)
        deaths = 0
        while left:
            try:
                for batch in self._timed(left):
                    if batch.problem is not None:
                        raise batch.problem
                    if self.strict and batch.broken:
                        index, reason = batch.broken[0]
                        raise UnreadableSample(self.sample_id(index), reason)
                    left.pop(0)
                    deaths = 0
                    yield batch
            except (RuntimeError, OSError, EOFError) as error:
                if self.workers == 0 or not _is_worker_death(error):
                    raise
                self._kept = None
                deaths = self._find_crashing_inputs(deaths + 1, str(error))

    def _timed(self, numbers: Sequence[int]) -> Iterator[Batch]:
        """Load the batches of these numbers and add up the waiting time."""
        with closing(self._loaded(numbers)) as loaded:
            start = time.perf_counter()
            for batch in loaded:
                if batch.number != numbers[0]:
                    self.waited += time.perf_counter() - start
                yield batch
                start = time.perf_counter()

    def _loaded(self, numbers: Sequence[int]) -> Any:
        loader = self._kept or self._torch_loader(numbers)
        # only a loader of all batches can serve the next iteration
        self._kept = loader if self.persistent and len(numbers) == len(self.batches) else None
        iterator: Any = None
        try:
            with held_interrupts(), _sigchld_handler_kept(self.workers > 0):
                get_temp_dir()  # made here, so that a worker that a signal ends leaves no folder of its own
                iterator = iter(loader)
            yield from iterator
        finally:
            # not left to the destructor, which a traceback delays, and in which an interrupt would be lost
            if iterator is not None and self.workers > 0 and self._kept is None:
                with held_interrupts():
                    iterator._shutdown_workers()

    def _torch_loader(self, numbers: Sequence[int]) -> Any:
        workers = min(self.workers, len(numbers))
        samples: Any = self._samples
        return DataLoader(
            samples,
            # each index carries the number of its batch, from which the batch gets its number
            batch_sampler=[[(number, index) for index in self.batches[number]] for number in numbers],
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=_quiet,
            pin_memory=self.pinned,
            persistent_workers=self.persistent and workers > 0,
        )

    def _find_crashing_inputs(self, deaths: int, message: str) -> int:
        """Mark the inputs that kill the process that decodes them; returns the number of unexplained deaths."""
        known = self._samples.fatal
        suspects = sorted({index for index in self._samples.current if index != _IDLE} - known.keys())
        found = {index: reason for index in suspects if (reason := _decode_fails(self._samples, index)) is not None}
        known.update(found)
        if found:
            names = "; ".join(f"{self.sample_id(index)}: {reason}" for index, reason in found.items())
            self.warn(f"a worker process died: {names}")
            return 0
        if deaths >= _MAX_UNEXPLAINED_DEATHS:
            raise DataError(
                f"the worker processes keep dying, and no input is the reason ({message})",
                "The machine may be out of memory, or of shared memory (/dev/shm). Fewer --workers need less.",
            )
        self.warn("a worker process died, and no input is the reason; loading continues")
        return deaths


def image_loader(
    dataset: ImageDataset,
    preprocessing: Preprocessing,
    batches: Mapping[int, Sequence[int]],
    *,
    workers: int,
    pinned: bool,
    warn: Callable[[str], None],
    strict: bool = False,
    persistent: bool = False,
) -> BatchLoader:
    """Load images or clips with their labels; a dataset without random access is read in this process."""
    preprocessing.require_stated()
    load = partial(_load_sample, dataset, preprocessing, preprocessing.transform())
    workers = workers if dataset.random_access else 0
    return BatchLoader(load, dataset.sample_id, batches, workers, pinned, warn, strict, persistent)


def _load_sample(
    dataset: ImageDataset, preprocessing: Preprocessing, transform: Callable[[Image.Image], Tensor], index: int
) -> Sample:
    raw, label = dataset.load(index)
    pixels, padded = decoded(raw, preprocessing, transform)
    return Sample(pixels, dataset.answers(index, label), padded)


def decoded(
    raw: Image.Image | EncodedFile, preprocessing: Preprocessing, transform: Callable[[Image.Image], Tensor]
) -> tuple[Tensor, bool]:
    """An image `[C, H, W]`, a spectrogram, or a clip `[T, C, H, W]` and whether its video is shorter.

    Raises:
        UnreadableSample: the video or spectrogram cannot be read.
    """
    if not isinstance(raw, EncodedFile):
        return transform(raw), False
    if preprocessing.spectrogram:
        return read_spectrogram(raw.path, preprocessing.shape), False
    clip = read_clip(raw.path, preprocessing.frames or 1, convert=transform, step=preprocessing.frame_step)
    return torch.stack(clip.frames), clip.padded


def cut_batches(count: int, size: int) -> dict[int, range]:
    """Cut `0 .. count - 1` into batches of `size`; the last one may have fewer."""
    return {number: range(start, min(start + size, count)) for number, start in enumerate(range(0, count, size))}


def available_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers(device: torch.device, processes: int) -> int:
    """Default number of worker processes.

    Args:
        device: where the models run.
        processes: how many processes share the cores of this machine.
    """
    cores = max(1, available_cores() // processes)
    # a model on the CPU uses all cores; one worker fills the gaps between its operations
    return min(cores - 1, _MAX_WORKERS if device.type == "cuda" else 1)


@dataclass
class _Loaded:
    """A sample, or the reason why there is none."""

    batch: int
    index: int
    sample: Sample | None = None
    reason: str | None = None
    problem: RepshiftError | None = None
    decoding: float = 0.0


class _Samples(TorchDataset[_Loaded]):
    """Samples by (batch, index). Errors are returned, not raised, because PyTorch changes the type of raised ones.

    Attributes:
        current: shared by all processes: the index that each worker is decoding.
        fatal: inputs that kill the process that decodes them, each with the reason.
    """

    def __init__(self, load: Callable[[int], Sample], workers: int) -> None:
        self.load = load
        self.current: Any = multiprocessing.RawArray("q", [_IDLE] * max(workers, 1))
        self.fatal: dict[int, str] = {}

    def __getitem__(self, place: tuple[int, int]) -> _Loaded:
        batch, index = place
        worker = get_worker_info()
        if worker is not None:
            self.current[worker.id] = index
        start = time.thread_time()
        loaded = self._load(batch, index)
        loaded.decoding = time.thread_time() - start
        if worker is not None:
            self.current[worker.id] = _IDLE
        return loaded

    def _load(self, batch: int, index: int) -> _Loaded:
        if index in self.fatal:
            return _Loaded(batch, index, reason=self.fatal[index])
        try:
            return _Loaded(batch, index, self.load(index))
        except UnreadableSample as error:
            return _Loaded(batch, index, reason=error.reason)
        except RepshiftError as error:
            return _Loaded(batch, index, reason=error.message, problem=error)


def _collate(loaded: list[_Loaded]) -> Batch:
    good = [(each.index, each.sample) for each in loaded if each.sample is not None]
    width = max((len(sample.answers) for _, sample in good), default=1)
    answers = [[*sample.answers, *[_NO_ANSWER] * (width - len(sample.answers))] for _, sample in good]
    return Batch(
        number=loaded[0].batch,
        pixels=torch.stack([sample.pixels for _, sample in good]) if good else None,
        answers=torch.tensor(answers, dtype=torch.int64).reshape(len(good), width),
        indices=[index for index, _ in good],
        broken=[(each.index, each.reason) for each in loaded if each.reason is not None],
        padded=[index for index, sample in good if sample.padded],
        decoding=sum(each.decoding for each in loaded),
        problem=next((each.problem for each in loaded if each.problem is not None), None),
    )


def _quiet(worker: int) -> None:
    """Print no traceback when the main process stops in the middle of taking a batch from this worker."""
    del worker
    usual = sys.excepthook
    sys.excepthook = lambda kind, error, trace: None if issubclass(kind, _BROKEN) else usual(kind, error, trace)


def _is_worker_death(error: Exception) -> bool:
    """Whether a worker died; one that dies while it sends a batch breaks the pipe."""
    if isinstance(error, RuntimeError):
        return str(error).startswith(_WORKER_DIED)
    return not str(error).startswith(_WORKER_RAISED)


@contextmanager
def _sigchld_handler_kept(starting: bool) -> Iterator[None]:
    """Restore the SIGCHLD handler that PyTorch replaces with one that raises anywhere in this process.

    A worker that dies is still noticed where its batch is waited for, and the error can be handled there.
    """
    if not starting or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def _decode_fails(samples: _Samples, index: int) -> str | None:
    """Decode one input in a process of its own; returns how that process fails, None if it does not."""
    process = multiprocessing.Process(target=samples.__getitem__, args=((0, index),), daemon=True)
    with held_interrupts():
        process.start()
    process.join(_SINGLE_DECODE_SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
        return f"decoding takes more than {_SINGLE_DECODE_SECONDS:.0f} s"
    return None if process.exitcode == 0 else f"decoding ends the process with {_exit_name(process.exitcode)}"


def _exit_name(code: int) -> str:
    try:
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
    except ValueError:
        return f"signal {-code}"
