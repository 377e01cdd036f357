"""`repshift advise`: which rows there are, what they compute, and which one is named."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_recipe, tiny_vit
from tiny_cnn import tiny_cnn
from torch import nn
from typer.testing import CliRunner

from repshift_cli.benchmark import ways
from repshift_cli.benchmark.advice import Advice, Question, Row, advise
from repshift_cli.benchmark.ways import Missing, Way
from repshift_cli.checkpoints.artifact import Opened
from repshift_cli.checkpoints.loaded import LoadedModel, ModelDescription
from repshift_cli.checkpoints.weights import Source
from repshift_cli.cli.app import app
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import UsageError
from repshift_cli.export.ways import exported_ways
from repshift_cli.measure.latency import Speedup, Spread
from repshift_cli.reduction.compressed_model import attach
from repshift_cli.reduction.plans import resolve_for
from repshift_cli.utils.progress import Silent

HOW = Preprocessing((3, 32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9)


def opened(model: nn.Module, layers: str = "[{layer: 1, drop_ratio: 0.5}]") -> Opened:
    plan = resolve_for(model, make_recipe(layers, "{kind: representation_shift, operation: block}"))
    loaded = LoadedModel(model, ModelDescription("tiny", None, {}, HOW), Source("random", None, None), {})
    return Opened(loaded, attach(model, plan))


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes longer than all other rows together."""
    monkeypatch.setattr(shutil, "which", lambda name: None)


@pytest.mark.slow
@pytest.mark.usefixtures("without_compiler")
def test_every_row_is_there_or_has_a_reason() -> None:
    model = opened(tiny_vit())
    found = advise(model, Question("builtin:digits", images=8, seconds=0.0), exported_ways, Silent())
    names = [row.way.name for row in found.rows]
    assert names[:2] == ["dense", "tokens"]
    for runtime in ("ONNX Runtime", "int8-dynamic, ONNX Runtime"):
        assert {f"{name}, {runtime}" for name in ("dense", "tokens", "images 24x24")} <= set(names)
    rows = {row.way.name: row for row in found.rows}
    assert rows["dense"].unchanged == rows["dense, ONNX Runtime"].unchanged == 1.0
    assert rows["tokens"].unchanged == rows["tokens, ONNX Runtime"].unchanged
    assert rows["tokens"].way.macs == model.macs < rows["dense"].way.macs == model.dense_macs
    assert rows["dense, int8-dynamic, ONNX Runtime"].way.bytes < rows["dense, ONNX Runtime"].way.bytes
    missing = {each.name: each.reason for each in found.missing}
    assert "C++ compiler" in missing["torch.compile"]
    document = found.to_dict()
    assert document["measure"] == "predictions"
    assert {"rows", "missing", "best", "agreement"} <= document.keys()
    assert all(set(row.to_dict()) == set(found.rows[0].to_dict()) for row in found.rows)


def test_a_smaller_input_costs_no_more_than_the_compressed_model() -> None:
    model = opened(tiny_vit())
    way = ways.smaller_input(model)
    assert isinstance(way, Way)
    side = way.preprocessing.input_size[1]
    assert side < HOW.input_size[1]
    assert way.macs <= model.macs
    assert way.run(torch.zeros(2, 3, side, side)).shape == (2, model.loaded.model.num_classes)
    assert model.loaded.model.patch_embed.img_size == (32, 32)  # the model itself is as before


def test_a_network_of_maps_takes_smaller_images() -> None:
    model = opened(tiny_cnn(), "[{layer: layer1.1, drop_ratio: 0.5}]")
    model.loaded.description = replace(model.loaded.description, preprocessing=replace(HOW, input_size=(3, 96, 96)))
    way = ways.smaller_input(model)
    assert isinstance(way, Way)
    assert way.preprocessing.input_size == (3, 64, 64)
    assert way.macs <= model.macs


def test_bfloat16_is_left_out_without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "cpu_features", lambda: frozenset({"avx2"}))
    (missing,) = ways.in_bfloat16(opened(tiny_vit()))
    assert isinstance(missing, Missing)
    monkeypatch.setattr(ways, "cpu_features", lambda: frozenset({"avx512_bf16"}))
    model = opened(tiny_vit())
    found = list(ways.in_bfloat16(model))
    assert [each.name for each in found] == ["dense, bfloat16", "tokens, bfloat16"]
    inputs = torch.randn(2, 3, 32, 32)
    for way in found:
        assert isinstance(way, Way)
        with torch.inference_mode(), way.context():
            assert way.run(inputs).dtype == torch.float32
    assert next(model.loaded.model.parameters()).dtype == torch.float32


def _row(name: str, ratio: float, unchanged: float | None) -> Row:
    spread = Spread(1.0, 1.0, 1.0, 5)
    way = Way(name, False, lambda images: images, 1, 1, HOW)
    return Row(way, spread, Speedup(ratio, ratio, ratio, overlap=False), unchanged, None)


@pytest.mark.parametrize(
    ("rows", "images", "best"),
    [
        ([("dense", 1.0, 1.0), ("a", 3.0, 0.9), ("b", 2.0, 0.99)], True, "b"),
        ([("dense", 1.0, 1.0), ("a", 3.0, 0.9)], True, None),
        ([("dense", 1.0, 1.0), ("a", 3.0, None)], True, None),
        ([("dense", 1.0, None), ("a", 3.0, None), ("b", 2.0, None)], False, "a"),
        ([("dense", 1.0, 1.0), ("a", 0.5, 1.0)], True, None),
    ],
)
def test_the_fastest_near_row_is_best(rows: list[Any], images: bool, best: str | None) -> None:
    found = Advice(
        tuple(_row(*row) for row in rows), (), "predictions", object() if images else None, Question(), "", 1
    )  # type: ignore[arg-type]
    assert (found.best.way.name if found.best else None) == best


def test_a_model_without_a_plan_is_refused() -> None:
    model = opened(tiny_vit())
    model.compressed = None
    with pytest.raises(UsageError, match="not compressed"):
        ways.both(model)


@pytest.mark.slow
@pytest.mark.usefixtures("without_compiler")
def test_the_command_prints_a_table_and_a_sentence(tmp_path: Path) -> None:
    arguments = ["advise", "builtin:vit-digits-small", "--data", "builtin:digits", "--images", "8", "--seconds", "0"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "tokens, int8-dynamic" in shown.stdout
    assert "predictions unchanged" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80
