"""`torchrun ... -m repshift_cli eval`: the same counts for any number of processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from outcome import Command
from paths import ROOT

from repshift_cli.cli.torchrun import refuse_torchrun
from repshift_cli.errors import UsageError

EXACT = ("images", "of", "skipped", "skipped_files", "top1", "top5", "top1_correct", "top5_correct", "top1_interval")

pytestmark = pytest.mark.slow


def together(processes: int, *arguments: str) -> list[str]:
    """The command that starts `repshift eval` in several processes."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *launch, "-m", "repshift_cli", "eval", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def launch(processes: int, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return start(together(processes, *arguments), folder)


def start(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, cwd=folder, env=environment()
    )


def exact(text: str) -> dict[str, Any]:
    document = json.loads(text)
    dense = {f"dense {key}": document["dense"][key] for key in EXACT if key in document.get("dense", {})}
    return {**{key: document[key] for key in EXACT}, "agreement": document.get("agreement"), **dense}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of 45 scenes, some of which cannot be read."""
    from repshift_cli.data.builtin.digits import DigitScenes

    root = tmp_path_factory.mktemp("digits")
    for label in range(10):
        (root / str(label)).mkdir()
    scenes = DigitScenes("test", 45)
    for index in range(45):
        scene_image, label = scenes[index]
        scene_image.save(root / str(label) / f"{index:02d}.png")
    for broken in sorted(root.glob("*/*.png"))[3::17]:
        broken.write_bytes(broken.read_bytes()[:100])
    return root


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from repshift_cli.compression.run import compress_checkpoint
    from repshift_cli.compression.settings import Settings
    from repshift_cli.utils.progress import Silent

    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    settings = Settings(output=path, seconds=0.0, calibration_images=0)
    compress_checkpoint("builtin:vit-digits-small", settings, Silent())
    return path


@pytest.fixture
def arguments(digits: Path, compressed: Path) -> list[str]:
    return [str(compressed), "--dataset", str(digits), "--compare-dense", "-b", "1", "--threads", "1", "--json"]


@pytest.fixture
def expected(arguments: list[str], cli: Command) -> dict[str, Any]:
    """The counts of one process."""
    alone = cli("eval", *arguments)
    assert alone.rc == 0, alone.stderr
    found = exact(alone.stdout)
    assert (found["skipped"], found["images"]) == (3, 42)
    return found


def test_several_processes_give_the_same_counts(arguments: list[str], expected: dict[str, Any], tmp_path: Path) -> None:
    done = launch(3, *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert exact(done.stdout) == expected
    assert json.loads(done.stdout)["data"]["processes"] == 3
    assert done.stderr.count("images could not be read") == 1


MEASURED = ("data", "images_per_s", "end_to_end_images_per_s")
"""Times, and what depends on the number of processes."""


def counted(text: str) -> dict[str, Any]:
    """The document of several models without what depends on time."""
    document = json.loads(text)
    for part in (document, *document["models"]):
        for key in MEASURED:
            part.pop(key, None)
    return dict(document)


def test_several_models_are_compared_by_several_processes(
    arguments: list[str], compressed: Path, cli: Command, tmp_path: Path
) -> None:
    two = [str(compressed), "builtin:cnn-digits", *arguments[1:]]
    alone = cli("eval", *two)
    assert alone.rc == 0, alone.stderr
    done = launch(2, *two, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    found = counted(done.stdout)
    assert [row["name"] for row in found["models"]] == ["small", "small, dense", "builtin:cnn-digits"]
    assert found == counted(alone.stdout)


def test_a_killed_run_is_resumed_with_another_number_of_processes(
    arguments: list[str], expected: dict[str, Any], cli: Command, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    process = subprocess.Popen(
        together(2, *arguments, "--resume", "state"),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=environment(),
    )
    deadline = time.monotonic() + 120
    while len(list(state.glob("0*.json"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.005)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False).stdout
    for pid in (process.pid, *map(int, workers.split())):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(60)
    assert len(list(state.glob("0*.json"))) >= 4
    done = cli("eval", *arguments, "--resume", "state")
    assert done.rc == 0, done.stderr
    assert exact(done.stdout) == expected
    assert not state.exists()


def test_an_error_in_one_process_is_printed_once_and_ends_all(digits: Path, tmp_path: Path) -> None:
    # the last broken image is in the part of the second process
    done = launch(2, "--dataset", str(digits), "-b", "2", "--strict", "--json", folder=tmp_path)
    assert done.returncode != 0
    assert json.loads(done.stdout)["exit_code"] == 4
    assert done.stderr.count("cannot be read") == 1
    assert "evaluation/classification/evaluate.py" not in done.stderr  # torchrun shows its own traceback, not ours


BY_RANK = """
import json, os, sys
sys.argv = ["repshift", "eval", *json.loads(sys.argv[1])[int(os.environ["RANK"])]]
from repshift_cli.cli.app import main
main()
"""


def test_processes_with_different_models_are_refused(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(BY_RANK)
    launched = together(2)[:-3]
    other = [argument for argument in arguments if argument != "--compare-dense"]
    done = start([*launched, "rank.py", json.dumps([arguments, other])], tmp_path)
    assert done.returncode == 1
    assert json.loads(done.stdout)["exit_code"] == 2
    assert done.stderr.count("rank 1 differs from rank 0 in models") == 1
    assert "exitcode  : 2" in done.stderr
    assert "SIGABRT" not in done.stderr


def test_videos_need_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="evaluating videos runs in one process"):
        refuse_torchrun("evaluating videos")
