"""Options of commands that say how a checkpoint is read and written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from outcome import Command
from PIL import Image
from tiny import DROPS, save_weights, tiny_vit

RECIPE = f"version: 1\nmetric: {{kind: representation_shift}}\nreducer: {{kind: prune}}\nlayers: {DROPS}\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    return path


def test_images_that_are_not_square(cli: Command, recipe: Path, tmp_path: Path) -> None:
    dense = save_weights(tiny_vit(img_size=(64, 32)), tmp_path / "a.safetensors")
    for name in "0123456789":
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.effect_noise((40, 70), 60).convert("RGB").save(tmp_path / "data" / name / "1.png")
    size = ("--heads", 2, "--img-size", "64x32")
    assert "Give --img-size HEIGHTxWIDTH" in cli("inspect", dense).stderr
    quick = ("--seconds", 0, "--batch-size", 1, "--no-calibrate")
    outcome = cli("compress", dense, "-r", recipe, *size, *quick, "-o", tmp_path / "b.safetensors")
    assert outcome.rc == 0, outcome.stderr
    outcome = cli("eval", tmp_path / "b.safetensors", "--dataset", tmp_path / "data", "--compare-dense", "--json")
    assert outcome.rc == 0, outcome.stderr
    outcome = cli("inspect", dense, *size, "--json")
    assert json.loads(outcome.stdout)["preprocessing"]["input_size"] == [3, 64, 32]


def test_raw_weights(cli: Command, recipe: Path, tmp_path: Path) -> None:
    raw, averaged = (tiny_vit(seed=seed).state_dict() for seed in (0, 1))
    torch.save({"model": raw, "model_ema": averaged}, tmp_path / "a.pth")
    outcome = cli("compress", tmp_path / "a.pth", "-r", recipe, "--heads", 2, "--weights", "raw", "--dry-run")
    assert outcome.rc == 0, outcome.stderr
    assert "raw weights (model) are used, not the averaged ones (model_ema)" in " ".join(outcome.stderr.split())
    outcome = cli("inspect", tmp_path / "a.pth", "--weights", "mean")
    assert (outcome.rc, "must be raw or ema" in outcome.stderr) == (2, True)


@pytest.mark.parametrize("name", ["x.pth", "x.onnx", "x", ".safetensors"])
@pytest.mark.parametrize("command", ["compress", "search"])
def test_outputs_of_another_format(command: str, name: str, cli: Command, tmp_path: Path) -> None:
    option = ["-o"] if command == "compress" else ["--target", "macs=0.7", "--save"]
    outcome = cli(command, "builtin:vit-digits", *option, tmp_path / name)
    assert (outcome.rc, "a compressed checkpoint is a safetensors file" in outcome.stderr) == (2, True)
    assert not list(tmp_path.iterdir())
