"""The Typer application: which commands there are and how they end."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from repshift_cli.cli import bench, compare, compress, demo, evaluate, export, inspect, recipes, search, visualize
from repshift_cli.cli.torchrun import Interrupted
from repshift_cli.errors import INTERRUPTED

__all__ = ["app", "main"]

app = typer.Typer(
    name="repshift",
    help="Make trained vision models faster by letting unimportant tokens go between layers.",
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
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of every command."""


def main() -> None:
    """Run the command line; errors become one message and an exit code (see docs/architecture.md)."""
    _share_cores()
    debug = "--debug" in sys.argv
    try:
        app(prog_name="repshift")
    except Interrupted:
        raise  # it has told what it left behind
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code != INTERRUPTED:
            raise
        typer.echo("interrupted; nothing half-done was left behind", err=True)
        sys.exit(INTERRUPTED)
    except Exception as problem:
        if debug:
            raise
        sys.exit(_explain(problem))


def _share_cores() -> None:
    """Let idle OpenMP threads spin for less than a millisecond before they sleep; has to happen before torch loads.

    As libgomp has it they spin so long that two processes on the same cores slow each other down 14 times over; without
    any spinning each operation wakes its threads anew, a quarter of the time at batch 1 (docs/benchmarking.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _explain(problem: Exception) -> int:
    """Show a problem on stderr; returns the exit code."""
    from repshift_cli.cli import ui
    from repshift_cli.errors import RepshiftError

    if isinstance(problem, RepshiftError):
        ui.error(problem)
        return problem.exit_code
    text = f"{type(problem).__name__}: {problem}"
    ui.error(
        RepshiftError(f"unexpected: {text}", "Run again as `repshift --debug ...` for the traceback, and report it.")
    )
    return 1
