"""Signals while processes start: held back, and never lost."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from repshift_cli.utils.interrupts import held_interrupts

HELD = """
import os, signal, sys, time
from repshift_cli.utils.interrupts import held_interrupts

def terminate(number, frame):
    raise SystemExit(143)

number = int(sys.argv[1])
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, terminate)
steps = []
try:
    with held_interrupts():
        os.kill(os.getpid(), number)
        steps.append("the block goes on")
except (KeyboardInterrupt, SystemExit) as raised:
    steps.append(type(raised).__name__)
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
assert signal.getsignal(signal.SIGTERM) is terminate
assert not signal.pthread_sigmask(signal.SIG_BLOCK, set())
print(*steps, sep=", ")
"""
"""A process of its own: a library that the tests have loaded may have threads, which take signals too."""


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, "SystemExit")])
def test_a_signal_is_raised_at_the_end_of_the_block(number: int, raised: str) -> None:
    command = [sys.executable, "-c", HELD, str(int(number))]
    found = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert found.stdout == f"the block goes on, {raised}\n", found.stderr
    assert found.returncode == 0


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
