"""What a command does where `torchrun` started it several times: one process speaks, and each has its own card."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from repshift_cli.errors import RepshiftError, UsageError
from repshift_cli.utils.progress import Progress, Silent

__all__ = ["Interrupted", "is_first", "one_voice", "own_device", "refuse_torchrun", "screen_of_first"]

_GRACE_SECONDS = 30.0
"""For which another process than the first waits with an error: torchrun ends it as soon as the first has told its."""


class Interrupted(SystemExit):
    """The command was interrupted, and has told what it has until then."""


def is_first() -> bool:
    """Whether this process is the one that prints and writes: the only one, or the first that torchrun started."""
    if os.environ.get("RANK", "0") == "0":
        return True
    from repshift_cli.utils.distributed import launched_together

    return not launched_together()


def screen_of_first() -> Progress:
    """Where this process shows how far it is: nowhere, where it is not the first."""
    from repshift_cli.cli import ui

    return ui.Screen() if is_first() else Silent()


def own_device(device: str) -> str:
    """The card of this process, where torchrun started several and `cuda` alone is asked for."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


@contextmanager
def one_voice() -> Iterator[None]:
    """Let the first process alone tell an error that all of them meet."""
    try:
        yield
    except RepshiftError:
        if not is_first():
            time.sleep(_GRACE_SECONDS)
        raise


def refuse_torchrun(command: str) -> None:
    """Refuse to run in several processes.

    Raises:
        UsageError: `torchrun` started several.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise UsageError(f"{command} runs in one process", "Start it without torchrun.")
