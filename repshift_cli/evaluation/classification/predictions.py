"""What a model said of each picture of a dataset, in a file: `.npz`, or `.parquet` where pyarrow is installed."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from repshift_cli.errors import DataError, UsageError
from repshift_cli.utils.files import atomic_output

__all__ = ["SUFFIXES", "Predictions", "check_suffix", "load_predictions", "save_predictions"]

SUFFIXES = (".npz", ".parquet")
"""Endings of files of predictions."""

_FORMAT = 1
_META = "meta"
_LARGEST = 1 << 32
"""Bytes of all arrays together; files that say more are damaged, or made to harm."""

_MOST_OUTPUTS = 1 << 20
_ARRAYS = {"id": np.str_, "answers": np.int32, "top": np.int32, "probabilities": np.float32}
"""What a file holds, each with its type."""


@dataclass(frozen=True)
class Predictions:
    """What one model said of some pictures, all arrays in one order.

    Attributes:
        ids: names of the pictures, `[n]`, each once.
        answers: int32 `[n, A]`, the outputs that are right; -1 where there are fewer than A.
        top: int32 `[n, K]`, the likeliest outputs, the likeliest first.
        probabilities: float32 `[n, K]`, theirs.
        meta: where they come from: `model`, `dataset`, and `classes`, the names of the outputs, or None.
    """

    ids: NDArray[np.str_]
    answers: NDArray[np.int32]
    top: NDArray[np.int32]
    probabilities: NDArray[np.float32]
    meta: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def right(self) -> NDArray[np.bool_]:
        """Whether the likeliest output is right, `[n]`."""
        found: NDArray[np.bool_] = (self.top[:, :1] == self.answers).any(axis=1)
        return found

    @property
    def right_in_five(self) -> NDArray[np.bool_]:
        """Whether one of the likeliest outputs is right, `[n]`."""
        found: NDArray[np.bool_] = (self.top[:, :, None] == self.answers[:, None, :]).any(axis=(1, 2))
        return found

    def class_name(self, output: int) -> str:
        """What an output stands for, or its number."""
        classes = self.meta.get("classes")
        return str(classes[output]) if isinstance(classes, list) and 0 <= output < len(classes) else str(output)


def check_suffix(option: str, path: Path) -> None:
    """Refuse a name that predictions cannot be written under, before any work is done.

    Raises:
        UsageError: the ending is not known, or pyarrow is missing.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{option} {path}: the ending is not known", f"Known are {' and '.join(SUFFIXES)}.")
    if path.suffix == ".parquet":
        _pyarrow(str(path))


def save_predictions(path: Path, predictions: Predictions, force: bool) -> None:
    """Write predictions; nothing half-written ever stands under `path`.

    Raises:
        UsageError: as `check_suffix`; or the file exists and `force` is off.
        OutputError: it cannot be written.
    """
    check_suffix("the file", path)
    write = _write_npz if path.suffix == ".npz" else _write_parquet
    with atomic_output(path, force) as temporary, temporary.open("wb") as stream:
        write(stream, predictions, json.dumps({"format": _FORMAT, **predictions.meta}))


def load_predictions(path: Path) -> Predictions:
    """Read a file of predictions; no code from it is ever run.

    Raises:
        DataError: it is missing, damaged, or no file of predictions.
        UsageError: as `check_suffix`.
    """
    check_suffix("the file", path)
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    read = _read_npz if path.suffix == ".npz" else _read_parquet
    try:
        return _checked(*read(path))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except _Damaged as problem:
        raise DataError(f"{path} holds no predictions, or is damaged: {problem}") from problem


class _Damaged(Exception):
    """What is wrong with a file of predictions."""


def _write_npz(stream: IO[bytes], predictions: Predictions, meta: str) -> None:
    np.savez_compressed(
        stream,
        id=predictions.ids,
        answers=predictions.answers,
        top=predictions.top,
        probabilities=predictions.probabilities,
        meta=np.array(meta),
    )


