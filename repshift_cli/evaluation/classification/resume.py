"""Where an evaluation stands, in a folder: what makes it this one, and a file for each of its shards that is done.

Each file is written whole or not at all, so a run may end at any moment, by a signal that nobody can catch too. Several
processes write into one folder, each its own shards; or each machine has a folder of that name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from repshift_cli.errors import OutputError, UsageError
from repshift_cli.evaluation.classification.counts import Count, Part, Rows, Said
from repshift_cli.utils.files import atomic_output
from repshift_cli.utils.hashing import digest_of_document
from repshift_cli.utils.progress import Progress

__all__ = ["State", "clear"]

_HEADER = "run.json"
_OTHER = "Name another folder, or remove this one to begin anew."
_LARGEST_FILE = 1 << 30
_Natural = Annotated[int, Field(ge=0)]


@dataclass
class State:
    """The folder of a run.

    Attributes:
        folder: made where it is missing.
        header: what makes the run this one; what JSON can hold.
        models: the names of its models.
        progress: told of what is not as it should be.
    """

    folder: Path
    header: Mapping[str, Any]
    models: Sequence[str]
    progress: Progress
    _failing: bool = field(default=False, init=False)

    def begin(self) -> None:
        """Make the folder, or see that it is that of this run.

        Raises:
            UsageError: it is that of another run, or of something else.
            OutputError: it cannot be written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            there = (self.folder / _HEADER).exists()
            if not there and any(entry.name != _HEADER and not _is_ours(entry.name) for entry in self.folder.iterdir()):
                raise UsageError(f"the folder {self.folder} holds something else than where a run stands", _OTHER)
        except FileExistsError as error:
            raise UsageError(f"{self.folder} is a file, not a folder", "Name a folder with --resume.") from error
        except OSError as error:
            raise OutputError(f"cannot make the folder {self.folder}: {error.strerror or error}") from error
        if there:
            self._check_header()
        else:
            _write(self.folder / _HEADER, self.header)

    def tidy(self) -> None:
        """Remove what writing left that was cut off; for one process alone, before the others begin."""
        if (self.folder / _HEADER).is_file():
            for path in self.folder.glob(".*.json.*.part"):
                path.unlink(missing_ok=True)

    def known(self, shards: Sequence[int]) -> dict[int, Part]:
        """Those of the shards that are done. A file that is damaged is left aside: its shard is done again."""
        found: dict[int, Part] = {}
        for shard in shards:
            path = self._path(shard)
            if not path.exists():
                continue
            try:
                found[shard] = self._read(path, shard)
            except (OSError, ValueError, OverflowError, RecursionError):
                self.progress.warn(f"{path} is damaged, so its pictures are evaluated again")
        return found

    def keep(self, shard: int, part: Part) -> None:
        """Note that a shard is done. Where that cannot be written, the run goes on, and says so once."""
        document = {"run": self._digest(), "shard": shard, **_document(part)}
        try:
            _write(self._path(shard), document)
        except OutputError as error:
            if not self._failing:
                self._failing = True
                self.progress.warn(f"{error.message}; the run goes on, but could not be taken up again from here")
        else:
            self._failing = False

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}.json"

    def _digest(self) -> str:
        return digest_of_document(self.header)

    def _check_header(self) -> None:
        path = self.folder / _HEADER
        try:
            found = json.loads(_text(path))
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{path} is damaged, so nobody knows whose state it is", _OTHER) from error
        if not isinstance(found, dict):
            raise UsageError(f"{path} is not the state of an evaluation", _OTHER)
        wanted = json.loads(json.dumps(dict(self.header)))
        differing = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
        if differing:
            raise UsageError(
                f"{self.folder} is the state of another evaluation: it differs in {', '.join(differing)}", _OTHER
            )

    def _read(self, path: Path, shard: int) -> Part:
        document = _Shard.model_validate_json(_text(path))
        if document.run != self._digest() or document.shard != shard:
            raise ValueError("a file of another run")
        return document.part(self.models)


def clear(folder: Path) -> None:
    """Remove the folder of a run, the mark of the run last, so that what is left can still be told."""
    try:
        for path in folder.glob("[0-9]*.json"):
            path.unlink(missing_ok=True)
        (folder / _HEADER).unlink(missing_ok=True)
        folder.rmdir()
    except OSError:
        return  # the user keeps something of his own in it, or another process was quicker


def _is_ours(name: str) -> bool:
    """Whether a name is one that a run which was cut off may have left before there was a header."""
    return name.startswith(f".{_HEADER}.") and name.endswith(".part")


def _text(path: Path) -> str:
    if path.stat().st_size > _LARGEST_FILE:
        raise ValueError("too large")
    return path.read_text(encoding="utf-8")


def _write(path: Path, document: Any) -> None:
    with atomic_output(path, force=True) as temporary:
        temporary.write_text(json.dumps(document, allow_nan=False), encoding="utf-8")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class _Count(_Strict):
    top1: _Natural
    top5: _Natural
    seconds: Annotated[float, Field(ge=0)]


class _Said(_Strict):
    top: list[list[int]]
    probabilities: list[list[float]]


class _Rows(_Strict):
    indices: list[_Natural]
    answers: list[list[int]]
    said: dict[str, _Said]


class _Shard(_Strict):
    """The form of a file."""

    run: str
    shard: _Natural
    images: _Natural
    counts: dict[str, _Count]
    same: _Natural
    skipped: list[tuple[_Natural, str]]
    rows: list[_Rows]

    def part(self, models: Sequence[str]) -> Part:
        """What was counted.

        Raises:
            ValueError: the numbers do not belong together.
        """
        if set(self.counts) != set(models) or any(set(rows.said) != set(models) for rows in self.rows):
            raise ValueError("other models")
        if self.same > self.images or any(not each.top1 <= each.top5 <= self.images for each in self.counts.values()):
            raise ValueError("more pictures than there are")
        return Part(
            images=self.images,
            counts={name: Count(**self.counts[name].model_dump()) for name in models},
            same=self.same,
            skipped=tuple(self.skipped),
            rows=tuple(_rows(rows) for rows in self.rows),
        )


def _rows(rows: _Rows) -> Rows:
    count = len(rows.indices)
    said = {
        name: Said(
            np.array(each.top, dtype=np.int32).reshape(count, -1),
            np.array(each.probabilities, dtype=np.float32).reshape(count, -1),
        )
        for name, each in rows.said.items()
    }
    if any(each.top.shape != each.probabilities.shape for each in said.values()):
        raise ValueError("not a probability for each output")
    return Rows(tuple(rows.indices), np.array(rows.answers, dtype=np.int32).reshape(count, -1), said)


def _document(part: Part) -> dict[str, Any]:
    return {
        "images": part.images,
        "counts": {name: vars(count) for name, count in part.counts.items()},
        "same": part.same,
        "skipped": [list(entry) for entry in part.skipped],
        "rows": [
            {
                "indices": list(rows.indices),
                "answers": rows.answers.tolist(),
                "said": {
                    name: {"top": said.top.tolist(), "probabilities": said.probabilities.tolist()}
                    for name, said in rows.said.items()
                },
            }
            for rows in part.rows
        ],
    }
