"""What is printed has been written, or an error says that it could not be."""

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
    """Print to a stdout that takes nothing; what it still holds is thrown away."""
    with monkeypatch.context() as patched:
        patched.setattr("sys.stdout", stream)
        try:
            print_something()
        finally:
            with suppress(OSError):
                stream.close()


@pytest.mark.skipif(not FULL.exists(), reason="there is no device here that is always full")
@pytest.mark.parametrize("print_something", PRINTS, ids=["json", "text", "table"])
def test_a_full_disk_is_told_at_once(print_something: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match="cannot write the output: No space left on device"):
        printed_to(FULL.open("w"), print_something, monkeypatch)


def test_a_reader_that_is_gone_is_no_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        printed_to(os.fdopen(writer, "w"), lambda: ui.print_json({}), monkeypatch)
