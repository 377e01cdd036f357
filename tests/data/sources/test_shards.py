"""Tars as datasets: WebDataset shards and class folders in a tar, read in place; damaged ones are refused."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from repshift_cli.data.catalog import open_dataset
from repshift_cli.data.sources.class_labels import imagenet_wnids
from repshift_cli.data.sources.tar import tar_members
from repshift_cli.errors import DataError

WNIDS = imagenet_wnids()


def image_bytes(shade: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def tar(path: Path, files: dict[str, bytes], format_: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format_) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def webdataset(path: Path, labels: list[int]) -> Path:
    files: dict[str, bytes] = {}
    for number, label in enumerate(labels):
        files |= {
            f"part/{number:04d}.cls": str(label).encode(),
            f"part/{number:04d}.json": b"{}",
            f"part/{number:04d}.png": image_bytes(label),
        }
    return tar(path, files)


class TestShards:
    def test_labels_are_read_from_cls_files(self, tmp_path: Path) -> None:
        webdataset(tmp_path / "val-0000.tar", [3, 1])
        webdataset(tmp_path / "val-0001.tar", [2])
        for dataset in (
            open_dataset("shards", tmp_path),
            open_dataset(str(tmp_path / "val-{0000..0001}.tar"), None),
        ):
            assert [dataset.load(index)[1] for index in range(len(dataset))] == [3, 1, 2]
            assert [dataset.load(index)[0].getpixel((0, 0))[0] for index in range(3)] == [3, 1, 2]
            assert dataset.classes is None
            assert dataset.key(2) == "val-0001.tar:part/0000.png"
            assert dataset.sample_id(2) == f"{tmp_path / 'val-0001.tar'}:part/0000.png"
            assert "3 images in 2 tars" in dataset.description

    def test_class_folders_in_a_tar(self, tmp_path: Path) -> None:
        files = {f"val/{name}/1.png": image_bytes() for name in (WNIDS[9], WNIDS[2])}
        dataset = open_dataset(str(tar(tmp_path / "a.tar", files)), None)
        assert dataset.classes == (WNIDS[2], WNIDS[9])
        assert [dataset.load(index)[1] for index in range(2)] == [1, 0]
        assert [dataset.for_head(1000).load(index)[1] for index in range(2)] == [9, 2]
        assert dataset.for_head(1000).classes == WNIDS

    def test_the_stamp_changes_when_a_shard_is_rewritten(self, tmp_path: Path) -> None:
        path = webdataset(tmp_path / "a.tar", [1])
        before = open_dataset(str(path), None).stamp(0)
        assert open_dataset(str(path), None).stamp(0) == before
        webdataset(path, [2])
        assert open_dataset(str(path), None).stamp(0) != before

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({"1.png": b""}, "1.png has no label"),
            ({"a/1.png": b"", "a/2.png": b"", "a/2.cls": b"0"}, "1 of the 2 images"),
            ({"notes.txt": b""}, "no images"),
        ],
    )
    def test_shards_without_images(self, tmp_path: Path, files: dict[str, bytes], message: str) -> None:
        with pytest.raises(DataError, match=message):
            open_dataset(str(tar(tmp_path / "a.tar", files)), None)

    @pytest.mark.parametrize("label", [b"cat", b"-1", b"", b"1" * 100, b"1" + b"0" * 30])
    def test_labels_that_are_not_numbers(self, tmp_path: Path, label: bytes) -> None:
        dataset = open_dataset(str(tar(tmp_path / "a.tar", {"1.png": image_bytes(), "1.cls": label})), None)
        with pytest.raises(DataError, match="not a number"):
            dataset.load(0)

    @pytest.mark.parametrize(
        ("name", "message"),
        [("x-{0000..0003}.tar", "x-0000.tar .4 are missing"), ("x.tar", "no file"), ("{9..1}.tar", "invalid range")],
    )
    def test_missing_tars(self, tmp_path: Path, name: str, message: str) -> None:
        with pytest.raises(DataError, match=message):
            open_dataset(str(tmp_path / name), None)

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no tars"):
            open_dataset("shards", tmp_path)

    def test_a_key_twice(self, tmp_path: Path) -> None:
        path = tmp_path / "a.tar"
        twice = [("1.cls", b"0"), ("1.png", image_bytes()), ("2.cls", b"1"), ("2.png", image_bytes())]
        for files in (
            [*twice, ("1.cls", b"0"), ("1.jpg", image_bytes())],
            [*twice, ("2.jpg", image_bytes())],
            [*twice, ("2.png", image_bytes())],
        ):
            tar(path, {})
            with tarfile.open(path, "w") as archive:
                for name, content in files:
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
            with pytest.raises(DataError, match="more than on"):
                open_dataset(str(path), None)

    def test_a_mask_is_not_an_image_of_its_own(self, tmp_path: Path) -> None:
        files = {"1.cls": b"4", "1.mask.png": image_bytes(9), "1.png": image_bytes(4), "2.heic": b"", "2.cls": b"1"}
        dataset = open_dataset(str(tar(tmp_path / "a.tar", files)), None)
        assert [dataset.load(index)[0].getpixel((0, 0))[0] for index in range(len(dataset))] == [4]  # type: ignore[index]
        assert dataset.info.left_out == {".cls": 1, ".heic": 1}

    def test_a_tar_that_links_to_another(self, tmp_path: Path) -> None:
        (tmp_path / "b.tar").symlink_to(webdataset(tmp_path / "a.tar", [1]))
        with pytest.raises(DataError, match="same file by a link"):
            open_dataset("shards", tmp_path)

    def test_a_label_is_part_of_the_stamp(self, tmp_path: Path) -> None:
        path = str(tar(tmp_path / "a.tar", {f"{name}/1.png": image_bytes() for name in ("x10", "x2")}))
        natural, text = (open_dataset(path, None, class_order=order) for order in ("natural", "text"))
        assert natural.stamp(0) != text.stamp(0)


class TestArchive:
    @pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    def test_members_equal_those_of_tarfile(self, tmp_path: Path, format_: int) -> None:
        deep = "/".join(["a folder with a long name"] * 5)
        long = "" if format_ == tarfile.USTAR_FORMAT else "x" * 300
        files = {"a.png": b"12345", f"{deep}/b.png": b"", f"c{long}.png": b"0" * 1025, "täst.png": b"1"}
        path = tar(tmp_path / "a.tar", files, format_)
        with tarfile.open(path) as archive:
            expected = [(member.name, member.offset_data, member.size) for member in archive]
        assert [tuple(member) for member in tar_members(path)] == expected
        assert [member.name for member in tar_members(path)] == list(files)

    def test_links_devices_and_folders_are_left_out(self, tmp_path: Path) -> None:
        path = tmp_path / "a.tar"
        with tarfile.open(path, "w") as archive:
            for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE):
                info = tarfile.TarInfo("a/1.png")
                info.type, info.linkname = kind, "/etc/passwd"
                archive.addfile(info)
            info = tarfile.TarInfo("a/2.png")
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
        assert [member.name for member in tar_members(path)] == ["a/2.png"]

    @pytest.mark.parametrize("name", ["../../evil.png", "/etc/evil.png", "a/../../../evil.png"])
    def test_names_outside_the_archive_are_only_names(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "in").mkdir()
        path = tar(tmp_path / "in" / "a.tar", {name: image_bytes(7), name.replace("png", "cls"): b"7"})
        before = sorted(tmp_path.rglob("*"))
        dataset = open_dataset(str(path), None)
        assert dataset.load(0)[1] == 7
        assert sorted(tmp_path.rglob("*")) == before

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda whole: whole[:700], "is truncated"),
            (lambda whole: whole[:1024], "is truncated"),
            (lambda whole: whole[:1536] + b"x" * 512 + whole[2048:], "no header at byte 1024|is truncated|no header"),
            (lambda whole: b"", "is truncated"),
            (lambda whole: b"no tar at all" * 100, "no header at byte 0"),
            (gzip.compress, "compressed .gzip"),
        ],
        ids=["cut-in-a-file", "cut-between", "damaged", "empty", "text", "gzip"],
    )
    def test_damaged_archives_are_refused(self, tmp_path: Path, change: Callable[[bytes], bytes], message: str) -> None:
        path = tar(tmp_path / "a.tar", {"a/1.png": b"1" * 600, "a/2.png": b"2" * 600})
        path.write_bytes(change(path.read_bytes()))
        with pytest.raises(DataError, match=message):
            tar_members(path)

    def test_a_negative_size(self, tmp_path: Path) -> None:
        path = tar(tmp_path / "a.tar", {"a/1.png": b""})
        block = bytearray(path.read_bytes())
        block[124:136] = b"\xff" * 12
        block[148:156] = b" " * 8
        block[148:156] = f"{sum(block[:512]):06o}\0 ".encode()
        path.write_bytes(bytes(block))
        with pytest.raises(DataError, match="no header at byte 0"):
            tar_members(path)

    def test_a_sparse_file(self, tmp_path: Path) -> None:
        path = tar(tmp_path / "a.tar", {"a/1.png": b""})
        block = bytearray(path.read_bytes())
        block[156:157] = tarfile.GNUTYPE_SPARSE
        block[148:156] = b" " * 8
        block[148:156] = f"{sum(block[:512]):06o}\0 ".encode()
        path.write_bytes(bytes(block))
        with pytest.raises(DataError, match="sparse"):
            tar_members(path)

    def test_two_archives_in_one_file(self, tmp_path: Path) -> None:
        path = tar(tmp_path / "a.tar", {"a/1.png": b"1"})
        path.write_bytes(path.read_bytes() * 2)
        with pytest.raises(DataError, match="no header at byte 10240"):
            tar_members(path)

    @pytest.mark.parametrize("length", [512, 1024, 3000])
    def test_zeros_in_place_of_a_header(self, tmp_path: Path, length: int) -> None:
        path = tar(tmp_path / "a.tar", {f"a/{number}.png": bytes([number + 1]) * 100 for number in range(20)})
        whole = bytearray(path.read_bytes())
        whole[9 * 1024 : 9 * 1024 + length] = bytes(length)
        path.write_bytes(bytes(whole))
        with pytest.raises(DataError, match="no header at byte"):
            tar_members(path)

    def test_the_end_is_two_blocks_of_zeros_and_not_much_more(self, tmp_path: Path) -> None:
        path = tar(tmp_path / "a.tar", {"a/1.png": b"1"})
        whole = path.read_bytes()
        for rest, message in ((512, "is truncated"), (1 << 21, "more than 1048576 zeros at byte 1024")):
            path.write_bytes(whole[:1024] + bytes(rest))
            with pytest.raises(DataError, match=message):
                tar_members(path)
        path.write_bytes(whole[:1024] + bytes(1024))
        assert len(tar_members(path)) == 1

    def test_what_is_not_a_file(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "a.tar")
        with pytest.raises(DataError, match="not a regular file"):
            open_dataset(str(tmp_path / "a.tar"), None)

    def test_a_record_that_is_too_long(self, tmp_path: Path) -> None:
        path = tar(tmp_path / "a.tar", {"x" * 100_000: b"1"})
        with pytest.raises(DataError, match="no header at byte 0"):
            tar_members(path)

    def test_an_extended_header_with_a_wrong_size(self, tmp_path: Path) -> None:
        path = tar(tmp_path / "a.tar", {"x" * 300: b"1"}, tarfile.PAX_FORMAT)
        path.write_bytes(path.read_bytes().replace(b"310 path=", b"999 path="))
        with pytest.raises(DataError, match="no header at byte 0"):
            tar_members(path)

    @given(st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 255)), max_size=12), st.integers(0, 10_240))
    def test_any_damage_gives_members_or_a_data_error(
        self, tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], length: int
    ) -> None:
        path = tmp_path_factory.mktemp("fuzz") / "a.tar"
        whole = bytearray(tar(path, {"x" * 300: b"1" * 700, "b": b"2"}, tarfile.PAX_FORMAT).read_bytes())
        for place, value in changes:
            whole[place] = value
        path.write_bytes(bytes(whole[:length]))
        try:
            members = tar_members(path)
        except DataError:
            return
        assert all(member.start + member.size <= length for member in members)
