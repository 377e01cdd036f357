"""Console output. Results go to stdout; progress, notes, warnings and errors to stderr.

All text passes `visible`, so that a name in a file cannot send control sequences to the terminal or fake a line.
rich is imported where it is used, so that commands start faster.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from repshift_cli.errors import OutputError, RepshiftError
from repshift_cli.utils.progress import Task
from repshift_cli.utils.text import visible

if TYPE_CHECKING:
    from rich.console import Console


def prepare_streams() -> None:
    """Make stdout and stderr accept any text, also in ASCII, and fail like a full disk where they are closed."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDONLY)  # takes the number of the closed stream, which a file would get otherwise
            setattr(sys, name, os.fdopen(number, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")


def finish_streams(code: int) -> int:
    """Flush stdout and stderr before the process ends. Return its exit code: 1 in place of 0 if that fails."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError) as problem:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())  # Python flushes again when it ends
            if stream is sys.stdout and code == 0 and not isinstance(problem, BrokenPipeError):
                error(OutputError(f"cannot write to stdout: {problem}"))
                code = 1
    return code


def _console(stderr: bool = False) -> Console:
    """A console that raises BrokenPipeError; rich would end the process at once."""
    from rich.console import Console

    class Raising(Console):
        def on_broken_pipe(self) -> None:
            raise  # noqa: PLE0704

    return Raising(stderr=stderr, highlight=False)


@contextmanager
def _stdout() -> Iterator[Console]:
    """A console on stdout, flushed at the end, so that callers may then delete what they kept for a rerun.

    Raises:
        OutputError: writing failed, for example because the disk is full.
    """
    try:
        yield _console()
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


def print_text(*lines: str) -> None:
    """Print lines of text without markup; errors as `_stdout`."""
    with _stdout() as console:
        for line in lines:
            console.print(visible(line), markup=False)


def print_table(title: str | None, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print a table; the first `left` columns are text, the others numbers. Errors as `_stdout`."""
    from rich.table import Table
    from rich.text import Text

    shown = Text(visible(title)) if title else None
    table = Table(title=shown, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(Text(visible(column)), justify="left" if index < left else "right")
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    with _stdout() as console:
        console.print(table)
        console.print()


def warn(text: str) -> None:
    """Print a warning."""
    _print_stderr(("warning:", "yellow"), f" {text}")


def remark(text: str) -> None:
    """Print a note."""
    _print_stderr(text)


def error(problem: RepshiftError) -> None:
    """Print an error and its hint."""
    _print_stderr(("error:", "bold red"), f" {problem.message}")
    if problem.hint:
        _print_stderr(problem.hint)


def _print_stderr(*parts: str | tuple[str, str]) -> None:
    """Print parts of a line, each a text or a text with its style."""
    from rich.text import Text

    shown = [visible(part) if isinstance(part, str) else (visible(part[0]), part[1]) for part in parts]
    with suppress(OSError, ValueError):  # a full or closed stderr must not end the work or change the exit code
        _console(stderr=True).print(Text.assemble(*shown), soft_wrap=True)


class _BarTask:
    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance

    def advance(self, steps: int = 1) -> None:
        self._advance(steps)


class Screen:
    """Notes, warnings and progress bars on stderr; bars only on a terminal."""

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Task]:
        from rich import progress

        console = _console(stderr=True)
        columns = (progress.SpinnerColumn(), progress.TextColumn("{task.description}", markup=False))
        counts = (progress.BarColumn(), progress.MofNCompleteColumn(), progress.TimeRemainingColumn())
        with progress.Progress(
            *columns, *counts, console=console, transient=True, disable=not console.is_terminal
        ) as bars:
            yield _BarTask(partial(bars.advance, bars.add_task(visible(label), total=total)))

    def warn(self, text: str) -> None:
        warn(text)

    def note(self, text: str) -> None:
        remark(text)
