"""The Typer application: commands, exit codes and error messages."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

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
    guard,
    inspect,
    recipes,
    report,
    search,
    sweep,
    ui,
    visualize,
)
from repshift_cli.cli.guard import Command
from repshift_cli.cli.torchrun import Interrupted, is_first
from repshift_cli.errors import INTERRUPTED, TERMINATED, CheckFailed, RepshiftError, UsageError, first_line
from repshift_cli.utils import reproducible

app = typer.Typer(
    name="repshift",
    help="Speed up trained vision models by dropping unimportant tokens.\n\n"
    "Tokens are dropped or merged between layers. No training needed.\n\n"
    "Start with: repshift compress MODEL --data IMAGES --speedup 1.5 --max-drop 1\n\n"
    "Variables of the environment give options a default: REPSHIFT_THREADS for --threads of all commands, "
    "REPSHIFT_BENCH_THREADS for that of bench.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_COMMANDS: dict[str, Callable[..., None]] = {
    "compress": compress.command,
    "search": search.command,
    "sweep": sweep.command,
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


_INTERRUPTED = "interrupted; no partial output was left"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_stopped: list[int] = []
"""Signals that came during the command."""


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", envvar="REPSHIFT_QUIET", help="Print no notes and no progress, only warnings.")
    ] = False,
    log_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", envvar="REPSHIFT_LOG_FILE", help="Append notes, warnings and errors to FILE, with times."
        ),
    ] = None,
) -> None:
    """Options of every command; Typer handles `--version`, `main` handles `--debug`."""
    ui.configure(quiet, log_file)
    reproducible.now()  # an invalid SOURCE_DATE_EPOCH is an error before the work


def main() -> None:
    """Run the command line. An error becomes one message and an exit code (docs/architecture.md)."""
    _limit_thread_spinning()
    ui.prepare_streams()
    os.environ["MPLBACKEND"] = "agg"  # figures are only written to files
    _stopped.clear()
    ui.result.clear()
    ui.configure()
    guard.variables.clear()
    for number in _SIGNALS:
        signal.signal(number, _stop)
    sys.unraisablehook = _send_again
    code = ui.finish_streams(_run())
    atexit.register(_end_at_once)
    sys.exit(code)


def _run() -> int:
    """Run the command and return the exit code. Every exception ends here."""
    try:
        if code := app(prog_name="repshift", standalone_mode=False) or 0:  # of an end by Typer, as after Ctrl-C
            raise SystemExit(code)  # noqa: TRY301
        ui.result.print()
    except (Exception, KeyboardInterrupt, SystemExit) as problem:
        code, error = _explain(problem)
        if error is not None and guard.wants_json() and is_first():
            with suppress(OSError, ValueError, RepshiftError):  # of a stdout that cannot be written to
                _print_error(error, code)
    return code


def _print_error(error: RepshiftError, code: int) -> None:
    """Print the JSON document of a command that failed, with what is known of its result."""
    reason = {"message": error.message, "hint": error.hint}
    checked = {"failed": reason} if isinstance(error, CheckFailed) else {}
    ui.result.keep({**error.document, **checked, "error": reason, "exit_code": code})
    ui.result.print()


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


def _explain(problem: BaseException) -> tuple[int, RepshiftError | None]:
    """Print the message of an exception on stderr. Return the exit code and, if there is one, the error."""
    if isinstance(problem, KeyboardInterrupt | SystemExit) or _stopped:
        return _explain_end(problem)
    if isinstance(problem, BrokenPipeError):
        return 1, None  # the reader of stdout has closed the pipe
    if hasattr(problem, "format_message"):
        return _explain_usage(problem)
    shown = _shown(problem)
    if note := guard.origin(shown.message):
        shown.hint = f"{shown.hint} {note}" if shown.hint else note
    if "--debug" in sys.argv:
        traceback.print_exception(problem)
    else:
        ui.error(shown)
    return shown.exit_code, shown


def _explain_usage(problem: Any) -> tuple[int, RepshiftError]:
    """`_explain` for an error of Typer's parser, which has no public class."""
    problem.show()
    message = problem.format_message()
    ui.log("error", message)
    if hint := guard.origin(message):
        ui.warn(hint)
    elif problem.ctx:
        hint = f"Run `{problem.ctx.command_path} --help` to see what is allowed."
    return problem.exit_code, UsageError(message, hint)


def _explain_end(problem: BaseException) -> tuple[int, RepshiftError | None]:
    """`_explain` for an interruption or for the end of the process."""
    code = problem.code if isinstance(problem, SystemExit) else INTERRUPTED
    if not isinstance(problem, KeyboardInterrupt | SystemExit):  # of a library that caught the exception of a signal
        code = INTERRUPTED if _stopped[0] == signal.SIGINT else TERMINATED
    code = code if isinstance(code, int) else int(code is not None)
    if code not in {INTERRUPTED, TERMINATED}:
        return code, None
    if isinstance(problem, Interrupted):
        return code, RepshiftError("interrupted")  # the command has printed its own message
    ui.remark(_INTERRUPTED)
    return code, RepshiftError(_INTERRUPTED)


def _shown(problem: BaseException) -> RepshiftError:
    """The error that is shown for an exception."""
    if isinstance(problem, RepshiftError):
        return problem
    if _is_out_of_memory(problem):
        return RepshiftError(
            f"out of memory: {first_line(problem)}", "Use a smaller --batch-size, a smaller model or fewer inputs."
        )
    if isinstance(problem, OSError):
        where = f"cannot access {problem.filename}: " if problem.filename else ""
        return RepshiftError(f"{where}{problem.strerror or problem}")
    message = f"unexpected: {type(problem).__name__}: {problem}"
    return RepshiftError(message, "Run `repshift --debug ...` to see the traceback, and report it.")


def _is_out_of_memory(problem: BaseException) -> bool:
    if not isinstance(problem, RuntimeError):
        return isinstance(problem, MemoryError)
    from repshift_cli.measure.device import out_of_memory  # imports torch, which has then raised the error

    return out_of_memory(problem)
