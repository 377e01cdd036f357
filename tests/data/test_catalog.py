"""Datasets by name: layouts, labels and errors."""

from __future__ import annotations

import io
import os
import pickle
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from repshift_cli.data.catalog import DATA_DIR_VARIABLE, DATASET_NAMES, open_dataset
from repshift_cli.data.dataset import ImageDataset, even_indices
from repshift_cli.data.decode import UnreadableSample, decode_bytes
from repshift_cli.data.sources.class_labels import imagenet_wnids
from repshift_cli.errors import DataError, UsageError

WNIDS = imagenet_wnids()
VAL_COUNT = 50_000

Opener = Callable[[int, int], tuple[ImageDataset, Any]]


@pytest.fixture(autouse=True)
def _no_data_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DATA_DIR_VARIABLE, raising=False)


def encoded(kind: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(stream, kind)
    return stream.getvalue()


def put(path: Path, content: bytes | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded() if content is None else content)
    return path


def val_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def labels_of(dataset: ImageDataset) -> list[int]:
    return [dataset.load(index)[1] for index in range(len(dataset))]


def synset_file(path: Path, known: dict[int, str]) -> Path:
    """One wnid per line for all 50,000 images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{known.get(number, WNIDS[0])}\n" for number in range(1, VAL_COUNT + 1)))
    return path


def tar_of(path: Path, names: Iterable[str]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(encoded())
            archive.addfile(info, io.BytesIO(encoded()))
    return path


class TestFolder:
    def test_classes_are_sorted_by_name(self, tmp_path: Path) -> None:
        for name in ("dog/b.png", "cat/z.jpg", "cat/deep/er/a.JPG", "bird/x.webp"):
            put(tmp_path / name, encoded("PNG" if name.endswith("png") else "JPEG"))
        dataset = open_dataset(str(tmp_path), None)
        assert dataset.classes == ("bird", "cat", "dog")
        assert labels_of(dataset) == [0, 1, 1, 2]
        assert [Path(dataset.sample_id(index)).name for index in range(4)] == ["x.webp", "a.JPG", "z.jpg", "b.png"]

    def test_an_empty_class_keeps_its_place(self, tmp_path: Path) -> None:
        put(tmp_path / "c/1.jpg")
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        assert labels_of(open_dataset("folder", tmp_path)) == [2]

    def test_other_files_are_ignored(self, tmp_path: Path) -> None:
        put(tmp_path / "a/1.jpg")
        for name in ("a/notes.txt", "a/._1.jpg", ".cache/x.jpg", "__MACOSX/x.jpg", "top.jpg"):
            put(tmp_path / name)
        dataset = open_dataset("folder", tmp_path)
        assert dataset.classes == ("a",)
        assert len(dataset) == 1

    def test_the_validation_split_is_used(self, tmp_path: Path) -> None:
        put(tmp_path / "train/a/1.jpg")
        put(tmp_path / "val/a/2.jpg")
        put(tmp_path / "val/b/3.jpg")
        dataset = open_dataset("folder", tmp_path)
        assert dataset.classes == ("a", "b")
        assert str(tmp_path / "val") in dataset.description

    def test_wnids_follow_imagenet_for_its_head_only(self, tmp_path: Path) -> None:
        put(tmp_path / WNIDS[7] / "1.jpg")
        put(tmp_path / WNIDS[900] / "1.jpg")
        dataset = open_dataset("folder", tmp_path)
        assert labels_of(dataset.for_head(2)) == [0, 1]
        assert labels_of(dataset.for_head(1000)) == [7, 900]
        assert dataset.for_head(1000).classes == WNIDS
        assert labels_of(open_dataset("folder", tmp_path, limit=1).for_head(1000)) == [900]

    def test_a_class_may_be_called_background(self, tmp_path: Path) -> None:
        put(tmp_path / "__background__/1.jpg")
        put(tmp_path / "a/1.jpg")
        assert open_dataset("folder", tmp_path).classes == ("__background__", "a")

    def test_links_to_a_parent_are_followed_once(self, tmp_path: Path) -> None:
        put(tmp_path / "data/a/1.jpg")
        (tmp_path / "data/a/loop").symlink_to(tmp_path / "data/a", target_is_directory=True)
        assert len(open_dataset("folder", tmp_path / "data")) == 1

    def test_linked_class_folders_are_read(self, tmp_path: Path) -> None:
        put(tmp_path / "store/x/1.jpg")
        (tmp_path / "data").mkdir()
        (tmp_path / "data/a").symlink_to(tmp_path / "store/x", target_is_directory=True)
        assert len(open_dataset("folder", tmp_path / "data")) == 1

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ([], "no class folders"),
            (["1.jpg"], "no class folders"),
            (["a/readme.txt"], "no images in the 1 class folders"),
        ],
    )
    def test_folders_without_images(self, tmp_path: Path, files: list[str], message: str) -> None:
        for name in files:
            put(tmp_path / name)
        with pytest.raises(DataError, match=message) as caught:
            open_dataset("folder", tmp_path)
        assert "one folder per class" in str(caught.value)
        assert caught.value.exit_code == 4

    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="does not exist"):
            open_dataset(str(tmp_path / "nowhere"), None)

    def test_a_file_in_place_of_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="is a file, not a folder"):
            open_dataset("folder", put(tmp_path / "x.jpg"))

    def test_a_missing_folder_option(self) -> None:
        with pytest.raises(DataError, match="needs a folder"):
            open_dataset("folder", None)


class TestBrokenImages:
    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "empty"),
            (b"no image at all", "not an image"),
            (encoded()[:-200], "truncated"),
            (encoded("PNG")[:-200], "truncated"),
            (encoded("PNG")[:40] + b"\xff" * 60 + encoded("PNG")[100:], "."),
        ],
        ids=["empty", "text", "truncated-jpeg", "truncated-png", "damaged-png"],
    )
    def test_reason(self, tmp_path: Path, content: bytes, reason: str) -> None:
        path = put(tmp_path / "a/1.jpg", content)
        with pytest.raises(UnreadableSample, match=reason) as caught:
            open_dataset("folder", tmp_path).load(0)
        assert str(path) in str(caught.value)
        assert caught.value.sample == str(path)
        assert caught.value.exit_code == 4

    def test_a_decompression_bomb(self, tmp_path: Path) -> None:
        # a PNG header with 30,000 x 30,000 pixels
        bomb = bytearray(encoded("PNG"))
        bomb[16:24] = (30_000).to_bytes(4, "big") * 2
        import zlib

        bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
        put(tmp_path / "a/1.png", bytes(bomb))
        with pytest.raises(UnreadableSample, match="too many pixels"):
            open_dataset("folder", tmp_path).load(0)

    def test_a_broken_link(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "a/1.jpg").symlink_to(tmp_path / "gone.jpg")
        with pytest.raises(UnreadableSample, match="No such file"):
            open_dataset("folder", tmp_path).load(0)

    @pytest.mark.parametrize(
        ("kind", "mode"), [("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "1")]
    )
    def test_other_modes_become_rgb(self, kind: str, mode: str) -> None:
        assert decode_bytes(encoded(kind, mode), "x").mode == "RGB"

    def test_the_error_can_be_pickled(self) -> None:
        copy = pickle.loads(pickle.dumps(UnreadableSample("a.jpg", "empty")))
        assert (copy.sample, copy.reason) == ("a.jpg", "empty")


class TestImageNetClassFolders:
    @pytest.mark.parametrize("inner", [".", "val", "ILSVRC/Data/CLS-LOC/val"])
    def test_a_subset_of_the_classes_has_the_labels_of_imagenet(self, tmp_path: Path, inner: str) -> None:
        for place in (0, 417, 999):
            put(tmp_path / inner / WNIDS[place] / val_name(place + 1))
        dataset = open_dataset("imagenet-val", tmp_path)
        assert labels_of(dataset) == [0, 417, 999]
        assert dataset.classes == WNIDS

    def test_the_wnids_are_those_of_the_models(self) -> None:
        assert len(WNIDS) == 1000
        assert list(WNIDS) == sorted(WNIDS)
        assert WNIDS[0] == "n01440764"  # tench

    def test_other_classes_are_refused(self, tmp_path: Path) -> None:
        put(tmp_path / WNIDS[0] / "1.JPEG")
        put(tmp_path / "n99999999/1.JPEG")
        with pytest.raises(DataError, match="n99999999"):
            open_dataset("imagenet-val", tmp_path)

    def test_empty(self, tmp_path: Path) -> None:
        (tmp_path / WNIDS[0]).mkdir()
        with pytest.raises(DataError, match="have no images"):
            open_dataset("imagenet-val", tmp_path)

    @pytest.mark.parametrize("inner", [".", "imagenet", "imagenet-val"])
    def test_the_folder_from_the_environment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inner: str) -> None:
        put(tmp_path / inner / WNIDS[3] / "1.JPEG")
        monkeypatch.setenv(DATA_DIR_VARIABLE, str(tmp_path))
        assert labels_of(open_dataset("imagenet-val", None)) == [3]

    def test_the_option_overrides_the_environment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        put(tmp_path / "one" / WNIDS[1] / "1.JPEG")
        put(tmp_path / "two" / WNIDS[2] / "1.JPEG")
        monkeypatch.setenv(DATA_DIR_VARIABLE, str(tmp_path / "one"))
        assert labels_of(open_dataset("imagenet-val", tmp_path / "two")) == [2]


class TestImageNetFlat:
    KNOWN = {1: WNIDS[65], 2: WNIDS[970], 40_000: WNIDS[12]}  # noqa: RUF012

    @pytest.fixture
    def images(self, tmp_path: Path) -> Path:
        for number in self.KNOWN:
            put(tmp_path / "val" / val_name(number))
        return tmp_path

    @pytest.mark.parametrize(
        "name", ["imagenet_2012_validation_synset_labels.txt", "val_synsets.txt", "val/val_synsets.txt"]
    )
    def test_synsets_by_line(self, images: Path, name: str) -> None:
        synset_file(images / name, self.KNOWN)
        assert labels_of(open_dataset("imagenet-val", images)) == [65, 970, 12]

    def test_synsets_by_name(self, images: Path) -> None:
        rows = [f"{val_name(number)} {wnid}" for number, wnid in self.KNOWN.items()]
        (images / "val_synsets.txt").write_text("\n".join(reversed(rows)))
        assert labels_of(open_dataset("imagenet-val", images)) == [65, 970, 12]

    def test_kaggle(self, images: Path) -> None:
        rows = [f"{val_name(number)[:-5]},{wnid} 1 2 3 4 {wnid} 5 6 7 8 " for number, wnid in self.KNOWN.items()]
        (images / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows, ""]))
        assert labels_of(open_dataset("imagenet-val", images)) == [65, 970, 12]

    def test_kit_with_meta(self, images: Path) -> None:
        io_module = pytest.importorskip("scipy.io")
        kit = images / "ILSVRC2012_devkit_t12/data"
        truth, table = self.kit_tables(kit)
        fields = [("ILSVRC2012_ID", "O"), ("WNID", "O")]
        # classes above 1000 are inner nodes of the tree, as in the real file
        rows = [*table.items(), (1001, "n00001740")]
        synsets = np.array([(number, wnid) for number, wnid in rows], dtype=fields)
        io_module.savemat(kit / "meta.mat", {"synsets": synsets[:, None]})
        assert labels_of(open_dataset("imagenet-val", images)) == truth

    def test_kit_numbers_alone_are_not_guessed(self, images: Path) -> None:
        self.kit_tables(images)
        with pytest.raises(DataError, match="not the labels of the models") as caught:
            open_dataset("imagenet-val", images)
        assert "meta.mat" in str(caught.value)

    def test_kit_with_a_damaged_meta(self, images: Path) -> None:
        pytest.importorskip("scipy.io")
        self.kit_tables(images)
        (images / "meta.mat").write_bytes(b"MATLAB 5.0 MAT-file, but not really")
        with pytest.raises(DataError, match=r"meta\.mat cannot be read"):
            open_dataset("imagenet-val", images)

    def test_kit_without_scipy(self, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kit_tables(images)
        (images / "meta.mat").write_bytes(b"")
        monkeypatch.setitem(sys.modules, "scipy.io", None)
        with pytest.raises(DataError, match="pip install scipy"):
            open_dataset("imagenet-val", images)

    def test_an_incomplete_kit(self, images: Path) -> None:
        io_module = pytest.importorskip("scipy.io")
        self.kit_tables(images)
        synsets = np.array([(1, WNIDS[0]), (2, WNIDS[1])], dtype=[("ILSVRC2012_ID", "i4"), ("WNID", "U9")])
        io_module.savemat(images / "meta.mat", {"synsets": synsets[:, None]})
        with pytest.raises(DataError, match="does not have the 1000 classes"):
            open_dataset("imagenet-val", images)

    def test_labels_in_the_names(self, tmp_path: Path) -> None:
        for number, wnid in self.KNOWN.items():
            put(tmp_path / f"ILSVRC2012_val_{number:08d}_{wnid}.JPEG")
        dataset = open_dataset("imagenet-val", tmp_path)
        assert labels_of(dataset) == [65, 970, 12]
        assert dataset.info.notes == ("3 of the 50000 images of the set are there",)
        put(tmp_path / "ILSVRC2012_val_00000009_n99999999.JPEG")
        with pytest.raises(DataError, match="other ids than ImageNet-1k: n99999999"):
            open_dataset("imagenet-val", tmp_path)

    @pytest.mark.parametrize(
        ("file", "line"), [("val_synsets.txt", "{} {}"), ("LOC_val_solution.csv", "{},{} 1 2 3 4")]
    )
    def test_an_image_twice_in_a_file_of_labels(self, images: Path, file: str, line: str) -> None:
        names = [val_name(1)[:-5], val_name(2)[:-5], val_name(1)[:-5]]
        (images / file).write_text("".join(line.format(name, WNIDS[n]) + "\n" for n, name in enumerate(names)))
        with pytest.raises(DataError, match=f"{file}, line 3: 1 is there more than once"):
            open_dataset("imagenet-val", images)

    def test_a_long_field(self, images: Path) -> None:
        row = f"{val_name(1)[:-5]},{'x' * 200_000}\n"
        (images / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + row)
        with pytest.raises(DataError, match=r"line 2: 'x{20}' is not a class"):
            open_dataset("imagenet-val", images)

    def test_no_labels(self, images: Path) -> None:
        with pytest.raises(DataError, match="have no labels") as caught:
            open_dataset("imagenet-val", images)
        assert "LOC_val_solution.csv" in str(caught.value)

    def test_too_few_lines(self, images: Path) -> None:
        (images / "val_synsets.txt").write_text("n01440764\n" * 3)
        with pytest.raises(DataError, match="has 3 lines"):
            open_dataset("imagenet-val", images)

    def test_an_image_without_a_label(self, images: Path) -> None:
        (images / "val_synsets.txt").write_text(f"{val_name(1)} {WNIDS[0]}\n")
        with pytest.raises(DataError, match=f"no label for {val_name(2)}"):
            open_dataset("imagenet-val", images)

    def test_an_unknown_wnid_is_named_with_its_line(self, images: Path) -> None:
        synset_file(images / "val_synsets.txt", {**self.KNOWN, 17: "n00000000"})
        with pytest.raises(DataError, match="line 17: 'n00000000'"):
            open_dataset("imagenet-val", images)

    def kit_tables(self, folder: Path) -> tuple[list[int], dict[int, str]]:
        """Write a ground truth; returns the labels of the images and the kit's numbering (reversed order)."""
        table = {number: WNIDS[-number] for number in range(1, 1001)}
        ids = {wnid: number for number, wnid in table.items()}
        rows = [ids[self.KNOWN.get(number, WNIDS[0])] for number in range(1, VAL_COUNT + 1)]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{row}\n" for row in rows))
        return [65, 970, 12], table


class TestImageNetTar:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        tar_of(tmp_path / "ILSVRC2012_img_val.tar", [val_name(3), val_name(1), "readme.txt"])
        synset_file(tmp_path / "val_synsets.txt", {1: WNIDS[5], 3: WNIDS[8]})
        return tmp_path

    @pytest.mark.parametrize("given", [".", "ILSVRC2012_img_val.tar"])
    def test_read_in_place(self, root: Path, given: str) -> None:
        dataset = open_dataset("imagenet-val", root / given)
        assert labels_of(dataset) == [5, 8]
        assert dataset.sample_id(1).endswith(f"img_val.tar:{val_name(3)}")
        assert dataset.load(0)[0].size == (40, 30)
        assert pickle.loads(pickle.dumps(dataset)).load(0)[1] == 5

    def test_damaged(self, root: Path) -> None:
        path = root / "ILSVRC2012_img_val.tar"
        path.write_bytes(path.read_bytes()[:700])
        with pytest.raises(DataError, match="is truncated"):
            open_dataset("imagenet-val", root)

    def test_a_hole(self, root: Path) -> None:
        path = root / "ILSVRC2012_img_val.tar"
        whole = bytearray(path.read_bytes())
        second = whole.index(b"ILSVRC2012_val_00000001")
        whole[second : second + 512] = bytes(512)
        path.write_bytes(bytes(whole))
        with pytest.raises(DataError, match="no header at byte"):
            open_dataset("imagenet-val", root)

    def test_without_images(self, root: Path) -> None:
        tar_of(root / "ILSVRC2012_img_val.tar", ["readme.txt"])
        with pytest.raises(DataError, match="no ImageNet validation images"):
            open_dataset("imagenet-val", root)

    def test_without_labels(self, root: Path) -> None:
        (root / "val_synsets.txt").unlink()
        with pytest.raises(DataError, match="have no labels"):
            open_dataset("imagenet-val", root)


class TestMissing:
    @pytest.mark.parametrize("place", [None, "nowhere", "."])
    def test_the_error_describes_the_layout_of_imagenet(self, tmp_path: Path, place: str | None) -> None:
        with pytest.raises(DataError) as caught:
            open_dataset("imagenet-val", None if place is None else tmp_path / place)
        for piece in ("n01440764", "ILSVRC2012_img_val.tar", "--data-dir", DATA_DIR_VARIABLE, "image-net.org"):
            assert piece in str(caught.value)

    @pytest.mark.parametrize(("name", "near"), [("imagenet", "imagenet-val"), ("digits", "builtin:digits")])
    def test_unknown_names_have_a_nearest_match(self, name: str, near: str) -> None:
        with pytest.raises(DataError, match=f"Did you mean {near}") as caught:
            open_dataset(name, None)
        assert all(known in str(caught.value) for known in DATASET_NAMES)

    @pytest.mark.parametrize("name", ["builtin:digits", "."])
    def test_an_unused_data_dir(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(UsageError, match="--data-dir"):
            open_dataset(name, tmp_path)

    def test_an_unknown_name_without_a_match(self) -> None:
        with pytest.raises(DataError, match="there is no dataset 'qqqq'") as caught:
            open_dataset("qqqq", None)
        assert "Did you mean" not in str(caught.value)


class TestLimit:
    @pytest.mark.parametrize(("total", "count"), [(10, 3), (1000, 7), (5, 5), (5, 9), (1, 1), (50_000, 999)])
    def test_even(self, total: int, count: int) -> None:
        chosen = even_indices(total, count)
        assert len(chosen) == min(total, count)
        assert chosen == sorted(set(chosen))
        steps = np.diff(chosen)
        assert steps.size == 0 or steps.max() - steps.min() <= 1

    def test_each_class_has_its_share(self, tmp_path: Path) -> None:
        for name in "abcd":
            for number in range(6):
                put(tmp_path / name / f"{number}.jpg")
        dataset = open_dataset("folder", tmp_path, limit=8)
        assert labels_of(dataset) == [0, 0, 1, 1, 2, 2, 3, 3]
        assert "8 of 24 images, evenly spaced" in dataset.description
        assert labels_of(open_dataset("folder", tmp_path, limit=4)) == [0, 1, 2, 3]

    def test_more_than_there_are(self, tmp_path: Path) -> None:
        put(tmp_path / "a/1.jpg")
        assert len(open_dataset("folder", tmp_path, limit=99)) == 1

    @pytest.mark.parametrize("limit", [0, -1])
    def test_not_positive(self, limit: int) -> None:
        with pytest.raises(UsageError, match="limit"):
            open_dataset("builtin:digits", None, limit=limit)


class TestDigits:
    def test_default_and_limit(self) -> None:
        assert len(open_dataset("builtin:digits", None)) == 1000
        few = open_dataset("builtin:digits", None, limit=7)
        assert len(few) == 7
        assert few.classes == tuple("0123456789")

    def test_fewer_scenes_are_the_first_of_more(self) -> None:
        few, many = (open_dataset("builtin:digits", None, limit=count) for count in (3, 5))
        assert [few.load(index)[0].tobytes() for index in range(3)] == [
            many.load(index)[0].tobytes() for index in range(3)
        ]

    def test_another_seed_gives_other_scenes(self) -> None:
        one, other = (open_dataset("builtin:digits", None, limit=1, seed=seed) for seed in (0, 1))
        assert one.load(0)[0].tobytes() != other.load(0)[0].tobytes()


class TestTimmNames:
    @pytest.mark.parametrize(
        ("name", "module"),
        [("hfds/owner/name", "datasets"), ("tfds/cifar10", "tensorflow_datasets"), ("wds/shards", "webdataset")],
    )
    def test_missing_package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str) -> None:
        import importlib.util

        real = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == module else real(wanted))
        with pytest.raises(DataError, match=f"needs the package {module}") as caught:
            open_dataset(name, tmp_path)
        assert "pip install" in str(caught.value)

    def test_nothing_is_downloaded(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="downloads no datasets"):
            open_dataset("torch/cifar10", tmp_path)
        assert not any(tmp_path.iterdir())

    def test_unknown_to_timm(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="torch/nonsense"):
            open_dataset("torch/nonsense", tmp_path)

    def test_no_folder(self) -> None:
        with pytest.raises(DataError, match="needs a folder"):
            open_dataset("torch/cifar10", None)

    def test_cifar10_in_the_layout_of_torchvision(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from torchvision.datasets import CIFAR10

        base = tmp_path / CIFAR10.base_folder
        base.mkdir()
        rng = np.random.default_rng(0)
        batch = {"data": rng.integers(0, 255, (3, 3072), dtype=np.uint8), "labels": [3, 8, 1]}
        (base / "test_batch").write_bytes(pickle.dumps(batch))
        names = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
        (base / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
        monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
        dataset = open_dataset("torch/cifar10", tmp_path)
        assert labels_of(dataset) == [3, 8, 1]
        assert dataset.classes == tuple(names)
        assert dataset.load(0)[0].mode == "RGB"


class TestTimmFolders:
    def test_the_stamp_changes_with_the_files(self, tmp_path: Path) -> None:
        for name in ("a/1.png", "b/1.png"):
            put(tmp_path / name, encoded("PNG"))
        before = open_dataset("torch/image_folder", tmp_path)
        assert labels_of(before) == [0, 1]
        assert open_dataset("torch/image_folder", tmp_path).stamp(0) == before.stamp(0)
        stamp = before.stamp(0)
        put(tmp_path / "a/1.png", encoded("PNG", "L"))
        assert open_dataset("torch/image_folder", tmp_path).stamp(0) != stamp
        (tmp_path / "a/1.png").unlink()
        assert "No such file" in before.stamp(0)

    def test_images_are_decoded_as_in_folders(self, tmp_path: Path) -> None:
        stream = io.BytesIO()
        Image.fromarray(np.full((8, 8), 100 * 257, np.uint16)).save(stream, "PNG")
        put(tmp_path / "a/1.png", stream.getvalue())
        assert open_dataset("torch/image_folder", tmp_path).load(0)[0].getpixel((0, 0)) == (100, 100, 100)


class TestTimmStreams:
    """Sources that can only be read from the start, here with a stand-in for the reader of timm."""

    class Source:
        def __init__(self, length: int, says: int) -> None:
            self.length = length
            self.says = says
            self.starts = 0

        def __len__(self) -> int:
            return self.says

        def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
            self.starts += 1
            yield from ((Image.new("L", (4, 4), number), number) for number in range(self.length))

    @pytest.fixture
    def opened(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Opener:
        def build(length: int, says: int) -> tuple[ImageDataset, Any]:
            source = self.Source(length, says)
            monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
            monkeypatch.setattr("repshift_cli.data.sources.timm_reader._create", lambda *_: source)
            return open_dataset("wds/shards", tmp_path), source

        return build

    def test_in_order_the_stream_is_read_once(self, opened: Opener) -> None:
        dataset, source = opened(6, 6)
        assert not dataset.random_access
        assert [dataset.load(index)[1] for index in (0, 2, 5)] == [0, 2, 5]
        assert source.starts == 1
        assert dataset.load(1)[0].mode == "RGB"
        assert source.starts == 2

    def test_the_stamp_is_a_digest_of_the_pixels(self, opened: Opener) -> None:
        dataset, _ = opened(3, 3)
        stamps = [dataset.stamp(index) for index in range(3)]
        assert len({stamp.partition(":")[2] for stamp in stamps}) == 3
        assert stamps == [opened(3, 3)[0].stamp(index) for index in range(3)]

    def test_a_stream_shorter_than_its_length(self, opened: Opener) -> None:
        dataset, source = opened(2, 4)
        assert dataset.load(1)[1] == 1
        for index in (2, 3):
            with pytest.raises(UnreadableSample, match="ended after 2 readable images"):
                dataset.load(index)
        assert source.starts == 1

    def test_a_stream_of_unknown_length(self, opened: Opener) -> None:
        with pytest.raises(DataError, match="number of images is unknown"):
            opened(2, 0)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_listed(tmp_path: Path) -> None:
    put(tmp_path / "a/1.jpg")
    (tmp_path / "a").chmod(0)
    try:
        with pytest.raises(DataError, match="cannot be listed"):
            open_dataset("folder", tmp_path)
    finally:
        (tmp_path / "a").chmod(0o755)
