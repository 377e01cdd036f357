"""The cache of evaluations, and the state file from which an interrupted search continues."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, FiniteFloat, TypeAdapter, ValidationError
from torch import nn

from repshift_cli.errors import UsageError
from repshift_cli.planning.recipe import ComponentSpec
from repshift_cli.search.result import SearchSettings
from repshift_cli.utils.files import atomic_output, read_text
from repshift_cli.utils.hashing import digest_of_document, digest_of_tensors
from repshift_cli.utils.progress import Task
from repshift_cli.version import __version__

_FORMAT = 4
_LARGEST = 1 << 26
_OUTPUTS, _DIGEST = "outputs", "digest"


class _Quality(BaseModel):
    """A measurement of quality, as `Evaluator.quality` returns it."""

    images: int
    distance: FiniteFloat
    kl: FiniteFloat
    agreement: FiniteFloat | None
    agreement_error: FiniteFloat | None
    top1: FiniteFloat | None
    lost: FiniteFloat | None
    lost_error: FiniteFloat | None
    recall: FiniteFloat | None
    recall_error: FiniteFloat | None
    cosine_error: FiniteFloat | None
    distances: list[FiniteFloat] | None = None


_FORMS: dict[str, TypeAdapter[Any]] = {
    "latency": TypeAdapter(Annotated[FiniteFloat, Field(gt=0)]),
    "fit": TypeAdapter(dict[str, ComponentSpec]),
    "choose": TypeAdapter(list[ComponentSpec] | None),
    **dict.fromkeys(("judge", "sense", "held"), TypeAdapter(_Quality | None)),
}
"""Form of the results by kind of evaluation, the first word of the key."""


class EvaluationCache:
    """Results of evaluations by key, written to the state file of the settings if they name one."""

    def __init__(self, model: nn.Module, settings: SearchSettings) -> None:
        """Load the state file, if it exists."""
        self._path = settings.state
        self._identity = {} if settings.state is None else _search_identity(model, settings)
        self._outputs: dict[str, str] = {}
        self._known: dict[str, Any] = {}
        if self._path is not None and os.path.lexists(self._path):
            self._outputs = kept_outputs(self._path)
            self._known = _read_state(self._path, self._identity)

    def get(self, keys: Sequence[str], compute: Callable[[int], Any], task: Task) -> list[Any]:
        """The results of the keys; missing ones are computed. An interruption keeps those that are finished.

        Args:
            compute: called with the index of a key; returns a value that JSON can hold.
        """
        added: dict[str, Any] = {}
        try:
            for index, key in enumerate(keys):
                if key not in self._known and key not in added:
                    added[key] = compute(index)
                task.advance()
        finally:
            # through JSON, so that a resumed search uses exactly the same values
            self._known |= json.loads(json.dumps(added))
            if added and self._path is not None:
                sealed = {_DIGEST: digest_of_document(self._known), "known": self._known}
                _write(self._path, {**self._identity, _OUTPUTS: self._outputs, **sealed})
        return [self._known[key] for key in keys]


def _search_identity(model: nn.Module, settings: SearchSettings) -> dict[str, Any]:
    """What must be equal for a state file to apply. More evaluations or more seconds continue the same search."""
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


def kept_outputs(state: Path) -> dict[str, str]:
    """The files that an interrupted search has written: absolute path and SHA-256 of each."""
    found = (_read_document(state) or {}).get(_OUTPUTS)
    return found if isinstance(found, dict) and all(isinstance(value, str) for value in found.values()) else {}


def keep_outputs(state: Path, outputs: Mapping[str, str]) -> None:
    """Add written files to a state file, in the form of `kept_outputs`."""
    document = _read_document(state)
    if document is not None:
        _write(state, {**document, _OUTPUTS: {**kept_outputs(state), **outputs}})


def _write(path: Path, document: Mapping[str, Any]) -> None:
    with atomic_output(path, force=True) as temporary:
        temporary.write_text(json.dumps(document), encoding="utf-8")


def _read_state(path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    hint = "Give another file, or remove it to start again."
    document = _read_document(path)
    if document is None or "known" not in document:
        raise UsageError(f"{path} is not the state of a search", hint)
    known, digest = document.pop("known"), document.pop(_DIGEST, None)
    document.pop(_OUTPUTS, None)
    if document != json.loads(json.dumps(identity)):
        differing = [key for key in identity if document.get(key) != identity[key]] or ["its keys"]
        raise UsageError(f"{path} is the state of another search: it differs in {', '.join(differing)}", hint)
    if not isinstance(known, dict) or not all(_is_valid(key, value) for key, value in known.items()):
        raise UsageError(f"{path} is not the state of a search", hint)
    if digest != digest_of_document(known):
        raise UsageError(f"{path} was changed after the search wrote it", hint)
    return known


def _read_document(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if it holds none."""
    try:
        document = json.loads(read_text(path, _LARGEST))
    except (OSError, ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _is_valid(key: str, value: Any) -> bool:
    try:
        _FORMS[key.partition(" ")[0]].validate_json(json.dumps(value), strict=True)
    except (KeyError, ValidationError):
        return False
    return True
