"""Other ways to run a model as contenders of `bench`: which there are, what they are compared with, what is missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_recipe, tiny_vit

from repshift_cli.benchmark import run, ways
from repshift_cli.benchmark.baselines import check_names, contenders_against
from repshift_cli.benchmark.run import BenchSettings, Contender, run_bench
from repshift_cli.benchmark.way_contenders import check_ways, split_ways, with_ways
from repshift_cli.benchmark.ways import Missing, Way
from repshift_cli.checkpoints.artifact import Opened
from repshift_cli.checkpoints.loaded import LoadedModel, ModelDescription
from repshift_cli.checkpoints.weights import Source
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import UsageError
from repshift_cli.export.ways import exported_ways
from repshift_cli.reduction.compressed_model import attach
from repshift_cli.reduction.plans import resolve_for
from repshift_cli.utils.progress import Silent

SETTINGS = BenchSettings(torch.device("cpu"), torch.float32, seconds=0, min_runs=1, threads=1)


def opened() -> Opened:
    model = tiny_vit()
    plan = resolve_for(model, make_recipe("[{layer: 1, drop_ratio: 0.5}]"))
    how = Preprocessing((3, 32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9)
    loaded = LoadedModel(model, ModelDescription("tiny", None, {}, how), Source("random", None, None), {})
    return Opened(loaded, attach(model, plan))


def exported(models: Sequence[Way]) -> Iterator[Way]:
    """A stand-in for files: as `exported_ways`, without a runtime."""
    for name in ("ONNX Runtime", "int8, ONNX Runtime"):
        yield from (replace(way, name=f"{way.name}, {name}", bytes=7) for way in models)


def nothing(models: Sequence[Way]) -> Iterator[Missing]:
    yield Missing("ONNX Runtime", "onnx is not installed")


def made(model: Opened, names: Sequence[str], files: Any = exported) -> tuple[list[Contender], dict[str, str]]:
    named = {"tiny": model}
    baselines, wanted = split_ways(names)
    return with_ways(contenders_against(named, baselines), [named], wanted, files)


def test_int8_is_compared_in_the_same_runtime_and_with_the_compressed_model() -> None:
    found, missing = made(opened(), ["fuse", "int8"])
    assert not missing
    report = run_bench(found, [1], SETTINGS, Silent())
    sides = [f"{side}, {name}" for name in ("ONNX Runtime", "int8, ONNX Runtime") for side in ("dense", "compressed")]
    assert [measured.name for measured in report.runs] == ["dense", "compressed", "fuse", *sides]
    pairs = {(ratio.name, ratio.against) for ratio in report.ratios}
    assert {("compressed", name) for name in ("fuse", *sides)} <= pairs
    assert {(name, "dense") for name in sides} <= pairs
    assert ("compressed, int8, ONNX Runtime", "dense, int8, ONNX Runtime") in pairs
    assert ("compressed, ONNX Runtime", "dense, ONNX Runtime") in pairs
    assert len(pairs) == 1 + 5 + 5 + 2
    assert [measured.bytes for measured in report.runs][2:] == [None, 7, 7, 7, 7]
    assert report.runs[0].bytes == report.runs[1].bytes > 7
    with_ours = [row for row in report.to_csv().splitlines() if ",peer," in row]
    assert len(with_ours) == 5


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx" else found(name))
    files = partial(exported_ways, folder=tmp_path, calibration=None, progress=Silent(), targets=("onnx",))
    _, missing = made(opened(), ["int8", "smaller-input"], files)
    assert list(missing) == ["ONNX Runtime", "int8-dynamic, ONNX Runtime"]
    assert all("pip install 'repshift-cli[onnx]'" in reason for reason in missing.values())


def test_a_smaller_input_is_timed_in_the_same_rounds_on_its_own_images(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[list[str]] = []
    measure = run.measure_latency

    def watched(subjects: Any, *rest: Any, **options: Any) -> Any:
        rounds.append([subject.name for subject in subjects])
        return measure(subjects, *rest, **options)

    monkeypatch.setattr(run, "measure_latency", watched)
    model = opened()
    found, _ = made(model, ["smaller-input"])
    report = run_bench(found, [2], SETTINGS, Silent())
    assert rounds == [["dense", "compressed", found[-1].name]]
    assert report.runs[-1].macs <= model.macs
    assert found[-1].takes != found[0].input_size


def test_a_smaller_model_keeps_its_name_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Opened(opened().loaded, None)
    small.loaded.description = replace(small.loaded.description, name="dense")
    monkeypatch.setattr(ways, "open_model", lambda name: small)
    found, _ = made(opened(), ["smaller-model=x"])
    assert [each.name for each in found] == ["dense", "compressed", "dense 2"]


def test_bfloat16_runs_as_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "cpu_features", lambda: frozenset({"avx512_bf16"}))
    found, _ = made(opened(), ["bfloat16"])
    report = run_bench(found, [1], SETTINGS, Silent())
    assert [each.name for each in report.runs][2:] == ["dense, bfloat16", "compressed, bfloat16"]
    assert report.runs[2].bytes * 2 == report.runs[0].bytes


def test_what_is_missing_has_a_reason_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "cxx_compiler", lambda: None)
    found, missing = made(opened(), ["compile", "int8", "smaller-input"], nothing)
    assert list(missing) == ["torch.compile", "ONNX Runtime"]
    report = replace(run_bench(found, [1], SETTINGS, Silent()), missing=missing)
    assert report.to_dict()["missing"][0]["reason"] == "there is no C++ compiler: install g++"
    made(opened(), ["compile", "fuse"])  # a baseline is left
    with pytest.raises(UsageError, match=r"torch\.compile: there is no C\+\+ compiler.*; ONNX Runtime: onnx") as error:
        made(opened(), ["compile", "int8"], nothing)
    assert error.value.hint == "Other ways are bfloat16, smaller-input, smaller-model=NAME."


def test_a_model_that_cannot_be_compiled_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, module: Any, mode: str) -> Any:
        raise UsageError(f"torch.compile cannot compile {name} here")

    monkeypatch.setattr(run, "Compiled", refuse)
    monkeypatch.setattr(ways, "cxx_compiler", lambda: "g++")
    monkeypatch.setattr(run, "_compilation", lambda subject: None)
    monkeypatch.setattr(run, "_peak", lambda *rest: None)
    found, _ = made(opened(), ["compile", "smaller-input"])
    report = run_bench(found, [1, 2], SETTINGS, Silent())
    assert list(report.missing) == ["dense, torch.compile", "compressed, torch.compile"]
    assert len(report.runs) == 2 * 3
    assert not [ratio for ratio in report.ratios if "compile" in ratio.name + ratio.against]
    with pytest.raises(UsageError, match="cannot compile compressed"):
        run_bench(made(opened(), ["compile"])[0], [1], SETTINGS, Silent())


def test_invalid_names_and_settings() -> None:
    assert split_ways(["tome", "int8", "smaller-model=x"]) == (["tome"], ["int8", "smaller-model=x"])
    for name in ("smaller-model", "smaller-model=", "int8=x", "int4"):
        with pytest.raises(UsageError, match=f"unknown baseline '{name}'") as error:
            check_names(split_ways([name])[0])
        assert "int8, bfloat16, compile, smaller-input, smaller-model=NAME" in str(error.value.hint)
    check_ways(["int8"], [SETTINGS], None)
    for settings, data in ((replace(SETTINGS, dtype=torch.bfloat16), None), (SETTINGS, "photos")):
        with pytest.raises(UsageError, match="--against int8: is measured on the CPU"):
            check_ways(["int8"], [settings], data)
        check_ways([], [settings], data)
    models = [{"a": opened()}, {"b": opened()}]
    with pytest.raises(UsageError, match="is for one compressed model"):
        with_ways(contenders_against(models[0], []), models, ["int8"], exported)
