"""The commands at work: what they print and what they write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
from outcome import Command
from tiny import save_weights

import repshift_cli
from repshift_cli import artifact
from repshift_cli.recipe import Recipe, shipped_recipes

QUICK = ("--seconds", "0", "--batch-size", "2")


class TestHelp:
    @pytest.mark.parametrize(
        ("command", "options"),
        [
            ([], ["compress", "export", "bench", "eval", "inspect", "visualize", "demo", "recipes", "--version"]),
            (
                ["compress"],
                [
                    "--recipe",
                    "--model",
                    "--heads",
                    "--output",
                    "--data",
                    "--calibration",
                    "--no-calibrate",
                    "--device",
                    "--dtype",
                    "--batch-size",
                    "--threads",
                    "--seconds",
                    "--seed",
                    "--dry-run",
                    "--json",
                    "--force",
                ],
            ),
            (["bench"], ["--batch-size", "--recipe", "--dtype", "--device", "--threads", "--attention", "--json"]),
            (["eval"], ["--dataset", "--data-dir", "--limit", "--compare-dense", "--strict", "--json"]),
            (["export"], ["--to", "--output", "--batch", "--dtype", "--opset", "--no-verify", "--dense", "--json"]),
            (["inspect"], ["--model", "--heads", "--json"]),
            (["visualize"], ["--json", "--output"]),
            (["demo"], ["--json"]),
            (["recipes"], ["list", "show", "check"]),
            (["recipes", "list"], []),
            (["recipes", "show"], ["--blocks"]),
            (["recipes", "check"], []),
        ],
    )
    @pytest.mark.parametrize("flag", ["--help", "-h"])
    def test_each_command_tells_its_options(
        self, flag: str, command: list[str], options: list[str], cli: Command
    ) -> None:
        outcome = cli(*command, flag)
        assert outcome.rc == 0
        assert outcome.stdout.startswith("Usage: repshift")
        assert outcome.stderr == ""
        missing = [option for option in options if option not in outcome.stdout]
        assert missing == []
        assert all(len(line) <= 80 for line in outcome.stdout.splitlines())

    def test_without_a_command_it_shows_the_help(self, cli: Command) -> None:
        outcome = cli()
        assert "Usage: repshift" in outcome.stdout + outcome.stderr

    def test_version(self, shell: Command) -> None:
        outcome = shell("--version")
        assert (outcome.rc, outcome.stdout) == (0, f"repshift {repshift_cli.__version__}\n")


class TestCompress:
    def test_json_is_one_document_and_nothing_else(
        self, shell: Command, dense: Path, recipe: Path, tmp_path: Path
    ) -> None:
        outcome = shell("compress", dense, "--recipe", recipe, *QUICK, "-o", "small.safetensors", "--json")
        assert outcome.rc == 0, outcome.stderr
        document = json.loads(outcome.stdout)
        assert document["output"] == "small.safetensors"
        assert [row["tokens_out"] for row in document["plan"]] == [13, 6]
        assert document.keys() >= {"model", "dense", "compressed", "ratio", "agreement"}
        assert artifact.load(tmp_path / "small.safetensors").macs() == round(document["compressed"]["gmacs"] * 1e9)
        assert "built as a ViT of width 128" in outcome.stderr

    def test_the_table(self, cli: Command, dense: Path, recipe: Path, tmp_path: Path) -> None:
        outcome = cli("compress", dense, "--recipe", recipe, *QUICK, "-o", "small.safetensors")
        assert outcome.rc == 0, outcome.stderr
        for word in ("blocks.0", "tokens out", "GMACs per image", "latency", "unchanged", "wrote   small.safetensors"):
            assert word in outcome.stdout
        assert all(len(line) <= 80 for line in outcome.stdout.splitlines())

    def test_the_default_name_of_the_output(self, cli: Command, dense: Path, recipe: Path, tmp_path: Path) -> None:
        assert cli("compress", dense, "--recipe", recipe, *QUICK).rc == 0
        assert (tmp_path / "dense_repshift.safetensors").is_file()

    def test_a_dry_run(self, cli: Command, dense: Path, tmp_path: Path) -> None:
        before = sorted(tmp_path.iterdir())
        outcome = cli("compress", dense, "--dry-run", "--json")
        assert outcome.rc == 0, outcome.stderr
        document = json.loads(outcome.stdout)
        assert document["output"] is None
        assert [row["layer"] for row in document["plan"]] == [0, 1, 2]
        assert any("no recipe was given" in note for note in document["notes"])
        assert "no recipe was given" in outcome.stderr
        assert sorted(tmp_path.iterdir()) == before

    def test_a_dry_run_for_people(self, cli: Command, dense: Path) -> None:
        outcome = cli("compress", dense, "--dry-run")
        assert "Dry run: nothing was run, measured or written." in outcome.stdout

    def test_a_dry_run_does_not_mind_an_output_that_exists(self, cli: Command, dense: Path, tmp_path: Path) -> None:
        (tmp_path / "dense_repshift.safetensors").touch()
        assert cli("compress", dense, "--dry-run").rc == 0

    def test_calibrated(self, cli: Command, dense: Path, pictures: Path) -> None:
        outcome = cli("compress", dense, "--calibration", pictures, *QUICK, "--force", "--json")
        assert outcome.rc == 0, outcome.stderr
        found = json.loads(outcome.stdout)["calibration"]
        assert all(len(site["candidates"]) == 30 for site in found["sites"])
        assert found["images"] == 16

    def test_the_builtin_model_calibrates_itself(self, shell: Command, tmp_path: Path) -> None:
        outcome = shell("compress", "builtin:vit-digits", *QUICK, "-o", "small.safetensors", "--json")
        assert outcome.rc == 0, outcome.stderr
        document = json.loads(outcome.stdout)
        assert document["calibration"]["clear"] is True
        chosen = [site["chosen"] for site in document["calibration"]["sites"]]
        assert chosen == [row["metric"] for row in document["plan"]]
        assert {metric["polarity"] for metric in chosen} == {"largest", "smallest"}
        assert document["agreement"] > 0.8
        assert document["ratio"]["macs"] > 1.2


class TestInspect:
    def test_dense(self, cli: Command, dense: Path) -> None:
        document = json.loads(cli("inspect", dense, "--json").stdout)
        assert (document["prefix_tokens"], document["patch_tokens"], document["compressed"]) == (1, 16, False)
        assert [site["site"] for site in document["sites"]] == [f"blocks.{index}" for index in range(4)]
        assert document["gmacs"] == document["dense_gmacs"]

    def test_compressed(self, cli: Command, dense: Path, recipe: Path) -> None:
        cli("compress", dense, "--recipe", recipe, *QUICK, "-o", "small.safetensors")
        document = json.loads(cli("inspect", "small.safetensors", "--json").stdout)
        assert document["compressed"] is True
        assert [site["tokens"] for site in document["sites"]] == [17, 13, 13, 6]
        assert document["gmacs"] < document["dense_gmacs"]
        shown = cli("inspect", "small.safetensors")
        assert "17 -> 13" in shown.stdout
        assert all(len(line) <= 80 for line in shown.stdout.splitlines())

    def test_what_cannot_be_says_why(self, cli: Command, tmp_path: Path) -> None:
        from timm.models.vision_transformer import ParallelThingsBlock

        model = timm.create_model("vit_small_patch16_36x1_224", depth=2, img_size=32, block_fn=ParallelThingsBlock)
        save_weights(model, tmp_path / "parallel.safetensors")
        outcome = cli("inspect", tmp_path / "parallel.safetensors")
        assert outcome.rc == 3
        assert "not known: blocks.0.attns" in " ".join(outcome.stderr.split())


class TestRecipes:
    def test_list(self, cli: Command) -> None:
        outcome = cli("recipes", "list")
        assert outcome.rc == 0
        assert all(name in outcome.stdout for name in shipped_recipes())

    @pytest.mark.parametrize("name", sorted(shipped_recipes()))
    def test_show_and_check(self, name: str, cli: Command) -> None:
        assert cli("recipes", "show", name).stdout == shipped_recipes()[name]
        assert "fine" in cli("recipes", "check", name).stdout

    def test_the_default_can_be_saved_and_used(self, cli: Command, dense: Path, tmp_path: Path) -> None:
        (tmp_path / "mine.yaml").write_text(cli("recipes", "show", "default", "--blocks", 4).stdout)
        document = json.loads(cli("compress", dense, "-r", "mine.yaml", "--dry-run", "--json").stdout)
        assert [row["layer"] for row in document["plan"]] == [0, 1, 2]

    def test_of_a_compressed_checkpoint(self, cli: Command, dense: Path, recipe: Path) -> None:
        cli("compress", dense, "--recipe", recipe, *QUICK, "-o", "small.safetensors")
        shown = cli("recipes", "show", "small.safetensors").stdout
        assert shown == recipe.read_text()
        assert Recipe.parse(shown).metric.kind == "token_norm"


class TestBench:
    def test_compressed_against_its_dense_self(self, cli: Command, dense: Path, recipe: Path) -> None:
        cli("compress", dense, "--recipe", recipe, *QUICK, "-o", "small.safetensors")
        outcome = cli("bench", "small.safetensors", "--seconds", "0", "-b", "1,2", "--json")
        assert outcome.rc == 0, outcome.stderr
        document = json.loads(outcome.stdout)
        assert document.keys() >= {"device", "dtype", "threads", "attention", "runs", "ratios"}
        assert {run["batch"] for run in document["runs"]} == {1, 2}
        for run in document["runs"]:
            assert run.keys() >= {"name", "batch", "gmacs", "latency_ms", "throughput", "peak_memory_mb"}
