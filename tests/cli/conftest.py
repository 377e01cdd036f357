"""Fixtures of the tests of commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import make_recipe, save_weights, tiny_vit


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A dense checkpoint of width 128, whose number of heads follows from the width."""
    return save_weights(tiny_vit(embed_dim=128), tmp_path / "dense.safetensors")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe for `dense` that needs no calibration."""
    path = tmp_path / "r.yaml"
    path.write_text(make_recipe(metric="{kind: token_norm}").text)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with 20 images of noise."""
    folder = tmp_path / "photos"
    folder.mkdir()
    random = np.random.default_rng(0)
    for index in range(20):
        Image.fromarray(random.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder
