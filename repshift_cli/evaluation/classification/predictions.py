"""Saved predictions of a model for each image of a dataset: `.npz`, or `.parquet` if pyarrow is installed."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from repshift_cli.errors import DataError
from repshift_cli.evaluation.classification.counts import correct_at
from repshift_cli.evaluation.common import check_table_suffix, import_pyarrow
from repshift_cli.utils.files import atomic_output, open_file

SUFFIXES = (".npz", ".parquet")

_FORMAT = 1
_META = "meta"
_MAX_BYTES, _ALWAYS_BYTES, _MAX_RATIO = 1 << 32, 1 << 28, 64
"""Largest size of all arrays together: up to 4 GiB, but above 256 MiB not more than 64 times the size of the file.

A larger size means a damaged or malicious file.
"""

_PYTHON_BYTES = 40
"""Of one number in a list of Python."""

_MAX_OUTPUTS = 1 << 20
_ARRAYS = {"id": np.str_, "answers": np.int32, "top": np.int32, "probabilities": np.float32}
"""The arrays of a file and their types."""


@dataclass(frozen=True)
class Predictions:
    """Labels and predictions of one model; row `i` of each array is image `i`.

    Attributes:
        ids: unique names of the images, `[n]`.
        answers: int32 `[n, A]`, the correct outputs; -1 pads images with fewer than A.
        top: int32 `[n, K]`, the most likely outputs, most likely first.
        probabilities: float32 `[n, K]`, their probabilities.
        meta: `model`, `dataset`, and `classes`, the names of the outputs, or None.
    """

    ids: NDArray[np.str_]
    answers: NDArray[np.int32]
    top: NDArray[np.int32]
    probabilities: NDArray[np.float32]
    meta: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether the most likely output is correct, `[n]`."""
        return correct_at(1, self.top, self.answers)

    @staticmethod
    def of(arrays: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]) -> Predictions:
        return Predictions(arrays["id"], arrays["answers"], arrays["top"], arrays["probabilities"], meta)

    @property
    def arrays(self) -> dict[str, Any]:
        """The arrays by name in a file."""
        return {"id": self.ids, "answers": self.answers, "top": self.top, "probabilities": self.probabilities}

    def subset(self, places: NDArray[np.intp]) -> Predictions:
        return Predictions.of({name: array[places] for name, array in self.arrays.items()}, self.meta)

    def class_name(self, output: int) -> str:
        """Name of an output, or its number if unnamed."""
        classes = self.meta.get("classes")
        return str(classes[output]) if isinstance(classes, list) and 0 <= output < len(classes) else str(output)


def check_suffix(option: str, path: Path) -> None:
    """Raise UsageError for an unknown suffix, or if pyarrow is missing."""
    check_table_suffix(option, path, SUFFIXES)


def save_predictions(path: Path, predictions: Predictions, force: bool) -> None:
    """Write predictions; `path` is written whole or not at all.

    Raises:
        UsageError: as `check_suffix`; or the file exists and `force` is False.
        OutputError: it cannot be written.
    """
    check_suffix("the file", path)
    write = _write_npz if path.suffix == ".npz" else _write_parquet
    with atomic_output(path, force) as temporary, temporary.open("wb") as stream:
        write(stream, predictions, json.dumps({"format": _FORMAT, **predictions.meta}))


def load_predictions(path: Path) -> Predictions:
    """Read a prediction file; never executes code from it.

    Raises:
        DataError: it is missing, damaged, or not a prediction file.
        UsageError: as `check_suffix`.
    """
    check_suffix("the file", path)
    read = _read_npz if path.suffix == ".npz" else _read_parquet
    try:
        with open_file(path) as stream:
            return _checked(*read(stream))
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except _Damaged as problem:
        raise DataError(f"{path} is not a prediction file, or is damaged: {problem}") from problem


class _Damaged(Exception):
    """Reason why a prediction file is invalid."""


def _write_npz(stream: IO[bytes], predictions: Predictions, meta: str) -> None:
    np.savez_compressed(stream, **predictions.arrays, meta=np.array(meta))


