"""Exports compute what the model does, have the promised form, and are refused otherwise."""

from __future__ import annotations

import errno
import json
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from exported import FAMILIES, export_to, inputs_for, open_family, reduced_vit, stored
from onnx import ModelProto
from paths import ROOT
from torch import Tensor

from repshift_cli import load
from repshift_cli.checkpoints import artifact, exported
from repshift_cli.checkpoints.exported import open_exported, run_file
from repshift_cli.checkpoints.schema import ExportDocument
from repshift_cli.errors import CheckFailed, OutputError, RepshiftError, UsageError
from repshift_cli.export import verify
from repshift_cli.export.formats import FORMATS, onnx_graph
from repshift_cli.export.job import check
from repshift_cli.export.request import Request, Subject
from repshift_cli.export.trace import trace_program
from repshift_cli.reduction.metrics.fitted import Fitted
from repshift_cli.utils.files import DeferredErrors
from repshift_cli.utils.progress import Silent

ALONE = """
import json, sys
sys.modules["repshift_cli"] = None  # as if it were not installed
import numpy, onnxruntime, torch
for entry in json.load(open(sys.argv[1])):
    given = torch.load(entry["inputs"])
    if entry["path"].endswith(".onnx"):
        session = onnxruntime.InferenceSession(entry["path"], providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run([entry["output"]], {entry["input"]: given.numpy()})[0])
    elif entry["kind"] == "aoti":
        found = torch._inductor.aoti_load_package(entry["path"])(given)
    else:
        found = torch.export.load(entry["path"]).module()(given)
    torch.save(found, entry["path"] + ".found")
"""
"""Runs exported files in a process without repshift."""

ROUNDING = {torch.float32: 1e-4, torch.float16: 3e-2}


def alone(entries: list[dict[str, str]], folder: Path) -> list[Tensor]:
    """Outputs of exported files in a new process without repshift."""
    listed = folder / "entries.json"
    listed.write_text(json.dumps(entries))
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(listed)], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(entry["path"] + ".found") for entry in entries]


def round_trip(cases: list[tuple[str, str, torch.dtype]], folder: Path, **options: Any) -> None:
    """Export each family to each format, run all files in one new process, and compare with torch."""
    entries, wanted = [], []
    for family, target, dtype in cases:
        opened, name = open_family(family), f"{family}_{target}_{dtype}".replace("torch.", "")
        path = folder / FORMATS[target].default_output(name).name
        exported = export_to(opened, target, path, dtype=dtype, **options)
        verdict = exported.document.verified
        assert verdict is not None
        assert verdict.passed
        inputs = inputs_for(opened).to(dtype)
        torch.save(inputs, folder / f"{name}.inputs")
        with torch.no_grad():
            wanted.append(opened.module(inputs))
        ports = {"input": exported.document.input.name, "output": exported.document.output.name}
        entries.append({"path": str(path), "kind": target, "inputs": str(folder / f"{name}.inputs"), **ports})
    for case, output, found in zip(cases, wanted, alone(entries, folder), strict=True):
        assert found.dtype == output.dtype, case
        allowed = ROUNDING[case[2]] * (
            4 if case[0] == "umt" else 1
        )  # the tiny UMT merges by likeness, which is rounded
        torch.testing.assert_close(found, output, rtol=allowed, atol=allowed)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_graphs_of_every_family_run_without_repshift(dtype: torch.dtype, tmp_path: Path) -> None:
    round_trip([(family, target, dtype) for family in FAMILIES for target in ("onnx", "pt2")], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_packages_of_every_family_run_without_repshift(family: str, tmp_path: Path) -> None:
    round_trip([(family, "aoti", torch.float32)], tmp_path)


# torch 2.14 compiles a tuned package of a merging UMT with a dynamic batch size that reads outside of its input
@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"umt"}))
def test_tuned_packages_run_without_repshift(family: str, tmp_path: Path) -> None:
    round_trip([(family, "aoti", torch.float32)], tmp_path, tune=True)


