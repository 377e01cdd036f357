"""Quantise an ONNX graph to int8 with the quantiser of ONNX Runtime.

Quantised are products with constant weights, and of convolutional networks the additions and activations between them.
Scores, TopK, softmax, norms and products of two activations stay in float32. Weights have a scale per channel and 7
bits: without VNNI, a CPU adds pairs of products in 16 bits, which saturates if weights have 8 bits, so answers would
differ between machines.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from repshift_cli.checkpoints.exported import run_file
from repshift_cli.errors import ModelError
from repshift_cli.export.quantize import Job, Maker, Pair, error, module_names, quiet

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto

_PERCENTILES = (100.0, 99.999, 99.99)
"""Shares of the values inside of the range of an activation, of which the best is taken; 100 is minimum to maximum."""

_PRODUCTS, _BETWEEN = ("MatMul", "Gemm", "Conv"), ("Relu", "Clip", "MaxPool", "Add")
_MATRIX_DIMS, _IMAGE_DIMS = 2, 4

_FLOAT_OUTPUT = ("MatMul", "Gemm")
"""Products that return float32, which their kernels do without a second rounding."""


class OnnxMaker(Maker):
    """Makes graphs with the quantiser of ONNX Runtime, static or dynamic.

    The graph in float32 stays on the disk: in memory it would be one more copy of the weights.
    """

    def __init__(self, source: Path, job: Job) -> None:
        import onnx
        from onnxruntime.quantization import quant_pre_process

        self._job, self._static = job, job.request.quantize == "int8"
        self._path = job.folder / "prepared.onnx"
        with quiet():
            quant_pre_process(str(source), str(self._path), skip_symbolic_shape=True)
        model = onnx.load(str(self._path))
        standard = [entry for entry in model.opset_import if not entry.domain]
        del model.opset_import[:]  # the optimiser names all domains that it knows
        model.opset_import.extend(standard)
        onnx.save(model, str(self._path))
        self._ranges: Any = None
        nodes = _find_layers(model.graph, static=self._static)
        self.layers = [node.name for node in nodes if node.op_type in _PRODUCTS]
        self.titles = module_names(model.graph)
        self._between = [node.name for node in nodes if node.op_type not in _PRODUCTS]
        self._tensors = {name for node in nodes for name in node.input if name}
        self._tensors |= {node.output[0] for node in nodes if node.op_type not in _FLOAT_OUTPUT}
        self._tensors -= {weight.name for weight in model.graph.initializer}

    def calibrate(self, images: Tensor) -> float:
        """Take the percentile whose ranges give the least error."""
        tried = []
        for percentile, ranges in zip(_PERCENTILES, self._record(images), strict=True):
            self._ranges = ranges
            tried.append((error(self, self.build(()), self._job.known), percentile, ranges))
        _, best, self._ranges = min(tried, key=lambda each: each[0])
        return best

    def _record(self, images: Tensor) -> list[Any]:
        """The ranges of each percentile, from histograms of the activations, with one batch in memory at a time."""
        from onnxruntime.quantization.calibrate import PercentileCalibrater

        found = PercentileCalibrater(self._path, augmented_model_path=str(self._job.folder / "augmented.onnx"))
        select = found.select_tensors_to_calibrate
        found.select_tensors_to_calibrate = lambda model: (self._tensors, select(model)[1])
        with quiet():
            found.augment_graph()
            found.create_inference_session()
        del found.model  # the session has its own copy
        parts = self._job.batches(images)
        with self._job.progress.task("calibrating", len(parts)) as task:
            for part in parts:
                with quiet():
                    found.collect_data(_OneBatch({self._job.document.input.name: part.contiguous().numpy()}))
                task.advance()
        ranges = []
        for percentile in _PERCENTILES:
            found.collector.percentile = percentile
            with quiet():
                ranges.append(found.compute_data())
        return ranges

    def build(self, excluded: Collection[str]) -> ModelProto:
        """The graph with all layers but these in int8."""
        import onnx
        from onnxruntime.quantization import QDQQuantizer, QuantType, quantize_dynamic

        chosen = [name for name in self.layers if name not in excluded]
        if not chosen and not self._between:  # no names mean all nodes
            return onnx.load(str(self._path))
        if not self._static:
            path = self._job.folder / "dynamic.onnx"
            with quiet():
                quantize_dynamic(
                    self._path,
                    path,
                    op_types_to_quantize=["MatMul"],
                    per_channel=True,
                    reduce_range=True,
                    weight_type=QuantType.QInt8,
                    nodes_to_quantize=[*chosen, *(f"{name}_MatMul" for name in chosen)],  # a Gemm is replaced
                )
            return onnx.load(str(path))
        quantizer = QDQQuantizer(
            onnx.load(str(self._path)),
            per_channel=True,
            reduce_range=True,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=self._ranges,
            nodes_to_quantize=[*chosen, *self._between],
            nodes_to_exclude=[],
            op_types_to_quantize=[*_PRODUCTS, *_BETWEEN],
            extra_options={"OpTypesToExcludeOutputQuantization": list(_FLOAT_OUTPUT)},
        )
        with quiet():
            quantizer.quantize_model()
        model: ModelProto = quantizer.model.model
        return model

    def run(self, graph: ModelProto, known: Sequence[Pair]) -> list[tuple[Tensor, ...]]:
        import onnx

        path = self._job.folder / "mix.onnx"
        onnx.save(graph, str(path))
        runtime = run_file(path, "onnx", self._job.document)
        return [(found[0], *found) for images, _ in known for found in [runtime.outputs(images)]]


class _OneBatch:
    """What the calibrater of ONNX Runtime reads: one batch, then None."""

    def __init__(self, batch: dict[str, Any]) -> None:
        self._batch: dict[str, Any] | None = batch

    def get_next(self) -> dict[str, Any] | None:
        batch, self._batch = self._batch, None
        return batch


def _find_layers(graph: GraphProto, *, static: bool) -> list[Any]:
    """Nodes that can be quantised: products with constant weights, and what lies between convolutions.

    Raises:
        ModelError: most of the weights have no int8 kernel.
    """
    sizes = {weight.name: list(weight.dims) for weight in graph.initializer}
    used = {graph.output[0].name}
    for node in reversed(graph.node):  # what only TopK needs are scores
        if node.op_type != "TopK" and not used.isdisjoint(node.output):
            used.update(node.input)
    weights = {
        node.output[0]: sizes[node.input[1]]
        for node in graph.node
        if node.op_type in _PRODUCTS
        and node.output[0] in used
        # there is no kernel for a stack of matrices
        and (node.op_type == "Conv" or len(sizes.get(node.input[1], ())) == _MATRIX_DIMS)
        and sizes.get(node.input[1])
    }
    convolutions = {
        node.output[0]
        for node in graph.node
        if node.op_type == "Conv" and len(weights.get(node.output[0], ())) == _IMAGE_DIMS
    }
    if len(convolutions) == 1 or not static:  # the output of a patch embedding is the stream, which stays in float32
        convolutions = set()
    inside, chosen = set(convolutions), []
    for node in graph.node:
        given = [name for name in node.input if name and name not in sizes]
        if node.output[0] in (weights if node.op_type != "Conv" else convolutions):
            chosen.append(node)
        elif node.op_type in _BETWEEN and given and inside.issuperset(given):
            inside.update(node.output)
            chosen.append(node)
    taken = sum(torch.Size(weights.get(node.output[0], [0])).numel() for node in chosen)
    if not taken or 2 * taken < sum(torch.Size(size).numel() for size in weights.values()):
        raise ModelError(
            "most weights of the model are in convolutions that ONNX Runtime cannot run in int8",
            "Leave --quantize out." if static else "Use --quantize int8, which needs images.",
        )
    return chosen