def _read_npz(stream: BinaryIO) -> tuple[dict[str, NDArray[Any]], str]:
    if not zipfile.is_zipfile(stream):
        raise _Damaged("it is not a zip archive")
    stream.seek(0)
    try:
        with np.load(stream, allow_pickle=False) as archive:
            _check_size(stream, sum(entry.file_size for entry in archive.zip.infolist()))
            # a member that is no array is read as bytes
            arrays = {name: np.asarray(archive[name]) for name in _ARRAYS}
            meta = np.asarray(archive[_META])
    except (_Damaged, OSError):
        raise
    except Exception as error:  # a damaged archive raises errors of the unpacker, such as zlib.error
        raise _Damaged(str(error) or type(error).__name__) from error
    if meta.dtype.kind != "U" or meta.shape != ():
        raise _Damaged("its metadata are not text")
    return arrays, str(meta)


def _check_size(stream: BinaryIO, size: int) -> None:
    if size > min(_MAX_BYTES, max(_ALWAYS_BYTES, _MAX_RATIO * os.fstat(stream.fileno()).st_size)):
        raise _Damaged(f"its arrays take {size} bytes")


def _write_parquet(stream: IO[bytes], predictions: Predictions, meta: str) -> None:
    arrow, parquet = import_pyarrow("the file")
    matrix, probabilities = arrow.list_(arrow.int32()), arrow.list_(arrow.float32())
    types = {"id": arrow.string(), "answers": matrix, "top": matrix, "probabilities": probabilities}
    columns = {name: arrow.array(array.tolist(), types[name]) for name, array in predictions.arrays.items()}
    parquet.write_table(arrow.table(columns, metadata={_META: meta}), stream)


def _read_parquet(stream: BinaryIO) -> tuple[dict[str, NDArray[Any]], str]:
    arrow, parquet = import_pyarrow("the file")
    try:
        with parquet.ParquetFile(stream) as file:
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
            columns = [group.column(number) for group in groups for number in range(group.num_columns)]
            values = sum(column.num_values for column in columns)
            _check_size(stream, max(values * _PYTHON_BYTES, sum(group.total_byte_size for group in groups)))
            table = file.read(columns=list(_ARRAYS))
        meta = (table.schema.metadata or {})[_META.encode()].decode()
        arrays = {name: np.array(table.column(name).to_pylist(), dtype=kind) for name, kind in _ARRAYS.items()}
    except (arrow.ArrowException, KeyError, ValueError, TypeError, OverflowError) as error:
        raise _Damaged(str(error)) from error
    return arrays, meta


def _checked(arrays: Mapping[str, NDArray[Any]], text: str) -> Predictions:
    """Predictions with consistent shapes and values."""
    try:
        meta = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _Damaged(f"its metadata are not JSON: {error}") from error
    if not isinstance(meta, dict) or meta.pop("format", None) != _FORMAT:
        raise _Damaged(f"its metadata are not of format {_FORMAT}")
    for name, kind in _ARRAYS.items():
        array, dimensions = arrays[name], 1 if name == "id" else 2
        if array.dtype.type is not kind or array.ndim != dimensions or len(array) != len(arrays["id"]):
            raise _Damaged(f"{name} has the shape {array.shape} of {array.dtype}")
    if len(arrays["id"]) == 0 or 0 in arrays["top"].shape or 0 in arrays["answers"].shape:
        raise _Damaged("it is empty")
    if arrays["top"].shape != arrays["probabilities"].shape:
        raise _Damaged("not one probability per output")
    if arrays["answers"][:, 0].min() < 0 or arrays["top"].min() < 0:
        raise _Damaged("outputs below 0")
    if max(arrays["answers"].max(), arrays["top"].max()) >= _MAX_OUTPUTS:
        raise _Damaged(f"outputs above {_MAX_OUTPUTS}")
    if not ((arrays["probabilities"] >= 0) & (arrays["probabilities"] <= 1 + 1e-3)).all():
        raise _Damaged("probabilities outside [0, 1]")
    if len(np.unique(arrays["id"])) != len(arrays["id"]):
        raise _Damaged("an image occurs twice")
    return Predictions.of(arrays, meta)
