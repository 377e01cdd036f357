"""Write the JSON schemas of docs/ again.

Run it after a change of `repshift_cli/checkpoints/schema.py`, and after `scripts/json_keys.py`:

    python scripts/write_schemas.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from repshift_cli.checkpoints.schema import ArtifactDocument, ExportDocument
from repshift_cli.cli.ui import JSON_VERSION

DIALECT = "https://json-schema.org/draft/2020-12/schema"
ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
KEYS = ROOT / "tests" / "vectors" / "json_keys.json"

DATA_KEYS = ("differing", "operators")
"""Objects whose keys are data, such as names of operators."""

REASON = {
    "type": "object",
    "properties": {"message": {"type": "string"}, "hint": {"type": ["string", "null"]}},
    "required": ["message", "hint"],
}


def command_schemas(keys: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
    """The schema of the JSON of each command, from the paths of the keys of its recorded runs (`json_keys.py`).

    All keys are named. Those at the top that every run has are required, unless the command failed.
    """
    runs: dict[str, list[Sequence[str]]] = {}
    for name, paths in keys.items():
        runs.setdefault(name.split()[0], []).append(paths)
    schemas = {}
    for command, found in sorted(runs.items()):
        tops = [{path.partition(".")[0].partition("[")[0] for path in paths} for paths in found]
        every = {"version": {"const": JSON_VERSION}, "error": REASON, "exit_code": {"type": "integer"}}
        properties = _properties(sorted({path for paths in found for path in paths}))
        schemas[command] = {
            "$schema": DIALECT,
            "title": f"repshift {command} --json",
            "type": "object",
            "properties": {**properties, **every, "failed": REASON},
            "required": ["version"],
            "if": {"required": ["error"]},
            "then": {"required": ["exit_code"]},
            "else": {"required": sorted(set.intersection(*tops))},
        }
    return schemas


def _properties(paths: Sequence[str]) -> dict[str, Any]:
    """The properties of an object with these paths, such as `plan[].site`."""
    inner: dict[str, list[str]] = {}
    for path in paths:
        key, _, rest = path.partition(".")
        inner.setdefault(key, []).extend([rest] if rest else [])
    properties: dict[str, Any] = {}
    for key, below in inner.items():
        name, _, lists = key.partition("[")
        schema: dict[str, Any] = {}
        if name in DATA_KEYS:
            schema = {"type": "object"}
        elif below:
            schema = {"type": ["object", "null"], "properties": _properties(below)}
            for _ in range(lists.count("]")):
                schema = {"type": ["array", "null"], "items": schema}
        properties[name] = properties.get(name) or schema
    return properties


def main() -> None:
    for command, schema in command_schemas(json.loads(KEYS.read_text(encoding="utf-8"))).items():
        text = json.dumps(schema, indent=1)
        (DOCS / "json" / f"{command}.schema.json").write_text(f"{text}\n", encoding="utf-8")
    for name, document in (("artifact", ArtifactDocument), ("export", ExportDocument)):
        text = json.dumps({"$schema": DIALECT, **document.model_json_schema()}, indent=2)
        (DOCS / f"{name}.schema.json").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
