"""`.pt2` archives: programs of `torch.export`, and the packages that AOTInductor compiles from them."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import torch
from torch.export import ExportedProgram

from repshift_cli.checkpoints.exported import DOCUMENT_FILE
from repshift_cli.checkpoints.schema import ExportDocument
from repshift_cli.checkpoints.weights import METADATA_KEY
from repshift_cli.errors import ModelError, OutputError
from repshift_cli.measure.compiled import quiet_tuning

__all__ = ["compile_package", "set_document", "write_program"]

_EXTRA = f"extra/{DOCUMENT_FILE}"
_COMPILED_METADATA = "_metadata.json"


def write_program(program: ExportedProgram, path: Path, document: ExportDocument) -> None:
    """Write a program, without the inputs that it was traced with and the folders of this machine, and a document.

    Raises:
        OutputError: it cannot be written.
    """
    program.example_inputs = None
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    try:
        torch.export.save(program, path, extra_files={DOCUMENT_FILE: document.model_dump_json()})
    except RuntimeError as error:  # torch's writer has no kind of its own for a full disk
        raise OutputError(f"cannot write the program: {_last_line(error)}", "Is there room for it?") from error


def compile_package(program: ExportedProgram, path: Path, device: torch.device, *, tune: bool = False) -> None:
    """Compile a program with AOTInductor into a package.

    For the CPU weights are laid out in advance as its kernels want them, which else each run does anew. (DeiT-S, one
    image in bfloat16: a fifth less time.)

    Args:
        device: where the program is to run, and its weights are.
        tune: time several kernels for each matrix product, at the sizes that the program was traced with, and take the
            fastest.

    Raises:
        ModelError: it cannot be compiled here.
    """
    settings = {"freezing": device.type == "cpu"} | ({"max_autotune": True} if tune else {})
    try:
        with quiet_tuning():
            torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
    except Exception as error:  # compilers fail in many ways
        raise ModelError(
            f"AOTInductor cannot compile the model here: {_last_line(error)}",
            "It needs a C++ compiler such as g++ for the CPU, and Triton and nvcc for CUDA. Use --to pt2 without.",
        ) from error


def set_document(path: Path, document: ExportDocument) -> None:
    """Write what a package says of itself: as a file of its own, and into what its loader calls metadata."""
    text, changed = document.model_dump_json(), path.with_stem("changed")
    with zipfile.ZipFile(path) as before, zipfile.ZipFile(changed, "w", zipfile.ZIP_STORED) as after:
        names = before.namelist()
        root = names[0].partition("/")[0]
        for name in names:
            content = before.read(name)
            if name.endswith(_COMPILED_METADATA):
                content = json.dumps({**json.loads(content), METADATA_KEY: text}).encode()
            after.writestr(name, content)
        after.writestr(f"{root}/{_EXTRA}", text)
    changed.replace(path)


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
