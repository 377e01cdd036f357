"""The ways to run a model in other runtimes than torch, for `repshift advise` and `bench`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from repshift_cli.benchmark.ways import Missing, Way
from repshift_cli.checkpoints.exported import open_exported
from repshift_cli.errors import RepshiftError
from repshift_cli.export.formats import FORMATS
from repshift_cli.export.job import export
from repshift_cli.export.request import Request
from repshift_cli.utils.progress import Progress

_RUNTIMES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}
"""Formats whose runtimes are timed."""


def exported_ways(
    models: Sequence[Way],
    folder: Path,
    calibration: str | None,
    progress: Progress,
    targets: Sequence[str] = tuple(_RUNTIMES),
) -> Iterator[Way | Missing]:
    """Models in the runtimes that are installed, in float32 and in int8; static int8 with images to calibrate."""
    for target, label in ((target, _RUNTIMES[target]) for target in targets if target in FORMATS):
        for quantize in (None, "int8" if calibration else "int8-dynamic"):
            name = label if quantize is None else f"{quantize}, {label}"
            for number, way in enumerate(models):
                assert way.opened is not None
                path = folder / f"{number}-{quantize}{FORMATS[target].suffix}"
                images = calibration if quantize else None
                request = Request(
                    target, path, dense=not way.reduced, quantize=quantize, calibration=images, verify=False
                )
                try:
                    written = export(way.opened, request, progress)
                except RepshiftError as error:
                    install = f". {error.hint}" if "pip install" in (error.hint or "") else ""
                    yield Missing(f"{way.name}, {name}" if number else name, f"{error.message}{install}")
                    if number:
                        continue
                    break  # most likely none of the models can be exported so
                module = open_exported(path).module
                yield replace(way, name=f"{way.name}, {name}", run=module, bytes=written.bytes, context=nullcontext)
