"""Several processes that work together, as `torchrun` starts them: who is which, and how they tell each other what."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar
from uuid import uuid4

import torch
from torch import Tensor, distributed
from torch.distributed import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store

from repshift_cli.errors import RepshiftError

__all__ = ["Processes", "launched_together", "together"]

_Value = TypeVar("_Value")

_STOP = "stop"


class Processes:
    """The processes that share some work; one alone where there is no group.

    All methods but `stopped` and `stop` are called by every process at the same point, or by none.

    Attributes:
        rank: number of this process, from 0.
        count: how many there are.
        nearby: how many of them run on this machine.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        """Join the group that there is; `device` is that of this process, on which numbers are added up."""
        grouped = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if grouped else 0
        self.count = distributed.get_world_size() if grouped else 1
        self.nearby = min(self.count, int(os.environ.get("LOCAL_WORLD_SIZE") or self.count))
        self._device = device or torch.device("cpu")
        self._store: Store | None = None
        if self.count > 1:
            # each piece of work has a name of its own, or it would find that the last one was stopped
            self._store = PrefixStore(self.collect(uuid4().hex)[0], _get_default_store())

    @property
    def is_first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def collect(self, mine: _Value) -> list[_Value]:
        """What each process gives, in the order of their numbers; anything that can be pickled."""
        if self.count == 1:
            return [mine]
        parts: list[_Value | None] = [None] * self.count
        distributed.all_gather_object(parts, mine)
        return parts  # type: ignore[return-value]

    def added(self, mine: Sequence[int]) -> list[int]:
        """The sums of whole numbers over all processes, place by place: exact below 2^63."""
        if self.count == 1:
            return list(mine)
        numbers: Tensor = torch.tensor(mine, dtype=torch.int64, device=self._device)
        distributed.all_reduce(numbers)
        return [int(number) for number in numbers.tolist()]

    def agreed(self, work: Callable[[], _Value]) -> _Value:
        """Do what each process does for itself; where it fails in one, it fails in all, with the same error.

        Raises:
            RepshiftError: that of the first process in which `work` raised one.
        """
        try:
            done, problem = [work()], None
        except RepshiftError as error:
            done, problem = [], error
        for told in self.collect(problem):
            if told is not None:
                raise told
        return done[0]

    def stop(self) -> None:
        """Ask the others to come to an end; when this returns, they are told so."""
        if self._store is not None:
            self._store.set(_STOP, "1")
            # `set` does not wait for the store, but what the same process asks next is answered after it
            self._store.get(_STOP)

    def stopped(self) -> bool:
        """Whether one of the others asked for the end."""
        return self._store is not None and self._store.check([_STOP])


def launched_together() -> bool:
    """Whether `torchrun` started this process and others beside it."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE") or 1) > 1


@contextmanager
def together(device: torch.device | None = None) -> Iterator[Processes]:
    """The group of this run: the one that exists, or one made of what `torchrun` set.

    Args:
        device: where this process adds up numbers; with a card that is done by nccl, everything else by gloo.
    """
    if not launched_together() or (distributed.is_available() and distributed.is_initialized()):
        yield Processes(device)
        return
    if device is not None and device.type == "cuda":
        torch.cuda.set_device(device)
        distributed.init_process_group("cpu:gloo,cuda:nccl")
    else:
        distributed.init_process_group("gloo")
    try:
        with _one_interrupt():
            yield Processes(device)
    finally:
        distributed.destroy_process_group()


@contextmanager
def _one_interrupt() -> Iterator[None]:
    """Listen to the first interrupt only: `torchrun` hands on what the keyboard has sent to all processes already."""
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
