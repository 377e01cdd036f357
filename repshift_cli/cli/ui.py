"""What a person sees: consoles, tables, progress, errors. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from repshift_cli.errors import OutputError, RepshiftError
from repshift_cli.utils.progress import Task

__all__ = ["Screen", "error", "print_json", "print_table", "print_text", "remark", "warn"]


def _stdout() -> Console:
    return Console(highlight=False, soft_wrap=False)


def _stderr() -> Console:
    return Console(stderr=True, highlight=False)


@contextmanager
def _written() -> Iterator[None]:
    """What is printed has been written afterwards: work that waits for it may then forget what it has kept.

    Raises:
        OutputError: it cannot be, because the disk of a file that stdout leads to is full, for example.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise  # whoever reads it wants no more
    except OSError as error:
        raise OutputError(
            f"cannot write the output: {error.strerror or error}", "Print it to another place."
        ) from error


def print_json(document: Any) -> None:
    """One JSON document on stdout; errors as `_written`."""
    with _written():
        sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")


def print_text(text: str) -> None:
    """Plain words on stdout, square brackets in it are not markup; errors as `_written`."""
    with _written():
        _stdout().print(text, markup=False)


def print_table(title: str | None, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """A table on stdout; the first `left` columns are text, the others numbers. Errors as `_written`."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console = _stdout()
    with _written():
        console.print(table)
        console.print()


def warn(text: str) -> None:
    """A remark on stderr that the user should not miss."""
    _stderr().print(f"[yellow]warning:[/yellow] {escape(text)}", soft_wrap=True)


def remark(text: str) -> None:
    """A remark on stderr."""
    _stderr().print(escape(text), style="dim", soft_wrap=True)


def error(problem: RepshiftError) -> None:
    """An error on stderr: what is wrong, then what to do."""
    console = _stderr()
    console.print(f"[bold red]error:[/bold red] {escape(problem.message)}", soft_wrap=True)
    if problem.hint:
        console.print(escape(problem.hint), soft_wrap=True)


class _BarTask:
    def __init__(self, bars: Bars, identity: Any) -> None:
        self._bars = bars
        self._identity = identity

    def advance(self, steps: int = 1) -> None:
        self._bars.advance(self._identity, steps)


class Screen:
    """Progress bars and remarks on stderr (bars only where stderr is a terminal)."""

    def __init__(self) -> None:
        self._console = _stderr()

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Task]:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        shown = self._console.is_terminal
        bars = Bars(*columns, TimeRemainingColumn(), console=self._console, transient=True, disable=not shown)
        with bars:
            yield _BarTask(bars, bars.add_task(label, total=total))

    def warn(self, text: str) -> None:
        warn(text)

    def note(self, text: str) -> None:
        remark(text)
