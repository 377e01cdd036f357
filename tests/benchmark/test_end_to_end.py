"""Passes from image files to results: all models see the same whole batches in turn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from repshift_cli.benchmark.end_to_end import Placement, Source, measure_end_to_end
from repshift_cli.benchmark.report import EndToEnd, Setting
from repshift_cli.data.inputs import open_images
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import DataError
from repshift_cli.measure.latency import Subject
from repshift_cli.utils.progress import Silent

PREPROCESSING = Preprocessing((3, 16, 16), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0)


class Recorder:
    """A model that keeps its inputs."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, images: Tensor) -> None:
        self.seen.append(images.float().clone())


@pytest.fixture(name="folder")
def fixture_folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for index in range(7):
        Image.fromarray(random.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(tmp_path / f"{index}.png")
    return tmp_path


def measured(
    folder: Path, *, images: int = 100, batch: int = 3, workers: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[EndToEnd, list[Tensor], list[Tensor]]:
    """Measure two models; returns the result and the inputs of both."""
    sides = {"dense": Recorder(), "compressed": Recorder()}
    found = measure_end_to_end(
        [Subject(name, side) for name, side in sides.items()],
        {"compressed": "dense"},
        PREPROCESSING,
        Source(open_images(folder, images), images, workers, min_passes=2),
        Setting(batch, (16, 16)),
        Placement(torch.device("cpu"), dtype),
        max_seconds=0,
        progress=Silent(),
    )
    return found, sides["dense"].seen, sides["compressed"].seen


@pytest.mark.parametrize("workers", [0, 2])
def test_both_sides_get_the_same_batches(folder: Path, workers: int) -> None:
    found, dense, compressed = measured(folder, workers=workers)
    assert [tuple(batch.shape) for batch in dense] == [(3, 3, 16, 16)] * 4  # two passes of two batches
    assert torch.equal(torch.cat(dense[:2]), torch.cat(dense[2:]))
    assert torch.equal(torch.cat(dense), torch.cat(compressed))
    assert (found.reading.images, found.workers) == (6, workers)
    assert {name: len(passes.seconds) for name, passes in found.sides.items()} == {"dense": 2, "compressed": 2}
    assert all(
        0 < wait <= whole
        for passes in found.sides.values()
        for wait, whole in zip(passes.waiting_s, passes.seconds, strict=True)
    )
    assert found.speedups.keys() == {"compressed"}


def test_images_are_preprocessed(folder: Path) -> None:
    _, dense, _ = measured(folder, images=1, batch=1)
    with Image.open(folder / "0.png") as image:
        wanted = PREPROCESSING.transform()(image.convert("RGB"))
    assert torch.equal(dense[0][0], wanted)


def test_the_dtype_of_the_model(folder: Path) -> None:
    _, dense, _ = measured(folder, images=1, batch=1, dtype=torch.bfloat16)
    assert torch.equal(dense[0], dense[0].to(torch.bfloat16).float())


@pytest.mark.parametrize(("images", "taken"), [(2, 3), (3, 3), (5, 3), (6, 6), (100, 6)])
def test_a_pass_is_at_least_one_batch(folder: Path, images: int, taken: int) -> None:
    assert measured(folder, images=images)[0].reading.images == taken


def test_too_few_images(folder: Path) -> None:
    with pytest.raises(DataError, match="do not fill a batch of 8"):
        measured(folder, batch=8)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(folder: Path, workers: int) -> None:
    (folder / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1\.png cannot be read"):
        measured(folder, workers=workers)
