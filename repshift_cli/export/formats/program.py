"""pt2: a program of `torch.export`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from repshift_cli.export.format import Draft, Format
from repshift_cli.utils.files import DeferredErrors

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram

    from repshift_cli.checkpoints.schema import ExportDocument
    from repshift_cli.export.request import Request, Subject
    from repshift_cli.utils.progress import Progress


def _write(subject: Subject, request: Request, path: Path, progress: Progress) -> Draft:
    from repshift_cli.checkpoints import exported
    from repshift_cli.export.trace import trace_program

    progress.note("tracing")
    program = trace_program(subject, request, watched=False)
    document = subject.document(request, subject.run(subject.examples(request)).output)

    def reopen() -> Callable[[Tensor], tuple[Tensor, ...]]:
        watched = path.with_stem("watched")
        _save_program(program, path, document)
        _save_program(trace_program(subject, request, watched=True), watched, document)
        run, watch = (exported.run_file(file, "pt2", document) for file in (path, watched))
        return lambda images: (run(images), *watch.outputs(images))

    return Draft(document, partial(_save_program, program, path), reopen)


def _save_program(program: ExportedProgram, path: Path, document: ExportDocument) -> None:
    """Save a program with its metadata, without example inputs and folder names of this machine."""
    import torch

    from repshift_cli.checkpoints.exported import DOCUMENT_FILE

    program.example_inputs = None
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    with DeferredErrors(path) as file:
        torch.export.save(program, file, extra_files={DOCUMENT_FILE: document.model_dump_json()})


FORMAT = Format("pt2", "a program of torch.export", ".pt2", _write)
