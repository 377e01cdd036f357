"""Console output. Results go to stdout; progress, notes, warnings and errors to stderr.

All text passes `visible`, so that a name in a file cannot send control sequences to the terminal or fake a line.
rich is imported where it is used, so that commands start faster.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TextIO

from repshift_cli.errors import OutputError, RepshiftError
from repshift_cli.utils.progress import SilentTask, Task
from repshift_cli.utils.text import visible

if TYPE_CHECKING:
    from rich.console import Console

_LINE_SECONDS = 10.0
"""Time between two lines of progress."""

_MINUTES_FROM = 120
"""Seconds from which the time that is left is given in minutes."""

_LONGEST_WORD = 24
"""Letters of the longest word that a table does not break; longer are names of files."""

_COLUMN_GAP = 2
"""Spaces between the columns of a table."""

JSON_VERSION = 1
"""Version of the JSON of all commands. It grows when a key is removed or changes its meaning, not with new keys."""


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

    # rich takes COLUMNS=0 for a width of 0 and prints nothing; others take it for unset
    width = shutil.get_terminal_size().columns if os.environ.get("COLUMNS", "80").strip("0") == "" else None
    return Raising(stderr=stderr, highlight=False, width=width)


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


def to_json(document: Mapping[str, Any]) -> str:
    """A document and its version as indented JSON with a final newline."""
    return json.dumps({"version": JSON_VERSION, **document}, indent=2, allow_nan=False) + "\n"


class Result:
    """The one JSON document of a command. `app` prints it at the end, also after an error."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Start again, for the next command in this process."""
        self._document: dict[str, Any] = {}
        self._printed = False

    def keep(self, document: Mapping[str, Any]) -> None:
        """Add these keys to the document."""
        self._document.update(document)

    def print(self) -> None:
        """Print the document if there is one and it was not printed; errors as `_stdout`."""
        if self._document and not self._printed:
            text, self._printed = to_json(self._document), True
            with _stdout():
                sys.stdout.write(text)


result = Result()


def print_text(*lines: str) -> None:
    """Print lines of text without markup; errors as `_stdout`."""
    with _stdout() as console:
        for line in lines:
            console.print(_wrapped(line, console.width), markup=False, soft_wrap=True)


def _wrapped(text: str, width: int) -> str:
    """Text in lines of a width. Longer words, such as names of files, are not broken, so that they can be copied."""
    return textwrap.fill(visible(text), width, break_long_words=False, break_on_hyphens=False)


