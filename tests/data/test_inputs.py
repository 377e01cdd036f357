"""Drawing images: all are found, the draw is repeatable, and the names of the images are kept."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from repshift_cli.data.catalog import DATA_DIR_VARIABLE
from repshift_cli.data.inputs import load_inputs
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.data.sources.class_labels import imagenet_wnids
from repshift_cli.errors import DataError, UsageError

SMALL = Preprocessing((3, 32, 48), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", 0.9)


def save_image(path: Path, shade: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (60, 50), (shade, shade, shade)).save(path)
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    names = ["a.jpg", "b.PNG", "class/c.jpeg", "class/deep/d.webp", "e.bmp"]
    for shade, name in enumerate(names):
        save_image(tmp_path / name, 20 + 40 * shade)
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


class TestFolder:
    def test_shape_and_identity(self, tree: Path) -> None:
        batch = load_inputs(tree, 3, SMALL, seed=0)
        assert batch.tensor.shape == (3, 3, 32, 48)
        assert batch.tensor.dtype == torch.float32
        assert not batch.builtin
        assert batch.skipped == []
        assert {**batch.identity, "sha256": ""} == {"where": str(tree), "count": 3, "seed": 0, "sha256": ""}
        assert len(batch.identity["sha256"]) == 64
        assert batch.description == f"3 of 5 images in {tree}, seed 0"

    def test_all_kinds_and_depths_are_found(self, tree: Path) -> None:
        assert len(load_inputs(str(tree), 99, SMALL, seed=0).tensor) == 5

    def test_the_same_seed_draws_the_same_images(self, tree: Path) -> None:
        one, other = load_inputs(tree, 3, SMALL, seed=4), load_inputs(tree, 3, SMALL, seed=4)
        assert torch.equal(one.tensor, other.tensor)
        assert one.identity == other.identity

    def test_another_seed_draws_other_images(self, tree: Path) -> None:
        digests = {load_inputs(tree, 2, SMALL, seed=seed).identity["sha256"] for seed in range(6)}
        assert len(digests) > 1

    def test_the_digest_does_not_depend_on_the_location(
        self, tree: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        copy = Path(shutil.copytree(tree, tmp_path_factory.mktemp("elsewhere") / "copy"))
        one, two = load_inputs(tree, 4, SMALL, seed=1), load_inputs(copy, 4, SMALL, seed=1)
        assert one.identity["sha256"] == two.identity["sha256"]

    def test_another_image_under_the_same_name_changes_the_digest(self, tree: Path) -> None:
        before = load_inputs(tree, 5, SMALL, seed=0).identity["sha256"]
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 60, 3), dtype=np.uint8)).save(tree / "a.jpg")
        assert load_inputs(tree, 5, SMALL, seed=0).identity["sha256"] != before

    def test_unreadable_images_are_replaced_and_named(self, tree: Path) -> None:
        (tree / "a.jpg").write_bytes(b"")
        (tree / "b.PNG").write_bytes((tree / "b.PNG").read_bytes()[:-30])
        batch = load_inputs(tree, 3, SMALL, seed=0)
        assert len(batch.tensor) == 3
        everything = load_inputs(tree, 5, SMALL, seed=0)
        assert len(everything.tensor) == everything.identity["count"] == 3
        assert sorted(Path(line.split(": ")[0]).name for line in everything.skipped) == ["a.jpg", "b.PNG"]

    def test_none_can_be_read(self, tmp_path: Path) -> None:
        (tmp_path / "a.jpg").write_bytes(b"")
        with pytest.raises(DataError, match=r"none of the 1 images.*a\.jpg: the file is empty"):
            load_inputs(tmp_path, 2, SMALL, seed=0)

    def test_no_images_in_the_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="there are no images") as caught:
            load_inputs(tmp_path, 2, SMALL, seed=0)
        assert "jpeg" in str(caught.value)

    @pytest.mark.parametrize(("name", "message"), [("nowhere", "does not exist"), ("a.jpg", "is a file")])
    def test_no_folder(self, tmp_path: Path, name: str, message: str) -> None:
        save_image(tmp_path / "a.jpg", 3)
        with pytest.raises(DataError, match=message):
            load_inputs(tmp_path / name, 2, SMALL, seed=0)

    def test_inputs_that_look_alike(self, tmp_path: Path) -> None:
        for number in range(8):
            save_image(tmp_path / f"{number}.png", 200 if number < 7 else 10)
        with pytest.raises(DataError, match=r"the 8 images of .* are \(nearly\) equal after preprocessing"):
            load_inputs(tmp_path, 8, SMALL, seed=0)
        assert len(load_inputs(tmp_path, 8, SMALL, seed=0, test_scenes=True).tensor) == 8  # to look at

    def test_files_left_out_are_counted(self, tree: Path) -> None:
        assert load_inputs(tree, 3, SMALL, seed=0).info.left_out == {".txt": 1}

    @pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux")
    def test_names_that_are_not_utf_8(self, tmp_path: Path) -> None:
        root = tmp_path / "fold\udcffer"
        for number, name in enumerate(("a\udcff.png", "b\n[red].png")):
            save_image(root / name, 100 * number)
        batch = load_inputs(root, 2, SMALL, seed=0)
        assert "\\xff" in batch.identity["where"]
        assert sorted(Path(name).name for name in batch.names) == ["a\\xff.png", "b\n[red].png"]
        str(batch.identity).encode()

    def test_an_unreasonable_number_of_scenes(self) -> None:
        with pytest.raises(UsageError, match="invalid images"):
            load_inputs(None, 10**9, SMALL, seed=0)

    def test_zero_images(self, tree: Path) -> None:
        with pytest.raises(UsageError, match="invalid images 0"):
            load_inputs(tree, 0, SMALL, seed=0)


class TestBuiltin:
    @pytest.mark.parametrize("where", [None, "builtin:digits"])
    def test_scenes(self, where: str | None) -> None:
        batch = load_inputs(where, 4, SMALL, seed=0)
        assert batch.builtin
        assert batch.tensor.shape == (4, 3, 32, 48)
        assert batch.identity["where"] == "builtin:digits"
        assert torch.equal(batch.tensor, load_inputs(None, 4, SMALL, seed=0).tensor)
        assert not torch.equal(batch.tensor, load_inputs(None, 4, SMALL, seed=1).tensor)

    def test_scenes_are_of_the_training_digits(self) -> None:
        assert "training" in load_inputs(None, 1, SMALL, seed=0).description


class TestDataset:
    def test_by_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for place in range(4):
            save_image(tmp_path / imagenet_wnids()[place] / "1.JPEG", 30 * place)
        monkeypatch.setenv(DATA_DIR_VARIABLE, str(tmp_path))
        batch = load_inputs("imagenet-val", 3, SMALL, seed=0)
        assert len(batch.tensor) == 3
        assert batch.identity["where"] == "imagenet-val"
        assert len({float(one.mean()) for one in batch.tensor}) == 3

    def test_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(DATA_DIR_VARIABLE, raising=False)
        with pytest.raises(DataError, match="imagenet-val needs a folder"):
            load_inputs("imagenet-val", 3, SMALL, seed=0)
