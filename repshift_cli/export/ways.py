"""The ways to run a model in other runtimes than torch, for `repshift advise`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from repshift_cli.benchmark.ways import Missing, Way, both
from repshift_cli.checkpoints.artifact import Opened
from repshift_cli.checkpoints.exported import open_exported
from repshift_cli.errors import RepshiftError
from repshift_cli.export.formats import FORMATS
from repshift_cli.export.job import export
from repshift_cli.export.request import Request
from repshift_cli.utils.progress import Progress

_RUNTIMES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}
"""Formats whose runtimes are timed."""


def exported_ways(opened: Opened, folder: Path, calibration: str | None, progress: Progress) -> Iterator[Way | Missing]:
    """Both models in the runtimes that are installed, in float32 and in int8; static int8 with images to calibrate."""
    for target, label in ((target, label) for target, label in _RUNTIMES.items() if target in FORMATS):
        for quantize in (None, "int8" if calibration else "int8-dynamic"):
            name = label if quantize is None else f"{quantize}, {label}"
            try:
                for way in both(opened):
                    path = folder / f"{way.name}-{quantize}{FORMATS[target].suffix}"
                    images = calibration if quantize else None
                    request = Request(
                        target, path, dense=not way.reduced, quantize=quantize, calibration=images, verify=False
                    )
                    written = export(opened, request, progress)
                    module = open_exported(path).module
                    yield replace(way, name=f"{way.name}, {name}", run=module, bytes=written.bytes, context=nullcontext)
            except RepshiftError as error:
                yield Missing(name, error.message)
