"""The JSON of commands is valid by the published schemas, which are made from the recorded keys."""

from __future__ import annotations

import json
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from outcome import Command
from paths import ROOT

SCHEMAS = {path.name.partition(".")[0]: json.loads(path.read_text()) for path in (ROOT / "docs" / "json").iterdir()}
TYPES = {"object": dict, "array": list, "string": str, "integer": int, "null": type(None)}


def check(value: Any, schema: Mapping[str, Any]) -> None:
    """Assert that a value is valid by the keywords that the schemas use."""
    kinds = schema.get("type", list(TYPES))
    if "type" in schema:
        assert isinstance(value, tuple(TYPES[kind] for kind in ([kinds] if isinstance(kinds, str) else kinds)))
    assert value == schema.get("const", value)
    if isinstance(value, dict):
        assert value.keys() >= set(schema.get("required", ()))
        for key, inner in value.items():
            check(inner, schema.get("properties", {}).get(key, {}))
        if "if" in schema:
            check(value, schema["then" if value.keys() >= set(schema["if"]["required"]) else "else"])
    for item in value if isinstance(value, list) else ():
        check(item, schema.get("items", {}))


def test_the_schemas_are_made_from_the_recorded_keys() -> None:
    keys = json.loads((ROOT / "tests" / "vectors" / "json_keys.json").read_text())
    made = runpy.run_path(str(ROOT / "scripts" / "write_schemas.py"))["command_schemas"](keys)
    assert made == SCHEMAS  # else run scripts/write_schemas.py


def test_documents_are_valid(cli: Command, dense: Path, recipe: Path) -> None:
    quick = ("--seconds", "0", "-b", "2", "--threads", "1")
    commands: dict[str, tuple[object, ...]] = {
        "compress": (dense, "-r", recipe, *quick, "-o", "fast.safetensors"),
        "inspect": ("fast.safetensors",),
        "dense": ("fast.safetensors",),
        "diff": ("fast.safetensors", dense),
        "bench": ("fast.safetensors", *quick),
        "doctor": (),
    }
    for command, arguments in commands.items():
        outcome = cli(command, *arguments, "--json")
        assert outcome.rc == 0, outcome.stderr
        document = json.loads(outcome.stdout)
        check(document, SCHEMAS[command])
        assert not document.keys() - SCHEMAS[command]["properties"].keys()


def test_errors_are_valid(cli: Command) -> None:
    for command, schema in SCHEMAS.items():
        document = json.loads(cli(command, "--nothing", "--json").stdout)
        check(document, schema)
        with pytest.raises(AssertionError):
            check({**document, "version": 0}, schema)
