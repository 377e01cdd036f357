"""The job: write, check, stamp, and only then let the file stand under its name."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repshift_cli.checkpoints import artifact
from repshift_cli.checkpoints.artifact import Opened
from repshift_cli.checkpoints.exported import require, run_file
from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.checkpoints.schema import ExportDocument
from repshift_cli.compression.api import compress_dense
from repshift_cli.errors import OutputError, UsageError
from repshift_cli.export import hub, onnx_graph, verify
from repshift_cli.export.package import compile_package, set_document, write_program
from repshift_cli.export.program import trace_program
from repshift_cli.export.request import Request, Subject, check_suffix
from repshift_cli.planning.recipe import Recipe
from repshift_cli.utils.files import atomic_output, check_output
from repshift_cli.utils.progress import Progress

__all__ = ["Exported", "check", "export", "open_for_export"]

_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        operators: of an ONNX graph, how often each stands in it.
    """

    output: Path
    document: ExportDocument
    bytes: int
    operators: dict[str, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON document of `repshift export`."""
        told = self.document.model_dump(mode="json", include={"kind", "opset", "tuned", "device", "verified"})
        ports = self.document.model_dump(mode="json", include={"input", "output"})
        return {
            "output": str(self.output),
            "bytes": self.bytes,
            **told,
            "ports": ports,
            "compressed": self.document.plan is not None,
            "gmacs": self.document.macs / 1e9,
            "dense_gmacs": self.document.dense_macs / 1e9,
            "operators": self.operators,
        }


def check(request: Request) -> None:
    """Refuse what cannot be, before a model is loaded.

    Raises:
        UsageError, OutputError: as `files.check_output`; a package is missing, the opset cannot be, or two options do
            not go together.
    """
    if request.opset is not None and request.target != "onnx":
        raise UsageError(f"--opset is for --to onnx, not for --to {request.target}", "Leave it out.")
    if request.tune and request.target != "aoti":
        raise UsageError(
            f"--tune is for --to aoti, not for --to {request.target}, which is not compiled", "Leave it out."
        )
    if request.target == "onnx":
        onnx_graph.check_opset(request.opset)
        for package in _ONNX_PACKAGES:
            require(package)
        if request.dtype is torch.bfloat16:
            raise UsageError(
                "--dtype bfloat16: ONNX Runtime has no kernels for it on the CPU, so the file could not be checked",
                "Use float32 or float16.",
            )
        if request.device.type != "cpu":
            raise UsageError(f"--device {request.device}: an ONNX graph is of no device", "Leave --device out.")
    if request.target == "hub":
        _check_hub(request)
    else:
        check_suffix(request)
        check_output(request.output, request.force)


def open_for_export(
    name: str,
    recipe: str | None,
    options: LoadOptions | None = None,
    *,
    progress: Progress,
) -> Opened:
    """A compressed or dense model; with a recipe a dense one that follows it, uncalibrated. Errors as its parts."""
    if recipe is None:
        return artifact.open_model(name, options)
    opened = compress_dense(name, recipe, options, progress=progress)
    assert opened.compressed is not None
    plan = opened.compressed.plan
    opened.loaded.document = artifact.make_document(opened.loaded, plan, Recipe.load(recipe), None, {})
    return opened


def export(opened: Opened, request: Request, progress: Progress) -> Exported:
    """Write a model in a format that runs without repshift, checked against the model in torch.

    Args:
        opened: the model; it is moved to the device and dtype of the request, and stays there.

    Raises:
        CheckFailed: the file does not do what the model does, or is not what it is meant to be; nothing is left.
        ModelError: the model cannot be traced or compiled.
        UsageError, OutputError: as `check`.
    """
    check(request)
    subject = Subject.of(opened, request)
    if request.target == "hub":
        return _export_folder(subject, request, progress)
    write = {"onnx": _write_onnx, "pt2": _write_program, "aoti": _write_package}[request.target]
    output = request.output
    # runtimes go by the ending of a name, which the temporary file of an atomic write has not
    with (
        atomic_output(output, request.force) as temporary,
        tempfile.TemporaryDirectory(dir=output.absolute().parent, prefix=f".{output.name}.") as folder,
    ):
        path = Path(folder) / f"model{output.suffix}"
        document, operators = write(subject, request, path, progress)
        path.replace(temporary)
    return Exported(request.output, document, request.output.stat().st_size, operators)


def _write_onnx(
    subject: Subject, request: Request, path: Path, progress: Progress
) -> tuple[ExportDocument, dict[str, int] | None]:
    import onnx

    opset = onnx_graph.check_opset(request.opset)
    progress.note("tracing")
    program = trace_program(subject, request, watched=True)
    wanted = subject.run(subject.examples(request))
    places = [f"kept_{layer}" for layer in wanted.kept]
    document = subject.document(request, wanted.output, opset)
    progress.note(f"writing ONNX of opset {opset}")
    whole = onnx_graph.build_graph(program, opset, (subject.input_name, [subject.output_name, *places]))
    model = onnx_graph.without_outputs(whole, places)
    operators = onnx_graph.check_graph(model)
    onnx_graph.set_document(model, document)
    onnx.save(model, str(path))
    if request.verify:
        watched = path.with_stem("watched")
        onnx.save(whole, str(watched))
        run, watch = run_file(path, "onnx", document), run_file(watched, "onnx", document)
        verdict = verify.compare(subject, request, run, watch.outputs, progress)
        document = document.model_copy(update={"verified": verdict})
        onnx_graph.set_document(model, document)
        onnx.save(model, str(path))
    return document, operators


def _write_program(
    subject: Subject, request: Request, path: Path, progress: Progress
) -> tuple[ExportDocument, dict[str, int] | None]:
    progress.note("tracing")
    program = trace_program(subject, request, watched=False)
    document = subject.document(request, subject.run(subject.examples(request)).output)
    write_program(program, path, document)
    if request.verify:
        watched = path.with_stem("watched")
        write_program(trace_program(subject, request, watched=True), watched, document)
        run, watch = run_file(path, "pt2", document), run_file(watched, "pt2", document)
        verdict = verify.compare(subject, request, run, watch.outputs, progress)
        document = document.model_copy(update={"verified": verdict})
        write_program(program, path, document)
    return document, None


def _write_package(
    subject: Subject, request: Request, path: Path, progress: Progress
) -> tuple[ExportDocument, dict[str, int] | None]:
    progress.note("tracing")
    program = trace_program(subject, request, watched=False)
    document = subject.document(request, subject.run(subject.examples(request)).output)
    progress.note(f"compiling{' and timing kernels' if request.tune else ''}, which takes a minute or more")
    compile_package(program, path, request.device, tune=request.tune)
    if request.verify:
        # To compile it once more with the places as outputs would take twice as long. They are those of the program
        # that was compiled; the compiled code is compared by what it returns.
        watched = trace_program(subject, request, watched=True).module()
        run = run_file(path, "aoti", document)
        verdict = verify.compare(subject, request, run, watched, progress)
        document = document.model_copy(update={"verified": verdict})
    set_document(path, document)
    return document, None


def _export_folder(subject: Subject, request: Request, progress: Progress) -> Exported:
    loaded = subject.opened.loaded
    document = subject.document(request, subject.run(subject.examples(request)).output)
    with _atomic_folder(request.output) as folder:
        hub.write_weights(folder, subject, request)
        hub.write_config(folder, subject, document)
        in_timm = hub.known_to_timm(folder)
        if request.verify:
            again = Subject.of(hub.reload(folder), request)
            watch = partial(_traced, again)
            verdict = verify.compare(subject, request, lambda images: again.run(images).output, watch, progress)
            if in_timm:
                with Subject(subject.opened, dense=True).context():
                    hub.check_timm(folder, loaded.model, verify.inputs_for(subject, request)[0])
            document = document.model_copy(update={"verified": verdict})
            hub.write_config(folder, subject, document)
        hub.write_card(folder, document, in_timm)
    size = sum(file.stat().st_size for file in request.output.iterdir())
    return Exported(request.output, document, size)


def _traced(subject: Subject, images: Tensor) -> Sequence[Tensor]:
    trace = subject.run(images)
    return (trace.output, *trace.kept.values())


def _check_hub(request: Request) -> None:
    output = request.output
    if request.batch is not None:
        raise UsageError("--batch: a folder for the hub is of no batch size", "Leave it out.")
    if request.device.type != "cpu":
        raise UsageError(f"--device {request.device}: a folder for the hub is of no device", "Leave --device out.")
    if output.exists():
        if not request.force:
            raise UsageError(f"{output} already exists", "Add --force to replace it, or choose another name with -o.")
        if not output.is_dir() or not hub.is_ours(output):
            raise UsageError(
                f"{output} holds more than what `repshift export` writes, so it is not replaced",
                "Choose another name with -o, or remove it yourself.",
            )
    if not output.absolute().parent.is_dir():
        raise OutputError(f"the folder {output.parent} does not exist", "Create it first, or choose another place.")


@contextmanager
def _atomic_folder(output: Path) -> Iterator[Path]:
    """Yield a new folder beside `output`; on success it takes the place of that, on any failure it vanishes."""
    try:
        folder = Path(tempfile.mkdtemp(dir=output.absolute().parent, prefix=f".{output.name}.", suffix=".part"))
    except OSError as error:
        raise OutputError(f"cannot write to {output.parent}: {error.strerror or error}") from error
    old = folder.with_suffix(".old")
    try:
        yield folder
        folder.chmod(0o755)
        if output.exists():
            output.rename(old)
        folder.rename(output)
    except OSError as error:
        if old.exists() and not output.exists():
            old.rename(output)
        raise OutputError(
            f"cannot write {output}: {error.strerror or error}", "Nothing was left under its name."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
