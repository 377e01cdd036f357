"""`scripts/train_fashion.py`: a run that is continued gives the same weights, and its file states the model."""

from __future__ import annotations

import importlib.util
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from repshift_cli.checkpoints.load import load_checkpoint

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "train_fashion.py"


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script with tiny ViTs, and images of 12x12 in `tmp_path`."""
    spec = importlib.util.spec_from_file_location("train_fashion", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train_fashion", module)
    spec.loader.exec_module(module)
    small = {"embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 10}
    first = {"img_size": 12, "patch_size": 3, **small, **module.MEAN_POOLING}
    second = {"img_size": 12, "patch_size": 2, **small}
    common: dict[str, Any] = {
        "architecture": None,
        "side": 12,
        "epochs": 2,
        "seed": 0,
        "sides": ((0.5, 6),),
        "batch": 4,
    }
    for name, args in {"vit_100": first, "vit_196": second}.items():
        monkeypatch.setitem(module.SETUPS, name, module.Setup(args=args, **common))
    for prefix, count in {"train": 12, "t10k": 5}.items():
        pixels = np.random.default_rng(count).integers(0, 256, (count, 12, 12), dtype=np.uint8)
        images = struct.pack(">IIII", 0x803, *pixels.shape) + pixels.tobytes()
        (tmp_path / f"{prefix}-images-idx3-ubyte").write_bytes(images)
        labels = struct.pack(">II", 0x801, count) + bytes(index % 10 for index in range(count))
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)
    return module


def test_training(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(name: str, output: str, *options: str) -> dict[str, torch.Tensor]:
        files = ["--data-dir", str(tmp_path), "--output", str(tmp_path / output)]
        monkeypatch.setattr(sys, "argv", ["train_fashion.py", name, *files, *options])
        script.main()
        return load_file(tmp_path / output)

    whole = train("vit_100", "whole.safetensors")
    saved = script.Training.save

    def interrupted(run: Any, path: Path) -> None:
        saved(run, path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(script.Training, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train("vit_100", "parts.safetensors")
    parts = train("vit_100", "parts.safetensors", "--resume")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    with pytest.raises(SystemExit, match="checkpoint of another run"):
        train("vit_100", "parts.safetensors", "--resume", "--epochs", "3")

    first = str(tmp_path / "whole.safetensors")
    taught = train("vit_100", "taught.safetensors", "--teacher", first)
    assert not torch.equal(taught["head.weight"], whole["head.weight"])
    train("vit_196", "next.safetensors", "--minutes", "0.01", "--start", first)
    loaded = load_checkpoint(tmp_path / "next.safetensors")
    assert loaded.description.name == "vit_196"
    assert loaded.description.preprocessing.input_size == (3, 12, 12)
    assert loaded.model(torch.zeros(1, 3, 12, 12)).shape == (1, 10)


def test_orthogonal(script: ModuleType) -> None:
    torch.manual_seed(0)
    for shape in ((3, 8, 16), (3, 16, 8)):
        values = torch.linalg.svdvals(script.orthogonal(torch.randn(shape)))
        assert ((values > 0.5) & (values < 1.3)).all()
