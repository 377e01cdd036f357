"""The command line: one file per command, which parses options and calls; `show/` prints reports."""

from repshift_cli.cli.app import main

__all__ = ["main"]
