"""Two ways to call `repshift`: in this process, which is quick, and as a process of its own, as people do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from outcome import Command, Outcome
from PIL import Image
from tiny import make_recipe, save_weights, tiny_vit


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Run `repshift` in this process, in an empty folder."""
    from repshift_cli.cli import main

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


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A dense checkpoint of width 128, which tells its heads by convention."""
    return save_weights(tiny_vit(embed_dim=128), tmp_path / "dense.safetensors")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe that leaves nothing open, for `dense`."""
    path = tmp_path / "r.yaml"
    path.write_text(make_recipe(metric="{kind: token_norm}").text)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with 20 pictures of noise."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    random = np.random.default_rng(0)
    for index in range(20):
        Image.fromarray(random.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder
