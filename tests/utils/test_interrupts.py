"""Signals while processes start: held back, and never lost."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from repshift_cli.utils.interrupts import held_interrupts


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def terminate(number: int, frame: object) -> None:
    raise SystemExit(143)


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_is_raised_at_the_end_of_the_block(number: int, raised: type[BaseException]) -> None:
    signal.signal(signal.SIGTERM, terminate)
    steps = []
    with pytest.raises(raised), held_interrupts():
        signal.pthread_kill(threading.get_ident(), number)  # a signal to the process may reach another thread, late
        steps.append("the block goes on")
    assert steps
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is terminate
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, set())


def test_a_process_that_starts_in_the_block_never_sees_sigint() -> None:
    ready = multiprocessing.Event()
    with held_interrupts():
        process = multiprocessing.Process(target=_wait, args=(ready,))
        process.start()
    assert ready.wait(30)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 0


def _wait(ready: object) -> None:
    ready.set()  # type: ignore[attr-defined]
    time.sleep(0.1)
