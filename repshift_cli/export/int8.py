"""Quantise an ONNX graph to int8 with the quantiser of ONNX Runtime.

Quantised are products with constant weights, and of convolutional networks the additions and activations between them.
Scores, TopK, softmax, norms and products of two activations stay in float32. Weights have a scale per channel and 7
bits: without VNNI, a CPU adds pairs of products in 16 bits, which saturates if weights have 8 bits, so answers would
differ between machines. Layers that cost the most agreement stay in float32, worst first, until the target holds.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from repshift_cli.checkpoints.exported import quiet_logs, run_file
from repshift_cli.checkpoints.schema import ExportDocument, Quantization, Verdict
from repshift_cli.compression.inputs import load_job_inputs, split_inputs
from repshift_cli.compression.notes import Notes
from repshift_cli.compression.settings import Amounts, Settings
from repshift_cli.data.inputs import ImageBatch
from repshift_cli.errors import DataError, ModelError
from repshift_cli.export import verify
from repshift_cli.export.request import Request, Subject
from repshift_cli.measure.cpu import int8_note
from repshift_cli.reduction.compressed_model import Trace
from repshift_cli.utils.progress import Progress

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto

_PERCENTILES = (100.0, 99.999, 99.99)
"""Shares of the values inside of the range of an activation, of which the best is taken; 100 is minimum to maximum."""

_HELD_OUT, _TRIED = 100, 16
"""Inputs that the agreement is measured on, and how many of them serve choices between graphs."""

_MOST_GROUPS = 32
"""Layers are measured one by one, or in groups of neighbours if there are more."""

_CALIBRATION_BATCH, _BATCHES, _LARGE_BATCH = 4, (1, 2, 5), 8

_FLAT, _MOST_FLAT = 1e-2, 0.5
"""Least deviation within a row of an image with content, and the largest share of images without content."""

_PRODUCTS, _BETWEEN = ("MatMul", "Gemm", "Conv"), ("Relu", "Clip", "MaxPool", "Add")
_MATRIX_DIMS, _IMAGE_DIMS = 2, 4

_FLOAT_OUTPUT = ("MatMul", "Gemm")
"""Products that return float32, which their kernels do without a second rounding."""

Images = tuple[ImageBatch | None, ImageBatch]
"""Inputs for the ranges of activations (None if the graph computes them), and others for the agreement."""

Pair = tuple[Tensor, Trace]
"""Inputs, and the trace of the model in torch."""


@dataclass(frozen=True)
class Quantized:
    """A quantised graph with its kept positions, how it was made, and what it is verified on."""

    graph: ModelProto
    part: Quantization
    known: list[Pair]


def quantize(watched: ModelProto, job: Job, images: Images) -> Quantized:
    """Quantise a graph that returns the kept positions too; `images` are those of `draw_images`.

    Raises:
        CheckFailed: no mix of layers in int8 and float32 meets the agreement.
        ModelError: most of the weights have no int8 kernel.
    """
    request, kind = job.request, job.request.quantize
    calibration, held_out = images
    job.progress.note(f"quantising to {kind}")
    if note := int8_note():
        job.progress.warn(note)
    maker = _Maker(watched, job)
    known = _traces(job, held_out) if request.verify or calibration is not None else []
    percentile = None
    if calibration is not None:
        maker.calibrate(calibration.tensor, job)
        percentile = maker.choose_percentile(lambda graph: job.error(graph, known))
    excluded = _fit(maker, job, known) if request.verify else []
    part = Quantization(
        kind="int8" if kind == "int8" else "int8-dynamic",
        layers=len(maker.layers) - len(excluded),
        float_layers=[maker.titles[name] for name in excluded],
        weight_bits=7,
        calibration=None if calibration is None else calibration.identity,
        percentile=percentile,
    )
    return Quantized(maker.build(excluded), part, known)


@dataclass(frozen=True)
class Job:
    """What is quantised, and a folder for temporary files."""

    subject: Subject
    request: Request
    document: ExportDocument
    folder: Path
    progress: Progress

    def run(self, graph: ModelProto, known: Sequence[Pair]) -> list[tuple[Tensor, ...]]:
        """Outputs of a graph as those of `Draft.reopen`: the output, the output again, the kept positions."""
        import onnx

        path = self.folder / "mix.onnx"
        onnx.save(graph, str(path))
        runtime = run_file(path, "onnx", self.document)
        return [(found[0], *found) for images, _ in known for found in [runtime.outputs(images)]]

    def error(self, graph: ModelProto, known: Sequence[Pair]) -> float:
        """Relative error of the outputs on a few inputs, plus the share of other kept positions."""
        count = 0
        few: list[Pair] = []
        for pair in known:
            if count < _TRIED:
                few.append(pair)
                count += len(pair[0])
        counts, wrong, total = verify.Counts(), 0.0, 0.0
        for (_, wanted), found in zip(few, self.run(graph, few), strict=True):
            counts.add(wanted, found)
            wrong += float((found[0] - wanted.output).square().sum())
            total += float(wanted.output.square().sum())
        moved = 1 - counts.same_places / counts.places if counts.places else 0.0
        return (wrong / max(total, 1e-12)) ** 0.5 + moved


def draw_images(subject: Subject, request: Request, progress: Progress) -> Images:
    """Draw the inputs to quantise with.

    Raises:
        DataError: there are none, too few, or ones that are nearly equal.
    """
    loaded = subject.opened.loaded
    count = Amounts.of(Settings(calibration_images=request.calibration_images), loaded).calibration
    held_out, notes = min(count, _HELD_OUT), Notes(progress)
    if request.quantize == "int8-dynamic":
        return None, load_job_inputs(loaded, request.calibration, held_out, 0, notes)
    if request.calibration is None and not loaded.is_builtin:
        raise DataError(
            "--quantize int8 needs images to find the ranges of activations",
            "Give unlabelled images of the model's own kind: --calibration FOLDER. Without images: int8-dynamic.",
        )
    batch = load_job_inputs(loaded, request.calibration, count + held_out, 0, notes)
    flat = batch.tensor.std(dim=-1).flatten(1).amax(dim=1) < _FLAT
    if float(flat.float().mean()) > _MOST_FLAT:
        raise DataError(f"most images of {batch.identity['where']} are of one colour", "Give images with content.")
    return split_inputs(batch, count)


def _traces(job: Job, inputs: ImageBatch) -> list[Pair]:
    """What the model computes in torch, in batches of several sizes, or of that of the request."""
    images, batch = inputs.tensor, job.request.batch
    if batch is not None:
        places = torch.arange(-(-len(images) // batch) * batch) % len(images)
        parts = list(images[places].split(batch))
    else:
        first = sum(_BATCHES)
        small = list(_BATCHES) if len(images) > first else 1
        parts = [*images[:first].split(small), *images[first:].split(_LARGE_BATCH)]
    found = []
    with job.progress.task("running the model in torch", len(parts)) as task, torch.no_grad():
        for part in parts:
            found.append((part, job.subject.run(part)))
            task.advance()
    return found


def _fit(maker: _Maker, job: Job, known: Sequence[Pair]) -> list[str]:
    """The fewest layers that stay in float32, worst first, so that the target holds; errors as `quantize`."""
    verdicts: list[Verdict] = []

    def passes(excluded: list[str]) -> bool:
        found = job.run(maker.build(excluded), known)
        verdicts.append(verify.judge(job.subject, job.request, [wanted for _, wanted in known], found))
        return verdicts[-1].passed

    if passes([]):
        return []
    size = -(-len(maker.layers) // _MOST_GROUPS)
    groups = [maker.layers[start : start + size] for start in range(0, len(maker.layers), size)]
    costs = []
    with job.progress.task("measuring what each layer costs", len(groups)) as task:
        for group in groups:
            others = [name for name in maker.layers if name not in group]
            costs.append(job.error(maker.build(others), known))
            task.advance()
    order = sorted(range(len(groups)), key=lambda number: -costs[number])

    def first(count: int) -> list[str]:
        return [name for number in order[:count] for name in groups[number]]

    low, high = 0, len(groups) - 1
    if not high or not passes(first(high)):
        nearest = max(verdicts, key=lambda each: (each.agreement or 0) + (each.kept_equal or 0))
        raise verify.failed(job.request, nearest)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(first(middle)) else (middle, high)
    job.progress.note(f"{len(first(high))} of {len(maker.layers)} layers stay in float32")
    return first(high)


class _Maker:
    """Makes graphs from one graph in float32, each with some layers in int8.

    Attributes:
        layers: names of the nodes of products that can be quantised, in order.
        titles: the module in torch of each, or the name of the node.
    """

    def __init__(self, watched: ModelProto, job: Job) -> None:
        import onnx
        from onnxruntime.quantization import quant_pre_process

        self._folder, self._static = job.folder, job.request.quantize == "int8"
        source, self._path = job.folder / "float.onnx", job.folder / "prepared.onnx"
        onnx.save(watched, str(source))
        with _quiet():
            quant_pre_process(str(source), str(self._path), skip_symbolic_shape=True)
        self._model = onnx.load(str(self._path))
        standard = [entry for entry in self._model.opset_import if not entry.domain]
        del self._model.opset_import[:]  # the optimiser names all domains that it knows
        self._model.opset_import.extend(standard)
        onnx.save(self._model, str(self._path))
        self._calibrater: Any = None
        self._ranges: Any = None
        nodes = _find_layers(self._model.graph, static=self._static)
        self.layers = [node.name for node in nodes if node.op_type in _PRODUCTS]
        self.titles = _titles(self._model.graph)
        self._between = [node.name for node in nodes if node.op_type not in _PRODUCTS]
        self._tensors = {name for node in nodes for name in node.input if name}
        self._tensors |= {node.output[0] for node in nodes if node.op_type not in _FLOAT_OUTPUT}
        self._tensors -= {weight.name for weight in self._model.graph.initializer}

    def calibrate(self, images: Tensor, job: Job) -> None:
        """Record histograms of the activations, with one batch in memory at a time."""
        from onnxruntime.quantization.calibrate import PercentileCalibrater

        found = PercentileCalibrater(self._path, augmented_model_path=str(self._folder / "augmented.onnx"))
        select = found.select_tensors_to_calibrate
        found.select_tensors_to_calibrate = lambda model: (self._tensors, select(model)[1])
        with _quiet():
            found.augment_graph()
            found.create_inference_session()
        parts = images.split(_CALIBRATION_BATCH)
        with job.progress.task("calibrating", len(parts)) as task:
            for part in parts:
                with _quiet():
                    found.collect_data(_OneBatch({job.document.input.name: part.contiguous().numpy()}))
                task.advance()
        self._calibrater = found

    def choose_percentile(self, error: Callable[[ModelProto], float]) -> float:
        """Set the ranges of activations to the percentile whose graph has the least error, and return it."""
        found = []
        for percentile in _PERCENTILES:
            self._calibrater.collector.percentile = percentile
            with _quiet():
                self._ranges = self._calibrater.compute_data()
            found.append((error(self.build(())), percentile, self._ranges))
        _, best, self._ranges = min(found, key=lambda each: each[0])
        return best

    def build(self, excluded: Collection[str]) -> ModelProto:
        """The graph with all layers but these in int8."""
        import onnx
        from onnxruntime.quantization import QDQQuantizer, QuantType, quantize_dynamic

        chosen = [name for name in self.layers if name not in excluded]
        if not self._static:
            path = self._folder / "dynamic.onnx"
            with _quiet():
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
            deepcopy(self._model),
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
        with _quiet():
            quantizer.quantize_model()
        model: ModelProto = quantizer.model.model
        return model


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


def _titles(graph: GraphProto) -> dict[str, str]:
    """The module in torch by the name of its node: that of its weight, or of the bias that is added to the product."""
    weights = {weight.name for weight in graph.initializer}
    users = {name: node for node in reversed(graph.node) for name in node.input}
    found = {}
    for node in graph.node:
        user = users.get(node.output[0])
        names = [*node.input, *(user.input if user is not None and user.op_type == "Add" else ())]
        known = [name for name in names if name in weights and name.startswith("model.")]
        title = known[0].removeprefix("model.").removeprefix("model.").rpartition(".")[0] if known else node.name
        found[node.name] = title
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with quiet_logs(logging.ERROR), contextlib.redirect_stdout(io.StringIO()):
        yield
