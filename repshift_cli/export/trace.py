"""Trace a model into a program of `torch.export`. All graphs are made from it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from repshift_cli.checkpoints.exported import quiet_logs
from repshift_cli.errors import ModelError, first_line
from repshift_cli.export.request import Request, Subject


def trace_program(subject: Subject, request: Request, *, watched: bool) -> ExportedProgram:
    """Trace the model, with a dynamic batch size unless the request fixes it.

    Args:
        watched: whether the positions that each site keeps are outputs too.

    Raises:
        ModelError: it cannot be traced, or needs operations that are not part of torch.
    """
    module, inputs = _Traceable(subject, watched).eval(), subject.examples(request)
    sizes = None if request.batch is not None else ({0: Dim("batch")},)
    try:
        # torch logs a traceback where an exception, such as that of a signal, passes through its operations
        with torch.no_grad(), quiet_logs(logging.CRITICAL), _without_masks():
            program = torch.export.export(module, (inputs,), dynamic_shapes=sizes, strict=False)
    except (RuntimeError, ValueError, AttributeError, TypeError) as error:  # errors of torch.export are of these types
        raise ModelError(
            f"{subject.opened.loaded.description.name} cannot be traced into a graph: {first_line(error)}",
            "Its code depends on values. Try `--batch 1`, or report it.",
        ) from error
    if foreign := foreign_operations(program):
        raise ModelError(
            f"the graph needs operations that are not part of torch: {', '.join(foreign)}",
            "Export on a machine without the package of these kernels.",
        )
    return program


@contextmanager
def _without_masks() -> Iterator[None]:
    """Let transformers leave out the mask of an input without padding, as outside of a trace.

    While it is traced it makes a mask that hides nothing, which would stay in the graph and be gathered at each site.
    """
    masks = sys.modules.get("transformers.masking_utils")
    name = "is_torchdynamo_exporting"
    original = getattr(masks, name, None)
    if original is not None:
        setattr(masks, name, lambda: False)
    try:
        yield
    finally:
        if original is not None:
            setattr(masks, name, original)


def foreign_operations(program: ExportedProgram) -> list[str]:
    """Operations of the graph that are not part of torch."""
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    return sorted({str(each) for each in targets if getattr(each, "namespace", None) not in (None, "aten", "prims")})


class _Traceable(nn.Module):
    """The argument of `forward` gives the input of the graph its name."""

    def __init__(self, subject: Subject, watched: bool) -> None:
        super().__init__()
        self.model = subject.opened.module
        self._subject, self._watched = subject, watched

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        if self._watched:
            trace = self._subject.run(images)
            return (trace.output, *trace.kept.values())
        with self._subject.context():
            output: Tensor = self.model(images)
        return output
