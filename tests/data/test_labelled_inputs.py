"""Inputs of a search: the same pictures as calibration draws, with labels where the source has the head's classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from repshift_cli.data.builtin.digits import DigitScenes
from repshift_cli.data.inputs import load_images, load_labelled
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import DataError

PREPROCESSING = Preprocessing((3, 8, 8), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bicubic", 1.0)
CLASSES = ("ant", "bee", "cow")


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Three classes of four pictures; the brightness of a picture is 80 times its label, and a little more."""
    for label, name in enumerate(CLASSES):
        (tmp_path / name).mkdir()
        for index in range(4):
            Image.fromarray(np.full((8, 8, 3), 80 * label + index, np.uint8)).save(tmp_path / name / f"{index}.png")
    return tmp_path


def test_class_folders_give_labels_that_belong_to_their_pictures(folders: Path) -> None:
    found = load_labelled(str(folders), 12, PREPROCESSING, 3, 0)
    assert found.unlabelled is None
    assert found.labels is not None
    assert sorted(found.labels.tolist()) == [0] * 4 + [1] * 4 + [2] * 4
    assert torch.equal((found.batch.tensor.mean(dim=(1, 2, 3)) * 255 / 80).int(), found.labels.int())


def test_they_are_the_pictures_that_calibration_draws(folders: Path) -> None:
    for seed in (0, 1):
        found, plain = (
            load_labelled(str(folders), 5, PREPROCESSING, 3, seed),
            load_images(folders, 5, PREPROCESSING, seed),
        )
        assert found.batch.identity == plain.identity
        assert torch.equal(found.batch.tensor, plain.tensor)
    assert (
        found.batch.identity["sha256"] != load_labelled(str(folders), 5, PREPROCESSING, 3, 0).batch.identity["sha256"]
    )


@pytest.mark.parametrize(
    ("classes", "reason"),
    [(4, "has 3 classes, the head of the model 4"), (None, "no classification head"), (0, "no c")],
)
def test_a_head_that_does_not_fit_leaves_them_unlabelled(folders: Path, classes: int | None, reason: str) -> None:
    found = load_labelled(str(folders), 5, PREPROCESSING, classes, 0)
    assert found.labels is None
    assert reason in (found.unlabelled or "")
    assert len(found.batch.tensor) == 5


def test_a_flat_folder_has_no_labels(folders: Path) -> None:
    found = load_labelled(str(folders / "ant"), 3, PREPROCESSING, 3, 0)
    assert found.labels is None
    assert "has no class folders" in (found.unlabelled or "")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_labelled(str(tmp_path / "nowhere"), 3, PREPROCESSING, 3, 0)


def test_an_unreadable_picture_is_left_out_with_its_label(folders: Path) -> None:
    (folders / "bee" / "1.png").write_bytes(b"no picture")
    found = load_labelled(str(folders), 12, PREPROCESSING, 3, 0)
    assert found.labels is not None
    assert sorted(found.labels.tolist()) == [0] * 4 + [1] * 3 + [2] * 4
    assert len(found.batch.skipped) == 1


@pytest.mark.parametrize("where", [None, "builtin:digits"])
def test_builtin_scenes_are_those_of_calibration(where: str | None) -> None:
    found, plain = load_labelled(where, 4, PREPROCESSING, 10, 3), load_images(where, 4, PREPROCESSING, 3)
    assert found.batch.identity == plain.identity
    assert found.batch.builtin
    scenes = DigitScenes("train", 4, 20_003)
    assert found.labels is not None
    assert found.labels.tolist() == [scenes[index][1] for index in range(4)]
