"""Results of combinations, and the file that keeps them: JSON lines, first the identity of the sweep."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, FiniteFloat, TypeAdapter

from repshift_cli.errors import UsageError
from repshift_cli.planning.recipe import StrictModel
from repshift_cli.sweep.combinations import Combination
from repshift_cli.utils.documents import parse_json
from repshift_cli.utils.files import check_output, read_text, write_text

RESULTS = "sweep.jsonl"
TABLES = ("sweep.csv", "sweep.md", "sweep.tex", "sweep.svg")

_LARGEST = 1 << 30
_HINT = "Give another folder, or remove this one to start again."

Bits = Annotated[str, Field(pattern=r"^([0-9a-f]{2})*$")]
"""One bit per image, in hexadecimal."""


class Result(StrictModel):
    """What was measured for a combination, or for the dense model, whose `combination` is None.

    Attributes:
        calibration: digest of the calibration images; None if nothing was calibrated.
        ratio: drop ratio at each layer.
        macs: of one image, metric and reducer included.
        clear: whether the calibrated score is clearly better than random dropping, or drops too little to tell.
        correct: whether the label of each image is predicted; None without labels.
        same: whether the prediction of each image is that of the dense model; None without a head.
        cosine, cosine_error: mean cosine to the dense outputs and its standard error, without a head.
    """

    combination: Combination | None = None
    calibration: str | None = None
    ratio: FiniteFloat | None = None
    macs: Annotated[int, Field(ge=0)]
    clear: bool | None = None
    correct: Bits | None = None
    same: Bits | None = None
    cosine: FiniteFloat | None = None
    cosine_error: FiniteFloat | None = None

    @property
    def key(self) -> str:
        """Equal for the same combination, calibrated on the same images."""
        return key_of(self.combination, self.calibration)


def key_of(combination: Combination | None, calibration: str | None) -> str:
    """See `Result.key`."""
    return f"{combination and combination.model_dump_json()} {calibration}"


def to_bits(values: NDArray[np.bool_]) -> str:
    """One bit per value."""
    return np.packbits(values).tobytes().hex()


def from_bits(text: str, count: int) -> NDArray[np.float64]:
    """The first `count` bits, as 0.0 and 1.0."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=count).astype(np.float64)


class ResultsFile:
    """`sweep.jsonl` in the folder of a sweep. Each further process writes a part, `sweep.RANK.jsonl`."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], rank: int) -> None:
        self.folder = folder
        self.identity = json.loads(json.dumps(identity))
        self.path = folder / (f"sweep.{rank}.jsonl" if rank else RESULTS)
        self._known: dict[str, Result] = {}

    def open(self) -> dict[str, Result]:
        """The finished results by key, with those in the parts of an interrupted sweep. For the first process alone.

        Raises:
            UsageError: the folder holds another sweep, or other files.
            OutputError: it cannot be written to.
        """
        check_folder(self.folder)
        parts = sorted(path for path in self.folder.glob("sweep*.jsonl") if path != self.path)
        for path in [self.path, *parts]:
            if path.is_file():
                self._known |= {result.key: result for result in self._read(path)}
        if parts:
            self.add(())
        for path in parts:
            path.unlink()
        return dict(self._known)

    def add(self, results: Iterable[Result]) -> None:
        """Write these and the earlier results; the file is complete at any moment."""
        self._known |= {result.key: result for result in results}
        self.folder.mkdir(exist_ok=True)
        lines = [
            json.dumps(self.identity),
            *(result.model_dump_json(exclude_none=True) for result in self._known.values()),
        ]
        write_text(self.path, "".join(f"{line}\n" for line in lines), force=True)

    def _read(self, path: Path) -> Sequence[Result]:
        try:
            header, *lines = map(parse_json, read_text(path, _LARGEST).splitlines())
            results = [Result.model_validate(line) for line in lines]
            found = TypeAdapter(dict[str, Any]).validate_python(header)
        except (OSError, ValueError) as error:
            reason = str(error) if isinstance(error, OSError) else "a line is invalid"
            raise UsageError(f"{path} is not the file of a sweep: {reason}", _HINT) from error
        if differing := [key for key, value in self.identity.items() if found.get(key) != value]:
            raise UsageError(f"{path} is of another sweep: it differs in {', '.join(differing)}", _HINT)
        digits = 2 * -(-self.identity["images"] // 8)
        if any(len(bits) != digits for each in results for bits in (each.correct, each.same) if bits is not None):
            raise UsageError(f"{path} is not the file of a sweep: results on another number of images", _HINT)
        return results


def check_folder(folder: Path) -> None:
    """Check before the work that a sweep can be written to a folder.

    Raises:
        UsageError: it holds other files and no sweep, or is a file.
        OutputError: it cannot be written to.
    """
    check_output(folder, force=True, is_folder=True)
    if folder.is_dir() and not list(folder.glob("sweep*.jsonl")) and any(folder.iterdir()):
        raise UsageError(f"the folder {folder} has files and no sweep", "Give a new or an empty folder.")
