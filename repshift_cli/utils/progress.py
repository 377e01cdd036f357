"""Progress reporting, independent of the UI."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """Work with a known number of steps."""

    def advance(self, steps: int = 1) -> None: ...


class Messages(Protocol):
    """Shows notes and warnings."""

    def note(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...


class Progress(Messages, Protocol):
    """Shows running tasks too. The command line prints everything to stderr."""

    def task(self, label: str, total: int) -> AbstractContextManager[Task]: ...


class SilentTask:
    """A task whose steps are not shown."""

    def advance(self, steps: int = 1) -> None:
        pass


class Silent:
    """Progress that shows nothing."""

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Task]:
        yield SilentTask()

    def note(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        pass
