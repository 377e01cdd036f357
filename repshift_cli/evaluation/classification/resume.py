"""State of an interrupted evaluation: a folder with a header and one file per completed shard.

Each file is written whole or not at all, so a run may be killed at any moment. Processes write their own shards, into
one folder or into a folder of that name on each machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from repshift_cli.errors import OutputError, RepshiftError, UsageError
from repshift_cli.evaluation.classification.counts import Counts, ModelCounts, Natural
from repshift_cli.utils.files import atomic_output, read_text
from repshift_cli.utils.hashing import digest_of_document
from repshift_cli.utils.progress import Progress

_HEADER = "run.json"
_SHARDS, _PARTS = re.compile(r"\d{6}\.json"), re.compile(r"\.(run|\d{6})\.json\.[0-9a-f]+\.part")
_HINT = "Choose another folder, or remove this one to start again."
_MAX_BYTES = 1 << 30
_MATRIX = 2  # dimensions


@dataclass
class ResumeState:
    """The folder of a run; `header` is the identity of the run, as JSON values."""

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
            if not all(path == header or _PARTS.fullmatch(path.name) for path in self.folder.iterdir()):
                raise UsageError(f"the folder {self.folder} is not an evaluation state: it has other files", _HINT)
        except FileExistsError as error:
            raise UsageError(f"{self.folder} is a file, not a folder", "Give a folder to --resume.") from error
        except OSError as error:
            raise OutputError(f"cannot create the folder {self.folder}: {error.strerror or error}") from error
        _write(header, json.dumps(self.header, allow_nan=False))

    def remove_partial_files(self) -> None:
        """Remove what an interrupted write left; for one process alone, before the others start."""
        with suppress(OSError):
            if (self.folder / _HEADER).is_file():
                for path in _named(self.folder, _PARTS):
                    path.unlink(missing_ok=True)

    def load(self, shards: Mapping[int, range], with_rows: bool) -> dict[int, Counts]:
        """Counts of the completed shards. A damaged file is skipped with a warning.

        Args:
            shards: the images of each shard.
            with_rows: whether the predictions of each image are kept.
        """
        found: dict[int, Counts] = {}
        for shard, images in shards.items():
            path = self._path(shard)
            try:
                counts = _FILE.validate_json(read_text(path, _MAX_BYTES))
                if counts.run != digest_of_document(self.header) or counts.shard != shard:
                    raise ValueError("a file of another run")  # noqa: TRY301
                counts.check(self.models, images, with_rows)
                found[shard] = counts
            except FileNotFoundError:
                continue
            except (OSError, ValueError, TypeError, OverflowError, RecursionError):
                self.progress.warn(f"{path} is damaged: its images are evaluated again")
        return found

    def save(self, shard: int, counts: Counts) -> None:
        """Save a completed shard. If that fails, the run continues with one warning."""
        document = _Shard(**vars(counts), run=digest_of_document(self.header), shard=shard)
        try:
            _write(self._path(shard), _FILE.dump_json(document, by_alias=True).decode())
        except RepshiftError as error:
            if not self._failing:
                self._failing = True
                self.progress.warn(f"{error.message}; the run continues but cannot be resumed from here")
        else:
            self._failing = False

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}.json"

    def _check_header(self, path: Path) -> None:
        try:
            found = json.loads(read_text(path))
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
    """Remove the files of a run, the header last, so that a partly removed folder is still recognised.

    The folder is removed if nothing else is in it.
    """
    with suppress(OSError, ValueError, RecursionError):  # it has other files, or another process was faster
        run = digest_of_document(json.loads(read_text(folder / _HEADER)))
        for path in _named(folder, _SHARDS):
            with suppress(OSError, ValueError, RecursionError):
                found = json.loads(read_text(path, _MAX_BYTES))
                if isinstance(found, dict) and found.get("run") == run:
                    path.unlink(missing_ok=True)
        (folder / _HEADER).unlink(missing_ok=True)
        folder.rmdir()


def _named(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    return [path for path in folder.iterdir() if pattern.fullmatch(path.name)]


def _write(path: Path, text: str) -> None:
    with atomic_output(path, force=True) as temporary:
        temporary.write_text(text, encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class _Shard(Counts):
    """Contents of a file."""

    run: str
    shard: Natural

    def check(self, models: Sequence[str], images: range, with_rows: bool) -> None:
        """Raise ValueError if these are not results on exactly these images, or the numbers are inconsistent."""
        if set(self.models) != set(models) or any(set(rows.top_k) != set(models) for rows in self.rows):
            raise ValueError("other models")
        if self.same > self.images or any(not each.top1 <= each.top5 <= self.images for each in self.models.values()):
            raise ValueError("more correct than images")
        for rows in self.rows:
            arrays = [rows.answers, *(each.top for each in rows.top_k.values())]
            if any(array.ndim != _MATRIX or len(array) != len(rows.indices) for array in arrays):
                raise ValueError("not one row per image")
            if any(each.top.shape != each.probabilities.shape or (each.top < 0).any() for each in rows.top_k.values()):
                raise ValueError("not one output for each probability")
        skipped = sorted(index for index, _ in self.skipped)
        kept = sorted(index for rows in self.rows for index in rows.indices)
        if self.images + len(skipped) != len(images) or len(set(skipped)) != len(skipped):
            raise ValueError("another number of images")
        if not {*skipped, *self.padded} <= set(images) or (
            kept != sorted({*images} - {*skipped}) if with_rows else kept
        ):
            raise ValueError("other images")
        for name, counts in self.models.items() if with_rows else ():
            found = [ModelCounts.of(rows.top_k[name].top, rows.answers, 0.0) for rows in self.rows]
            if sum(each.top1 for each in found) != counts.top1 or sum(each.top5 for each in found) != counts.top5:
                raise ValueError("other counts than predictions")


_FILE = TypeAdapter(_Shard)
