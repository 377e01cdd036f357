"""Options given twice, failed checks in JSON, and several outputs of which one fails."""

from __future__ import annotations

import json
import signal
import threading
from types import SimpleNamespace

import pytest
from outcome import Command

from repshift_cli.cli import app, guard
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


def test_a_failed_check_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    for json_wanted in (True, False):
        with pytest.raises(CheckFailed), guard.failure_as_json(json_wanted, {"output": None}):
            raise CheckFailed("too bad", "try again", {"numbers": [1]})
        text = capsys.readouterr().out
        if json_wanted:
            failed = {"message": "too bad", "hint": "try again"}
            assert json.loads(text) == {"output": None, "numbers": [1], "failed": failed}
        else:
            assert text == ""


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
