"""Import OpenVINO and NNCF without their telemetry.

It sends usage data unless the user has turned it off, and writes to the home folder when the package is imported.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

_TELEMETRY = "openvino_telemetry"


def import_without_telemetry(package: str) -> Any:
    """Import a package. While it is imported it does not find `openvino_telemetry`, and uses its own stub instead."""
    before = sys.modules.get(_TELEMETRY)
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
    try:
        return importlib.import_module(package)
    finally:
        del sys.modules[_TELEMETRY]
        if before is not None:
            sys.modules[_TELEMETRY] = before
