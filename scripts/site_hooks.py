"""Hooks of MkDocs: the page of the commands is made from their help."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer
from typer.testing import CliRunner

from repshift_cli.cli.app import app

COMMANDS_PAGE = "reference/cli.md"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Add the help of every command to the page of the commands."""
    if page.file.src_uri != COMMANDS_PAGE:
        return markdown
    parts = [f"## {' '.join(name)}\n\n```\n{_help(name)}```\n" for name in _names(typer.main.get_command(app), ())]
    return "\n".join([markdown, *parts])


def _names(command: Any, name: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The commands of a group, and those of the groups in it."""
    for key, inner in getattr(command, "commands", {}).items():
        if hasattr(inner, "commands"):
            yield from _names(inner, (*name, key))
        else:
            yield (*name, key)


def _help(name: tuple[str, ...]) -> str:
    environment = {"COLUMNS": "80", "TERM": "dumb"}
    return CliRunner().invoke(app, [*name, "--help"], env=environment, prog_name="repshift").output
