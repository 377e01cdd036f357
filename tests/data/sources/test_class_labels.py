"""Labels by the names of folders: the same for folders and tars, in timm's order, and never counted twice."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from torch import nn

from repshift_cli.data.catalog import open_dataset
from repshift_cli.data.dataset import ImageDataset
from repshift_cli.data.sources.class_labels import imagenet_wnids, natural_key
from repshift_cli.errors import DataError, UsageError
from repshift_cli.models.tensor_model import class_names

WNIDS = imagenet_wnids()
NAMES = ("Zebra", "air", "type10", "type2")
NATURAL = ("air", "type2", "type10", "Zebra")


def image_bytes(shade: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def as_folder(root: Path, names: Iterator[str] | tuple[str, ...] | list[str]) -> Path:
    """Files with these names below a folder `data`; a name with a slash at its end is a folder."""
    for number, name in enumerate(names):
        path = root / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name.endswith("/") else path.write_bytes(image_bytes(number))
    return root / "data"


def as_tar(root: Path, names: Iterator[str] | tuple[str, ...] | list[str]) -> Path:
    with tarfile.open(root / "data.tar", "w") as archive:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name.rstrip("/"))
            if name.endswith("/"):
                info.type = tarfile.DIRTYPE
                archive.addfile(info)
            else:
                info.size = len(image_bytes(number))
                archive.addfile(info, io.BytesIO(image_bytes(number)))
    return root / "data.tar"


class TestNamesOfTheModel:
    def test_labels_follow_them(self, tmp_path: Path) -> None:
        path = str(as_folder(tmp_path, [f"{name}/1.png" for name in NAMES]))
        names = ("Type 2", "Type 10", "cat", "air", "zebra")
        found = open_dataset(path, None).for_head(5, names)
        assert sorted(labels(found).values()) == [0, 1, 3, 4]
        assert (found.info.class_order, found.info.warning) == ("model", None)
        assert found.classes == ("type2", "type10", "cat", "air", "Zebra")
        assert found.for_head(5) is found

    def test_the_order_of_the_user_wins(self, tmp_path: Path) -> None:
        path = str(as_folder(tmp_path, [f"{name}/1.png" for name in NAMES]))
        found = open_dataset(path, None, class_order="natural").for_head(4, ("type2", "type10", "air", "zebra"))
        assert found.classes == NATURAL

    def test_other_names_are_ignored(self, tmp_path: Path) -> None:
        path = str(as_folder(tmp_path, [f"{name}/1.png" for name in NAMES]))
        for names in [("type2", "type10", "air", "horse"), ("type2", "Type2", "air", "zebra"), ()]:
            assert open_dataset(path, None).for_head(4, names).classes == NATURAL

    def test_where_they_are_stated(self) -> None:
        model = nn.Linear(1, 2)
        model.num_classes, model.config = 2, SimpleNamespace(id2label={0: "cat", 1: "dog"})
        assert class_names(model) == ("cat", "dog")
        model.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
        assert class_names(model) == ()
        model.config, model.pretrained_cfg = None, {"label_names": ["dog", "cat"]}
        assert class_names(model) == ("dog", "cat")


def labels(dataset: ImageDataset) -> dict[str, int]:
    """Labels by the last parts of the names of the images."""
    return {
        dataset.sample_id(index).rsplit("data", 1)[1][-12:]: dataset.load(index)[1] for index in range(len(dataset))
    }


@pytest.fixture(params=[as_folder, as_tar])
def pack(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[list[str]], str]:
    return lambda names: str(request.param(tmp_path, names))


Pack = Callable[[list[str]], str]


class TestOrder:
    def test_timm_sorts_in_the_same_way(self) -> None:
        timm_key = pytest.importorskip("timm.utils.misc").natural_key
        names = ["b2", "B10", "a", "x1y22", "x1y3", "007", "10", "9", "_", "Ä1", "x", "x01z"]
        assert sorted(names, key=natural_key) == sorted(names, key=timm_key)
        assert sorted(["²", "2", "1" * 5000], key=natural_key) == ["2", "1" * 5000, "²"]

    def test_the_default_is_that_of_timm_and_is_said(self, pack: Pack) -> None:
        dataset = open_dataset(pack([f"{name}/1.png" for name in NAMES]), None).for_head(4)
        assert dataset.classes == NATURAL
        assert dataset.info.class_order == "natural"
        warning = dataset.info.warning or ""
        assert "label 0 is air in the natural order of timm, which is used, and Zebra in text order" in warning
        assert "--class-order" in warning
        shades = {dataset.load(index)[0].getpixel((0, 0))[0]: dataset.load(index)[1] for index in range(4)}  # type: ignore[index]
        assert shades == {NAMES.index(name): label for label, name in enumerate(NATURAL)}

    @pytest.mark.parametrize(("order", "classes"), [("natural", NATURAL), ("text", NAMES)])
    def test_a_chosen_order_is_not_warned_of(self, pack: Pack, order: str, classes: tuple[str, ...]) -> None:
        dataset = open_dataset(pack([f"{name}/1.png" for name in NAMES]), None, class_order=order)
        assert dataset.classes == classes
        assert (dataset.info.class_order, dataset.info.warning) == (order, None)

    def test_equal_orders_need_no_warning(self, pack: Pack) -> None:
        assert open_dataset(pack(["a/1.png", "b/1.png"]), None).info.warning is None

    def test_numbers_run_with_a_chosen_order(self, pack: Pack) -> None:
        path = pack([f"{name}/1.png" for name in ("1", "10", "2")])
        with pytest.raises(DataError, match="some tools sort as text"):
            open_dataset(path, None).for_head(3)
        assert open_dataset(path, None, class_order="natural").for_head(3).classes == ("1", "2", "10")
        assert open_dataset(path, None, class_order="text").for_head(3).classes == ("1", "10", "2")

    def test_a_list_may_have_more_classes(self, pack: Pack, tmp_path: Path) -> None:
        (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbftype2\r\nother\r\nair\r\ntype10\r\nZebra\r\n")
        given = str(tmp_path / "classes.txt")
        dataset = open_dataset(pack([f"{name}/1.png" for name in NAMES]), None, class_order=given, limit=2).for_head(5)
        assert dataset.classes == ("type2", "other", "air", "type10", "Zebra")
        assert dataset.info.class_order == given
        assert dataset.info.warning is None

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("air\n", "lacks 1 of the classes: type2"),
            ("air\nair\ntype2", "a name twice: air"),
            ("air\n\ntype2", "empty line"),
        ],
    )
    def test_lists_that_do_not_fit(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "classes.txt").write_text(text)
        path = as_folder(tmp_path, ["air/1.png", "type2/1.png"])
        with pytest.raises(DataError, match=message):
            open_dataset(str(path), None, class_order=str(tmp_path / "classes.txt"))

    def test_a_list_that_cannot_be_read(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo")
        path = str(as_folder(tmp_path, ["a/1.png"]))
        for name in ("nowhere", "fifo", "data"):
            with pytest.raises(DataError, match=r"list of classes .* cannot be read") as caught:
                open_dataset(path, None, class_order=str(tmp_path / name))
            assert "natural, text, or a file" in caught.value.hint

    def test_imagenet_ids_stay_as_they_are(self, pack: Pack) -> None:
        dataset = open_dataset(pack([f"{WNIDS[9]}/1.png", f"{WNIDS[2]}/1.png"]), None).for_head(1000)
        assert sorted(labels(dataset).values()) == [2, 9]
        assert dataset.info.class_order == "imagenet"

    def test_other_datasets_have_no_order(self) -> None:
        with pytest.raises(UsageError, match="--class-order cannot be used with the dataset builtin:digits"):
            open_dataset("builtin:digits", None, class_order="text")


class TestLayout:
    """Folders and tars are labelled by the same rule."""

    def test_the_label_is_the_first_folder_below_the_common_one(self, pack: Pack) -> None:
        dataset = open_dataset(pack(["set/cat/part0/1.png", "set/cat/part1/2.png", "set/dog/part0/3.png"]), None)
        assert dataset.classes == ("cat", "dog")
        assert list(labels(dataset).values()) == [0, 0, 1]
        assert any("classes are the folders in" in note for note in dataset.info.notes)

    def test_an_empty_class_keeps_its_place(self, pack: Pack) -> None:
        assert open_dataset(pack(["b/", "a/1.png", "c/1.png"]), None).classes == ("a", "b", "c")

    @pytest.mark.parametrize(
        ("splits", "used"),
        [
            (("train", "valid"), "valid"),
            (("training", "testing"), "testing"),
            (("Train", "Dev", "Test"), "Dev"),
            (("eval",), "eval"),
        ],
    )
    def test_splits_are_not_classes(self, pack: Pack, splits: tuple[str, ...], used: str) -> None:
        dataset = open_dataset(pack([f"{split}/{name}/{split}.png" for split in splits for name in "ab"]), None)
        assert dataset.classes == ("a", "b")
        assert len(dataset) == 2
        assert all(dataset.sample_id(index).endswith(f"{used}.png") for index in range(2))
        assert f"the split {used} of" in dataset.info.notes[0]

    @pytest.mark.parametrize(
        "names", [["train/1.png", "valid/2.png"], ["train/a/1.png", "valid/a/1.png", "extra/a/1.png"]]
    )
    def test_splits_without_classes_are_refused(self, pack: Pack, names: list[str], tmp_path: Path) -> None:
        path = pack(names)
        with pytest.raises(DataError, match="look like splits, not classes") as caught:
            open_dataset(path, None)
        assert f"--dataset {path}/valid" in caught.value.hint
        (tmp_path / "list").write_text("train\nvalid\nextra\n")
        assert len(open_dataset(path, None, class_order=str(tmp_path / "list"))) == len(names)

    def test_files_left_out_are_counted(self, pack: Pack) -> None:
        names = [*(f"a/{n}.txt" for n in range(3)), "b/x.HEIC", "b/noending", "b/.hidden", ".cache/x.txt", "b/._1.png"]
        dataset = open_dataset(pack(["a/1.png", "b/1.tif", *names]), None)
        assert len(dataset) == 2
        assert dataset.info.left_out == {".txt": 3, ".heic": 1, "no ending": 1}
        said: list[str] = []
        dataset.info.report(Said(said))
        assert said == ["5 files with other endings left out (.heic 1, .txt 3, no ending 1)"]

    @pytest.mark.parametrize(
        "suffix", ["JPEG", "jfif", "jpe", "webp", "bmp", "gif", "tif", "TIFF", "ppm", "pgm", "pbm"]
    )
    def test_all_formats_are_found(self, pack: Pack, suffix: str) -> None:
        dataset = open_dataset(pack([f"a/1.{suffix}"]), None)
        assert len(dataset) == 1
        assert dataset.load(0)[0].size == (8, 8)  # the content decides

    def test_images_outside_of_class_folders_are_said(self, tmp_path: Path) -> None:
        dataset = open_dataset(str(as_folder(tmp_path, ["a/1.png", "top.png"])), None)
        assert "1 images in" in dataset.info.notes[0]
        assert "no class folder" in dataset.info.notes[0]


class Said:
    def __init__(self, texts: list[str]) -> None:
        self.note = self.warn = texts.append


class TestLinks:
    def test_a_class_that_is_a_link_to_another(self, tmp_path: Path) -> None:
        root = as_folder(tmp_path, ["a/1.png"])
        (root / "b").symlink_to(root / "a")
        with pytest.raises(DataError, match="the same by a link"):
            open_dataset(str(root), None)

    def test_an_image_that_is_a_link_to_one_of_another_class(self, tmp_path: Path) -> None:
        root = as_folder(tmp_path, ["a/1.png", "b/2.png"])
        (root / "b/3.png").symlink_to(root / "a/1.png")
        with pytest.raises(DataError, match=r"a/1\.png and .*b/3\.png are the same by a link"):
            open_dataset(str(root), None)

    def test_links_within_a_class_count_once(self, tmp_path: Path) -> None:
        root = as_folder(tmp_path, ["a/1.png", "b/2.png"])
        (root / "a/2.png").symlink_to(root / "a/1.png")
        dataset = open_dataset(str(root), None)
        assert len(dataset) == 2
        assert dataset.info.notes == ("1 links to images of the same class left out",)

    def test_links_to_elsewhere_are_read(self, tmp_path: Path) -> None:
        root, store = as_folder(tmp_path, ["a/1.png", "b/2.png"]), tmp_path / "store.png"
        store.write_bytes(image_bytes(3))
        (root / "a/3.png").symlink_to(store)
        assert len(open_dataset(str(root), None)) == 3

    @pytest.mark.parametrize("target", ["/dev/zero", "fifo"])
    def test_what_is_not_a_file_is_unreadable(self, tmp_path: Path, target: str) -> None:
        os.mkfifo(tmp_path / "fifo")
        root = as_folder(tmp_path, ["a/1.png"])
        (root / "a/0.png").symlink_to(tmp_path / target)
        os.mkfifo(root / "a/2.png")
        dataset = open_dataset(str(root), None)
        for index in (0, 2):
            with pytest.raises(DataError, match="not a regular file"):
                dataset.load(index)

    def test_a_folder_that_may_not_be_entered(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        root = as_folder(tmp_path, ["a/1.png"])

        def refuse(path: Path) -> bool:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Path, "is_dir", refuse)
        with pytest.raises(DataError, match=r"cannot read .*Permission denied"):
            open_dataset(str(root), None)


class TestNames:
    def test_an_existing_path_is_no_name_for_timm(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        as_folder(tmp_path, ["a/1.png"]).rename(tmp_path / "torch")
        (tmp_path / "wds").mkdir()
        as_tar(tmp_path, ["a/1.png", "b/1.png"]).rename(tmp_path / "wds/x.tar")
        (tmp_path / "torch").rename(tmp_path / "data")
        (tmp_path / "torch").mkdir()
        (tmp_path / "data").rename(tmp_path / "torch/data")
        monkeypatch.chdir(tmp_path)
        for name, count in (("torch/data", 1), ("wds/x.tar", 2)):
            dataset = open_dataset(name, None)
            assert len(dataset) == count
            assert "the name is one for timm" in dataset.info.notes[0]

    def test_an_unreasonable_number_of_scenes(self) -> None:
        with pytest.raises(UsageError, match="invalid limit 1000000000000"):
            open_dataset("builtin:digits", None, limit=10**12)