@pytest.mark.slow
def test_a_file_that_does_not_run_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*args: Any) -> Tensor:
        raise RuntimeError("index out of bounds\nframe #0")

    monkeypatch.setattr(exported, "run_file", lambda *args: broken)
    broken.outputs = broken  # type: ignore[attr-defined]
    with pytest.raises(CheckFailed, match=r"vit.pt2 does not run with 1 inputs: index out of bounds\n") as caught:
        export_to(open_family("timm_vit"), "pt2", tmp_path / "vit.pt2")
    assert caught.value.exit_code == 5
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny ViT as `vit.onnx` and `vit.pt2`, compressed and dense."""
    made = tmp_path_factory.mktemp("exports")
    for target in ("onnx", "pt2"):
        export_to(open_family("timm_vit"), target, made / f"vit.{target}")
    export_to(open_family("timm_vit"), "onnx", made / "dense.onnx", dense=True)
    return made


class TestOnnx:
    @pytest.mark.slow
    def test_the_graph_is_of_standard_operators_with_constant_counts(self, folder: Path) -> None:
        model = onnx.load(folder / "vit.onnx")
        onnx.checker.check_model(model, full_check=True)
        operators = onnx_graph.check_graph(model)
        assert operators["TopK"] == 2
        assert operators["Gather"] >= 1
        assert not {"Loop", "If", "Scan", "NonZero"} & operators.keys()
        assert not any(name.startswith("Scatter") for name in operators)

    @pytest.mark.slow
    def test_names_and_dynamic_batch(self, folder: Path) -> None:
        graph = onnx.load(folder / "vit.onnx").graph
        (given,), (returned,) = graph.input, graph.output
        assert (given.name, returned.name) == ("images", "logits")
        shape = [dim.dim_param or dim.dim_value for dim in given.type.tensor_type.shape.dim]
        assert shape == ["batch", 3, 24, 24]
        assert [dim.dim_param or dim.dim_value for dim in returned.type.tensor_type.shape.dim] == ["batch", 4]

    def test_no_folder_names_of_this_machine(self, folder: Path) -> None:
        for name in ("vit.onnx", "vit.pt2"):
            content = (folder / name).read_bytes()
            assert str(ROOT).encode() not in content
            assert str(Path(torch.__file__).parent).encode() not in content

    def test_metadata_has_the_result_of_the_check(self, folder: Path) -> None:
        (entry,) = onnx.load(folder / "vit.onnx").metadata_props
        document = ExportDocument.model_validate_json(entry.value)
        assert document.verified is not None
        assert document.verified.passed
        assert document.verified.kept_equal == 1.0
        assert document.verified.batches == [1, 2, 4, 5]
        assert document.macs < document.dense_macs
        assert document.plan == artifact.load(stored(1)).plan

    @pytest.mark.slow
    def test_a_long_graph_skips_the_rewriting_rules(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(onnx_graph, "_MOST_TO_REWRITE", 10)
        exported = export_to(open_family("vim"), "onnx", tmp_path / "vim.onnx")
        assert exported.document.verified is not None

    @pytest.mark.slow
    def test_attention_is_one_operator_where_the_opset_has_it(self, tmp_path: Path) -> None:
        exported = export_to(open_family("timm_vit"), "onnx", tmp_path / "vit.onnx", opset=23)
        assert exported.operators is not None
        assert exported.operators["Attention"] == 2

    def test_a_fixed_batch(self, tmp_path: Path) -> None:
        exported = export_to(open_family("timm_vit"), "onnx", tmp_path / "vit.onnx", batch=3)
        assert exported.document.input.shape == [3, 3, 24, 24]
        runtime = open_exported(tmp_path / "vit.onnx")
        with pytest.raises(UsageError, match="takes batches of 3, not of 2"):
            runtime.module(torch.zeros(2, 3, 24, 24))
        inputs = inputs_for(runtime, 5)
        with torch.no_grad():
            wanted = artifact.load(stored(1))(inputs)
        torch.testing.assert_close(runtime.flexible(inputs), wanted, rtol=1e-4, atol=1e-4)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "options",
        [
            "merge, similarity: keys",
            *(pytest.param(each, marks=pytest.mark.slow) for each in ("fuse, carry: true", "bipartite")),
        ],
    )
    def test_merging_reducers(self, options: str, tmp_path: Path) -> None:
        exported = export_to(reduced_vit(f"{{kind: {options}}}"), "onnx", tmp_path / "vit.onnx")
        assert exported.document.verified is not None

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "metric",
        [
            "{kind: representation_shift, operation: block, distance: cosine, polarity: smallest}",
            pytest.param("{kind: class_attention}", marks=pytest.mark.slow),
            pytest.param("{kind: attention_entropy}", marks=pytest.mark.slow),
            pytest.param("{kind: random}", marks=pytest.mark.slow),
            f"{{kind: fitted, weights: {Fitted.of([0.5, -1.0] * 8).weights}}}",
        ],
    )
    def test_metrics(self, metric: str, tmp_path: Path) -> None:
        exported = export_to(reduced_vit(metric=metric), "onnx", tmp_path / "vit.onnx")
        assert exported.document.verified is not None

    @pytest.mark.slow
    def test_the_lower_position_is_kept_among_equal_scores(self, tmp_path: Path) -> None:
        class Ties(torch.nn.Module):
            def forward(self, scores: Tensor) -> tuple[Tensor, ...]:
                from repshift_cli.ops.tokens import complement, split_top

                return (*split_top(scores, 3), complement(scores[:, :2].sort(dim=1).values.long(), 6))

        scores = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0, 2.0], [0.0, 5.0, 0.0, 0.0, 0.0, 0.0]])
        shapes = ({0: torch.export.Dim("batch")},)
        program = torch.export.export(Ties(), (scores,), dynamic_shapes=shapes, strict=False)
        model = onnx_graph.build_graph(program, 18, ("scores", ["keep", "drop", "others"]))
        onnx_graph.check_graph(model)
        onnx.save(model, tmp_path / "ties.onnx")
        import onnxruntime

        session = onnxruntime.InferenceSession(str(tmp_path / "ties.onnx"), providers=["CPUExecutionProvider"])
        keep, drop, others = session.run(None, {"scores": scores.numpy()})
        assert keep.tolist() == [[1, 3, 5], [0, 1, 2]]
        assert drop.tolist() == [[0, 2, 4], [3, 4, 5]]
        assert others.tolist() == [[0, 3, 4, 5], [1, 2, 3, 4]]

    @pytest.mark.parametrize("operator", ["Loop", "ScatterND", "Scan"])
    def test_unsupported_operators(self, operator: str) -> None:
        node = onnx.helper.make_node(operator, ["a"], ["b"])
        model = onnx.helper.make_model(onnx.helper.make_graph([node], "graph", [], []))
        with pytest.raises(CheckFailed, match=operator):
            onnx_graph.check_graph(model)

    def test_a_count_that_is_not_constant(self) -> None:
        node = onnx.helper.make_node("TopK", ["a", "k"], ["b", "c"])
        model = onnx.helper.make_model(onnx.helper.make_graph([node], "graph", [], []))
        with pytest.raises(CheckFailed, match="not constant"):
            onnx_graph.check_graph(model)


class TestHub:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_folder_loads_as_the_compressed_model(self, family: str, tmp_path: Path) -> None:
        opened = open_family(family)
        exported = export_to(opened, "hub", tmp_path / "model")
        assert {path.name for path in exported.output.iterdir()} == {"README.md", "config.json", "model.safetensors"}
        again = load(exported.output)
        inputs = inputs_for(opened)
        with torch.no_grad():
            assert torch.equal(again(inputs), opened.module(inputs))
        config = json.loads((exported.output / "config.json").read_text())
        assert ExportDocument.model_validate(config["repshift"]).verified is not None
        card = (exported.output / "README.md").read_text()
        assert ("timm.create_model" in card) == (family in ("timm_vit", "resnet"))
        assert "tokens in" in card

    @pytest.mark.parametrize("family", ["timm_vit", "resnet"])
    def test_timm_loads_it(self, family: str, tmp_path: Path) -> None:
        opened = open_family(family)
        assert opened.compressed is not None
        export_to(opened, "hub", tmp_path / "model")
        found = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
        inputs = inputs_for(opened)
        with torch.no_grad(), opened.compressed.dense() as dense:
            torch.testing.assert_close(found(inputs), dense(inputs), rtol=1e-5, atol=1e-5)

    def test_weights_in_half_precision(self, tmp_path: Path) -> None:
        export_to(open_family("timm_vit"), "hub", tmp_path / "half", dtype=torch.float16)
        export_to(open_family("timm_vit"), "hub", tmp_path / "whole")
        half, whole = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "whole"))
        assert half < 0.7 * whole

    def test_other_files_of_a_folder_are_kept(self, tmp_path: Path) -> None:
        output = tmp_path / "model"
        output.mkdir()
        (output / "thesis.tex").write_text("all of it")
        with pytest.raises(UsageError, match="already exists"):
            export_to(open_family("timm_vit"), "hub", output, verify=False)
        export_to(open_family("timm_vit"), "hub", output, verify=False, force=True)
        (output / "config.json").chmod(0o600)
        export_to(open_family("vim"), "hub", output, verify=False, force=True)
        assert {path.name for path in output.iterdir()} == {
            *("README.md", "config.json", "model.safetensors", "thesis.tex")
        }
        assert (output / "thesis.tex").read_text() == "all of it"
        assert load(output).plan.family == "vim"
        assert {stat.S_IMODE(path.stat().st_mode) for path in output.iterdir()} == {0o644}
        assert list(tmp_path.iterdir()) == [output]

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
    def test_a_configuration_and_weights_of_others_are_not_replaced(self, name: str, tmp_path: Path) -> None:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / name).write_text('{"architecture": "mine"}')
        with pytest.raises(UsageError, match="that repshift did not write, so it is not replaced"):
            export_to(open_family("timm_vit"), "hub", tmp_path / "model", force=True)
        assert (tmp_path / "model" / name).read_text() == '{"architecture": "mine"}'

    @pytest.mark.parametrize("edit", [b"My notes", b"%sMy notes", b"My notes%s"])
    def test_an_edited_card_is_kept(self, edit: bytes, tmp_path: Path) -> None:
        card = tmp_path / "model" / "README.md"
        export_to(open_family("vim"), "hub", card.parent, verify=False)
        before = card.read_bytes()
        export_to(open_family("timm_vit"), "hub", card.parent, verify=False, force=True)
        assert card.read_bytes() != before
        edited = edit.replace(b"%s", card.read_bytes())
        card.write_bytes(edited)
        export_to(open_family("vim"), "hub", card.parent, verify=False, force=True)
        assert card.read_bytes() == edited

    def test_a_link_to_a_folder_and_a_file_in_its_place(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        export_to(open_family("timm_vit"), "hub", tmp_path / "link", verify=False, force=True)
        assert (tmp_path / "link").is_symlink()
        assert load(tmp_path / "real").plan.family == "timm_vit"
        (tmp_path / "file").touch()
        (tmp_path / "dangling").symlink_to("missing")
        for name in ("file", "dangling"):
            for force in (False, True):
                with pytest.raises(UsageError, match="is not a folder"):
                    export_to(open_family("timm_vit"), "hub", tmp_path / name, verify=False, force=force)


class TestFailures:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("target", "problem"),
        [("pt2", KeyboardInterrupt()), ("hub", SystemExit(143)), ("hub", OSError(errno.ENOSPC, "No space left"))],
    )
    def test_no_files_stay(
        self, target: str, problem: BaseException, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def fail(*arguments: Any) -> None:
            raise problem

        monkeypatch.setattr(verify, "compare", fail)
        output = tmp_path / ("model" if target == "hub" else f"model.{target}")
        with pytest.raises((OutputError, KeyboardInterrupt, SystemExit)):
            export_to(open_family("timm_vit"), target, output)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.slow
    def test_a_program_on_a_full_disk(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """torch's writer would abort the process."""
        opened = DeferredErrors.__init__
        monkeypatch.setattr(DeferredErrors, "__init__", lambda self, path: opened(self, Path("/dev/full")))
        with pytest.raises(OutputError, match=r"cannot write .*model.pt2: No space left on device"):
            export_to(open_family("timm_vit"), "pt2", tmp_path / "model.pt2", verify=False)
        assert list(tmp_path.iterdir()) == []


