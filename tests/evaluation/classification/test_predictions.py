"""Prediction files: reading returns what was written, and a damaged file raises a DataError."""

from __future__ import annotations

import io
import json
import os
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repshift_cli.errors import DataError, OutputError, UsageError
from repshift_cli.evaluation.classification.counts import correct_at
from repshift_cli.evaluation.classification.predictions import (
    Predictions,
    check_suffix,
    load_predictions,
    save_predictions,
)

KINDS = [".npz", pytest.param(".parquet", marks=pytest.mark.skipif(not find_spec("pyarrow"), reason="no pyarrow"))]


def predictions(**changes: Any) -> Predictions:
    usual: dict[str, Any] = {
        "ids": np.array(["a/1.jpg", "b/ä 2.jpg", "c"], dtype=np.str_),
        "answers": np.array([[0, -1], [1, 2], [2, -1]], dtype=np.int32),
        "top": np.array([[0, 1], [2, 0], [1, 2]], dtype=np.int32),
        "probabilities": np.array([[0.9, 0.05], [0.4, 0.3], [0.123456789, 0.1]], dtype=np.float32),
        "meta": {"model": "m", "dataset": "d", "classes": ["cat", "dog", "emu"]},
    }
    return Predictions(**{**usual, **changes})


def arrays(**changes: Any) -> dict[str, Any]:
    one = predictions()
    usual = {"id": one.ids, "answers": one.answers, "top": one.top, "probabilities": one.probabilities}
    return {**usual, "meta": np.array(json.dumps({"format": 1, **one.meta})), **changes}


def test_correct_predictions() -> None:
    one = predictions()
    assert one.correct.tolist() == [True, True, False]
    assert correct_at(5, one.top, one.answers).tolist() == [True, True, True]
    assert [one.class_name(output) for output in (1, 7)] == ["dog", "7"]
    assert predictions(meta={}).class_name(1) == "1"


@pytest.mark.parametrize("suffix", KINDS)
def test_reading_returns_what_was_written(tmp_path: Path, suffix: str) -> None:
    path, one = tmp_path / f"p{suffix}", predictions()
    save_predictions(path, one, force=False)
    back = load_predictions(path)
    assert back.meta == one.meta
    for name in ("ids", "answers", "top", "probabilities"):
        written, read = getattr(one, name), getattr(back, name)
        assert read.dtype == written.dtype
        assert (read == written).all()
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    with pytest.raises(UsageError, match="already exists"):
        save_predictions(path, one, force=False)
    save_predictions(path, one, force=True)


def test_npz_opens_without_this_project(tmp_path: Path) -> None:
    save_predictions(tmp_path / "p.npz", predictions(), force=False)
    with np.load(tmp_path / "p.npz", allow_pickle=False) as found:
        assert set(found.files) == {"id", "answers", "top", "probabilities", "meta"}
        assert found["id"].tolist() == predictions().ids.tolist()


@pytest.mark.parametrize(("name", "message"), [("p.csv", "unknown suffix"), ("p", "unknown suffix")])
def test_unknown_suffixes(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_suffix("--save-predictions", tmp_path / name)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repshift_cli.evaluation.common.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="parquet needs pyarrow") as caught:
        save_predictions(tmp_path / "p.parquet", predictions(), force=False)
    assert "npz" in str(caught.value)


def test_a_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OutputError, match="No space left"):
        save_predictions(tmp_path / "p.npz", predictions(), force=False)
    assert list(tmp_path.iterdir()) == []


