"""aoti: a package that AOTInductor compiles from a program of `torch.export`."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from repshift_cli.errors import ModelError, last_line
from repshift_cli.export.format import Draft, Format
from repshift_cli.utils.files import DeferredErrors

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.export import ExportedProgram

    from repshift_cli.checkpoints.schema import ExportDocument
    from repshift_cli.export.request import Request, Subject
    from repshift_cli.utils.progress import Progress

_COMPILED_METADATA = "_metadata.json"


def _write(subject: Subject, request: Request, path: Path, progress: Progress) -> Draft:
    from repshift_cli.checkpoints import exported
    from repshift_cli.export.trace import trace_program

    progress.note("tracing")
    program = trace_program(subject, request, watched=False)
    document = subject.document(request, subject.run(subject.examples(request)).output)
    progress.note(f"compiling{' and timing kernels' if request.tune else ''}, which takes a minute or more")
    _compile(program, path, request.device, tune=request.tune)

    def reopen() -> Callable[[Tensor], tuple[Tensor, ...]]:
        # To compile a package with the positions as outputs would double the time. They are read from the program that
        # was compiled; the compiled code is compared by its output.
        watch = trace_program(subject, request, watched=True).module()
        run = exported.run_file(path, "aoti", document)
        return lambda images: (run(images), *watch(images))

    return Draft(document, partial(_set_document, path), reopen)


def _compile(program: ExportedProgram, path: Path, device: torch.device, *, tune: bool) -> None:
    """Compile a program into a package.

    For the CPU, `freezing` stores the weights in the layout of the kernels, which is else computed in each run (DeiT-S,
    one image in bfloat16: 20% less time). `tune` times several kernels for each matrix product, at the traced sizes.
    """
    import torch

    from repshift_cli.measure.compiled import quiet_tuning

    settings = {"freezing": device.type == "cpu"} | ({"max_autotune": True} if tune else {})
    with DeferredErrors(path) as file:
        try:
            with quiet_tuning():
                torch._inductor.aoti_compile_and_package(program, package_path=file, inductor_configs=settings)
        except Exception as error:  # compilers raise errors of many types
            raise ModelError(
                f"AOTInductor cannot compile the model here: {last_line(error)}",
                "It needs a C++ compiler such as g++ for the CPU, and Triton and nvcc for CUDA. Use --to pt2 without.",
            ) from error


def _set_document(path: Path, document: ExportDocument) -> None:
    """Add the metadata to a package: as a file, and in the metadata of its loader."""
    from repshift_cli.checkpoints.exported import DOCUMENT_FILE
    from repshift_cli.checkpoints.weights import METADATA_KEY

    text, changed = document.model_dump_json(), path.with_stem("changed")
    with zipfile.ZipFile(path) as before, zipfile.ZipFile(changed, "w", zipfile.ZIP_STORED) as after:
        names = before.namelist()
        for name in names:
            content = before.read(name)
            if name.endswith(_COMPILED_METADATA):
                content = json.dumps({**json.loads(content), METADATA_KEY: text}).encode()
            after.writestr(name, content)
        after.writestr(f"{names[0].partition('/')[0]}/extra/{DOCUMENT_FILE}", text)
    changed.replace(path)


FORMAT = Format("aoti", "compiled by AOTInductor", "_aoti.pt2", _write, options=("batch", "tune"))
