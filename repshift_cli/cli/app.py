"""The Typer application: commands, exit codes and error messages."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Annotated

import typer

from repshift_cli.cli import (
    advise,
    bench,
    compare,
    compress,
    demo,
    dense,
    diff,
    doctor,
    evaluate,
    export,
    inspect,
    recipes,
    report,
    search,
    ui,
    visualize,
)
from repshift_cli.cli.guard import Command
from repshift_cli.cli.torchrun import Interrupted
from repshift_cli.errors import INTERRUPTED, TERMINATED, RepshiftError, first_line

app = typer.Typer(
    name="repshift",
    help="Speed up trained vision models by dropping unimportant tokens.\n\n"
    "Tokens are dropped or merged between layers. No training needed.\n\n"
    "Start with: repshift compress MODEL --data IMAGES --speedup 1.5 --max-drop 1",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_COMMANDS: dict[str, Callable[..., None]] = {
    "compress": compress.command,
    "search": search.command,
    "export": export.command,
    "bench": bench.command,
    "advise": advise.command,
    "eval": evaluate.command,
    "compare": compare.command,
    "inspect": inspect.command,
    "diff": diff.command,
    "dense": dense.command,
    "visualize": visualize.command,
    "report": report.command,
    "demo": demo.command,
    "doctor": doctor.command,
}
for _name, _command in _COMMANDS.items():
    app.command(_name, cls=Command)(_command)
app.add_typer(recipes.app, name="recipes")


def _print_version(value: bool) -> None:
    if value:
        from repshift_cli.version import __version__

        typer.echo(f"repshift {__version__}")
        raise typer.Exit


_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_stopped: list[int] = []
"""Signals that came during the command."""


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of every command; Typer handles `--version`, `main` handles `--debug`."""


def main() -> None:
    """Run the command line. An error becomes one message and an exit code (docs/architecture.md)."""
    _limit_thread_spinning()
    ui.prepare_streams()
    os.environ["MPLBACKEND"] = "agg"  # figures are only written to files
    _stopped.clear()
    for number in _SIGNALS:
        signal.signal(number, _stop)
    sys.unraisablehook = _send_again
    code = ui.finish_streams(_run())
    atexit.register(_end_at_once)
    sys.exit(code)


def _run() -> int:
    """Run the command and return the exit code. Every exception ends here."""
    try:
        app(prog_name="repshift")
    except Interrupted:
        return INTERRUPTED  # the command has printed its own message
    except (KeyboardInterrupt, SystemExit) as stop:
        code = INTERRUPTED if isinstance(stop, KeyboardInterrupt) else stop.code
        if code in {INTERRUPTED, TERMINATED}:
            ui.remark("interrupted; no partial output was left")
        return code if isinstance(code, int) else int(code is not None)
    except Exception as problem:
        if _stopped:  # some libraries turn the exception of a signal into one of their own
            ui.remark("interrupted; no partial output was left")
            return INTERRUPTED if _stopped[0] == signal.SIGINT else TERMINATED
        if "--debug" in sys.argv:
            raise
        return _explain(problem)
    return 0


def _stop(number: int, frame: object) -> None:
    """End by an exception, so that temporary files are deleted."""
    del frame
    _stopped.append(number)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(TERMINATED)


def _send_again(discarded: sys.UnraisableHookArgs) -> None:
    """Python discards exceptions in destructors and callbacks: send a signal that came there once more."""
    if _stopped and isinstance(discarded.exc_value, KeyboardInterrupt | SystemExit):
        again = threading.Timer(0.05, signal.raise_signal, _stopped[-1:])
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(discarded)


def _end_at_once() -> None:
    """Let signals end the process while the interpreter shuts down, where an exception would print a traceback."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def _limit_thread_spinning() -> None:
    """Let idle OpenMP threads spin for less than a millisecond; must run before torch is imported.

    With libgomp's default, two processes on the same cores slow each other down 14 times. Without spinning, waking
    threads takes a quarter of the time at batch 1 (docs/benchmarking.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _explain(problem: Exception) -> int:
    if isinstance(problem, RepshiftError):
        shown = problem
    elif isinstance(problem, BrokenPipeError):
        return 1  # the reader of stdout has closed the pipe
    elif _is_out_of_memory(problem):
        shown = RepshiftError(
            f"out of memory: {first_line(problem)}", "Use a smaller --batch-size, a smaller model or fewer inputs."
        )
    elif isinstance(problem, OSError):
        where = f"cannot access {problem.filename}: " if problem.filename else ""
        shown = RepshiftError(f"{where}{problem.strerror or problem}")
    else:
        message = f"unexpected: {type(problem).__name__}: {problem}"
        shown = RepshiftError(message, "Run `repshift --debug ...` to see the traceback, and report it.")
    ui.error(shown)
    return shown.exit_code


def _is_out_of_memory(problem: Exception) -> bool:
    if not isinstance(problem, RuntimeError):
        return isinstance(problem, MemoryError)
    from repshift_cli.measure.device import out_of_memory  # imports torch, which has then raised the error

    return out_of_memory(problem)
