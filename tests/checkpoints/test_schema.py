"""Documents of all format versions follow the schemas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import expected, open_family, stored
from paths import DOCS
from pydantic import BaseModel, ValidationError
from safetensors import safe_open

from repshift_cli.checkpoints import artifact
from repshift_cli.checkpoints.schema import ArtifactDocument, ExportDocument
from repshift_cli.checkpoints.weights import FORMAT_VERSION, METADATA_KEY

SCHEMAS: dict[str, type[BaseModel]] = {"artifact": ArtifactDocument, "export": ExportDocument}


def document_of(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as archive:
        found: dict[str, Any] = json.loads(archive.metadata()[METADATA_KEY])
    return found


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
class TestStored:
    def test_outputs_are_unchanged(self, version: int) -> None:
        model = artifact.load(stored(version))
        with torch.no_grad():
            output = model(expected()[f"v{version}/input"])
        torch.testing.assert_close(output, expected()[f"v{version}/output"], rtol=1e-4, atol=1e-5)

    def test_version_and_schema(self, version: int) -> None:
        document = document_of(stored(version))
        assert document["format_version"] == version
        newer: Any = {key: True for key in ("search", "recovered") if key not in document}  # keys that these files lack
        newer["model"] = {"preprocessing": {"frame_step", "spectrogram"} - document["model"]["preprocessing"].keys()}
        assert ArtifactDocument.model_validate(document).model_dump(mode="json", exclude=newer) == document


def test_the_schema_allows_a_search() -> None:
    document = {**document_of(stored(1)), "search": {"target": "macs=0.6"}}
    assert ArtifactDocument.model_validate(document).search == {"target": "macs=0.6"}


@pytest.mark.parametrize(
    "change", [{"surprise": 1}, {"plan": None}, {"format_version": 0}, {"source": {"origin": "heaven"}}, {"model": {}}]
)
def test_an_invalid_document(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ArtifactDocument.model_validate({**document_of(stored(1)), **change})


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schema_in_docs_is_up_to_date(name: str) -> None:
    written = json.loads((DOCS / f"{name}.schema.json").read_text(encoding="utf-8"))
    made = SCHEMAS[name].model_json_schema()
    # how a type is written down is a matter of pydantic's version
    for part in ("properties", "required"):
        assert sorted(written[part]) == sorted(made[part])
    assert {key: sorted(value.get("properties", {})) for key, value in written["$defs"].items()} == {
        key: sorted(value.get("properties", {})) for key, value in made["$defs"].items()
    }


def test_a_model_in_memory_gets_a_document() -> None:
    ArtifactDocument.model_validate(open_family("resnet").loaded.document)
