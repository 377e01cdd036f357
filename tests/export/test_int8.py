"""Quantised graphs: which nodes, which images, and what stays in float32."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from exported import export_to, open_family
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import Tensor

from repshift_cli.checkpoints.exported import open_exported
from repshift_cli.cli.export import requests_for
from repshift_cli.errors import CheckFailed, DataError, ModelError, UsageError
from repshift_cli.export import int8_onnx, quantize
from repshift_cli.export.job import check
from repshift_cli.export.request import Request, Subject
from repshift_cli.reduction.compressed_model import Trace
from repshift_cli.utils.progress import Silent


def graph_of(nodes: Sequence[tuple[str, str, str]], weights: dict[str, tuple[int, ...]]) -> Any:
    """A graph from `input` to `output`; nodes are operator, inputs and outputs."""
    made = [
        helper.make_node(operator, given.split(), returned.split(), name=f"node {returned.split()[0]}")
        for operator, given, returned in nodes
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("input", "output")]
    tensors = [numpy_helper.from_array(np.ones(size, np.float32), name) for name, size in weights.items()]
    return helper.make_graph(made, "graph", values[:1], values[1:], tensors)


def names(graph: Any, *, static: bool = True) -> list[str]:
    return [node.name.removeprefix("node ") for node in int8_onnx._find_layers(graph, static=static)]


def test_scores_and_the_patch_embedding_stay_in_float32() -> None:
    nodes = [
        ("Conv", "input patch", "tokens"),
        ("MatMul", "tokens qkv", "update"),
        ("MatMul", "update fitted", "scores"),
        ("TopK", "scores k", "values places"),
        ("Gather", "update places", "kept"),
        ("MatMul", "kept kept", "attention"),
        ("Gemm", "attention head", "output"),
    ]
    weights = {"patch": (8, 3, 4, 4), "qkv": (32, 32), "fitted": (32, 1), "head": (32, 8), "k": (1,)}
    assert names(graph_of(nodes, weights)) == ["update", "output"]


def test_a_stack_of_matrices_stays_in_float32() -> None:
    nodes = [("MatMul", "input one", "a"), ("MatMul", "a stack", "b"), ("MatMul", "b two", "output")]
    graph = graph_of(nodes, {"one": (32, 32), "stack": (2, 32, 32), "two": (32, 8)})
    assert names(graph) == ["a", "output"]


def test_what_lies_between_convolutions_is_quantised() -> None:
    nodes = [
        ("Conv", "input one", "a"),
        ("Relu", "a", "b"),
        ("Conv", "b two", "c"),
        ("Add", "c b", "d"),
        ("ReduceMean", "d", "e"),
        ("Add", "e input", "output"),
    ]
    graph = graph_of(nodes, {"one": (8, 3, 3, 3), "two": (8, 8, 3, 3)})
    assert names(graph) == ["a", "b", "c", "d"]
    with pytest.raises(ModelError, match="convolutions that ONNX Runtime cannot run in int8") as caught:
        names(graph, static=False)
    assert caught.value.hint == "Use --quantize int8, which needs images."


def job_of(folder: Path, **options: Any) -> quantize.Job:
    options = {"quantize": "int8", "calibration": str(folder), **options}
    request = Request("onnx", folder / "out.onnx", **options)
    subject: Any = Subject(open_family("timm_vit"), False)
    nothing: Any = SimpleNamespace()
    return quantize.Job(subject, request, nothing, folder, (None, nothing), Silent())


def draw(job: quantize.Job) -> quantize.Images:
    return quantize.draw_images(job.subject, job.request, Silent())


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("none", "no images|no image"),
        ("few", "too few|at least 8 images"),
        ("equal", "equal"),
        ("flat", "of one colour"),
    ],
)
def test_images_that_cannot_calibrate_are_refused(tmp_path: Path, kind: str, words: str) -> None:
    random = np.random.default_rng(0)
    for number in range({"none": 0, "few": 5}.get(kind, 24)):
        pixels = random.integers(0, 255, (20, 20, 3), dtype=np.uint8)
        if kind in ("equal", "flat"):
            pixels[:] = 99 if kind == "equal" else random.integers(0, 255, 3, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    with pytest.raises(DataError, match=words):
        draw(job_of(tmp_path))


def test_static_needs_images_unless_the_model_is_built_in(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs images") as caught:
        draw(job_of(tmp_path, calibration=None))
    assert caught.value.hint is not None
    assert "int8-dynamic" in caught.value.hint
    calibration, held_out = draw(job_of(tmp_path, calibration=None, quantize="int8-dynamic"))
    assert calibration is None
    assert len(held_out.tensor) == 100


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "pt2", "quantize": "int8"}, "--quantize is for --to onnx"),
        ({"target": "onnx", "quantize": "int8", "dtype": torch.float16}, "takes a model in float32"),
        ({"target": "openvino", "quantize": "int8", "dtype": torch.float16}, "takes a model in float32"),
        ({"target": "openvino", "quantize": "int8-dynamic"}, "has no int8-dynamic, only int8"),
        ({"target": "onnx", "quantize": "int8", "opset": 12}, "invalid --opset 12"),
    ],
)
def test_invalid_requests(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check(Request(output=tmp_path / f"x.{options['target']}", **options))


def test_compress_quantises_only_what_can_be(tmp_path: Path) -> None:
    from repshift_cli.cli.export import Target
    from repshift_cli.cli.options import QuantizeKind

    given: dict[str, Any] = {"quantize": QuantizeKind.INT8, "calibration": "images", "images": 16}
    onnx_too, hub = [Target("onnx"), Target("hub")], [Target("hub")]
    found = requests_for(tmp_path / "m.safetensors", onnx_too, False, **given)
    assert [(each.output.name, each.quantize) for each in found] == [("m_int8.onnx", "int8"), ("m_hub", None)]
    with pytest.raises(UsageError, match="--quantize is for an export to onnx"):
        requests_for(tmp_path / "m.safetensors", hub, False, **given)


class Layers:
    """Four layers; the output is wrong by the cost of each that is in int8."""

    layers = ("a", "b", "c", "d")

    def __init__(self, allowed: float, wanted: Tensor) -> None:
        self.allowed, self.wanted = allowed, wanted

    def build(self, excluded: Collection[str]) -> float:
        costs = {"a": 0.0, "b": 3.0, "c": 0.1, "d": 1.0}
        return sum(cost for name, cost in costs.items() if name not in excluded)

    def run(self, graph: float, known: Any) -> list[tuple[Tensor, ...]]:
        output = self.wanted if graph <= self.allowed else self.wanted.flip(-1)
        return [(output, output)]


@pytest.mark.parametrize(("allowed", "stay"), [(9.0, []), (2.0, ["b"]), (0.5, ["b", "d"]), (-1.0, None)])
def test_the_worst_layers_stay_in_float32(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, allowed: float, stay: list[str] | None
) -> None:
    trace = Trace(torch.tensor([[1.0, 0.0]]), {})

    monkeypatch.setattr(quantize, "error", lambda maker, graph, known: graph)
    layers: Any = Layers(allowed, trace.output)
    job = job_of(tmp_path)
    known = [(torch.zeros(1), trace)]
    if stay is None:
        with pytest.raises(CheckFailed, match=r"unchanged predictions 0.00% \(at least 99.00%\)") as caught:
            quantize._fit(layers, job, known)
        assert "in float32 it does not either" in (caught.value.hint or "")
    else:
        assert quantize._fit(layers, job, known) == stay


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind"), [("timm_vit", "int8"), ("timm_vit", "int8-dynamic"), ("resnet", "int8"), ("vim", "int8")]
)
def test_quantised_files_run(family: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    found = export_to(
        open_family(family),
        "onnx",
        path,
        quantize=kind,
        calibration="builtin:digits",
        calibration_images=16,
        agreement=0.5,
    )
    assert found.document.quantized is not None
    assert found.document.quantized.layers > 1
    assert found.document.verified is not None
    assert found.document.verified.agreement is not None
    model = onnx.load(path)
    assert [entry.domain for entry in model.opset_import] == [""]
    arrays = [numpy_helper.to_array(weight) for weight in model.graph.initializer]
    weights = [array for array in arrays if array.dtype == np.int8 and array.ndim > 1]
    assert weights
    assert all(np.abs(array.astype(int)).max() <= 64 for array in weights)
    assert open_exported(path).runtime.document.quantized == found.document.quantized


@pytest.mark.slow
def test_a_target_that_is_missed_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repshift_cli.export.verify._QUANTIZED_TOLERANCE", -1.0)
    options: dict[str, Any] = {"quantize": "int8", "calibration": "builtin:digits", "calibration_images": 16}
    with pytest.raises(CheckFailed, match="No output was written"):
        export_to(open_family("timm_vit"), "onnx", tmp_path / "model.onnx", **options)
    assert list(tmp_path.iterdir()) == []
