"""Commands under `torchrun`: only rank 0 prints, and each process has its own GPU."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from repshift_cli.cli import ui
from repshift_cli.errors import RepshiftError, UsageError
from repshift_cli.utils.progress import Progress, Silent

_GRACE_SECONDS = 30.0
"""How long other ranks hold an error back. `torchrun` ends them as soon as rank 0 has printed its own."""


class Interrupted(SystemExit):
    """The command was interrupted and has already printed its partial result."""


def is_first() -> bool:
    """Whether this process prints and writes: it is the only one, or rank 0."""
    if os.environ.get("RANK", "0") == "0":
        return True
    from repshift_cli.utils.distributed import launched_together

    return not launched_together()


def screen_of_first() -> Progress:
    """Progress on stderr for rank 0, none for other ranks."""
    return ui.Screen() if is_first() else Silent()


def own_device(device: str) -> str:
    """The GPU of this process if `cuda` is given under `torchrun`."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


@contextmanager
def rank_zero_errors() -> Iterator[None]:
    """Let rank 0 alone report an error that every rank raises."""
    try:
        yield
    except RepshiftError:
        if not is_first():
            time.sleep(_GRACE_SECONDS)
        raise


def refuse_torchrun(command: str) -> None:
    """Check that the command runs in one process.

    Raises:
        UsageError: `torchrun` started several.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise UsageError(f"{command} runs in one process", "Start it without torchrun.")
