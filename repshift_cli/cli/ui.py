"""Console output. Results go to stdout; progress, notes, warnings and errors to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from repshift_cli.errors import OutputError, RepshiftError
from repshift_cli.utils.progress import Task

__all__ = ["Screen", "error", "print_json", "print_table", "print_text", "remark", "to_json", "warn"]


def _stderr() -> Console:
    return Console(stderr=True, highlight=False)


@contextmanager
def _stdout() -> Iterator[Console]:
    """A console on stdout, flushed at the end, so that callers may then delete what they kept for a rerun.

    Raises:
        OutputError: writing failed, for example because the disk is full.
    """
    try:
        yield Console(highlight=False, soft_wrap=False)
        sys.stdout.flush()
    except BrokenPipeError:
        raise  # the reader has closed the pipe
    except OSError as error:
        raise OutputError(f"cannot write to stdout: {error.strerror or error}") from error


def to_json(document: Any) -> str:
    """A document as indented JSON with a final newline."""
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def print_json(document: Any) -> None:
    """Print one JSON document; errors as `_stdout`."""
    with _stdout():
        sys.stdout.write(to_json(document))


def print_text(text: str) -> None:
    """Print text without markup; errors as `_stdout`."""
    with _stdout() as console:
        console.print(text, markup=False)


def print_table(title: str | None, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print a table; the first `left` columns are text, the others numbers. Errors as `_stdout`."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    with _stdout() as console:
        console.print(table)
        console.print()


def warn(text: str) -> None:
    """Print a warning."""
    _stderr().print(f"[yellow]warning:[/yellow] {escape(text)}", soft_wrap=True)


def remark(text: str) -> None:
    """Print a note."""
    _stderr().print(escape(text), style="dim", soft_wrap=True)


def error(problem: RepshiftError) -> None:
    """Print an error and its hint."""
    console = _stderr()
    console.print(f"[bold red]error:[/bold red] {escape(problem.message)}", soft_wrap=True)
    if problem.hint:
        console.print(escape(problem.hint), soft_wrap=True)


class _BarTask:
    def __init__(self, bars: Bars, identity: TaskID) -> None:
        self._bars = bars
        self._identity = identity

    def advance(self, steps: int = 1) -> None:
        self._bars.advance(self._identity, steps)


class Screen:
    """Notes, warnings and progress bars on stderr; bars only on a terminal."""

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Task]:
        console = _stderr()
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Bars(
            *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
        ) as bars:
            yield _BarTask(bars, bars.add_task(label, total=total))

    def warn(self, text: str) -> None:
        warn(text)

    def note(self, text: str) -> None:
        remark(text)
