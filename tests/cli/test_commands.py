"""Output and files of the commands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from flash_stand_in import allow_flash
from outcome import Command, explained
from tiny import images, save_weights

import repshift_cli
from repshift_cli.checkpoints import artifact
from repshift_cli.measure.attention_kernel import observed_attention
from repshift_cli.planning.recipe import Recipe, shipped_recipes

QUICK = ("--seconds", "0", "--batch-size", "2")


class TestIdleThreads:
    """Variables of OpenMP, which are set before torch is imported."""

    @staticmethod
    def variables(own: dict[str, str]) -> dict[str, str]:
        """The variables of OpenMP after `repshift --version`."""
        names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
        script = f"""
import os, sys
from repshift_cli.cli import main
sys.argv = ["repshift", "--version"]
try:
    main()
except SystemExit:
    assert "torch" not in sys.modules
    print(*(f"{{name}}={{os.environ.get(name)}}" for name in {names}))
"""
        environment = {name: value for name, value in os.environ.items() if name not in names} | own
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
        )
        return dict(pair.split("=") for pair in done.stdout.splitlines()[-1].split())

    def test_spinning_is_limited(self) -> None:
        assert self.variables({}) == {"OMP_WAIT_POLICY": "None", "GOMP_SPINCOUNT": "10000"}

    @pytest.mark.parametrize("own", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}])
    def test_variables_of_the_user_are_kept(self, own: dict[str, str]) -> None:
        assert self.variables(own) == {"OMP_WAIT_POLICY": "None", "GOMP_SPINCOUNT": "None"} | own

    def test_bench_notes_a_passive_wait_policy(self, cli: Command, dense: Path, recipe: Path) -> None:
        quick = ("bench", dense, "--recipe", recipe, "--seconds", "0", "-b", "1")
        assert "OMP_WAIT_POLICY=PASSIVE is set" in cli(*quick, "--threads", "2").stderr
        assert "OMP_WAIT_POLICY" not in cli(*quick, "--threads", "1").stderr


class TestHelp:
    def test_no_command_is_described_in_part(self, cli: Command) -> None:
        shown = cli("--help").stdout
        assert "--speedup 1.5 --max-drop 1" in shown
        assert "..." not in shown.partition("Commands")[2]

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
                    "--attention",
                    "--seconds",
                    "--seed",
                    "--dry-run",
                    "--json",
                    "--force",
                ],
            ),
            (["bench"], ["--batch-size", "--recipe", "--dtype", "--device", "--threads", "--attention", "--json"]),
            (["eval"], ["--dataset", "--data-dir", "--limit", "--compare-dense", "--attention", "--strict", "--json"]),
            (["export"], ["--to", "--output", "--batch", "--dtype", "--opset", "--no-verify", "--dense", "--json"]),
            (["inspect"], ["--model", "--heads", "--json"]),
            (["visualize"], ["--json", "--output"]),
            (["demo"], ["--json"]),
            (["recipes"], ["list", "show", "check", "import"]),
            (["recipes", "list"], ["--json"]),
            (["recipes", "show"], ["--blocks", "--calibrated", "--json"]),
            (["recipes", "check"], []),
            (["recipes", "import"], ["--kind", "--blocks", "--tokens", "--prefix", "--output", "--force"]),
        ],
    )
    @pytest.mark.parametrize("flag", ["--help", "-h"])
    def test_help_lists_the_options_in_80_columns(
        self, flag: str, command: list[str], options: list[str], cli: Command
    ) -> None:
        outcome = cli(*command, flag)
        assert outcome.rc == 0
        assert outcome.stdout.startswith("Usage: repshift")
        assert outcome.stderr == ""
        missing = [option for option in options if option not in outcome.stdout]
        assert missing == []
        assert all(len(line) <= 80 for line in outcome.stdout.splitlines())
        assert re.findall(r"<(?:str|int|float|path|list).*?>", outcome.stdout) == []  # types of Python

    def test_help_without_a_command(self, cli: Command) -> None:
        outcome = cli()
        assert "Usage: repshift" in outcome.stdout + outcome.stderr

    def test_version(self, shell: Command) -> None:
        outcome = shell("--version")
        assert (outcome.rc, outcome.stdout) == (0, f"repshift {repshift_cli.__version__}\n")


class TestCompress:
    def test_json_is_one_document(self, shell: Command, dense: Path, recipe: Path, tmp_path: Path) -> None:
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

    def test_default_output(self, cli: Command, dense: Path, recipe: Path, tmp_path: Path) -> None:
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

    def test_a_dry_run_as_text(self, cli: Command, dense: Path) -> None:
        outcome = cli("compress", dense, "--dry-run")
        assert "Dry run: nothing was run, measured or written." in outcome.stdout

    def test_a_dry_run_ignores_an_existing_output(self, cli: Command, dense: Path, tmp_path: Path) -> None:
        (tmp_path / "dense_repshift.safetensors").touch()
        assert cli("compress", dense, "--dry-run").rc == 0

    def test_calibrated(self, cli: Command, dense: Path, photos: Path) -> None:
        outcome = cli("compress", dense, "--calibration", photos, *QUICK, "--force", "--json")
        assert outcome.rc == 0, outcome.stderr
        found = json.loads(outcome.stdout)["calibration"]
        assert all(len(site["candidates"]) == 3 for site in found["sites"])  # coverage, random, grid
        assert found["images"] == 16

    @pytest.mark.slow
    def test_the_builtin_model_is_calibrated_on_builtin_scenes(self, shell: Command, tmp_path: Path) -> None:
        outcome = shell("compress", "builtin:vit-digits", *QUICK, "-o", "small.safetensors", "--json")
        assert outcome.rc == 0, outcome.stderr
        document = json.loads(outcome.stdout)
        assert document["calibration"]["clear"] is True
        chosen = [site["chosen"] for site in document["calibration"]["sites"]]
        assert chosen == [row["metric"] for row in document["plan"]]
        assert {metric["kind"] for metric in chosen} == {"coverage"}
        assert document["calibration"]["checked"]["default"]["agreement"] < 0.6  # the paper's choice
        assert document["agreement"] > 0.95
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

    def test_an_unsupported_block_is_named(self, cli: Command, tmp_path: Path) -> None:
        from timm.models.vision_transformer import ParallelThingsBlock

        model = timm.create_model("vit_small_patch16_36x1_224", depth=2, img_size=32, block_fn=ParallelThingsBlock)
        save_weights(model, tmp_path / "parallel.safetensors")
        outcome = cli("inspect", tmp_path / "parallel.safetensors")
        assert outcome.rc == 3
        assert "compute something else than a plain ViT: vit_" in " ".join(outcome.stderr.split())


class TestRecipes:
    def test_list(self, cli: Command) -> None:
        outcome = cli("recipes", "list")
        assert outcome.rc == 0
        assert all(name in outcome.stdout for name in shipped_recipes())

    def test_json(self, cli: Command) -> None:
        listed = json.loads(cli("recipes", "list", "--json").stdout)["recipes"]
        assert [each["name"] for each in listed] == sorted(shipped_recipes())
        assert all(each.keys() == {"name", "description", "model", "schedules"} for each in listed)
        shown = json.loads(cli("recipes", "show", "deit_small_paper", "--json").stdout)
        assert shown["text"] == shipped_recipes()["deit_small_paper"]
        assert shown["recipe"]["layers"][0]["drop_ratio"] == 0.2

    def test_json_of_an_invalid_recipe(self, cli: Command, tmp_path: Path) -> None:
        text = "version: 1\nmetric: {kind: token_norm, extra: .inf}\nlayers: [{layer: 0, drop_ratio: 0.2}]\n"
        (tmp_path / "bad.yaml").write_text(text)
        explained(cli("recipes", "show", "bad.yaml", "--json"), 2, "extra")

    @pytest.mark.parametrize("name", sorted(shipped_recipes()))
    def test_show_and_check(self, name: str, cli: Command) -> None:
        assert cli("recipes", "show", name).stdout == shipped_recipes()[name]
        assert "valid" in cli("recipes", "check", name).stdout

    def test_import(self, cli: Command, dense: Path, tmp_path: Path) -> None:
        text = cli("recipes", "import", "r=3", "--blocks", 4, "--tokens", 16).stdout
        assert cli("recipes", "import", "r=3", "--blocks", 4, "--tokens", 16, "-o", "r.yaml").stdout == "wrote r.yaml\n"
        assert (tmp_path / "r.yaml").read_text() == text
        document = json.loads(cli("compress", dense, "-r", "r.yaml", "--dry-run", "--json").stdout)
        assert [row["tokens_out"] for row in document["plan"]] == [14, 11, 8]
        explained(cli("recipes", "import", "[1, 2]"), 2, "Add --kind ratios")
        explained(cli("recipes", "import", "drop_r=[0.5]", "-o", "r.yaml"), 2, "r.yaml already exists", "--force")
        assert cli("recipes", "import", "drop_r=[0.5]", "-o", "r.yaml", "--force").rc == 0
        assert "drop_ratios: [0.5]" in (tmp_path / "r.yaml").read_text()

    def test_the_default_recipe_can_be_saved_and_used(self, cli: Command, dense: Path, tmp_path: Path) -> None:
        (tmp_path / "mine.yaml").write_text(cli("recipes", "show", "default", "--blocks", 4).stdout)
        document = json.loads(cli("compress", dense, "-r", "mine.yaml", "--dry-run", "--json").stdout)
        assert [row["layer"] for row in document["plan"]] == [0, 1, 2]

    def test_of_a_compressed_checkpoint(self, cli: Command, dense: Path, recipe: Path) -> None:
        cli("compress", dense, "--recipe", recipe, *QUICK, "-o", "small.safetensors")
        shown = cli("recipes", "show", "small.safetensors").stdout
        assert shown == recipe.read_text()
        assert Recipe.parse(shown).metric.kind == "token_norm"


class TestAttention:
    """`--attention` of the commands that measure: each reports the kernel that ran."""

    @pytest.mark.parametrize(
        ("asked", "ran"),
        [
            pytest.param("sdpa", "sdpa:flash", marks=pytest.mark.slow),
            ("explicit", "explicit"),
            pytest.param("auto", "sdpa:flash", marks=pytest.mark.slow),  # the default, which other tests run
        ],
    )
    def test_observed_attention_in_json(self, asked: str, ran: str, cli: Command, recipe: Path, dense: Path) -> None:
        chosen = ("--attention", asked, "--json")
        done = cli("compress", dense, "--recipe", recipe, *QUICK, "-o", "small.safetensors", *chosen)
        assert done.rc == 0, done.stderr
        assert json.loads(done.stdout)["attention"] == ran
        done = cli("bench", "small.safetensors", "--seconds", "0", "-b", "1", *chosen)
        assert done.rc == 0, done.stderr
        assert json.loads(done.stdout)["attention"] == ran

    @pytest.mark.slow
    @pytest.mark.parametrize(("asked", "ran"), [("sdpa:math", "sdpa:math"), ("explicit", "explicit")])
    def test_observed_attention_in_eval(self, asked: str, ran: str, cli: Command, recipe: Path, tmp_path: Path) -> None:
        done = cli("compress", "builtin:vit-digits-small", *QUICK, "--no-calibrate", "-o", "small.safetensors")
        assert done.rc == 0, done.stderr
        options = ("small.safetensors", "--dataset", "builtin:digits", "--limit", "8", "--attention", asked)
        document = json.loads(cli("eval", *options, "--compare-dense", "--json").stdout)
        assert (document["attention"], document["dense"]["attention"]) == (ran, ran)
        assert f"attention: {ran}\n" in cli("eval", *options).stdout

    @pytest.mark.parametrize("task", ["", "-qa"])
    def test_observed_attention_in_video_eval(self, task: str, cli: Command) -> None:
        options = (f"builtin:umt-shapes{task}", "--limit", "4", "--attention", "explicit")
        assert json.loads(cli("eval", *options, "--json").stdout)["attention"] == "explicit"
        assert "attention: explicit, in the video encoder\n" in cli("eval", *options).stdout

    @pytest.mark.slow
    def test_several_kernels_are_joined_per_model(self, cli: Command) -> None:
        """vid-TLDR's own score computes the attention map, in the compressed model only."""
        path = Path("r.yaml")
        path.write_text(
            "version: 1\nmetric: {kind: attention_entropy}\nreducer: {kind: prune}\n"
            "layers: [{layer: 0, drop_ratio: 0.2}]\n"
        )
        assert cli("compress", "builtin:vit-digits-small", "-r", path, *QUICK, "-o", "small.safetensors").rc == 0
        found = cli("eval", "small.safetensors", "--dataset", "builtin:digits", "--limit", "8", "--compare-dense")
        assert "attention: explicit+sdpa:flash (compressed), sdpa:flash (dense)\n" in found.stdout

    def test_flash_attn_runs(self, cli: Command, dense: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        flash = allow_flash(monkeypatch)
        chosen = ("--attention", "flash", "--json")
        done = cli("compress", dense, "--recipe", recipe, *QUICK, "-o", "small.safetensors", *chosen)
        assert done.rc == 0, done.stderr
        assert json.loads(done.stdout)["attention"] == "flash-attn"
        assert flash.calls
        done = cli("bench", "small.safetensors", "--seconds", "0", "-b", "1", *chosen)
        assert json.loads(done.stdout)["attention"] == "flash-attn"
        done = cli("eval", "builtin:umt-shapes", "--limit", "4", *chosen)
        assert json.loads(done.stdout)["attention"] == "flash-attn"

    def test_the_file_does_not_depend_on_attention(
        self, cli: Command, dense: Path, recipe: Path, tmp_path: Path
    ) -> None:
        for kind in ("sdpa", "explicit"):
            assert (
                cli("compress", dense, "-r", recipe, *QUICK, "-o", f"{kind}.safetensors", "--attention", kind).rc == 0
            )
        one, other = (artifact.load(tmp_path / f"{kind}.safetensors") for kind in ("sdpa", "explicit"))
        assert one.plan == other.plan
        assert list(one.state_dict()) == list(other.state_dict())
        assert observed_attention(other, images(1)) == "sdpa:flash"

    @pytest.mark.parametrize("command", ["compress", "bench", "eval"])
    def test_flash_attn_without_cuda(self, command: str, cli: Command, tmp_path: Path) -> None:
        outcome = cli(command, "builtin:vit-digits-small", "--attention", "flash")
        assert outcome.rc == 2
        assert "cannot run on flash-attn: it runs on CUDA" in " ".join(outcome.stderr.split())
        assert "pip install 'repshift-cli[flash]'" in " ".join(outcome.stderr.split())
        assert "Traceback" not in outcome.stderr
        assert list(tmp_path.iterdir()) == []

    def test_an_unavailable_kernel(self, cli: Command, tmp_path: Path) -> None:
        outcome = cli("compress", "builtin:vit-digits-small", "--attention", "sdpa:cudnn")
        assert outcome.rc == 2
        assert "sdpa:cudnn: torch has no kernel" in " ".join(outcome.stderr.split())
        assert list(tmp_path.iterdir()) == []

    def test_a_model_without_attention(self, cli: Command) -> None:
        outcome = cli("eval", "builtin:cnn-digits", "--limit", "8", "--attention", "sdpa")
        assert outcome.rc == 2
        assert "no attention in ResNet can be switched to 'sdpa'" in " ".join(outcome.stderr.split())

    def test_an_unknown_kind(self, cli: Command) -> None:
        outcome = cli("eval", "--attention", "fast")
        assert outcome.rc == 2
        assert "sdpa:flash" in outcome.stderr


class TestBench:
    @pytest.mark.slow
    def test_compressed_against_dense(self, cli: Command, dense: Path, recipe: Path) -> None:
        cli("compress", dense, "--recipe", recipe, *QUICK, "-o", "small.safetensors")
        outcome = cli("bench", "small.safetensors", "--seconds", "0", "-b", "1,2", "--json")
        assert outcome.rc == 0, outcome.stderr
        document = json.loads(outcome.stdout)
        assert document.keys() >= {"device", "dtype", "threads", "attention", "runs", "ratios"}
        assert {run["batch"] for run in document["runs"]} == {1, 2}
        for run in document["runs"]:
            assert run.keys() >= {"name", "batch", "gmacs", "latency_ms", "throughput", "peak_memory_mb"}