def print_table(title: str | None, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print a table; the first `left` columns are text, the others numbers. Errors as `_stdout`.

    If the columns are too many for the terminal, each row is printed as lines of `column value`.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold", box=None, pad_edge=False)
    with _stdout() as console:
        if title:
            console.print(Text(_wrapped(title, console.width), style="bold"), soft_wrap=True)
        shown = [[visible(cell) for cell in row] for row in (columns, *rows)]
        widths = _column_widths(list(zip(*shown, strict=True)), console.width)
        if widths is None:
            for line in _as_lines(shown[0], shown[1:], left):
                console.print(_wrapped(line, console.width), markup=False, soft_wrap=True)
        else:
            for index, column in enumerate(shown[0]):
                justify: Literal["left", "right"] = "left" if index < left else "right"
                table.add_column(Text(column), justify=justify, overflow="fold", width=widths[index])
            for row in shown[1:]:
                table.add_row(*map(Text, row))
            console.print(table)
        console.print()


def _column_widths(columns: Sequence[Sequence[str]], available: int) -> list[int] | None:
    """The widths of columns in which no word is broken, from their cells; None if they need more than is available."""
    from rich.cells import cell_len

    widths = [max(1, *map(cell_len, cells)) for cells in columns]
    words = [[cell_len(word) for cell in cells for word in cell.split()] for cells in columns]
    least = [min(max(lengths, default=0), _LONGEST_WORD) for lengths in words]
    available -= _COLUMN_GAP * (len(widths) - 1)
    if sum(least) > available:
        return None
    while sum(widths) > available:
        widest = max((index for index in range(len(widths)) if widths[index] > least[index]), key=widths.__getitem__)
        widths[widest] -= 1
    return widths


def _as_lines(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> Iterator[str]:
    """The cells of a table as lines; the text of a row comes first, and its numbers are indented."""
    for row in rows:
        cells = [f"{column} {cell}".strip() for column, cell in zip(columns, row, strict=True) if cell]
        texts = sum(map(bool, row[:left]))
        yield ", ".join(cells[:texts])
        yield from (f"  {cell}" for cell in cells[texts:])


class _Settings:
    """What `--quiet` and `--log-file` set, and the notes and warnings that this command has printed."""

    quiet = False
    log: TextIO | None = None
    printed: ClassVar[set[str]] = set()


def configure(quiet: bool = False, log_file: Path | None = None) -> None:
    """Set whether notes and progress are printed, and the file to which notes, warnings and errors are appended.

    A command starts: what earlier ones in this process have printed may be printed again.

    Raises:
        OutputError: the file cannot be written.
    """
    if _Settings.log is not None:
        with suppress(OSError):
            _Settings.log.close()
    _Settings.quiet, _Settings.log = quiet, None
    _Settings.printed.clear()
    try:
        if log_file is not None:
            _Settings.log = log_file.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
    except (OSError, ValueError) as problem:
        raise OutputError(f"cannot write the log {log_file}: {problem}", "Give another --log-file.") from problem


def log(kind: str, text: str) -> None:
    """Append a line to the file of `--log-file`, if there is one. A full disk must not end the work."""
    if _Settings.log is not None:
        when = datetime.now().astimezone().isoformat(timespec="seconds")
        with suppress(OSError):
            _Settings.log.write(f"{when} {kind}: {visible(text)}\n")


def warn(text: str) -> None:
    """Print a warning, once per command: several models or files may have the same one."""
    if _is_new(text):
        log("warning", text)
        _print_stderr(("warning:", "yellow"), f" {text}")


def remark(text: str) -> None:
    """Print a note, once per command and not after the same warning."""
    if _is_new(text):
        log("note", text)
        if not _Settings.quiet:
            _print_stderr(text)


def _is_new(text: str) -> bool:
    new = text not in _Settings.printed
    _Settings.printed.add(text)
    return new


def error(problem: RepshiftError) -> None:
    """Print an error and its hint."""
    log("error", f"{problem.message} {problem.hint or ''}".rstrip())
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


class _LineTask:
    """A line of progress every `_LINE_SECONDS`, where there is no terminal."""

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total, self._done = label, total, 0
        self._start = self._last = time.monotonic()

    def advance(self, steps: int = 1) -> None:
        self._done += steps
        now = time.monotonic()
        if now - self._last >= _LINE_SECONDS and 0 < self._done < self._total:
            self._last = now
            left = (now - self._start) / self._done * (self._total - self._done)
            shown = f"{left:.0f} s" if left < _MINUTES_FROM else f"{left / 60:.0f} min"
            _print_stderr(f"{self._label}: {self._done}/{self._total}, about {shown} left")


class Screen:
    """Notes, warnings and progress on stderr: bars on a terminal, else lines."""

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Task]:
        console = _console(stderr=True)
        if _Settings.quiet or not console.is_terminal:
            yield SilentTask() if _Settings.quiet else _LineTask(label, total)
            return
        from rich import progress

        columns = (progress.SpinnerColumn(), progress.TextColumn("{task.description}", markup=False))
        counts = (progress.BarColumn(), progress.MofNCompleteColumn(), progress.TimeRemainingColumn())
        with progress.Progress(*columns, *counts, console=console, transient=True) as bars:
            yield _BarTask(partial(bars.advance, bars.add_task(visible(label), total=total)))

    def warn(self, text: str) -> None:
        warn(text)

    def note(self, text: str) -> None:
        remark(text)
