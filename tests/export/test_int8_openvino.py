"""int8 in OpenVINO: which layers NNCF quantises, which go back to float32, and the files."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openvino
import pytest
import torch
from exported import export_to, inputs_for, open_family
from onnx import TensorProto, helper, numpy_helper
from outcome import Command

from repshift_cli.benchmark.ways import Missing, Way, both
from repshift_cli.checkpoints.artifact import open_model
from repshift_cli.checkpoints.exported import open_exported
from repshift_cli.errors import CheckFailed, UsageError
from repshift_cli.export.int8_openvino import OpenVinoMaker
from repshift_cli.export.job import check
from repshift_cli.export.quantize import Job
from repshift_cli.export.request import Request
from repshift_cli.export.ways import exported_ways
from repshift_cli.utils.intel import import_without_telemetry
from repshift_cli.utils.progress import Silent

CHANNELS, TOKENS = 32, 8


def graph() -> Any:
    """A product, scores, a choice of tokens, a product of two activations, and a product: `output` and `kept`."""
    random = np.random.default_rng(0)
    weights = {
        "model.first.weight": random.standard_normal((CHANNELS, CHANNELS), np.float32) / 20,
        "model.score.weight": random.standard_normal((CHANNELS, 1), np.float32),
        "model.last.weight": random.standard_normal((TOKENS // 2, CHANNELS), np.float32),
        "count": np.array([TOKENS // 2]),
        "axis": np.array([2]),
    }
    nodes = [
        ("MatMul", "images model.first.weight", "a", {}),
        ("MatMul", "a model.score.weight", "b", {}),
        ("Squeeze", "b axis", "scores", {}),
        ("TopK", "scores count", "values kept", {"axis": 1}),
        ("Unsqueeze", "kept axis", "index", {}),
        ("Expand", "index shape", "indices", {}),
        ("GatherElements", "a indices", "c", {"axis": 1}),
        ("Transpose", "c", "d", {"perm": [0, 2, 1]}),
        ("MatMul", "c d", "e", {}),
        ("Softmax", "e", "f", {}),
        ("MatMul", "f model.last.weight", "output", {}),
    ]
    weights["shape"] = np.array([1, 1, CHANNELS])
    made = [helper.make_node(kind, i.split(), o.split(), name=o, **more) for kind, i, o, more in nodes]
    ports = [("images", TensorProto.FLOAT, ["batch", TOKENS, CHANNELS]), ("output", TensorProto.FLOAT, None)]
    values = [helper.make_tensor_value_info(*port) for port in (*ports, ("kept", TensorProto.INT64, None))]
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    found = helper.make_graph(made, "graph", values[:1], values[1:], tensors)
    return helper.make_model(found, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def quantisers(model: Any) -> int:
    return sum(op.get_type_name() == "FakeQuantize" for op in model.get_ordered_ops())


def test_scores_stay_in_float32_and_layers_go_back_to_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    document: Any = SimpleNamespace(input=SimpleNamespace(name="images", dtype="float32"))
    nothing: Any = None
    job = Job(nothing, Request("openvino", tmp_path / "x", quantize="int8"), document, tmp_path, nothing, Silent())
    maker = OpenVinoMaker(graph(), job)
    images = torch.randn(16, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(0))
    maker.calibrate(images)
    assert [maker.titles[name] for name in maker.layers] == ["first", "last"]
    assert maker.titles["output"] == "last"
    pairs: Any = [(images, None)]
    exact = openvino.Core().compile_model(openvino.Core().read_model(graph().SerializeToString()), "CPU")
    wanted = torch.from_numpy(exact(images.numpy())["output"])
    errors = {}
    for excluded in ((), ("a",), ("a", "output")):
        model = maker.build(excluded)
        assert quantisers(model) == 2 - len(excluded)
        ((output, _, kept),) = maker.run(model, pairs)
        assert kept.shape == (16, TOKENS // 2)
        errors[excluded] = float((output - wanted).abs().max())
    assert errors["a", "output"] < 1e-5 < errors["a",] < errors[()]
    constants = [op for op in maker.build(()).get_ordered_ops() if op.get_type_name() == "Constant"]
    weights = [op.get_data() for op in constants if op.get_element_type() == openvino.Type.i8]
    assert len(weights) == 2
    assert all(np.abs(array.astype(int)).max() <= 64 for array in weights)
    assert capfd.readouterr() == ("", "")


def test_a_fixed_batch_calibrates_in_batches_of_that_size(tmp_path: Path) -> None:
    nothing: Any = None
    job = Job(nothing, Request("onnx", tmp_path / "x", batch=3), nothing, tmp_path, nothing, Silent())
    assert [part[:, 0].tolist() for part in job.batches(torch.arange(4.0)[:, None])] == [[0, 1, 2], [3, 0, 1]]


def test_without_nncf_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "nncf" else found(name))
    check(Request("openvino", tmp_path / "x"))
    with pytest.raises(UsageError, match="quantised OpenVINO files need nncf, which is not installed") as caught:
        check(Request("openvino", tmp_path / "x", quantize="int8"))
    assert caught.value.hint == "Install it with: pip install 'repshift-cli[openvino]'"


def test_packages_do_not_find_the_telemetry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = "try:\n    import openvino_telemetry as found\nexcept ImportError:\n    found = None\n"
    (tmp_path / "repshift_test_package.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "openvino_telemetry", sys)
    assert import_without_telemetry("repshift_test_package").found is None
    assert sys.modules["openvino_telemetry"] is sys
    monkeypatch.delitem(sys.modules, "repshift_test_package")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["timm_vit", "resnet", "umt"])
def test_every_family(family: str, tmp_path: Path, cli: Command) -> None:
    scenes = "builtin:shapes" if family == "umt" else "builtin:digits"
    options: dict[str, Any] = {"quantize": "int8", "calibration": scenes, "calibration_images": 16, "agreement": 0.5}
    found = export_to(open_family(family), "openvino", tmp_path / "x", **options).document
    assert found.quantized is not None
    assert found.verified is not None
    assert found.verified.agreement is not None
    assert (found.quantized.weight_bits, found.quantized.percentile) == (7, None)
    opened = open_exported(tmp_path / "x")
    assert opened.runtime.document.quantized == found.quantized
    assert opened.module(inputs_for(opened)).isfinite().all()
    shown = cli("inspect", tmp_path / "x")
    assert shown.rc == 0, shown.stderr
    assert f"layers   {found.quantized.layers} in int8, {len(found.quantized.float_layers)} in float32" in shown.stdout
    outcome = cli("inspect", tmp_path / "x", "--json")
    assert json.loads(outcome.stdout)["quantized"] == found.quantized.model_dump()


@pytest.mark.slow
def test_what_openvino_computes_wrongly_is_no_fault_of_int8(tmp_path: Path) -> None:
    options: dict[str, Any] = {"quantize": "int8", "calibration": "builtin:digits", "calibration_images": 16}
    with pytest.raises(CheckFailed, match="of the kept positions are those of torch") as caught:
        export_to(open_family("vim"), "openvino", tmp_path / "x", **options)
    assert "int8 is not the cause" in (caught.value.hint or "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit-digits", "cnn-digits"])
def test_built_in_models_keep_their_predictions_and_tokens(name: str, tmp_path: Path, cli: Command) -> None:
    checkpoint = tmp_path / "model.safetensors"
    assert cli("compress", f"builtin:{name}", "-o", checkpoint, "--seconds", "0.1").rc == 0
    found = export_to(open_model(str(checkpoint)), "openvino", tmp_path / "x", quantize="int8").document
    assert found.verified is not None
    assert found.verified.kept_equal is not None
    assert (found.verified.agreement or 0) >= 0.99
    assert found.verified.kept_equal >= 0.98


@pytest.mark.slow
def test_advise_has_a_row_with_images_to_calibrate(tmp_path: Path) -> None:
    for calibration in ("builtin:digits", None):
        found = {
            each.name: each for each in exported_ways(both(open_family("timm_vit")), tmp_path, calibration, Silent())
        }
        if calibration:
            assert {"dense, int8, OpenVINO", "tokens, int8, OpenVINO"} <= found.keys()
            assert all(isinstance(way, Way) for way in found.values())
        else:
            missing = found["int8-dynamic, OpenVINO"]  # once, not for each model
            assert isinstance(missing, Missing)
            assert "needs images" in missing.reason
