"""Write an export to a temporary path, verify it, and move it to its output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repshift_cli.checkpoints import artifact
from repshift_cli.checkpoints.artifact import Opened
from repshift_cli.checkpoints.exported import require
from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.checkpoints.schema import ExportDocument
from repshift_cli.compression.api import compress_dense
from repshift_cli.errors import UsageError
from repshift_cli.export import verify
from repshift_cli.export.formats import FORMATS
from repshift_cli.export.request import Request, Subject
from repshift_cli.planning.recipe import Recipe
from repshift_cli.utils.files import atomic_folder, atomic_output, check_output, temporary_folder
from repshift_cli.utils.progress import Progress

_OPTIONS = ("batch", "opset", "tune", "quantize")
"""Options that only some formats support."""


@dataclass(frozen=True)
class Exported:
    """A written export; `operators` counts those of an ONNX graph by name."""

    output: Path
    document: ExportDocument
    bytes: int
    operators: dict[str, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON document of `repshift export`."""
        document = self.document.model_dump(mode="json")
        return {
            "output": str(self.output),
            "bytes": self.bytes,
            **{key: document[key] for key in ("kind", "opset", "tuned", "quantized", "device", "verified")},
            "ports": {key: document[key] for key in ("input", "output")},
            "compressed": self.document.plan is not None,
            "gmacs": self.document.macs / 1e9,
            "dense_gmacs": self.document.dense_macs / 1e9,
            "operators": self.operators,
        }


def check(request: Request) -> None:
    """Check before the model is loaded that the output is writable, and the format supports the request.

    Raises:
        UsageError, OutputError: it is not, or does not; or a package is not installed.
    """
    wanted = FORMATS[request.target]
    for option in _OPTIONS:
        if getattr(request, option) not in (None, False) and option not in wanted.options:
            allowed = ", ".join(known.name for known in FORMATS.values() if option in known.options)
            raise UsageError(f"--{option} is for --to {allowed}, not for --to {wanted.name}", "Leave it out.")
    dtype = "float32" if request.dtype is None else str(request.dtype).removeprefix("torch.")
    for option, value, supported in (("dtype", dtype, wanted.dtypes), ("device", request.device.type, wanted.devices)):
        if value not in supported:
            raise UsageError(f"--to {wanted.name}: unsupported --{option} {value}: allowed: {', '.join(supported)}")
    if request.quantize and dtype != "float32":
        raise UsageError("--quantize takes a model in float32", "Leave --dtype out.")
    for package in wanted.packages:
        require(package, wanted.name)
    wanted.check(request)
    if wanted.files:
        return
    suffix = Path(f"model{wanted.suffix}").suffix
    if request.output.suffix != suffix:
        raise UsageError(
            f"-o {request.output}: a file of --to {wanted.name} has a name that ends with {suffix}",
            f"For example -o {request.output.with_suffix(suffix).name}.",
        )
    check_output(request.output, request.force)


def open_for_export(name: str, recipe: str | None, options: LoadOptions | None = None, *, progress: Progress) -> Opened:
    """Open a model; with a recipe, compress a dense one without calibration. Errors as `open_model`, `compress`."""
    if recipe is None:
        return artifact.open_model(name, options)
    opened = compress_dense(name, recipe, options, progress=progress)
    assert opened.compressed is not None
    plan = opened.compressed.plan
    opened.loaded.document = artifact.make_document(opened.loaded, plan, Recipe.load(recipe), None, {})
    return opened


def export(opened: Opened, request: Request, progress: Progress) -> Exported:
    """Write a model in a format that runs without repshift, and verify it against the model in torch.

    The model is moved to the device and dtype of the request.

    Raises:
        CheckFailed: the export does not compute what the model does, or is not a valid graph; no output is left.
        ModelError: the model cannot be traced or compiled.
        UsageError, OutputError: as `check`.
    """
    check(request)
    subject, output, wanted = Subject.of(opened, request), request.output, FORMATS[request.target]
    made = atomic_folder(output, wanted.files, request.force) if wanted.files else _atomic_file(output, request.force)
    with subject.context(), made as path:  # the whole time: a trace must not exchange parameters
        draft = wanted.write(subject, request, path, progress)
        document = draft.document
        if request.verify:
            verdict = verify.compare(subject, request, draft.reopen(), progress, draft.known)
            document = document.model_copy(update={"verified": verdict})
        draft.save(document)
    written = [output / name for name in wanted.files] or [output]
    size = sum(file.stat().st_size for file in written)
    return Exported(output, document, size, draft.operators)


@contextmanager
def _atomic_file(output: Path, force: bool) -> Iterator[Path]:
    """As `atomic_output`, with a temporary path of the same suffix, which runtimes need."""
    with atomic_output(output, force) as temporary, temporary_folder(output) as folder:
        path = folder / f"model{output.suffix}"
        yield path
        path.replace(temporary)
