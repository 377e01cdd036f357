"""Files of `repshift eval`: progress that survives SIGKILL, predictions, and `repshift compare` of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from outcome import Command
from paths import ROOT

MODEL = "builtin:vit-digits-small"
FEW = (MODEL, "--limit", "120", "-b", "4", "--workers", "0", "--threads", "1", "--json")


@contextmanager
def running(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`repshift eval` as a process that can be ended in the middle."""
    process = subprocess.Popen(
        [sys.executable, "-m", "repshift_cli", "eval", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_shards(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(list(folder.glob("0*.json"))) < count:
        assert time.monotonic() < deadline, "nothing is kept"
        time.sleep(0.01)


def counted(text: str) -> dict[str, Any]:
    document = json.loads(text)
    keys = ("images", "of", "skipped", "top1", "top5", "top1_correct", "top5_correct", "top1_interval", "interrupted")
    return {key: document[key] for key in keys}


def test_a_killed_run_is_resumed(cli: Command, tmp_path: Path) -> None:
    fresh = cli("eval", *FEW)
    assert fresh.rc == 0, fresh.stderr
    for shards in (2, 9):
        with running(tmp_path, *FEW, "--resume", "state") as process:
            wait_for_shards(tmp_path / "state", shards)
            process.send_signal(signal.SIGKILL)
            process.wait(60)
    kept = len(list((tmp_path / "state").glob("0*.json")))
    assert 9 <= kept < 30
    other = cli("eval", *FEW, "--resume", "state", "--seed", "1")
    assert other.rc == 2
    assert "is the state of another evaluation: it differs in data" in other.stderr
    done = cli("eval", *FEW, "--resume", "state")
    assert done.rc == 0, done.stderr
    assert counted(done.stdout) == counted(fresh.stdout)
    assert not (tmp_path / "state").exists()


def test_ctrl_c_prints_the_partial_result(cli: Command, tmp_path: Path) -> None:
    with running(tmp_path, *FEW, "--resume", "state") as process:
        wait_for_shards(tmp_path / "state", 3)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    found = counted(out)
    assert found["interrupted"]
    assert 12 <= found["images"] < 120
    assert found["of"] == 120
    assert "interrupted: this is the result of" in err
    assert "to continue from state" in err
    assert "Traceback" not in err
    assert counted(cli("eval", *FEW, "--resume", "state").stdout)["images"] == 120


class TestPredictions:
    def test_saved_and_compared(self, cli: Command) -> None:
        few = ("--limit", "40", "--json", "--workers", "0")
        for model, name in ((MODEL, "a.npz"), ("builtin:vit-digits", "b.npz")):
            done = cli("eval", model, *few, "--save-predictions", name)
            assert done.rc == 0, done.stderr
            assert json.loads(done.stdout)["images"] == 40
        found = json.loads(cli("compare", "a.npz", "b.npz", "--json").stdout)
        assert found["images"] == 40
        assert found["first"]["model"] == MODEL
        assert found["won"] - found["lost"] == found["second"]["top1_correct"] - found["first"]["top1_correct"]
        assert 0 <= found["mcnemar_p"] <= 1
        shown = cli("compare", "a.npz", "b.npz")
        assert shown.rc == 0, shown.stderr
        assert max(map(len, shown.stdout.splitlines())) <= 80
        assert "McNemar's exact test: p =" in shown.stdout
        assert "same prediction:" in shown.stdout

    def test_predictions_of_the_dense_model_have_their_own_file(self, cli: Command, dense: Path, recipe: Path) -> None:
        made = cli("compress", dense, "-r", recipe, "-o", "fast.safetensors", "--seconds", "0")
        assert made.rc == 0, made.stderr
        few = ("--limit", "12", "--compare-dense", "--save-predictions", "p.npz", "--workers", "0")
        done = cli("eval", "fast.safetensors", "--dataset", "builtin:digits", *few)
        assert done.rc == 0, done.stderr
        assert "wrote p.npz" in done.stdout
        assert "wrote p_dense.npz" in done.stdout
        same = [line for line in done.stdout.splitlines() if "predictions are the same" in line or "the same (" in line]
        found = json.loads(cli("compare", "p_dense.npz", "p.npz", "--json").stdout)
        assert f"{round(12 * found['agreement'])} of 12" in " ".join(same)
        again = cli("eval", "fast.safetensors", "--dataset", "builtin:digits", *few)
        assert again.rc == 2
        assert "already exists" in again.stderr
        assert cli("eval", "fast.safetensors", "--dataset", "builtin:digits", *few, "--force").rc == 0

    @pytest.mark.parametrize(
        ("arguments", "rc", "message"),
        [
            (("eval", MODEL, "--save-predictions", "p.csv"), 2, "unknown suffix"),
            (("eval", MODEL, "--save-predictions", "nowhere/p.npz"), 1, "does not exist"),
            (("compare", "a.npz", "b.npz"), 4, "no file a.npz"),
            (("eval", "builtin:umt-shapes", "--save-predictions", "p.npz"), 2, "is for image models"),
            (("eval", "builtin:umt-shapes", "--resume", "state"), 2, "is for image models"),
        ],
    )
    def test_invalid_options(self, cli: Command, arguments: tuple[str, ...], rc: int, message: str) -> None:
        done = cli(*arguments)
        assert done.rc == rc, done.stderr
        assert message in done.stderr
        assert done.stdout == ""
