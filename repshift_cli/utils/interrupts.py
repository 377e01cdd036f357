"""SIGINT and SIGTERM while processes start and stop: never lost, and never raised where they would do harm."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_NUMBERS: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def held_interrupts() -> Iterator[None]:
    """Hold signals back until the end of the block. Processes that are started in it never see SIGINT."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    before = {number: signal.signal(number, lambda number, _: waiting.append(number)) for number in _NUMBERS}
    masks = hasattr(signal, "pthread_sigmask")
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if masks else set()  # inherited by processes
    try:
        yield
    finally:
        if masks:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        for number in waiting[-1:]:
            signal.raise_signal(number)


@contextmanager
def watched_interrupts() -> Iterator[Callable[[], None]]:
    """Yield a function that raises again for a signal that came in the block and was not seen.

    Python discards exceptions that are raised in a destructor or a callback, KeyboardInterrupt among them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in _NUMBERS}
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        before[number](number, frame)

    def check() -> None:
        for number in seen[:1]:
            before[number](number, None)

    for number, handler in before.items():
        if callable(handler):
            signal.signal(number, note)
    try:
        yield check
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is note:  # else it was replaced on purpose
                signal.signal(number, handler)
