"""State of an interrupted evaluation: a folder with a header and one file per completed shard.

Each file is written whole or not at all, so a run may be killed at any moment. Processes write their own shards, into
one folder or into a folder of that name on each machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from repshift_cli.errors import OutputError, UsageError
from repshift_cli.evaluation.classification.counts import Counts, ModelCounts, PredictionRows, TopK
from repshift_cli.utils.files import atomic_output
from repshift_cli.utils.hashing import digest_of_document
from repshift_cli.utils.progress import Progress

__all__ = ["ResumeState", "remove_state"]

_HEADER = "run.json"
_HINT = "Choose another folder, or remove this one to start again."
_MAX_BYTES = 1 << 30
_Natural = Annotated[int, Field(ge=0)]


@dataclass
class ResumeState:
    """The folder of a run.

    Attributes:
        folder: created by `open`.
        header: identity of the run, as JSON values.
        models: the names of its models.
        progress: receives warnings.
    """

    folder: Path
    header: Mapping[str, Any]
    models: Sequence[str]
    progress: Progress
    _failing: bool = field(default=False, init=False)

    def open(self) -> None:
        """Create the folder, or check that it belongs to this run.

        Raises:
            UsageError: it is the folder of another run, or of something else.
            OutputError: it cannot be written to.
        """
        header = self.folder / _HEADER
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if header.exists():
                self._check_header(header)
                return
            # an interrupted run may have left a partial header
            if not all(path == header or path.match(f".{_HEADER}.*.part") for path in self.folder.iterdir()):
                raise UsageError(f"the folder {self.folder} is not an evaluation state: it has other files", _HINT)
        except FileExistsError as error:
            raise UsageError(f"{self.folder} is a file, not a folder", "Give a folder to --resume.") from error
        except OSError as error:
            raise OutputError(f"cannot create the folder {self.folder}: {error.strerror or error}") from error
        _write(header, self.header)

    def remove_partial_files(self) -> None:
        """Remove what an interrupted write left; for one process alone, before the others start."""
        if (self.folder / _HEADER).is_file():
            for path in self.folder.glob(".*.json.*.part"):
                path.unlink(missing_ok=True)

    def load(self, shards: Iterable[int]) -> dict[int, Counts]:
        """Counts of the completed shards. A damaged file is skipped with a warning."""
        found: dict[int, Counts] = {}
        for shard in shards:
            path = self._path(shard)
            if not path.exists():
                continue
            try:
                document = _Shard.model_validate_json(_text(path))
                found[shard] = document.to_counts(digest_of_document(self.header), shard, self.models)
            except (OSError, ValueError, OverflowError, RecursionError):
                self.progress.warn(f"{path} is damaged: its images are evaluated again")
        return found

    def save(self, shard: int, counts: Counts) -> None:
        """Save a completed shard. If that fails, the run continues with one warning."""
        document = {"run": digest_of_document(self.header), "shard": shard, **_document(counts)}
        try:
            _write(self._path(shard), document)
        except OutputError as error:
            if not self._failing:
                self._failing = True
                self.progress.warn(f"{error.message}; the run continues but cannot be resumed from here")
        else:
            self._failing = False

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}.json"

    def _check_header(self, path: Path) -> None:
        try:
            found = json.loads(_text(path))
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{path} is damaged, so the run it belongs to is unknown", _HINT) from error
        if not isinstance(found, dict):
            raise UsageError(f"{path} is not the state of an evaluation", _HINT)
        expected = json.loads(json.dumps(self.header))
        differing = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
        if differing:
            raise UsageError(
                f"{self.folder} is the state of another evaluation: it differs in {', '.join(differing)}", _HINT
            )


def remove_state(folder: Path) -> None:
    """Remove the folder of a run, the header last, so that a partly removed folder is still recognised."""
    try:
        for path in folder.glob("[0-9]*.json"):
            path.unlink(missing_ok=True)
        (folder / _HEADER).unlink(missing_ok=True)
        folder.rmdir()
    except OSError:
        return  # it has other files, or another process was faster


def _text(path: Path) -> str:
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError("too large")
    return path.read_text(encoding="utf-8")


def _write(path: Path, document: Any) -> None:
    with atomic_output(path, force=True) as temporary:
        temporary.write_text(json.dumps(document, allow_nan=False), encoding="utf-8")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class _ModelCounts(_Strict):
    top1: _Natural
    top5: _Natural
    seconds: Annotated[float, Field(ge=0)]


class _TopK(_Strict):
    top: list[list[int]]
    probabilities: list[list[float]]


class _Rows(_Strict):
    indices: list[_Natural]
    answers: list[list[int]]
    said: dict[str, _TopK]

    def to_rows(self) -> PredictionRows:
        count = len(self.indices)
        top_k = {
            name: TopK(
                np.array(each.top, dtype=np.int32).reshape(count, -1),
                np.array(each.probabilities, dtype=np.float32).reshape(count, -1),
            )
            for name, each in self.said.items()
        }
        if any(each.top.shape != each.probabilities.shape for each in top_k.values()):
            raise ValueError("not one probability per output")
        return PredictionRows(tuple(self.indices), np.array(self.answers, dtype=np.int32).reshape(count, -1), top_k)


class _Shard(_Strict):
    """Contents of a file."""

    run: str
    shard: _Natural
    images: _Natural
    counts: dict[str, _ModelCounts]
    same: _Natural
    skipped: list[tuple[_Natural, str]]
    rows: list[_Rows]

    def to_counts(self, run: str, shard: int, models: Sequence[str]) -> Counts:
        """Raises ValueError if the file belongs to another run or shard, or its numbers are inconsistent."""
        if self.run != run or self.shard != shard:
            raise ValueError("a file of another run")
        if set(self.counts) != set(models) or any(set(rows.said) != set(models) for rows in self.rows):
            raise ValueError("other models")
        if self.same > self.images or any(not each.top1 <= each.top5 <= self.images for each in self.counts.values()):
            raise ValueError("more correct than images")
        return Counts(
            images=self.images,
            models={name: ModelCounts(**self.counts[name].model_dump()) for name in models},
            same=self.same,
            skipped=tuple(self.skipped),
            rows=tuple(rows.to_rows() for rows in self.rows),
        )


def _document(counts: Counts) -> dict[str, Any]:
    """The fields of `_Shard`, as JSON values."""
    return {
        "images": counts.images,
        "counts": {name: asdict(each) for name, each in counts.models.items()},
        "same": counts.same,
        "skipped": counts.skipped,
        "rows": [
            {
                "indices": rows.indices,
                "answers": rows.answers.tolist(),
                "said": {
                    name: {"top": each.top.tolist(), "probabilities": each.probabilities.tolist()}
                    for name, each in rows.top_k.items()
                },
            }
            for rows in counts.rows
        ],
    }
