"""Labelled inputs: the same images as without labels, and labels where the source has the head's classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from repshift_cli.data.builtin.digits import DigitScenes
from repshift_cli.data.inputs import ImageBatch, load_inputs
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import DataError

PREPROCESSING = Preprocessing((3, 8, 8), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bicubic", 1.0)
CLASSES = ("ant", "bee", "cow")


def labelled(where: str | None, count: int, num_classes: int | None, seed: int) -> ImageBatch:
    return load_inputs(where, count, PREPROCESSING, seed, num_classes=num_classes)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Three classes of four images; the brightness of an image is 80 times its label, and a little more."""
    for label, name in enumerate(CLASSES):
        (tmp_path / name).mkdir()
        for index in range(4):
            Image.fromarray(np.full((8, 8, 3), 80 * label + index, np.uint8)).save(tmp_path / name / f"{index}.png")
    return tmp_path


def test_labels_of_class_folders_belong_to_their_images(folders: Path) -> None:
    found = labelled(str(folders), 12, 3, 0)
    assert found.unlabelled is None
    assert found.labels is not None
    assert sorted(found.labels.tolist()) == [0] * 4 + [1] * 4 + [2] * 4
    assert torch.equal((found.tensor.mean(dim=(1, 2, 3)) * 255 / 80).int(), found.labels.int())


def test_images_are_the_same_with_and_without_labels(folders: Path) -> None:
    for seed in (0, 1):
        found, plain = (
            labelled(str(folders), 5, 3, seed),
            load_inputs(folders, 5, PREPROCESSING, seed),
        )
        assert found.identity == plain.identity
        assert torch.equal(found.tensor, plain.tensor)
    assert found.identity["sha256"] != labelled(str(folders), 5, 3, 0).identity["sha256"]


@pytest.mark.parametrize(
    ("classes", "reason"),
    [(4, "has 3 classes, the head of the model 4"), (None, "no classification head"), (0, "no c")],
)
def test_a_head_with_other_classes_gets_no_labels(folders: Path, classes: int | None, reason: str) -> None:
    found = labelled(str(folders), 5, classes, 0)
    assert found.labels is None
    assert reason in (found.unlabelled or "")
    assert len(found.tensor) == 5


def test_a_flat_folder_has_no_labels(folders: Path) -> None:
    found = labelled(str(folders / "ant"), 3, 3, 0)
    assert found.labels is None
    assert "there are no class folders" in (found.unlabelled or "")


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        labelled(str(tmp_path / "nowhere"), 3, 3, 0)


def test_the_label_of_an_unreadable_image_is_skipped_too(folders: Path) -> None:
    (folders / "bee" / "1.png").write_bytes(b"no image")
    found = labelled(str(folders), 12, 3, 0)
    assert found.labels is not None
    assert sorted(found.labels.tolist()) == [0] * 4 + [1] * 3 + [2] * 4
    assert len(found.skipped) == 1


@pytest.mark.parametrize("where", [None, "builtin:digits"])
def test_builtin_scenes_are_the_same_with_and_without_labels(where: str | None) -> None:
    found, plain = labelled(where, 4, 10, 3), load_inputs(where, 4, PREPROCESSING, 3)
    assert found.identity == plain.identity
    assert found.builtin
    scenes = DigitScenes("train", 4, 20_003)
    assert found.labels is not None
    assert found.labels.tolist() == [scenes[index][1] for index in range(4)]


@pytest.mark.parametrize(("order", "labels"), [(None, [0, 1, 2]), ("text", [0, 2, 1])])
def test_the_order_of_classes(tmp_path: Path, order: str | None, labels: list[int]) -> None:
    for number, name in enumerate(("x1", "x2", "x10")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), (80 * number,) * 3).save(tmp_path / name / "1.png")
    found = load_inputs(tmp_path, 3, PREPROCESSING, 0, num_classes=3, class_order=order)
    assert found.labels is not None
    shades = (found.tensor.mean(dim=(1, 2, 3)) * 255 / 80).int().tolist()
    assert dict(zip(shades, found.labels.tolist(), strict=True)) == dict(enumerate(labels))
    assert (found.info.warning is not None) == (order is None)


def test_a_list_of_classes_that_does_not_fit_is_an_error(folders: Path) -> None:
    (folders / "list").write_text("ant\n")
    with pytest.raises(DataError, match="lacks 2 of the classes"):
        load_inputs(folders, 3, PREPROCESSING, 0, num_classes=3, class_order=str(folders / "list"))
