"""Fashion-MNIST in IDX files: splits, folders, and damaged files."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from repshift_cli.data.catalog import DATA_DIR_VARIABLE, open_dataset
from repshift_cli.data.inputs import load_inputs, open_images
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.data.sources import idx
from repshift_cli.errors import DataError

SMALL = Preprocessing((3, 12, 12), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0)
IMAGES, LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


def header(*shape: int, kind: int = 8) -> bytes:
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, kind, len(shape), *shape)


def write_split(folder: Path, prefix: str, labels: list[int], suffix: str = ".gz") -> Path:
    """Images of 12x12 noise."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(labels)).integers(0, 256, (len(labels), 12, 12), dtype=np.uint8)
    for name, content in {
        f"{prefix}-images-idx3-ubyte": header(*pixels.shape) + pixels.tobytes(),
        f"{prefix}-labels-idx1-ubyte": header(len(labels)) + bytes(labels),
    }.items():
        (folder / f"{name}{suffix}").write_bytes(gzip.compress(content) if suffix else content)
    return folder


@pytest.fixture
def both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with 3 training and 2 test images, and nothing installed or set."""
    monkeypatch.delenv(DATA_DIR_VARIABLE, raising=False)
    monkeypatch.setattr(idx, "_PACKAGE_FOLDER", tmp_path / "nowhere")
    write_split(tmp_path / "fashion-mnist", "train", [0, 9, 5])
    return write_split(tmp_path / "fashion-mnist", "t10k", [7, 1])


def test_evaluation_reads_the_test_split(both: Path) -> None:
    data = open_dataset("fashion-mnist", both)
    assert len(data) == 2
    assert data.description == f"2 test images of fashion-mnist in {both}"
    image, label = data.load(0)
    assert image.mode == "RGB"
    assert (np.asarray(image) == idx.read_idx(both / f"{IMAGES}.gz", 3)[0][..., None]).all()
    assert data.classes is not None
    assert data.classes[label] == "Sneaker"
    assert len({data.stamp(index) for index in range(2)}) == 2


def test_calibration_reads_the_training_split(both: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_DIR_VARIABLE, str(both.parent))
    batch = load_inputs("fashion-mnist", 9, SMALL, 0, num_classes=10)
    assert batch.labels is not None
    assert sorted(batch.labels.tolist()) == [0, 5, 9]
    assert batch.classes == idx.FASHION_CLASSES
    assert len(load_inputs("fashion-mnist", 9, SMALL, 0, test_scenes=True).tensor) == 2
    assert len(open_images("fashion-mnist", 9)) == 2
    assert load_inputs("fashion-mnist", 9, SMALL, 0, num_classes=4).labels is None


def test_the_package_is_found_without_a_folder(both: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="fashion-mnist needs a folder") as caught:
        open_dataset("fashion-mnist", None)
    assert "dataset-fashion-mnist" in caught.value.hint
    monkeypatch.setattr(idx, "_PACKAGE_FOLDER", both)
    assert len(open_dataset("fashion-mnist", None)) == 2


def test_files_need_not_be_compressed(tmp_path: Path) -> None:
    assert len(open_dataset("fashion-mnist", write_split(tmp_path, "t10k", [3] * 4, suffix=""))) == 4


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (IMAGES, lambda raw: b"", "it starts with nothing, not 00000803"),
        (IMAGES, lambda raw: raw[:9], "is not an IDX file"),
        (IMAGES, lambda raw: header(2, 12, 12, kind=13) + raw[16:], "it starts with 00000d03, not 00000803"),
        (LABELS, lambda raw: header(2, 1) + raw[8:], "1 dimensions: it starts with 00000802"),
        (IMAGES, lambda raw: header(2, 0, 12), "states the shape 2x0x12"),
        (IMAGES, lambda raw: header(2, 1, 5000) + raw[16:], "states the shape 2x1x5000"),
        (IMAGES, lambda raw: header(2**32 - 1, 4096, 4096) + raw[16:], "states the shape 4294967295x4096x4096"),
        (IMAGES, lambda raw: raw[:-1], "has 287 bytes of values, its header states 288"),
        (IMAGES, lambda raw: raw + b"0", "has more bytes of values, its header states 288"),
        (IMAGES, lambda raw: header(1, 12, 12) + raw[16 + 144 :], "has 1 images, .* has 2 labels"),
        (LABELS, lambda raw: raw[:-1] + bytes([10]), "label 10 of image 1 is not in 0 to 9"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_damaged_files(tmp_path: Path, name: str, change: Callable[[bytes], bytes], message: str, suffix: str) -> None:
    path = write_split(tmp_path, "t10k", [7, 1], suffix) / f"{name}{suffix}"
    raw = change(gzip.decompress(path.read_bytes()) if suffix else path.read_bytes())
    path.write_bytes(gzip.compress(raw) if suffix else raw)
    with pytest.raises(DataError, match=message) as caught:
        open_dataset("fashion-mnist", tmp_path)
    assert str(path) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    "change",
    [
        lambda packed: packed[:-9],
        lambda packed: b"\x1f\x8b" + bytes(30),
        lambda packed: b"not gzip",
        lambda packed: packed[:-8] + bytes(8),
        lambda packed: packed[:200] + bytes([packed[200] ^ 255]) + packed[201:],
    ],
)
def test_damaged_compression(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    path = write_split(tmp_path, "t10k", [7, 1]) / f"{IMAGES}.gz"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match="cannot be decompressed"):
        open_dataset("fashion-mnist", tmp_path)


def test_a_file_that_expands_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = write_split(tmp_path, "t10k", [7, 1]) / f"{IMAGES}.gz"
    path.write_bytes(gzip.compress(header(2, 12, 12) + bytes(1 << 22)))
    with pytest.raises(DataError, match="has more bytes of values"):
        open_dataset("fashion-mnist", tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is not a folder"):
        open_dataset("fashion-mnist", tmp_path / "nowhere")
    write_split(tmp_path, "train", [1])
    with pytest.raises(DataError, match=f"there is no {IMAGES} or {IMAGES}.gz") as caught:
        open_dataset("fashion-mnist", tmp_path)
    assert "t10k-labels-idx1-ubyte" in caught.value.hint
    (tmp_path / IMAGES).mkdir()
    (tmp_path / LABELS).mkdir()
    with pytest.raises(DataError, match="is a folder"):
        open_dataset("fashion-mnist", tmp_path)
