"""Printing to stdout flushes, errors of writing are raised; notes, progress and the log."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TextIO

import pytest
from outcome import Command, explained

from repshift_cli.cli import ui
from repshift_cli.errors import OutputError

FULL = Path("/dev/full")

PRINTS: tuple[Callable[[], None], ...] = (
    lambda: (ui.result.clear(), ui.result.keep({"images": 3}), ui.result.print()),  # type: ignore[func-returns-value]
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
        printed_to(os.fdopen(writer, "w"), lambda: ui.print_text("three images"), monkeypatch)


def test_without_a_terminal_progress_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 4.0, 12.0, 13.0, 31.0, 200.0, 201.0])
    monkeypatch.setattr("repshift_cli.cli.ui.time", SimpleNamespace(monotonic=lambda: next(clock)))
    with ui.Screen().task("evaluating", 50) as task:
        for steps in (1, 2, 1, 6, 30, 10):
            task.advance(steps)
    assert capsys.readouterr().err.splitlines() == [
        "evaluating: 3/50, about 3 min left",
        "evaluating: 10/50, about 2 min left",
        "evaluating: 40/50, about 50 s left",
    ]
    ui.configure(quiet=True)
    with ui.Screen().task("evaluating", 50) as task:
        task.advance(25)
    ui.configure()
    assert capsys.readouterr().err == ""


def test_a_note_is_printed_once_per_command(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        ui.configure()
        for screen in (ui.Screen(), ui.Screen()):
            screen.warn("no images")
            screen.note("no images")
            screen.note("tracing")
            ui.remark("tracing")
        assert capsys.readouterr().err.splitlines() == ["warning: no images", "tracing"]


def test_quiet_and_the_log(cli: Command, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "built as a ViT" in cli("inspect", dense).stderr
    outcome = cli("--quiet", "--log-file", "log.txt", "inspect", dense)
    assert (outcome.rc, outcome.stderr) == (0, "")
    assert outcome.stdout
    monkeypatch.setenv("REPSHIFT_LOG_FILE", "log.txt")
    monkeypatch.setenv("REPSHIFT_QUIET", "1")
    explained(cli("inspect", "missing.safetensors"), 3, "there is no file missing.safetensors")
    assert cli("inspect", "--nothing").rc == 2
    lines = Path("log.txt").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\S+ (note|error): ", line) for line in lines)
    assert "note: " in lines[0]
    assert "error: there is no file missing.safetensors" in lines[-2]
    assert "error: No such option: --nothing" in lines[-1]
    explained(cli("--log-file", "nowhere/log.txt", "inspect", dense), 1, "cannot write the log nowhere/log.txt")


def test_a_narrow_terminal(cli: Command, dense: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    stem = "a_name_that_does_not_fit_into_a_line_of_sixty_columns_as_a_whole"
    name = f"{stem}.safetensors"
    quick = ("--seconds", "0", "-b", "2", "--threads", "1")
    commands = (("compress", dense, "-r", recipe, *quick, "-o", name), ("inspect", name), ("bench", name, *quick))
    for command in (*commands, ("recipes", "list"), ("doctor",), ("eval", "builtin:vit-digits-small", "--limit", "4")):
        outcome = cli(*command)
        assert outcome.rc == 0, outcome.stderr
        lines = [line.rstrip() for line in outcome.stdout.splitlines()]
        assert not [line for line in lines if len(line) > 60 and " " in line.strip()]
        assert name not in command or command[0] == "inspect" or any(stem in line for line in lines)
        assert "\u2026" not in outcome.stdout  # nothing is cut


def test_columns_of_0_are_ignored(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "0")
    ui.print_text("three images")
    ui.print_table(None, ("images",), (("3",),))
    assert capsys.readouterr().out.split() == ["three", "images", "images", "3"]


@pytest.mark.parametrize("width", [80, 50, 20])
def test_a_table_breaks_no_words(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    cells = [["model", "metrics", "images per second"], ["dense", "token_norm, representation_shift", "97.06-98.44"]]
    ui.print_table("A title of this table", cells[0], cells[1:], left=2)
    printed = capsys.readouterr().out
    words = " ".join(["A title of this table", *cells[0], *cells[1]]).replace(",", "").split()
    assert set(words) <= set(printed.replace(",", "").split())
    assert width == 20 or max(map(len, printed.splitlines())) <= width


def test_a_table_of_many_columns_is_printed_by_rows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "16")
    ui.print_table(None, ["", "top-1 %", "GMACs"], [["dense", "97.5", "0.11"], ["compressed", "", "0.07"]])
    assert capsys.readouterr().out == "dense\n  top-1 % 97.5\n  GMACs 0.11\ncompressed\n  GMACs 0.07\n\n"