class TestVerify:
    def wrong(self, change: Callable[[ModelProto], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
        """The error message for an export whose graph was changed."""
        right = onnx_graph.build_graph

        def wrong(*arguments: Any) -> ModelProto:
            model = right(*arguments)
            change(model)
            return model

        monkeypatch.setattr(onnx_graph, "build_graph", wrong)
        with pytest.raises(CheckFailed) as caught:
            export_to(open_family("timm_vit"), "onnx", tmp_path / "vit.onnx")
        assert caught.value.exit_code == 5
        assert list(tmp_path.iterdir()) == []
        return caught.value.message

    def test_outputs_that_differ(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        def change(model: ModelProto) -> None:
            weight = next(each for each in model.graph.initializer if each.name.endswith("head.bias"))
            values = onnx.numpy_helper.to_array(weight) + np.float32(0.1)
            weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))

        assert "outputs differ from those of torch by" in self.wrong(change, monkeypatch, tmp_path)

    @pytest.mark.slow
    def test_tokens_that_differ(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        def change(model: ModelProto) -> None:
            for node in model.graph.node:
                for attribute in node.attribute if node.op_type == "TopK" else ():
                    if attribute.name == "largest":
                        attribute.i = 1 - attribute.i
                        return

        assert "of the kept positions are those of torch" in self.wrong(change, monkeypatch, tmp_path)

    @pytest.mark.slow
    def test_nan_outputs(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        def change(model: ModelProto) -> None:
            weight = next(each for each in model.graph.initializer if each.name.endswith("head.bias"))
            values = onnx.numpy_helper.to_array(weight) * np.float32("nan")
            weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))

        assert "differ from those of torch by inf" in self.wrong(change, monkeypatch, tmp_path)

    def test_outputs_are_compared_if_every_input_keeps_another_token(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(verify._KEPT, torch.float16, 0.5)
        request = Request("pt2", Path("x.pt2"), dtype=torch.float16)
        subject = Subject.of(open_family("timm_vit"), request)
        nowhere = 99

        def run(images: Tensor, wrong: int = 0) -> tuple[Tensor, ...]:
            trace = subject.run(images)
            first = torch.full((len(images), 1), nowhere)
            kept = (torch.cat((first, places[:, 1:]), dim=1) for places in trace.kept.values())
            return (trace.output + wrong, trace.output, *kept)

        right = verify.compare(subject, request, run, Silent())
        assert right.passed
        assert right.swapped == right.inputs
        with pytest.raises(CheckFailed, match="outputs differ from those of torch"):
            verify.compare(subject, request, partial(run, wrong=1), Silent())

    @pytest.mark.slow
    def test_an_existing_file_stays_where_the_check_fails(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "vit.pt2").write_text("precious")
        monkeypatch.setattr(exported, "run_file", lambda path, kind, document: _Zeros())
        with pytest.raises(CheckFailed):
            export_to(open_family("timm_vit"), "pt2", tmp_path / "vit.pt2", force=True)
        assert (tmp_path / "vit.pt2").read_text() == "precious"
        assert [path.name for path in tmp_path.iterdir()] == ["vit.pt2"]


class _Zeros:
    """A file that returns zeros."""

    def __call__(self, images: Tensor) -> Tensor:
        return torch.zeros(len(images), 4)

    def outputs(self, images: Tensor) -> tuple[Tensor, ...]:
        return (self(images), torch.zeros(len(images), 7, dtype=torch.int64))


class TestProgram:
    @pytest.mark.slow
    def test_operations_are_of_torch_and_without_scatter(self) -> None:
        for family in FAMILIES:
            opened = open_family(family)
            request = Request("pt2", Path("x.pt2"))
            program = trace_program(Subject.of(opened, request), request, watched=True)
            names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
            assert not [name for name in names if "scatter" in name or "repshift" in name or "index_add" in name]

    def test_the_archive_has_the_metadata(self, folder: Path) -> None:
        with zipfile.ZipFile(folder / "vit.pt2") as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("repshift.json")]
            document = ExportDocument.model_validate_json(archive.read(name))
        assert document.kind == "pt2"
        files: dict[str, Any] = {"repshift.json": ""}
        torch.export.load(folder / "vit.pt2", extra_files=files)
        assert ExportDocument.model_validate_json(files["repshift.json"]) == document


class TestRuns:
    @pytest.mark.slow
    def test_a_hundred_runs_at_different_batch_sizes_agree(self, folder: Path) -> None:
        for name in ("vit.onnx", "vit.pt2"):
            opened = open_exported(folder / name, trust=True)
            images = inputs_for(opened, 8)
            first: dict[int, Tensor] = {}
            with torch.no_grad():
                for turn in range(100):
                    count = 1 + turn % 8
                    output = opened.module(images[:count])
                    assert torch.equal(output, first.setdefault(count, output)), (name, count)
            for count, output in first.items():
                torch.testing.assert_close(output, first[8][:count], rtol=1e-4, atol=1e-5)

    def test_dense_and_compressed_differ(self, folder: Path) -> None:
        dense, compressed = (open_exported(folder / f"{name}.onnx") for name in ("dense", "vit"))
        assert not dense.reduced
        assert compressed.reduced
        assert dense.macs == dense.dense_macs == compressed.dense_macs > compressed.macs
        images = inputs_for(dense)
        model = artifact.load(stored(1))
        with torch.no_grad(), model.dense() as reference:
            torch.testing.assert_close(dense.module(images), reference(images), rtol=1e-4, atol=1e-5)
            assert not torch.allclose(dense.module(images), compressed.module(images), atol=1e-3)


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"target": "onnx", "opset": 17}, "invalid --opset 17: must be from 18 to 23"),
            ({"target": "onnx", "opset": 99}, "invalid --opset 99: must be from 18 to 23"),
            ({"target": "onnx", "dtype": torch.bfloat16}, "unsupported --dtype bfloat16: allowed: float32, float16"),
            ({"target": "onnx", "device": torch.device("cuda")}, "unsupported --device cuda: allowed: cpu"),
            ({"target": "pt2", "opset": 20}, "--opset is for --to onnx"),
            ({"target": "pt2", "tune": True}, "--tune is for --to aoti"),
            ({"target": "onnx", "tune": True}, "--tune is for --to aoti"),
            ({"target": "pt2", "quantize": "int8"}, "--quantize is for --to onnx, openvino, not for --to pt2"),
            ({"target": "hub", "tune": True}, "--tune is for --to aoti"),
            ({"target": "hub", "batch": 2}, "--batch is for --to aoti, onnx, openvino, pt2"),
            ({"target": "hub", "device": torch.device("cuda")}, "unsupported --device cuda: allowed: cpu"),
        ],
    )
    def test_invalid_requests(self, options: dict[str, Any], words: str, tmp_path: Path) -> None:
        suffix = {"onnx": ".onnx", "pt2": ".pt2"}.get(options["target"], "")
        with pytest.raises(UsageError, match=words):
            check(Request(output=tmp_path / f"x{suffix}", **options))

    @pytest.mark.parametrize("target", ["onnx", "pt2", "aoti"])
    def test_a_wrong_suffix(self, target: str, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="has a name that ends with"):
            check(Request(target, tmp_path / "model.bin"))

    @pytest.mark.parametrize("target", FORMATS)
    def test_an_output_that_exists(self, target: str, tmp_path: Path) -> None:
        output = tmp_path / FORMATS[target].default_output("model").name
        output.mkdir() if FORMATS[target].files else output.touch()
        with pytest.raises(UsageError, match="already exists"):
            check(Request(target, output))

    @pytest.mark.parametrize("target", FORMATS)
    def test_a_missing_folder(self, target: str, tmp_path: Path) -> None:
        with pytest.raises(RepshiftError, match="does not exist"):
            check(Request(target, tmp_path / "no" / FORMATS[target].default_output("model").name))

    @pytest.mark.slow
    def test_weights_too_large_for_onnx(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(onnx_graph, "_MOST_BYTES", 1000)
        with pytest.raises(RepshiftError, match="do not fit into one ONNX file"):
            export_to(open_family("timm_vit"), "onnx", tmp_path / "vit.onnx")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
    def test_a_missing_package(
        self, package: str, monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
    ) -> None:
        import importlib.util

        found = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
        with pytest.raises(UsageError, match=r"pip install 'repshift-cli\[onnx\]'"):
            check(Request("onnx", tmp_path / "x.onnx"))
        if package != "onnxscript":
            with pytest.raises(UsageError, match=f"need {package}"):
                open_exported(folder / "vit.onnx")


def test_run_file_returns_all_outputs(folder: Path) -> None:
    opened = open_exported(folder / "vit.onnx")
    runtime = run_file(folder / "vit.onnx", "onnx", opened.runtime.document)
    (output,) = runtime.outputs(inputs_for(opened))
    assert output.shape == (3, 4)