class TestDamaged:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"id": np.array(["a", "a", "b"])}, "occurs twice"),
            ({"id": np.array(["a"])}, "has the shape"),
            ({"id": np.array([1, 2, 3])}, "has the shape"),
            ({"top": np.zeros((3, 2), dtype=np.int64)}, "has the shape"),
            ({"top": np.zeros((3, 1), dtype=np.int32)}, "not one probability per output"),
            ({"top": np.full((3, 2), -1, dtype=np.int32)}, "below 0"),
            ({"answers": np.full((3, 1), 2**30, dtype=np.int32)}, "above"),
            ({"answers": np.full((3, 0), 0, dtype=np.int32)}, "is empty"),
            ({"probabilities": np.full((3, 2), np.nan, dtype=np.float32)}, "outside"),
            ({"meta": np.array("{")}, "not JSON"),
            ({"meta": np.array("[" * 100_000)}, "not JSON"),
            ({"meta": np.array('{"format": 2}')}, "not of format 1"),
            ({"meta": np.array(["a", "b"])}, "not text"),
        ],
    )
    def test_inconsistent_arrays(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        np.savez(tmp_path / "p.npz", **arrays(**changes))
        with pytest.raises(DataError, match=message) as caught:
            load_predictions(tmp_path / "p.npz")
        assert caught.value.exit_code == 4

    def test_objects_are_not_unpickled(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "p.npz", **arrays(id=np.array([print, 1, 2], dtype=object)))
        with pytest.raises(DataError, match="damaged"):
            load_predictions(tmp_path / "p.npz")

    def test_headers_of_huge_arrays(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "whole.npz", **arrays())
        with zipfile.ZipFile(tmp_path / "whole.npz") as whole, zipfile.ZipFile(tmp_path / "p.npz", "w") as changed:
            for name in whole.namelist():
                content = whole.read(name)
                if name == "top.npy":
                    stream = io.BytesIO()
                    header = {"descr": "<i4", "fortran_order": False, "shape": (1 << 40, 2)}
                    np.lib.format.write_array_header_1_0(stream, header)
                    content = stream.getvalue() + b"0" * 24
                changed.writestr(name, content)
        with pytest.raises(DataError, match="damaged"):
            load_predictions(tmp_path / "p.npz")

    def test_an_archive_that_expands(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("repshift_cli.evaluation.classification.predictions._ALWAYS_BYTES", 1 << 16)
        np.savez_compressed(tmp_path / "p.npz", **arrays(id=np.array(["a" * 100_000, "b", "c"])))
        with pytest.raises(DataError, match="its arrays take 120"):
            load_predictions(tmp_path / "p.npz")

    def test_a_parquet_file_that_expands(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("pyarrow")
        monkeypatch.setattr("repshift_cli.evaluation.classification.predictions._ALWAYS_BYTES", 1 << 16)
        answers = np.zeros((3, 50_000), dtype=np.int32)
        save_predictions(tmp_path / "p.parquet", predictions(answers=answers), force=False)
        with pytest.raises(DataError, match="its arrays take"):
            load_predictions(tmp_path / "p.parquet")

    @pytest.mark.parametrize("suffix", KINDS)
    def test_a_fifo_and_a_device(self, tmp_path: Path, suffix: str) -> None:
        os.mkfifo(tmp_path / f"fifo{suffix}")
        (tmp_path / f"zero{suffix}").symlink_to("/dev/zero")
        for name in ("fifo", "zero"):
            with pytest.raises(DataError, match="is not a regular file"):
                load_predictions(tmp_path / f"{name}{suffix}")

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"text"])
    def test_not_an_archive(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "p.npz").write_bytes(content)
        with pytest.raises(DataError, match="damaged"):
            load_predictions(tmp_path / "p.npz")

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no file"):
            load_predictions(tmp_path / "p.npz")

    @given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 255)), min_size=1, max_size=6))
    def test_random_damage(self, tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]) -> None:
        path = tmp_path_factory.mktemp("p") / "p.npz"
        save_predictions(path, predictions(), force=False)
        content = bytearray(path.read_bytes())
        for place, value in changes:
            content[place % len(content)] = value
        path.write_bytes(bytes(content))
        try:
            assert len(load_predictions(path)) > 0
        except DataError as error:
            assert "damaged" in error.message
