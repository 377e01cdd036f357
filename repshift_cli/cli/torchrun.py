"""Commands under `torchrun`: only rank 0 prints, and each process has its own GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from repshift_cli.cli import ui
from repshift_cli.errors import INTERRUPTED, RepshiftError, UsageError
from repshift_cli.utils.launch import launch
from repshift_cli.utils.progress import Progress, Silent

_GRACE_SECONDS = 10.0
"""How long other ranks hold an error back. `torchrun` ends them as soon as rank 0 has printed its own."""


class Interrupted(SystemExit):
    """The command was interrupted and has already printed its partial result."""


def is_first() -> bool:
    """Whether this process prints and writes: it is the only one, or rank 0."""
    place = launch()
    return place.rank == 0 or not place.together


def screen_of_first() -> Progress:
    """Progress on stderr for rank 0, none for other ranks."""
    return ui.Screen() if is_first() else Silent()


def own_device(device: str) -> str:
    """The GPU of this process if `cuda` is given under `torchrun`."""
    gpu = launch().gpu
    return f"cuda:{gpu}" if device == "cuda" and gpu is not None else device


@contextmanager
def rank_zero_errors() -> Iterator[None]:
    """Let rank 0 alone report an error that every rank raises."""
    try:
        yield
    except RepshiftError:
        if not is_first():
            try:
                time.sleep(_GRACE_SECONDS)
            except (KeyboardInterrupt, SystemExit):
                raise Interrupted(INTERRUPTED) from None
        raise


def refuse_torchrun(command: str) -> None:
    """Check that the command runs in one process.

    Raises:
        UsageError: `torchrun` started several.
    """
    if launch().together:
        raise UsageError(f"{command} runs in one process", "Start it without torchrun.")
