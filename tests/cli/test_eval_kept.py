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

from repshift_cli.cli.show.evaluate import show_evaluation, warn_of_guessing
from repshift_cli.errors import OutputError
from repshift_cli.evaluation.classification.predictions import load_predictions
from repshift_cli.evaluation.classification.result import Evaluation, Pace, Score
from repshift_cli.evaluation.common import Skipped

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


@pytest.mark.parametrize("kills", [(5,), pytest.param((2, 9), marks=pytest.mark.slow)], ids=str)
def test_a_killed_run_is_resumed(kills: tuple[int, ...], cli: Command, tmp_path: Path) -> None:
    fresh = cli("eval", *FEW)
    assert fresh.rc == 0, fresh.stderr
    for shards in kills:
        with running(tmp_path, *FEW, "--resume", "state") as process:
            wait_for_shards(tmp_path / "state", shards)
            process.send_signal(signal.SIGKILL)
            process.wait(60)
    kept = len(list((tmp_path / "state").glob("0*.json")))
    assert kills[-1] <= kept < 30
    other = cli("eval", *FEW, "--resume", "state", "--seed", "1")
    assert other.rc == 2
    assert "is the state of another evaluation: it differs in data" in other.stderr
    done = cli("eval", *FEW, "--resume", "state")
    assert done.rc == 0, done.stderr
    assert counted(done.stdout) == counted(fresh.stdout)
    assert not (tmp_path / "state").exists()


@pytest.mark.slow
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


QUICK = ("--limit", "12", "--workers", "0", "--threads", "1", "--save-predictions", "p.npz")


class TestOutputThatFails:
    @pytest.mark.parametrize("form", [(), ("--json",)], ids=["table", "json"])
    @pytest.mark.parametrize("kind", ["full", "pipe"])
    def test_predictions_are_saved_before_anything_is_printed(
        self, cli: Command, monkeypatch: pytest.MonkeyPatch, kind: str, form: tuple[str, ...]
    ) -> None:
        if kind == "full":
            stdout = Path("/dev/full").open("w", encoding="utf-8")  # noqa: SIM115
        else:
            reader, writer = os.pipe()
            os.close(reader)
            stdout = os.fdopen(writer, "w")
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", stdout)
            done = cli("eval", MODEL, *QUICK, "--resume", "state", *form)
        assert done.rc == 1
        assert ("cannot write to stdout" in done.stderr) == (kind == "full")
        assert "unexpected" not in done.stderr
        assert len(load_predictions(Path("p.npz"))) == 12
        assert Path("state/run.json").is_file()  # a finished state is removed once the numbers are printed

    def test_the_result_is_printed_although_predictions_cannot_be_saved(
        self, cli: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: Any) -> None:
            raise OutputError("cannot write p.npz: No space left on device")

        monkeypatch.setattr("repshift_cli.evaluation.classification.predictions.save_predictions", full)
        done = cli("eval", MODEL, *QUICK, "--json")
        assert done.rc == 1
        assert counted(done.stdout)["images"] == 12
        assert "No space left" in done.stderr


def test_names_with_markup_and_bytes_that_are_not_utf8(cli: Command, tmp_path: Path) -> None:
    from repshift_cli.data.builtin.digits import DigitScenes

    scenes = DigitScenes("test", 12)
    odd = os.fsdecode(b"\xe9")
    folder = tmp_path / f"[bold][{odd}"
    for label in range(10):
        (folder / f"{label}[{odd}]").mkdir(parents=True)
    for index in range(len(scenes)):
        scene_image, label = scenes[index]
        scene_image.save(folder / f"{label}[{odd}]" / f"{index}[b]{odd}.png")
    few = ("--dataset", folder, "--workers", "0")
    for model, name in ((MODEL, "a.npz"), ("builtin:vit-digits", "[b].npz")):
        done = cli("eval", model, *few, "--save-predictions", name)
        assert done.rc == 0, done.stderr
        assert r"[bold][\udce9,12images" in "".join(done.stdout.split())
        assert f"wrote {name}" in done.stdout
    assert cli("eval", MODEL, *few, "--json").rc == 0
    assert load_predictions(Path("a.npz")).ids[0].isprintable()
    for form in ((), ("--json",)):
        assert cli("compare", "a.npz", "[b].npz", *form).rc == 0


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["60", "20"])
def test_labels_in_another_order(cli: Command, tmp_path: Path, limit: str) -> None:
    from repshift_cli.data.builtin.digits import DigitScenes

    scenes = DigitScenes("test", 60)
    for index in range(len(scenes)):
        scene_image, label = scenes[index]
        folder = tmp_path / "digits" / str((label + 1) % 10)
        folder.mkdir(parents=True, exist_ok=True)
        scene_image.save(folder / f"{index}.png")
    (tmp_path / "digits" / "0" / "broken.png").touch()
    few = ("--dataset", tmp_path / "digits", "--workers", "0", "--limit", limit)
    done = cli("eval", "builtin:vit-digits", *few)
    assert done.rc == 0
    found = json.loads(cli("eval", "builtin:vit-digits", *few, "--json").stdout)
    assert found["top1"] < 5
    if limit == "60":
        assert "labels are probably in another order" in done.stderr
        assert found["against_guessing"] == "below"
    else:
        assert "no better than guessing among 10 classes" in done.stderr
        assert found["against_guessing"] == "not above"


def test_a_table_says_that_images_are_left_out_and_a_compressed_model_is_judged_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    score = Score(40, 4, 20, 1.0, None)
    result = Evaluation(
        dataset="d",
        total=43,
        outputs=10,
        images=40,
        skipped=tuple(Skipped(str(index), "broken") for index in range(3)),
        scores={"compressed": score},
        same_top1=None,
        seconds=1.0,
        fresh=40,
        interrupted=False,
        pace=Pace(1.0, 0.0, 0.0, 0.0, 0, 1, False),
        batch_size=4,
    )
    show_evaluation(result, {"compressed": 1})
    warn_of_guessing(result, "compressed")
    out, err = capsys.readouterr()
    assert "d, 40 of 43 images, 3 could not be read" in out
    assert "top-1 of the compressed model is 10.00%" in err
    assert "no better than guessing" in err
