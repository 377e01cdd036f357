"""onnx: a graph of standard operators, with constant token counts and a dynamic batch size.

The graph is made once, with the kept positions of each site as extra outputs. It is verified with these outputs. They
are removed from the file, with all nodes that only they need.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repshift_cli.errors import CheckFailed, ModelError, UsageError, first_line
from repshift_cli.export.format import Draft, Format
from repshift_cli.version import __version__

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import Tensor
    from torch.export import ExportedProgram

    from repshift_cli.checkpoints.schema import ExportDocument
    from repshift_cli.export.request import Request, Subject
    from repshift_cli.reduction.compressed_model import Trace
    from repshift_cli.utils.progress import Progress

OLDEST_OPSET, NEWEST_OPSET = 18, 23
DEFAULT_OPSET = 20

_MOST_BYTES = 2**31 - 2**20
"""A protobuf file is limited to 2 GiB."""

_MOST_TO_REWRITE = 1500
"""Largest number of nodes for all rewriting rules of the exporter, which take quadratic time."""

_OTHERWISE = "Try another --opset, or --to pt2."
_REFUSED = ("Loop", "If", "Scan", "Scatter", "ScatterElements", "ScatterND", "NonZero")


def _write(subject: Subject, request: Request, path: Path, progress: Progress) -> Draft:
    import onnx

    from repshift_cli.checkpoints import exported
    from repshift_cli.checkpoints.weights import METADATA_KEY
    from repshift_cli.export import quantize
    from repshift_cli.export.int8_onnx import OnnxMaker

    opset = request.opset or DEFAULT_OPSET
    drawn = quantize.draw_images(subject, request, progress) if request.quantize else None
    watched, places, output = watched_graph(subject, request, opset, progress)
    document = subject.document(request, output, opset)
    known: Sequence[tuple[Tensor, Trace]] = ()
    if drawn:
        job = quantize.Job(subject, request, document, path.parent, drawn, progress)
        source = path.with_stem("float")
        onnx.save(watched, str(source))
        del watched  # the weights once less in memory
        made = quantize.quantize(partial(OnnxMaker, source), job)
        watched, known = made.graph, made.known
        document = document.model_copy(update={"quantized": made.part})
    model = _without_outputs(watched, places)

    def save(document: ExportDocument) -> None:
        onnx.helper.set_model_props(model, {METADATA_KEY: document.model_dump_json()})
        onnx.save(model, str(path))

    def reopen() -> Callable[[Tensor], tuple[Tensor, ...]]:
        save(document)
        watched_path = path.with_stem("watched")
        onnx.save(watched, str(watched_path))
        run, watch = (exported.run_file(file, "onnx", document) for file in (path, watched_path))
        return lambda images: (run(images), *watch.outputs(images))

    return Draft(document, save, reopen, check_graph(model), known)


def watched_graph(
    subject: Subject, request: Request, opset: int, progress: Progress
) -> tuple[ModelProto, list[str], Tensor]:
    """The graph that returns the kept positions of each site too, the names of these outputs, and an output in torch.

    Raises a ModelError as `build_graph` and `trace_program`.
    """
    from repshift_cli.export.trace import trace_program

    progress.note("tracing")
    program = trace_program(subject, request, watched=True)
    example = subject.run(subject.examples(request))
    places = [f"kept_{layer}" for layer in example.kept]
    progress.note(f"writing ONNX of opset {opset}")
    return build_graph(program, opset, (subject.input_name, [subject.output_name, *places])), places, example.output


def _check(request: Request) -> None:
    opset = request.opset
    if opset is not None and not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise UsageError(
            f"invalid --opset {opset}: must be from {OLDEST_OPSET} to {NEWEST_OPSET}",
            f"Leave it out for {DEFAULT_OPSET}; 23 has attention as one operator.",
        )


def build_graph(program: ExportedProgram, opset: int, names: tuple[str, Sequence[str]]) -> ModelProto:
    """Convert a program to ONNX; `names` are those of the input and of the outputs.

    Raises:
        ModelError: an operation cannot be expressed in this opset, or the weights are too large for one file.
    """
    import onnx
    import torch

    from repshift_cli.checkpoints.exported import quiet_logs

    weights = sum(tensor.nbytes for tensor in (*program.state_dict.values(), *program.constants.values()))
    if weights > _MOST_BYTES:
        raise ModelError(
            f"weights of {weights / 1e9:.1f} GB do not fit into one ONNX file, which is limited to 2 GiB",
            "Use --dtype float16, or --to pt2.",
        )
    given, returned = names
    short = len(program.graph.nodes) <= _MOST_TO_REWRITE
    try:
        with quiet_logs(logging.WARNING), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            found: Any = torch.onnx.export(
                program,
                (),
                dynamo=True,
                opset_version=opset,
                input_names=[given],
                output_names=list(returned),
                custom_translation_table={torch.ops.aten.sort.stable: _stable_sort, torch.ops.aten.sort.default: _sort},
                verbose=False,
                optimize=short,
            )
            if not short:
                _tidy(found.model)
    except torch.onnx.errors.OnnxExporterError as error:
        raise ModelError(
            f"the model cannot be expressed in ONNX opset {opset}: {_reason(error)}", _OTHERWISE
        ) from error
    model: ModelProto = found.model_proto
    _clean(model)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(f"the graph is not valid in ONNX opset {opset}: {first_line(error)}", _OTHERWISE) from error
    return model


def _tidy(model: Any) -> None:
    """Fold constants, and remove duplicate and unused nodes."""
    from onnx_ir.passes import common
    from onnxscript import optimizer

    optimizer.fold_constants(model)
    for tidy in (common.RemoveUnusedNodesPass, common.CommonSubexpressionEliminationPass, common.RemoveUnusedNodesPass):
        tidy()(model)


def _sort(self: Any, dim: int = -1, descending: bool = False) -> Any:
    return _stable_sort(self, None, dim, descending)


def _stable_sort(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """A stable sort as TopK of all values. TopK prefers the lower position among equal values."""
    from onnxscript import opset18

    count = self.shape[dim]
    if not isinstance(count, int):
        raise TypeError(f"the number of sorted values is not constant: {count}")
    everything: Any = opset18.Constant(value_ints=[count])
    return opset18.TopK(self, everything, axis=dim, largest=int(descending), sorted=1)


def _without_outputs(model: ModelProto, names: Sequence[str]) -> ModelProto:
    from onnx.utils import Extractor

    outputs = [output.name for output in model.graph.output if output.name not in names]
    kept: ModelProto = Extractor(model).extract_model([entry.name for entry in model.graph.input], outputs)
    kept.graph.name, kept.producer_name, kept.producer_version = model.graph.name, "repshift", __version__
    return kept


def check_graph(model: ModelProto) -> dict[str, int]:
    """Check the operators of the graph and count them by name.

    Raises:
        CheckFailed: it has a loop, a branch, a scatter, a token count that is not constant, or an operator that is not
            part of the standard.
    """
    constants = {weight.name for weight in model.graph.initializer}
    constants |= {name for node in model.graph.node if node.op_type == "Constant" for name in node.output}
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx") or node.op_type in _REFUSED:
            raise CheckFailed(
                f"the graph has the unsupported operator {node.domain}{'::' if node.domain else ''}{node.op_type}",
                "Please report it, with the recipe.",
            )
        if node.op_type == "TopK" and node.input[1] not in constants:
            raise CheckFailed(f"{node.name} takes a number of tokens that is not constant", "Please report it.")
    return dict(sorted(Counter(node.op_type for node in model.graph.node).items()))


def _clean(model: ModelProto) -> None:
    """Remove the notes of the exporter, which name folders of this machine, and call the batch dimension `batch`."""
    graph = model.graph
    model.producer_name, model.producer_version, model.doc_string = "repshift", __version__, ""
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    del graph.metadata_props[:]
    free = next((dim.dim_param for dim in _dims(graph.input) if dim.dim_param), None)
    for dim in _dims((*graph.input, *graph.output, *graph.value_info)):
        if free and dim.dim_param == free:
            dim.dim_param = "batch"


def _dims(values: Any) -> Iterator[Any]:
    for value in values:
        yield from value.type.tensor_type.shape.dim


def _reason(error: BaseException) -> str:
    return first_line(error) if error.__cause__ is None else _reason(error.__cause__)


FORMAT = Format(
    "onnx",
    "a graph for ONNX Runtime",
    ".onnx",
    _write,
    packages=("onnx", "onnxscript", "onnxruntime"),
    dtypes=("float32", "float16"),  # ONNX Runtime has no bfloat16 kernels for the CPU
    devices=("cpu",),
    options=("batch", "opset", "quantize"),
    check=_check,
)
