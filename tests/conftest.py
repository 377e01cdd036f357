"""Every test runs on one thread, without network and without cached weights.

`cli` runs `repshift` in this process, which is faster; `shell` runs it in a new process.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# Before timm or huggingface_hub are imported, by this process or by one that it starts.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_CACHE"] = str(Path(tempfile.gettempdir()) / "repshift-tests-have-no-hub")
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings
from outcome import Command, Outcome

torch.set_num_threads(1)
settings.register_profile("repshift", deadline=None, max_examples=60)
settings.load_profile("repshift")


def pytest_collection_finish() -> None:
    """Exclude imported modules from garbage collection, which took a quarter of the time of small tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Run `repshift` in this process, in an empty folder."""
    from repshift_cli.cli.app import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.delenv("REPSHIFT_DATA_DIR", raising=False)

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["repshift", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def shell(tmp_path: Path) -> Command:
    """Run `repshift` in a process of its own, in an empty folder."""

    def run(*arguments: object) -> Outcome:
        environment = {key: value for key, value in os.environ.items() if key != "REPSHIFT_DATA_DIR"}
        done = subprocess.run(
            [sys.executable, "-m", "repshift_cli", *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
            cwd=tmp_path,
            env={**environment, "COLUMNS": "80"},
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run
