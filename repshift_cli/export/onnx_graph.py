"""ONNX: from a traced program to a graph of standard operators, with constant counts and any number of inputs.

The graph is made once, with the places that each site keeps as outputs beside the model's own. So it is checked; then
those outputs go, with all that only they needed, and what is left is the file.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram

from repshift_cli.checkpoints.schema import ExportDocument
from repshift_cli.checkpoints.weights import METADATA_KEY
from repshift_cli.errors import CheckFailed, ModelError, UsageError, first_line

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = [
    "DEFAULT_OPSET",
    "NEWEST_OPSET",
    "OLDEST_OPSET",
    "build_graph",
    "check_graph",
    "check_opset",
    "set_document",
    "without_outputs",
]

OLDEST_OPSET, NEWEST_OPSET = 18, 23
DEFAULT_OPSET = 20

_ATTENTION_OPSET = 23
_MOST_BYTES = 2**31 - 2**20
"""A protobuf file holds no more than 2 GiB."""

_MOST_TO_REWRITE = 1500
"""Nodes of a program whose graph is rewritten by all rules of the exporter, which takes the square of their number."""

_OTHERWISE = "Try another --opset, or --to pt2."

_REFUSED = ("Loop", "If", "Scan", "Scatter", "ScatterElements", "ScatterND", "NonZero")


def check_opset(opset: int | None) -> int:
    """The opset to use.

    Raises:
        UsageError: it is too old or too new.
    """
    chosen = DEFAULT_OPSET if opset is None else opset
    if not OLDEST_OPSET <= chosen <= NEWEST_OPSET:
        raise UsageError(
            f"--opset {chosen}: the graph needs opset {OLDEST_OPSET} or later, and torch writes up to {NEWEST_OPSET}",
            f"Leave it out for {DEFAULT_OPSET}; {_ATTENTION_OPSET} has attention as one operator.",
        )
    return chosen


def build_graph(program: ExportedProgram, opset: int, names: tuple[str, Sequence[str]]) -> ModelProto:
    """The graph of a program.

    Args:
        names: of the input, and of the outputs.

    Raises:
        ModelError: an operation of the model has no form in this opset, or the weights are too large for one file.
    """
    _check_weights(program)
    given, returned = names
    short = len(program.graph.nodes) <= _MOST_TO_REWRITE
    try:
        with _quiet():
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
        raise ModelError(f"the model has no form in ONNX of opset {opset}: {_reason(error)}", _OTHERWISE) from error
    model: ModelProto = found.model_proto
    _clean(model)
    _check_valid(model, opset)
    return model


def _check_weights(program: ExportedProgram) -> None:
    """Refuse more weights than one file holds."""
    weights = sum(tensor.nbytes for tensor in (*program.state_dict.values(), *program.constants.values()))
    if weights > _MOST_BYTES:
        raise ModelError(
            f"weights of {weights / 1e9:.1f} GB do not fit into one ONNX file, which ends at 2 GiB",
            "Use --dtype float16, or --to pt2.",
        )


def _tidy(model: Any) -> None:
    """Fold constants, and leave out of a graph what is there twice or for nothing."""
    from onnx_ir.passes import common
    from onnxscript import optimizer

    optimizer.fold_constants(model)
    for tidy in (common.RemoveUnusedNodesPass, common.CommonSubexpressionEliminationPass, common.RemoveUnusedNodesPass):
        tidy()(model)


def _sort(self: Any, dim: int = -1, descending: bool = False) -> Any:
    return _stable_sort(self, None, dim, descending)


def _stable_sort(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """`sort` by TopK of all, which puts the lower of two equal values first as a stable sort does."""
    from onnxscript import opset18

    count = self.shape[dim]
    if not isinstance(count, int):
        raise TypeError(f"a sort of {count} values has no constant count")
    everything: Any = opset18.Constant(value_ints=[count])
    return opset18.TopK(self, everything, axis=dim, largest=int(descending), sorted=1)


def without_outputs(model: ModelProto, names: Sequence[str]) -> ModelProto:
    """The model without these outputs, and without the nodes and weights that only they needed."""
    from onnx.utils import Extractor

    outputs = [output.name for output in model.graph.output if output.name not in names]
    kept: ModelProto = Extractor(model).extract_model([entry.name for entry in model.graph.input], outputs)
    kept.graph.name, kept.producer_name, kept.producer_version = model.graph.name, "repshift", _version()
    return kept


def set_document(model: ModelProto, document: ExportDocument) -> None:
    """Write what the file says of itself into its metadata."""
    import onnx

    onnx.helper.set_model_props(model, {METADATA_KEY: document.model_dump_json()})


def check_graph(model: ModelProto) -> dict[str, int]:
    """Hold the graph to what it is meant to be; returns how often each operator stands in it.

    Raises:
        CheckFailed: it loops or branches, scatters, counts by a value that is no constant, or has an operator that is
            not of the standard.
    """
    constants = {weight.name for weight in model.graph.initializer}
    constants |= {name for node in model.graph.node if node.op_type == "Constant" for name in node.output}
    counts: dict[str, int] = {}
    for node in model.graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
        if node.domain not in ("", "ai.onnx") or node.op_type in _REFUSED:
            raise CheckFailed(
                f"the graph has the operator {node.domain}{'::' if node.domain else ''}{node.op_type}, which it should "
                "do without",
                "Please report it, with the recipe.",
            )
        if node.op_type == "TopK" and node.input[1] not in constants:
            raise CheckFailed(f"{node.name} takes a number of tokens that is not constant", "Please report it.")
    return dict(sorted(counts.items()))


def _clean(model: ModelProto) -> None:
    """Take out notes of the exporter, in which the folders of this machine stand, and call the batch a batch."""
    graph = model.graph
    model.producer_name, model.producer_version, model.doc_string = "repshift", _version(), ""
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


def _check_valid(model: ModelProto, opset: int) -> None:
    """Refuse what the checker or shape inference objects to."""
    import onnx

    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(f"the graph is not valid ONNX of opset {opset}: {first_line(error)}", _OTHERWISE) from error


def _reason(error: Exception) -> str:
    """The innermost cause that says something."""
    found: BaseException = error
    while found.__cause__ is not None:
        found = found.__cause__
    return first_line(found)


def _version() -> str:
    from repshift_cli.version import __version__

    return __version__


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the steps and hints that the exporter prints."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
