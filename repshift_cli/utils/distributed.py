"""The processes of one `torchrun` job."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar
from uuid import uuid4

import torch
from torch import distributed
from torch.distributed import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store

from repshift_cli.errors import RepshiftError, UsageError, first_line
from repshift_cli.utils.launch import launch

_Value = TypeVar("_Value")

_STOP = "stop"


class Processes:
    """The processes that share a job; only this one if there is no process group.

    Every process must call the same methods in the same order, except for `stop` and `stopped`.

    Attributes:
        rank: rank of this process.
        count: number of processes.
        nearby: number of processes on this machine.
    """

    def __init__(self) -> None:
        grouped = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if grouped else 0
        self.count = distributed.get_world_size() if grouped else 1
        self.nearby = min(self.count, launch().nearby or self.count)
        self._store: Store | None = None
        if self.count > 1:
            # a new prefix for each job, so that the stop flag of the last one is not seen
            self._store = PrefixStore(self.collect(uuid4().hex)[0], _get_default_store())

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def collect(self, mine: _Value) -> list[_Value]:
        """Gather a picklable object from each process, in order of rank."""
        if self.count == 1:
            return [mine]
        parts: list[_Value | None] = [None] * self.count
        distributed.all_gather_object(parts, mine)
        return parts  # type: ignore[return-value]

    def agreed(self, work: Callable[[], _Value]) -> _Value:
        """Run `work` in every process. If it fails in one, all raise the same error.

        Raises:
            RepshiftError: from the process of lowest rank in which `work` raised one.
        """
        try:
            done, problem = [work()], None
        except RepshiftError as error:
            done, problem = [], error
        for failure in self.collect(problem):
            if failure is not None:
                raise failure
        return done[0]

    def check_equal(self, mine: Mapping[str, Any]) -> None:
        """Raise a UsageError in every process if a value differs between two; the keys are shown to the user."""
        first, *others = self.collect(mine)
        for rank, other in enumerate(others, 1):
            if differing := sorted(key for key in {*first, *other} if first.get(key) != other.get(key)):
                raise UsageError(
                    f"the processes were started for different evaluations: rank {rank} differs from rank 0 in "
                    f"{', '.join(differing)}",
                    "Give all processes the same options and files.",
                )

    def stop(self) -> None:
        """Ask the other processes to stop; the flag is set when this returns."""
        if self._store is not None:
            self._store.set(_STOP, "1")
            # `set` is asynchronous; a `get` from the same process returns after it
            self._store.get(_STOP)

    def stopped(self) -> bool:
        """Whether another process called `stop`."""
        return self._store is not None and self._store.check([_STOP])


@contextmanager
def together(device: torch.device | None = None) -> Iterator[Processes]:
    """Use the existing process group, or create one from the variables that `torchrun` set, with the device of each."""
    if not launch().together or (distributed.is_available() and distributed.is_initialized()):
        yield Processes()
        return
    if device is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        distributed.init_process_group("gloo")
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"the processes cannot find each other: {first_line(error)}", "Use torchrun.") from error
    try:
        with _one_interrupt():
            yield Processes()
    finally:
        distributed.destroy_process_group()


@contextmanager
def _one_interrupt() -> Iterator[None]:
    """Ignore interrupts after the first: `torchrun` forwards what the terminal already sent to all processes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, _interrupt_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)


def _interrupt_once(number: int, frame: FrameType | None) -> None:
    del frame
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
