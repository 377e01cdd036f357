"""The command line: one file per command, each of which parses, calls and renders."""

from repshift_cli.cli.app import main

__all__ = ["main"]
