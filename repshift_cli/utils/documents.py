"""JSON documents in files. They are not trusted: each is parsed by `parse_json` and checked by `validated`."""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from repshift_cli.errors import CheckpointError

_Value = TypeVar("_Value")

_LARGEST_INTEGER = 2**63 - 1
_LONGEST_VALUE = 60

Name = Annotated[str, Field(max_length=1000, pattern=r"^[^\x00-\x1f\x7f]*$")]
"""A name without control characters."""

Count = Annotated[int, Field(gt=0, le=2**31 - 1)]
"""A number of tokens, images, classes, ..."""


def parse_json(text: str) -> Any:
    """The content of a JSON text; raises ValueError also for what JSON or a reader of another language does not allow.

    That is NaN and infinity, lone surrogates, integers of more than 64 bits, and values nested too deeply.
    """
    try:
        found = json.loads(text, parse_int=_integer)
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return found


def parse_document(text: str, where: str, key: str, newest: int) -> dict[str, Any]:
    """A JSON document of this project with its version under a key; without one it is the newest.

    Raises:
        CheckpointError: it is damaged, or of a newer version.
    """
    damaged = f"{where}: its repshift metadata is damaged"
    try:
        found = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{damaged}: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{damaged}: not a mapping")
    version = found.get(key, newest)
    if not isinstance(version, int) or version < 1:
        raise CheckpointError(f"{where}: invalid metadata version {version!r}: must be at least 1")
    if version > newest:
        raise CheckpointError(
            f"{where} was written by a newer repshift ({key.removesuffix('_version')} {version}, supported up to "
            f"{newest})",
            "Upgrade: pip install --upgrade repshift-cli. Other tools can open the file.",
        )
    return found


def _integer(text: str) -> int:
    value = int(text)
    if abs(value) > _LARGEST_INTEGER:
        raise ValueError(f"the integer {_shortened(text)} has more than 64 bits")
    return value


def validated(kind: type[_Value], data: Any, where: str) -> _Value:
    """A part of a document as a pydantic model or dataclass.

    Raises:
        CheckpointError: a value is missing or invalid; the message has its key and what is allowed.
    """
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        key, value = ".".join(map(str, detail["loc"])), detail["input"]
        reason = detail["msg"].removeprefix("Value error, ").replace("Input should", "should")
        shown = f" (it is {_shortened(repr(value))})" if isinstance(value, str | int | float | bool | None) else ""
        raise CheckpointError(f"{where}: {key}{': ' if key else ''}{reason}{shown}") from error


def readable(data: Any) -> Any:
    """A document whose texts can be encoded: bytes of file names that are not UTF-8 are escaped."""
    if isinstance(data, str):
        return data.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    if isinstance(data, dict):
        return {key: readable(value) for key, value in data.items()}
    return [readable(value) for value in data] if isinstance(data, list) else data


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."
