"""The Typer application: commands, exit codes and error messages."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from repshift_cli.cli import bench, compare, compress, demo, evaluate, export, inspect, recipes, search, ui, visualize
from repshift_cli.cli.torchrun import Interrupted
from repshift_cli.errors import INTERRUPTED

app = typer.Typer(
    name="repshift",
    help="Speed up trained vision models by dropping unimportant tokens.\n\n"
    "Tokens are dropped or merged between layers. No training needed.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("compress")(compress.command)
app.command("search")(search.command)
app.command("export")(export.command)
app.command("bench")(bench.command)
app.command("eval")(evaluate.command)
app.command("compare")(compare.command)
app.command("inspect")(inspect.command)
app.command("visualize")(visualize.command)
app.command("demo")(demo.command)
app.add_typer(recipes.app, name="recipes")


def _print_version(value: bool) -> None:
    if value:
        from repshift_cli.version import __version__

        typer.echo(f"repshift {__version__}")
        raise typer.Exit


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
    debug = "--debug" in sys.argv
    try:
        app(prog_name="repshift")
    except Interrupted:
        raise  # the command has printed its own message
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code != INTERRUPTED:
            raise
        typer.echo("interrupted; no partial output was left", err=True)
        sys.exit(INTERRUPTED)
    except Exception as problem:
        if debug:
            raise
        sys.exit(_explain(problem))


def _limit_thread_spinning() -> None:
    """Let idle OpenMP threads spin for less than a millisecond; must run before torch is imported.

    With libgomp's default, two processes on the same cores slow each other down 14 times. Without spinning, waking
    threads takes a quarter of the time at batch 1 (docs/benchmarking.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _explain(problem: Exception) -> int:
    """Print an error to stderr and return the exit code."""
    from repshift_cli.errors import RepshiftError

    if isinstance(problem, RepshiftError):
        ui.error(problem)
        return problem.exit_code
    message = f"unexpected: {type(problem).__name__}: {problem}"
    ui.error(RepshiftError(message, "Run `repshift --debug ...` to see the traceback, and report it."))
    return 1
