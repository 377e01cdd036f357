"""Quantise a model to int8: draw images, keep layers in float32 until the target holds. The quantisers are `Maker`s.

Layers that cost the most agreement stay in float32, worst first, until the target holds.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from repshift_cli.checkpoints.exported import quiet_logs
from repshift_cli.checkpoints.schema import ExportDocument, Quantization, Verdict
from repshift_cli.compression.inputs import load_job_inputs, split_inputs
from repshift_cli.compression.notes import Notes
from repshift_cli.compression.settings import Amounts, Settings
from repshift_cli.data.inputs import ImageBatch
from repshift_cli.errors import DataError
from repshift_cli.export import verify
from repshift_cli.export.request import Request, Subject
from repshift_cli.measure.cpu import int8_note
from repshift_cli.reduction.compressed_model import Trace
from repshift_cli.utils.progress import Progress

if TYPE_CHECKING:
    from onnx import GraphProto

_HELD_OUT, _TRIED = 100, 16
"""Inputs that the agreement is measured on, and how many of them serve choices between graphs."""

_MOST_GROUPS = 32
"""Layers are measured one by one, or in groups of neighbours if there are more."""

_CALIBRATION_BATCH, _BATCHES, _LARGE_BATCH = 4, (1, 2, 5), 8

_FLAT, _MOST_FLAT = 1e-2, 0.5
"""Least deviation within a row of an image with content, and the largest share of images without content."""

Images = tuple[ImageBatch | None, ImageBatch]
"""Inputs for the ranges of activations (None if the graph computes them), and others for the agreement."""

Pair = tuple[Tensor, Trace]
"""Inputs, and the trace of the model in torch."""


@dataclass(frozen=True)
class Quantized:
    """A quantised graph with its kept positions, how it was made, and what it is verified on."""

    graph: Any
    part: Quantization
    known: list[Pair]


@dataclass(frozen=True)
class Job:
    """What is quantised, on which images, and a folder for temporary files."""

    subject: Subject
    request: Request
    document: ExportDocument
    folder: Path
    images: Images
    progress: Progress

    @cached_property
    def known(self) -> list[Pair]:
        """What the model computes in torch, in batches of several sizes, or of that of the request."""
        inputs, first = self.images[1].tensor, sum(_BATCHES)
        if self.request.batch is not None or len(inputs) <= first:
            parts = self.batches(inputs, 1)
        else:
            parts = [*inputs[:first].split(list(_BATCHES)), *inputs[first:].split(_LARGE_BATCH)]
        found = []
        with self.progress.task("running the model in torch", len(parts)) as task, torch.no_grad():
            for part in parts:
                found.append((part, self.subject.run(part)))
                task.advance()
        return found

    def batches(self, inputs: Tensor, size: int = _CALIBRATION_BATCH) -> list[Tensor]:
        """Inputs in batches of a size; if the graph has a fixed one in batches of that, with some inputs twice."""
        if (fixed := self.request.batch) is not None:
            inputs = inputs[torch.arange(-(-len(inputs) // fixed) * fixed) % len(inputs)]
        return list(inputs.split(fixed or size))


class Maker(ABC):
    """Makes graphs from one graph in float32, each with some layers in int8.

    Attributes:
        layers: names of the products that can be quantised, in order; complete after `calibrate`.
        titles: the module in torch of each, or its own name.
    """

    layers: list[str]
    titles: dict[str, str]

    @abstractmethod
    def calibrate(self, images: Tensor) -> float | None:
        """Find the ranges of activations on images `[B, ...]`; returns their percentile, None for none."""

    @abstractmethod
    def build(self, excluded: Collection[str]) -> Any:
        """The graph with all layers but these in int8."""

    @abstractmethod
    def run(self, graph: Any, known: Sequence[Pair]) -> list[tuple[Tensor, ...]]:
        """Outputs of a graph as those of `Draft.reopen`: the output, the output again, the kept positions."""


def quantize(make: Callable[[Job], Maker], job: Job) -> Quantized:
    """Quantise the graph that `make` reads, which returns the kept positions too.

    Raises:
        CheckFailed: no mix of layers in int8 and float32 meets the agreement.
        ModelError: most of the weights have no int8 kernel.
    """
    request, calibration = job.request, job.images[0]
    job.progress.note(f"quantising to {request.quantize}")
    if note := int8_note():
        job.progress.warn(note)
    maker = make(job)
    percentile = None if calibration is None else maker.calibrate(calibration.tensor)
    known = job.known if request.verify else []
    excluded = _fit(maker, job, known) if request.verify else []
    part = Quantization(
        kind="int8" if request.quantize == "int8" else "int8-dynamic",
        layers=len(maker.layers) - len(excluded),
        float_layers=[maker.titles.get(name, name) for name in excluded],
        weight_bits=7,
        calibration=None if calibration is None else calibration.identity,
        percentile=percentile,
    )
    return Quantized(maker.build(excluded), part, known)


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
        without = " Without images: int8-dynamic." if request.target == "onnx" else ""
        raise DataError(
            "--quantize int8 needs images to find the ranges of activations",
            f"Give unlabelled images of the model's own kind: --calibration FOLDER.{without}",
        )
    batch = load_job_inputs(loaded, request.calibration, count + held_out, 0, notes)
    flat = batch.tensor.std(dim=-1).flatten(1).amax(dim=1) < _FLAT
    if float(flat.float().mean()) > _MOST_FLAT:
        raise DataError(f"most images of {batch.identity['where']} are of one colour", "Give images with content.")
    return split_inputs(batch, count)


def error(maker: Maker, graph: Any, known: Sequence[Pair]) -> float:
    """Relative error of the outputs on a few inputs, plus the share of other kept positions."""
    count = 0
    few: list[Pair] = []
    for pair in known:
        if count < _TRIED:
            few.append(pair)
            count += len(pair[0])
    counts, wrong, total = verify.Counts(), 0.0, 0.0
    for (_, wanted), found in zip(few, maker.run(graph, few), strict=True):
        counts.add(wanted, found)
        wrong += float((found[0] - wanted.output).square().sum())
        total += float(wanted.output.square().sum())
    moved = 1 - counts.same_places / counts.places if counts.places else 0.0
    return (wrong / max(total, 1e-12)) ** 0.5 + moved


def _fit(maker: Maker, job: Job, known: Sequence[Pair]) -> list[str]:
    """The fewest layers that stay in float32, worst first, so that the target holds; errors as `quantize`."""
    verdicts: list[Verdict] = []

    def passes(excluded: list[str]) -> bool:
        found = maker.run(maker.build(excluded), known)
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
            costs.append(error(maker, maker.build(others), known))
            task.advance()
    order = sorted(range(len(groups)), key=lambda number: -costs[number])

    def first(count: int) -> list[str]:
        return [name for number in order[:count] for name in groups[number]]

    low, high = 0, len(groups) - 1
    if not high or not passes(first(high)):
        nearest = max(verdicts, key=lambda each: (each.agreement or 0) + (each.kept_equal or 0))
        raise verify.failed(job.request, nearest, wrong_in_float=not passes(list(maker.layers)))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(first(middle)) else (middle, high)
    job.progress.note(f"{len(first(high))} of {len(maker.layers)} layers stay in float32")
    return first(high)


def module_names(graph: GraphProto) -> dict[str, str]:
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
def quiet() -> Iterator[None]:
    """Hide what a quantiser prints, logs and warns of."""
    with quiet_logs(logging.ERROR), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
