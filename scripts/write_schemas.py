"""Write the JSON schemas of docs/ again. Run it after a change of `repshift_cli/checkpoints/schema.py`.

python scripts/write_schemas.py
"""

from __future__ import annotations

import json
from pathlib import Path

from repshift_cli.checkpoints.schema import ArtifactDocument, ExportDocument

DIALECT = "https://json-schema.org/draft/2020-12/schema"
DOCS = Path(__file__).resolve().parent.parent / "docs"


def main() -> None:
    for name, document in (("artifact", ArtifactDocument), ("export", ExportDocument)):
        text = json.dumps({"$schema": DIALECT, **document.model_json_schema()}, indent=2)
        (DOCS / f"{name}.schema.json").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
