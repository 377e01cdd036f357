"""Every example runs by its documented command, in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

EXAMPLES = ROOT / "examples"

PRINTED = {
    "calibrate_on_your_images": r"calibrated \(.*\): KL [\d.]+ nats",
    "compress_in_python": r"predictions: \d+ of 32 are the same",
    "feature_extractor": r"feature map \(2, 384, 16, 16\)",
    "finetune": r"after:  loss [\d.]+, accuracy [\d.]+%",
    "video_embedding": r"captions: \d+ of 32 find their clip",
}


def run(name: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def test_each_example_is_tested_and_documents_its_command() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(PRINTED)
    for path in EXAMPLES.glob("*.py"):
        assert f"python examples/{path.name}" in path.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(PRINTED) - {"finetune"}))
def test_example_runs_and_writes_nothing(name: str, tmp_path: Path) -> None:
    assert re.search(PRINTED[name], run(name, tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_finetuning_lowers_the_loss_and_does_not_change_the_asset(tmp_path: Path) -> None:
    asset = ROOT / "repshift_cli" / "assets" / "vit_digits.safetensors"
    before = asset.read_bytes()
    printed = run("finetune", tmp_path)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert len(losses) == 3
    assert losses[2] < losses[1]
    assert asset.read_bytes() == before
