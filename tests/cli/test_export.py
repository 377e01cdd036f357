"""`repshift export`, and the commands that open its files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import stored
from outcome import Command, Outcome, explained

from repshift_cli.checkpoints import artifact
from repshift_cli.checkpoints.exported import open_exported

QUICK = ("--seconds", "0", "--min-runs", "1", "-b", "2")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The tiny compressed ViT."""
    shutil.copy(stored(1), tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


def document_of(outcome: Outcome) -> dict[str, Any]:
    assert outcome.rc == 0, outcome.stderr
    found: dict[str, Any] = json.loads(outcome.stdout)
    return found


class TestExport:
    @pytest.mark.slow
    def test_onnx_and_bench(self, shell: Command, small: Path, tmp_path: Path) -> None:
        document = document_of(shell("export", small, "--to", "onnx", "--json"))
        assert document["output"] == "small.onnx"
        assert document["verified"]["passed"] is True
        assert document["ports"]["input"] == {"name": "images", "shape": [None, 3, 24, 24], "dtype": "float32"}
        assert document["opset"] == 20
        assert document["operators"]["TopK"] == 2
        assert (
            document_of(shell("export", small, "--to", "onnx", "--dense", "-o", "dense.onnx", "--json"))["compressed"]
            is False
        )
        bench = document_of(shell("bench", "dense.onnx", "small.onnx", *QUICK, "--json"))
        assert [run["name"] for run in bench["runs"]] == ["dense.onnx", "small.onnx"]
        assert [ratio["against"] for ratio in bench["ratios"]] == ["dense.onnx"]

    def test_the_table_and_a_program(self, cli: Command, small: Path, tmp_path: Path) -> None:
        outcome = cli("export", small, "--to", "pt2", "-o", "small.pt2")
        assert outcome.rc == 0, outcome.stderr
        for word in (
            "images: float32 [batch, 3, 24, 24]",
            "largest difference",
            "kept positions equal 100.00%",
            "wrote",
        ):
            assert word in " ".join(outcome.stdout.split())
        assert all(len(line) <= 80 for line in outcome.stdout.splitlines())
        model = artifact.load(small)
        images = torch.randn(2, 3, 24, 24)
        with torch.no_grad():
            torch.testing.assert_close(open_exported(tmp_path / "small.pt2", trust=True).module(images), model(images))

    def test_a_dense_model_by_a_recipe(self, cli: Command, dense: Path, recipe: Path, tmp_path: Path) -> None:
        arguments = ("export", dense, "--recipe", recipe, "--to", "hub", "-o", "folder", "--json")
        assert document_of(cli(*arguments))["compressed"] is True
        assert artifact.load(tmp_path / "folder").plan.sites[0].tokens_out == 13
        assert (tmp_path / "folder" / "README.md").read_text().count("```yaml") == 1

    def test_not_verified(self, cli: Command, small: Path) -> None:
        outcome = cli("export", small, "--to", "pt2", "--no-verify", "--batch", "2")
        assert "verified no" in outcome.stdout
        assert "[2, 3, 24, 24]" in outcome.stdout

    def test_compress_exports_too(self, cli: Command, dense: Path, recipe: Path, tmp_path: Path) -> None:
        options = ("--seconds", "0", "-o", "fast.safetensors", "--export", "pt2", "--export", "hub", "--json")
        document = document_of(cli("compress", dense, "--recipe", recipe, *options))
        assert [each["output"] for each in document["exports"]] == ["fast.pt2", "fast_hub"]
        assert all(each["verified"]["passed"] for each in document["exports"])

    @pytest.mark.slow
    def test_eval_of_a_program(self, cli: Command) -> None:
        arguments = (
            "export",
            "builtin:vit-digits-small",
            "--to",
            "pt2",
            "-o",
            "digits.pt2",
            "--batch",
            "8",
            "--no-verify",
        )
        assert cli(*arguments).rc == 0
        evaluated = document_of(
            cli("eval", "digits.pt2", "--trust", "--dataset", "builtin:digits", "--limit", "20", "--json")
        )
        assert evaluated["top1"] > 50
        assert evaluated["images"] == 20
        explained(cli("eval", "digits.pt2"), 2, "no dataset given")


class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--to", "onnx", "--opset", "11"], ["--opset 11", "must be from 18 to 23"]),
            (["--to", "onnx", "--dtype", "bfloat16"], ["unsupported --dtype bfloat16", "allowed: float32, float16"]),
            (["--to", "onnx", "--batch", "0"], ["invalid --batch 0: must be dynamic or a number of at least 1"]),
            (["--to", "onnx", "--batch", "many"], ["invalid --batch many: must be dynamic or a number"]),
            (["--to", "hub", "--batch", "4"], ["--batch is for --to aoti, onnx, openvino, pt2, not for --to hub"]),
            (["--to", "pt2", "-o", "small.onnx"], ["a name that ends with .pt2"]),
            (["--to", "pt2", "--opset", "20"], ["--opset is for --to onnx"]),
            (["--to", "onnx", "--tune"], ["--tune is for --to aoti, not for --to onnx"]),
            (["--to", "tflite"], ["--to"]),
            (["--to", "pt2", "--dtype", "int8"], ["unknown dtype 'int8'"]),
        ],
    )
    def test_invalid_options(self, arguments: list[str], words: list[str], cli: Command, small: Path) -> None:
        before = sorted(small.parent.iterdir())
        explained(cli("export", small, *arguments), 2, *words)
        assert sorted(small.parent.iterdir()) == before

    def test_an_output_that_exists(self, cli: Command, small: Path) -> None:
        (small.parent / "small.pt2").write_text("precious")
        explained(cli("export", small, "--to", "pt2"), 2, "small.pt2 already exists", "--force")
        assert (small.parent / "small.pt2").read_text() == "precious"

    def test_an_export_of_compress_that_exists_stops_it_before_the_work(
        self, cli: Command, dense: Path, recipe: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "fast.pt2").touch()
        arguments = ("compress", dense, "-r", recipe, "-o", "fast.safetensors", "--export", "pt2")
        explained(cli(*arguments), 2, "fast.pt2 already exists")
        assert not (tmp_path / "fast.safetensors").exists()

    @pytest.mark.parametrize("command", ["bench", "eval"])
    @pytest.mark.parametrize(("name", "words"), [("bad.onnx", "not an ONNX file"), ("bad.pt2", "not a .pt2 archive")])
    def test_a_corrupted_file(self, name: str, words: str, command: str, cli: Command, tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(b"\x08\x0agarbage" * 10)
        more = ("--dataset", "builtin:digits") if command == "eval" else ()
        explained(cli(command, name, *more), 3, name, words)

    @pytest.mark.slow
    def test_unsupported_options_of_exported_files(self, cli: Command, small: Path) -> None:
        assert cli("export", small, "--to", "pt2", "--no-verify").rc == 0
        explained(
            cli("eval", "small.pt2", "--trust", "--dataset", "builtin:digits", "--compare-dense"), 2, "its dense model"
        )
        explained(cli("bench", "small.pt2", "--trust", "--img-size", "32"), 2, "--img-size", "is an exported file")
        explained(cli("bench", "small.pt2", "--trust", "--dtype", "float16"), 2, "takes float32, not float16")
        explained(cli("compress", "small.pt2"), 3, "small.pt2 is an exported file", "that it was exported from")
        explained(
            cli("bench", "small.pt2", "--trust", "--recipe", "deit_small_paper"), 3, "small.pt2 is an exported file"
        )
        explained(cli("bench", "small.pt2", "--trust", "--compile", "default"), 2, "--compile", "cannot be compiled")
        explained(
            cli("bench", "small.pt2", "--trust", "--attention", "explicit"), 2, "--attention", "cannot be switched"
        )
        explained(
            cli("bench", "small.pt2", "--trust", "--against", "tome"),
            2,
            "--against",
            "unsupported for an exported file",
        )

    @pytest.mark.slow
    def test_an_exported_file_needs_the_dense_one_to_be_compared_with(self, cli: Command, small: Path) -> None:
        assert cli("export", small, "--to", "pt2", "--no-verify").rc == 0
        words = ("same format and weights", "the dense model too, with --dense, and give both")
        outcome = cli("bench", "small.pt2", "--trust", *QUICK)
        assert outcome.rc == 0
        assert all(word in " ".join(outcome.stdout.split()) for word in words)
        explained(cli("bench", "small.pt2", "--trust", "--budget", "macs<=0.9"), 2, "--budget", *words)
        assert cli("export", small, "--to", "pt2", "--dense", "-o", "dense.pt2", "--no-verify").rc == 0
        explained(cli("bench", "dense.pt2", "--trust", "--budget", "macs<=0.9"), 2, "--budget", *words)

    @pytest.mark.slow
    def test_a_budget_of_exported_files(self, cli: Command, small: Path) -> None:
        for options in ((), ("--dense", "-o", "dense.onnx")):
            assert cli("export", small, "--to", "onnx", "--no-verify", *options).rc == 0
        held = ("bench", "small.onnx", "dense.onnx", *QUICK, "--json")
        document = document_of(cli(*held, "--budget", "macs<=0.99"))
        assert [(each["name"], each["met"]) for each in document["budget"]] == [("small.onnx", True)]
        missed = cli(*held, "--budget", "macs<=0.1", "--budget", "peak_memory_mb<=1000")
        assert missed.rc == 5
        assert "macs<=0.1 missed" in missed.stderr
        assert "cannot be measured inside a compiled graph or another runtime" in " ".join(missed.stderr.split())

    @pytest.mark.slow
    def test_a_video_model_without_its_text_encoder(self, cli: Command, tmp_path: Path) -> None:
        assert cli("export", stored(3), "--to", "pt2", "-o", "clip.pt2", "--no-verify").rc == 0
        explained(cli("eval", "clip.pt2", "--trust", "--dataset", "builtin:shapes"), 3, "holds the vision encoder only")
