"""The cache of evaluations and the state file that holds it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repshift_cli.errors import UsageError
from repshift_cli.search.result import SearchSettings
from repshift_cli.utils.distributed import Processes
from repshift_cli.utils.files import atomic_output
from repshift_cli.utils.hashing import digest_of_tensors
from repshift_cli.utils.progress import Task
from repshift_cli.version import __version__

__all__ = ["EvaluationCache", "identity_of", "keep_outputs", "kept_outputs"]

_FORMAT = 2


_OUTPUTS = "outputs"


_ALWAYS = frozenset({"images", "distance", "kl"})


_VALUES = _ALWAYS | {"agreement", "agreement_error", "top1", "lost", "lost_error"}
"""What `_compare` tells of a candidate; `_ALWAYS` is never None."""


_LARGEST = 1e300


class EvaluationCache:
    """What is known, by key; on disk where there is a file."""

    def __init__(self, path: Path | None, header: Callable[[], dict[str, Any]], processes: Processes) -> None:
        self._path = path
        self._processes = processes
        self._writes = path is not None and processes.rank == 0
        self._header = header() if self._writes else {}
        self._outputs: dict[str, str] = {}
        self._known: dict[str, Any] = {}
        self._load()

    def get(
        self, keys: Sequence[str], compute: Callable[[int], Any], task: Task, *, first_only: bool = False
    ) -> list[Any]:
        """The values of the keys; what is not known is computed, each by one of the processes.

        Args:
            compute: given the place of a key; what it returns has a form in JSON.
            task: advances by the number of keys.
            first_only: the first process computes them all.
        """
        missing = {key: index for index, key in reversed(list(enumerate(keys))) if key not in self._known}
        order = sorted(missing.values())
        count, rank = self._processes.count, self._processes.rank
        own = (order if rank == 0 else []) if first_only else order[rank::count]
        mine: dict[str, Any] = {}
        try:
            task.advance(len(keys) - len(order))
            for index in own:
                mine[keys[index]] = compute(index)
                task.advance()
        except BaseException:
            self._add(mine)
            raise
        gathered = _joined(self._processes.collect(mine))
        task.advance(len(order) - len(own))
        self._add({keys[index]: gathered[keys[index]] for index in order})
        return [self._known[key] for key in keys]

    def of_first(self, text: str) -> str:
        """What the first process says; every process calls this at the same point."""
        return self._processes.collect(text)[0]

    def alone(self) -> None:
        """As `Processes.alone`."""
        self._processes.alone()

    def _add(self, found: Mapping[str, Any]) -> None:
        # through JSON, so that what is read back later is what is used now
        self._known |= json.loads(json.dumps(found))
        if found and self._writes and self._path is not None:
            with atomic_output(self._path, force=True) as temporary:
                document = {**self._header, _OUTPUTS: self._outputs, "known": self._known}
                temporary.write_text(json.dumps(document), encoding="utf-8")

    def _load(self) -> None:
        mine: dict[str, Any] = {}
        if self._writes and self._path is not None and self._path.exists():
            self._outputs = kept_outputs(self._path)
            try:
                mine = {"known": _read_state(self._path, self._header)}
            except UsageError as error:
                mine = {"error": [error.message, error.hint]}
        found = _joined(self._processes.collect(mine))
        if "error" in found:
            raise UsageError(*found["error"])
        self._known = found.get("known", {})


def _joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Everything that the processes know."""
    return {key: value for part in parts for key, value in part.items()}


def _read_state(path: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    other = "Give another file, or remove it to begin anew."
    document = _state_document(path)
    if document is None or "known" not in document:
        raise UsageError(f"{path} is not the state of a search", other)
    known = document.pop("known")
    document.pop(_OUTPUTS, None)
    if document != json.loads(json.dumps(header)):
        differing = [key for key in header if document.get(key) != header[key]] or ["what it holds"]
        raise UsageError(f"{path} is the state of another search: it differs in {', '.join(differing)}", other)
    if not isinstance(known, dict) or not all(_is_valid(key, value) for key, value in known.items()):
        raise UsageError(f"{path} is not the state of a search", other)
    return known


def _state_document(path: Path) -> dict[str, Any] | None:
    """What a state file holds; None where it is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _is_valid(key: str, value: Any) -> bool:
    """Whether a value has the form that its kind of evaluation gives."""
    kind = key.partition(" ")[0]
    if kind == "latency":
        return _is_number(value) and value > 0
    if kind == "fit":
        return isinstance(value, dict) and all(_is_part(part) for part in value.values())
    if kind == "choose":
        return value is None or (isinstance(value, list) and all(_is_part(part) for part in value))
    if kind not in ("judge", "sense", "held"):
        return False
    return value is None or (
        isinstance(value, dict)
        and value.keys() >= _VALUES
        and all(_is_number(value[name]) for name in _ALWAYS)
        and all(value[name] is None or _is_number(value[name]) for name in _VALUES)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST


def _is_part(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("kind"), str)


def kept_outputs(state: Path) -> dict[str, str]:
    """What was written before this state was left: absolute path and SHA-256 of each file."""
    found = (_state_document(state) or {}).get(_OUTPUTS)
    return found if isinstance(found, dict) and all(isinstance(value, str) for value in found.values()) else {}


def keep_outputs(state: Path, outputs: Mapping[str, str]) -> None:
    """Note in a state what was written, beside what it knows already, as `kept_outputs` reads it."""
    document = _state_document(state)
    if document is not None:
        with atomic_output(state, force=True) as temporary:
            temporary.write_text(
                json.dumps({**document, _OUTPUTS: {**kept_outputs(state), **outputs}}), encoding="utf-8"
            )


def identity_of(model: nn.Module, settings: SearchSettings) -> dict[str, Any]:
    """What makes a search this one. More evaluations or more time to measure continue it."""
    sample = next(model.parameters())
    labels = [] if settings.labels is None else [("labels", settings.labels)]
    return {
        "search": _FORMAT,
        "repshift": __version__,
        "torch": str(torch.__version__),
        "model": digest_of_tensors(model.state_dict().items()),
        "images": digest_of_tensors([("images", settings.images), *labels]),
        "target": str(settings.target),
        "start": settings.start.to_yaml(),
        "reducers": [part.model_dump() for part in settings.reducers],
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "device": sample.device.type,
        "dtype": str(sample.dtype),
    }
