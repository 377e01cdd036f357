"""Options given twice, errors in JSON, and several outputs of which one fails."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from outcome import Command, Outcome

from repshift_cli.cli import app, guard, ui
from repshift_cli.errors import CheckFailed, OutputError


@pytest.mark.parametrize(
    "arguments",
    [
        ("search", "m", "--target", "macs=0.5", "-t", "macs=0.6"),
        ("compress", "m", "--recipe", "a", "--recipe", "b"),
        ("compress", "m", "--calibrate", "--no-calibrate"),
        ("eval", "m", "--seed", "1", "--seed", "2"),
        ("bench", "m", "--csv", "a.csv", "--csv", "b.csv"),
        ("inspect", "m", "--model", "a", "--model", "b"),
        ("visualize", "m", "--data", "a", "--data=b"),
        ("export", "m", "--to", "onnx", "--to", "pt2"),
        ("recipes", "show", "default", "--blocks", "3", "--blocks", "4"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_an_option_given_twice_is_refused(cli: Command, arguments: tuple[str, ...]) -> None:
    outcome = cli(*arguments)
    assert outcome.rc == 2
    assert "is given more than once" in outcome.stderr


def test_a_switch_or_a_list_may_be_repeated(cli: Command) -> None:
    outcome = cli(
        "bench", "missing.safetensors", "--budget", "macs<=0.5", "--budget", "macs<=0.6", "--force", "--force"
    )
    assert "is given more than once" not in outcome.stderr
    assert outcome.rc == 3


def failed(outcome: Outcome, rc: int) -> dict[str, Any]:
    """The document of a command that failed; nothing of it may be missing."""
    assert outcome.rc == rc, outcome.stderr
    document: dict[str, Any] = json.loads(outcome.stdout)
    assert (document["version"], document["exit_code"]) == (1, rc)
    assert document["error"].keys() == {"message", "hint"}
    assert document["error"]["message"] in " ".join(outcome.stderr.split())
    return document


def test_every_error_is_one_json_document(cli: Command) -> None:
    cases: tuple[tuple[tuple[str, ...], int, str], ...] = (
        (("inspect", "missing.safetensors"), 3, "there is no file missing.safetensors"),
        (("eval", "missing.safetensors"), 2, "no dataset given for missing.safetensors"),
        (("search", "missing.safetensors"), 2, "no target is given"),
        (("compare", "a.npz", "b.npz"), 4, "there is no file a.npz"),
        (("compress", "m", "--seconds", "-1"), 2, "Invalid value for '--seconds'"),
        (("bench", "m", "--csv", "a", "--csv", "b"), 2, "--csv is given more than once"),
        (("recipes", "check", "default"), 2, "No such option: --json"),
        (("compres",), 2, "No such command 'compres'"),
    )
    for arguments, rc, message in cases:
        assert failed(cli(*arguments, "--json"), rc)["error"]["message"].startswith(message)
    assert cli("inspect", "missing.safetensors").stdout == ""


@pytest.mark.parametrize(
    ("problem", "rc"),
    [
        (CheckFailed("too bad", "try again", {"numbers": [1]}), 5),
        (OutputError("the disk is full"), 1),
        (ZeroDivisionError("by nothing"), 1),
        (SystemExit(143), 143),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda each: type(each).__name__,
)
def test_what_is_known_of_the_result_is_in_the_json(
    cli: Command, monkeypatch: pytest.MonkeyPatch, problem: BaseException, rc: int
) -> None:
    def fail() -> None:
        ui.result.keep({"cpu": None})
        raise problem

    monkeypatch.setattr("repshift_cli.measure.environment.environment", fail)
    document = failed(cli("doctor", "--json"), rc)
    assert document["cpu"] is None
    if isinstance(problem, CheckFailed):
        assert document["numbers"] == [1]
        assert document["failed"] == document["error"] == {"message": "too bad", "hint": "try again"}


def test_a_measurement_that_cannot_be_written_is_in_the_json(
    cli: Command, dense: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OutputError("the disk is full")

    monkeypatch.setattr("repshift_cli.checkpoints.artifact.save", full)
    quick = ("--seconds", "0", "-b", "2", "--threads", "1")
    document = failed(cli("compress", dense, "-r", recipe, *quick, "-o", "a.safetensors", "--json"), 1)
    assert document["output"] is None
    assert document["ratio"]["macs"] > 1


class TestVariables:
    def test_give_options_a_default(self, cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        def blocks() -> int:
            return cli("recipes", "show", "default").stdout.count("layer:")

        usual = blocks()
        monkeypatch.setenv("REPSHIFT_BLOCKS", "3")
        assert (few := blocks()) < usual
        monkeypatch.setenv("REPSHIFT_RECIPES_SHOW_BLOCKS", "12")
        assert blocks() == usual
        assert cli("recipes", "show", "default", "--blocks", "3").stdout.count("layer:") == few
        assert "REPSHIFT_BLOCKS" not in cli("recipes", "show", "--help").stdout

    def test_an_error_names_the_variable(self, cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        cases: tuple[tuple[str, str, tuple[str, ...]], ...] = (
            ("REPSHIFT_THREADS", "many", ("eval", "m")),
            ("REPSHIFT_BENCH_THREADS", "0", ("bench", "m")),
            ("REPSHIFT_DEVICE", "tpu", ("eval",)),
            ("REPSHIFT_FORCE", "perhaps", ("dense", "m")),
        )
        monkeypatch.setenv("REPSHIFT_JSON", "true")
        for name, value, command in cases:
            with monkeypatch.context() as patched:
                patched.setenv(name, value)
                outcome = cli(*command)
            hint = failed(outcome, 2)["error"]["hint"]
            assert f"The environment has {name}={value}." in hint
            assert f"{name}={value}" in " ".join(outcome.stderr.split())


def test_all_steps_run(capsys: pytest.CaptureFixture[str]) -> None:
    done: list[int] = []

    def fail(text: str) -> None:
        raise OutputError(text)

    with pytest.raises(OutputError, match="first"):
        guard.run_all(lambda: fail("first"), lambda: done.append(1), lambda: fail("second"), lambda: done.append(2))
    assert done == [1, 2]
    assert "warning: second" in capsys.readouterr().err


def test_recipes_check_shows_the_sites_of_a_model(cli: Command) -> None:
    outcome = cli("recipes", "check", "deit_small_paper", "--model", "deit_small_patch16_224")
    assert outcome.rc == 0, outcome.stderr
    assert [line.split()[0] for line in outcome.stdout.splitlines() if "blocks." in line] == [
        "blocks.0",
        "blocks.3",
        "blocks.6",
    ]


def test_a_signal_that_a_destructor_discards_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    sent, found = threading.Event(), []
    monkeypatch.setattr(app, "_stopped", [signal.SIGINT])
    monkeypatch.setattr(signal, "raise_signal", lambda number: (found.append(number), sent.set()))
    app._send_again(SimpleNamespace(exc_value=KeyboardInterrupt()))
    assert sent.wait(5)
    assert found == [signal.SIGINT]
