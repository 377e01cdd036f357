"""The registry of export formats."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import repshift_cli.export.formats as registry
from repshift_cli.export.formats import FORMATS


def test_one_file_is_one_format() -> None:
    files = {path.stem for path in Path(registry.__path__[0]).glob("*.py")} - {"__init__"}
    assert {found.write.__module__.rsplit(".", 1)[1] for found in FORMATS.values()} == files
    assert sorted(FORMATS) == ["aoti", "hub", "onnx", "openvino", "pt2"]
    assert len({found.suffix for found in FORMATS.values()}) == len(FORMATS)


def test_the_registry_does_not_import_torch() -> None:
    code = "import sys, repshift_cli.export.formats; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
