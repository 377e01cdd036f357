"""`torchrun ... -m repshift_cli eval`: the whole numbers of one process, whatever the number of processes."""

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

ROOT = Path(__file__).parents[2]
EXACT = ("images", "of", "skipped", "skipped_files", "top1", "top5", "top1_correct", "top5_correct", "top1_interval")

pytestmark = pytest.mark.slow


def launch(processes: int, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "repshift_cli"]
    if processes > 1:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"),
            *("-m", "repshift_cli"),
        ]
    return subprocess.run(
        [*command, "eval", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def exact(text: str) -> dict[str, Any]:
    document = json.loads(text)
    dense = {f"dense {key}": document["dense"][key] for key in EXACT if key in document.get("dense", {})}
    return {**{key: document[key] for key in EXACT}, "agreement": document.get("agreement"), **dense}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of 45 scenes, some of which cannot be read."""
    from repshift_cli.data.digits import DigitScenes

    root = tmp_path_factory.mktemp("digits")
    for label in range(10):
        (root / str(label)).mkdir()
    scenes = DigitScenes("test", 45)
    for index in range(45):
        picture, label = scenes[index]
        picture.save(root / str(label) / f"{index:02d}.png")
    for broken in sorted(root.glob("*/*.png"))[3::17]:
        broken.write_bytes(broken.read_bytes()[:100])
    return root


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from repshift_cli.compression import Settings, compress_checkpoint
    from repshift_cli.progress import Silent

    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    settings = Settings(output=path, seconds=0.0, calibration_images=0)
    compress_checkpoint("builtin:vit-digits-small", settings, Silent())
    return path


def test_any_number_of_processes_counts_the_same(digits: Path, compressed: Path, tmp_path: Path) -> None:
    arguments = [str(compressed), "--dataset", str(digits), "--compare-dense", "-b", "4", "--json"]
    alone = launch(1, *arguments, folder=tmp_path)
    assert alone.returncode == 0, alone.stderr
    expected = exact(alone.stdout)
    assert expected["skipped"] == 3
    assert expected["images"] == 42
    for processes in (2, 3):
        done = launch(processes, *arguments, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert exact(done.stdout) == expected
        assert json.loads(done.stdout)["data"]["processes"] == processes
        assert done.stderr.count("pictures could not be read") == 1


def test_a_run_of_several_that_was_killed_goes_on_with_any_number(
    digits: Path, compressed: Path, tmp_path: Path
) -> None:
    arguments = [str(compressed), "--dataset", str(digits), "-b", "1", "--json"]
    expected = exact(launch(1, *arguments, folder=tmp_path).stdout)
    state = tmp_path / "state"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("-m", "repshift_cli", "eval", *arguments, "--resume", "state"),
        ],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while len(list(state.glob("0*.json"))) < 6 and time.monotonic() < deadline:
        time.sleep(0.005)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False).stdout
    for pid in (process.pid, *map(int, workers.split())):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(60)
    assert len(list(state.glob("0*.json"))) >= 6
    done = launch(3, *arguments, "--resume", "state", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert exact(done.stdout) == expected
    assert not state.exists()


def test_an_error_in_one_process_is_told_once_and_ends_all(digits: Path, tmp_path: Path) -> None:
    # the last broken picture is in the part of the second process
    done = launch(2, "--dataset", str(digits), "-b", "2", "--strict", "--json", folder=tmp_path)
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.count("cannot be read") == 1
    assert "repshift_cli/evaluate.py" not in done.stderr  # torchrun shows its own traceback, not ours


def test_videos_are_for_one_process(tmp_path: Path) -> None:
    done = launch(2, "builtin:umt-shapes", folder=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("Start it without torchrun") == 1
