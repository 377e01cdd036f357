"""Quantise a model of OpenVINO to int8 with NNCF.

Quantised are products with constant weights and convolutions, and of convolutional networks what NNCF quantises between
them. Scores, TopK and products of two activations stay in float32. Weights have 7 bits, as in `int8_onnx`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from repshift_cli.checkpoints.exported import compile_ir
from repshift_cli.errors import ModelError
from repshift_cli.export.quantize import Job, Maker, Pair, module_names, quiet
from repshift_cli.utils.intel import import_without_telemetry

if TYPE_CHECKING:
    from onnx import ModelProto

_PRODUCTS = ("MatMul", "Convolution", "GroupConvolution")
_QUANTIZER = "FakeQuantize"

_ENDS = (*_PRODUCTS, "ShapeOf", "TopK")
"""Operations whose outputs are no rounded values of their input."""


class OpenVinoMaker(Maker):
    """Makes models of OpenVINO from one that NNCF quantised, without the quantisers of layers in float32."""

    def __init__(self, watched: ModelProto, job: Job) -> None:
        self._model = import_without_telemetry("openvino").Core().read_model(watched.SerializeToString())
        self._job = job
        self._quantized: Any = None
        self._readers: dict[str, set[str]] = {}
        self.layers, self.titles = [], {}
        for name, title in module_names(watched.graph).items():
            self.titles |= {name: title, f"{name}/WithoutBiases": title}  # the product of a Gemm or Conv with a bias

    def calibrate(self, images: Tensor) -> None:
        with quiet():
            nncf = import_without_telemetry("nncf")
        parts, port = self._job.batches(images), self._job.document.input.name
        ops, used = self._model.get_ordered_ops(), _used(self._model)
        types, constants = list(used.values()), _constants(ops)
        transformer = "Softmax" in types or types.count("Convolution") <= 1
        ignored = [
            name
            for op in ops
            if (name := op.get_friendly_name()) not in used
            or used[name] == "GatherElements"  # OpenVINO has none for int8: a product behind it would run in float32
            or (used[name] == "MatMul" and constants.isdisjoint(_inputs(op)))
        ]
        with self._job.progress.task("calibrating", len(parts) * (2 if transformer else 1)) as task, quiet():

            def feed(part: Tensor) -> dict[str, Any]:
                task.advance()
                return {port: part.contiguous().numpy()}

            self._quantized = nncf.quantize(
                self._model,
                nncf.Dataset(parts, feed),
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=len(parts),
                model_type=nncf.ModelType.TRANSFORMER if transformer else None,
                ignored_scope=nncf.IgnoredScope(ignored, validate=False),
                advanced_parameters=nncf.AdvancedQuantizationParameters(
                    overflow_fix=nncf.OverflowFix.ENABLE,
                    disable_bias_correction=True,  # a corrected bias is wrong for a layer in float32
                    backend_params={"compress_weights": False},
                ),
            )
        self._find_layers()

    def _find_layers(self) -> None:
        """Find the layers, and the products that read each quantiser, directly or through other operations."""
        ops = self._quantized.get_ordered_ops()
        constants, behind = _constants(ops), dict[str, set[str]]()
        for op in ops:
            name, kind = op.get_friendly_name(), op.get_type_name()
            found = {each for given in _inputs(op) for each in behind[given]}
            if kind == _QUANTIZER:
                self._readers[name] = set()
            elif kind in _PRODUCTS:
                for each in found:
                    self._readers[each].add(name)
                if not found.isdisjoint(constants):
                    self.layers.append(name)
            behind[name] = {name} if kind == _QUANTIZER else set() if kind in _ENDS else found
        self._readers = {name: readers & set(self.layers) for name, readers in self._readers.items()}
        if not self.layers:
            raise ModelError("NNCF quantises none of the layers of the model", "Leave --quantize out.")

    def build(self, excluded: Collection[str]) -> Any:
        from openvino._offline_transformations import compress_quantize_weights_transformation

        model = self._quantized.clone()
        for quantizer in [op for op in model.get_ordered_ops() if op.get_type_name() == _QUANTIZER]:
            source, readers = quantizer.input_value(0), self._readers[quantizer.get_friendly_name()]
            alone = bool(readers) and readers <= set(excluded)
            for target in quantizer.output(0).get_target_inputs():
                if alone or target.get_node().get_friendly_name() in excluded:
                    target.replace_source_output(source)
        compress_quantize_weights_transformation(model)
        return model

    def run(self, graph: Any, known: Sequence[Pair]) -> list[tuple[Tensor, ...]]:
        runtime = compile_ir(graph, self._job.document)
        found = [tuple(map(torch.from_numpy, runtime(images.numpy()).to_tuple())) for images, _ in known]
        return [(outputs[0], *outputs) for outputs in found]


def _inputs(op: Any) -> list[str]:
    return [value.get_node().get_friendly_name() for value in op.input_values()]


def _constants(ops: Sequence[Any]) -> set[str]:
    """Names of the operations that depend on constants only."""
    found: set[str] = set()
    for op in ops:
        inputs = _inputs(op)
        if op.get_type_name() == "Constant" or (inputs and found.issuperset(inputs)):
            found.add(op.get_friendly_name())
    return found


def _used(model: Any) -> dict[str, str]:
    """Types by name of the operations that the first output needs for more than a choice of tokens; no scores."""
    waiting, found = [model.get_results()[0]], dict[str, str]()
    while waiting:
        op = waiting.pop()
        name, kind = op.get_friendly_name(), op.get_type_name()
        if name not in found and kind != "TopK":
            found[name] = kind
            waiting += [value.get_node() for value in op.input_values()]
    return found
