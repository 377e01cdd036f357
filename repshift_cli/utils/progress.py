"""How long work tells that it goes on, without knowing who listens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

__all__ = ["Progress", "Silent", "SilentTask", "Task"]


class Task(Protocol):
    """One piece of work with a known number of steps."""

    def advance(self, steps: int = 1) -> None: ...


class Progress(Protocol):
    """Opens tasks, takes remarks, and warnings that must not be missed; the command line shows all on stderr."""

    def task(self, label: str, total: int) -> AbstractContextManager[Task]: ...

    def note(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...


class SilentTask:
    """A task whose steps are not shown."""

    def advance(self, steps: int = 1) -> None:
        pass


class Silent:
    """A listener that shows nothing."""

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Task]:
        yield SilentTask()

    def note(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        pass