def _read_npz(path: Path) -> tuple[dict[str, NDArray[Any]], str]:
    if not zipfile.is_zipfile(path):
        raise _Damaged("it is not a zip archive")
    try:
        with np.load(path, allow_pickle=False) as archive:
            _check_size(sum(entry.file_size for entry in archive.zip.infolist()))
            arrays = {name: archive[name] for name in _ARRAYS}
            meta = archive[_META]
    except (_Damaged, OSError):
        raise
    except Exception as error:  # damaged archives end in the errors of whatever unpacks them, such as zlib.error
        raise _Damaged(str(error) or type(error).__name__) from error
    if meta.dtype.kind != "U" or meta.shape != ():
        raise _Damaged("its description is no text")
    return arrays, str(meta)


def _check_size(size: int) -> None:
    if size > _LARGEST:
        raise _Damaged(f"its arrays take {size} bytes")


def _write_parquet(stream: IO[bytes], predictions: Predictions, meta: str) -> None:
    arrow, parquet = _pyarrow("the file")
    table = arrow.table(
        {
            "id": arrow.array(predictions.ids.tolist(), arrow.string()),
            "answers": arrow.array(predictions.answers.tolist(), arrow.list_(arrow.int32())),
            "top": arrow.array(predictions.top.tolist(), arrow.list_(arrow.int32())),
            "probabilities": arrow.array(predictions.probabilities.tolist(), arrow.list_(arrow.float32())),
        },
        metadata={_META: meta},
    )
    parquet.write_table(table, stream)


def _read_parquet(path: Path) -> tuple[dict[str, NDArray[Any]], str]:
    arrow, parquet = _pyarrow(str(path))
    try:
        with parquet.ParquetFile(path) as file:
            groups = (file.metadata.row_group(number) for number in range(file.metadata.num_row_groups))
            size = sum(group.total_byte_size for group in groups)
            _check_size(size)
            table = file.read(columns=list(_ARRAYS))
        meta = (table.schema.metadata or {})[_META.encode()].decode()
        columns = {name: table.column(name).to_pylist() for name in _ARRAYS}
        arrays = {
            "id": np.array(columns["id"], dtype=np.str_),
            "answers": np.array(columns["answers"], dtype=np.int32),
            "top": np.array(columns["top"], dtype=np.int32),
            "probabilities": np.array(columns["probabilities"], dtype=np.float32),
        }
    except (arrow.ArrowException, KeyError, ValueError, TypeError, OverflowError) as error:
        raise _Damaged(str(error)) from error
    return arrays, meta


def _checked(arrays: Mapping[str, NDArray[Any]], text: str) -> Predictions:
    """The predictions, whose parts fit together."""
    try:
        meta = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _Damaged(f"its description is no JSON: {error}") from error
    if not isinstance(meta, dict) or meta.pop("format", None) != _FORMAT:
        raise _Damaged(f"its description is not that of format {_FORMAT}")
    for name, kind in _ARRAYS.items():
        array, dimensions = arrays[name], 1 if name == "id" else 2
        if array.dtype.type is not kind or array.ndim != dimensions or len(array) != len(arrays["id"]):
            raise _Damaged(f"{name} has the shape {array.shape} of {array.dtype}")
    if len(arrays["id"]) == 0 or 0 in arrays["top"].shape or 0 in arrays["answers"].shape:
        raise _Damaged("there is nothing in it")
    if arrays["top"].shape != arrays["probabilities"].shape:
        raise _Damaged("not each output has a probability")
    if arrays["answers"][:, 0].min() < 0 or arrays["top"].min() < 0:
        raise _Damaged("there are outputs below 0")
    if max(arrays["answers"].max(), arrays["top"].max()) >= _MOST_OUTPUTS:
        raise _Damaged(f"there are outputs above {_MOST_OUTPUTS}")
    if not ((arrays["probabilities"] >= 0) & (arrays["probabilities"] <= 1 + 1e-3)).all():
        raise _Damaged("there are probabilities that cannot be")
    if len(np.unique(arrays["id"])) != len(arrays["id"]):
        raise _Damaged("a picture stands in it twice")
    return Predictions(arrays["id"], arrays["answers"], arrays["top"], arrays["probabilities"], meta)


def _pyarrow(what: str) -> tuple[Any, Any]:
    if find_spec("pyarrow") is None:
        raise UsageError(
            f"{what}: parquet needs pyarrow, which is not installed",
            "Run `pip install 'repshift-cli[parquet]'`, or name a file that ends with .npz.",
        )
    return import_module("pyarrow"), import_module("pyarrow.parquet")
