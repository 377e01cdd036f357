"""Printing to stdout flushes, and errors of writing are raised."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import pytest

from repshift_cli.cli import ui
from repshift_cli.errors import OutputError

FULL = Path("/dev/full")

PRINTS: tuple[Callable[[], None], ...] = (
    lambda: ui.print_json({"images": 3}),
    lambda: ui.print_text("three images"),
    lambda: ui.print_table(None, ("images",), (("3",),)),
)


def printed_to(stream: TextIO, print_something: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Print to a stdout that cannot be written to; its buffer is discarded."""
    with monkeypatch.context() as patched:
        patched.setattr("sys.stdout", stream)
        try:
            print_something()
        finally:
            with suppress(OSError):
                stream.close()


@pytest.mark.skipif(not FULL.exists(), reason="there is no device here that is always full")
@pytest.mark.parametrize("print_something", PRINTS, ids=["json", "text", "table"])
def test_a_full_disk_is_an_error(print_something: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match="cannot write to stdout: No space left on device"):
        printed_to(FULL.open("w"), print_something, monkeypatch)


def test_a_closed_pipe_is_not_an_output_error(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        printed_to(os.fdopen(writer, "w"), lambda: ui.print_json({}), monkeypatch)
