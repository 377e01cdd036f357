"""Invalid input: one message, the exit code of its kind, and no output."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from outcome import Command, explained
from safetensors.torch import load_file, save_file
from tiny import make_recipe, save_weights, tiny_vit

import repshift_cli
from repshift_cli.models.vim import VisionMamba

QUICK = ("--seconds", "0", "--batch-size", "2")


RECIPES = [
    ("version: 1\nlayer: [{layer: 0, drop_ratio: 0.2}]\n", ["2:1", "unknown key layer", "Did you mean layers?"]),
    ("version: one\nlayers: [{layer: 0, drop_ratio: 0.2}]\n", ["1:1", "version: should be 1 (it is 'one')"]),
    ("version: 3\nlayers: [{layer: 0, drop_ratio: 0.2}]\n", ["version: should be 1 (it is 3)"]),
    ("version: 1\nlayers: [{layer: 9, drop_ratio: 0.2}]\n", ["2:10", "no layer 9", "0 (blocks.0) to 3 (blocks.3)"]),
    ("version: 1\nlayers: [{layer: 0, drop_ratio: 0.2}, {layer: 0, drop_ratio: 0.2}]\n", ["layer 0 is given twice"]),
    ("version: 1\nlayers: [{layer: 0, drop_ratio: 1.5}]\n", ["layers[0].drop_ratio: should be less than 1"]),
    ("version: 1\nlayers: [{layer: 0, drop_ratio: 0.0}]\n", ["should be greater than 0"]),
    ("version: 1\nlayers: []\n", ["layers: is empty"]),
    ("version: 1\nlayers: [{layer: 0, keep_tokens: 17}]\n", ["keep_tokens is 17, but only 16 patch tokens"]),
    ("version: 1\nlayers: [{layer: 0, keep_tokens: 0}]\n", ["keep_tokens: should be greater than or equal to 1"]),
    ("version: 1\nlayers: [{layer: 0\n", ["3:1", "this is not YAML"]),
    ("- 1\n", ["a recipe is a mapping"]),
    ("version: 1\nversion: 1\nlayers: []\n", ["2:1", "the key version is given twice"]),
    ("version: 1\nmetric: {kind: magic}\nlayers: [{layer: 0, drop_ratio: 0.2}]\n", ["2:10", "unknown metric 'magic'"]),
    (
        "version: 1\nreducer: {kind: prune, hard: true}\nlayers: [{layer: 0, drop_ratio: 0.2}]\n",
        ["unknown key reducer.hard"],
    ),
]


@pytest.mark.parametrize(("text", "words"), RECIPES)
def test_recipes(text: str, words: list[str], cli: Command, dense: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    explained(cli("compress", dense, "--recipe", "bad.yaml", "-o", "out.safetensors"), 2, "bad.yaml", *words)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_recipe_for_another_model(cli: Command, tmp_path: Path) -> None:
    outcome = cli(
        "compress", "deit_tiny_patch16_224", "--model", "deit_tiny_patch16_224", "--recipe", "deit_small_paper"
    )
    explained(outcome, 2, "the recipe is for deit_small_patch16_224, but the model is deit_tiny_patch16_224")


@pytest.mark.parametrize("name", ["deit_smal_paper", "missing.yaml"])
def test_an_unknown_recipe(name: str, cli: Command, dense: Path) -> None:
    explained(cli("compress", dense, "-r", name), 2, f"no recipe {name}", "repshift recipes list")


def damaged(path: Path, kind: str) -> Path:
    """Write an invalid checkpoint."""
    model = tiny_vit(embed_dim=128)
    state = model.state_dict()
    path = path / {"pickle": "code.pth", "truncated_torch": "half.pth"}.get(kind, "bad.safetensors")
    if kind == "empty":
        path.touch()
    elif kind == "truncated":
        whole = save_weights(model, path).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "truncated_torch":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "text":
        path.write_text("these are no weights")
    elif kind == "pickle":
        torch.save({"model": state, "args": Payload(path.parent / "marker")}, path)
    elif kind == "other":
        save_file({"trunk_output.block1.block1-0.f.a.0.weight": torch.zeros(8, 4)}, path)
    elif kind == "several":
        save_weights(timm.create_model("resnet18"), path)
    elif kind == "no_name":
        save_weights(timm.create_model("resnet18", layers=(1, 1, 2, 1)), path)
    elif kind == "vim":
        state = VisionMamba(img_size=32, patch_size=8, depth=1, embed_dim=32).state_dict()
        save_file({key: value for key, value in state.items() if "A_b_log" not in key}, path)
    elif kind == "heads":
        save_weights(tiny_vit(embed_dim=96, num_heads=3), path)
    elif kind == "misfit":
        save_file({**state, "blocks.0.mlp.fc1.weight": torch.zeros(3, 3)}, path)
    return path


class Payload:
    """Unpickling it would create a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


CHECKPOINTS = [
    ("missing", ["there is no file"]),
    ("empty", ["is empty"]),
    ("truncated", ["is not a safetensors file, or is damaged"]),
    ("truncated_torch", ["is not a PyTorch weights file, or is damaged"]),
    ("text", ["is not a safetensors file, or is damaged"]),
    ("pickle", ["which could run code when loaded"]),
    ("other", ["looks like a RegNet of torchvision, which is not supported", "Supported are"]),
    ("several", ["several models have exactly these tensors", "resnet18, resnetblur18", "--model"]),
    ("no_name", ["it looks like a ResNet with stages of 1, 1, 2, 1 blocks, but no timm model has these", "--model"]),
    ("vim", ["looks like a Vision Mamba that is not supported: it reads the tokens in one direction only"]),
    ("heads", ["unknown number of attention heads", "Give --heads. Allowed: 1, 2, 3, 4, 6."]),
    ("misfit", ["blocks.0.mlp.fc1.weight is [3, 3], not [512, 128]"]),
]


@pytest.mark.parametrize(
    ("kind", "words", "command"),
    [
        pytest.param(*found, command, marks=() if command == "inspect" or found[0] == "several" else pytest.mark.slow)
        for found in CHECKPOINTS
        for command in ("compress", "inspect", "bench")
    ],
)
def test_checkpoints(kind: str, words: list[str], command: str, cli: Command, tmp_path: Path) -> None:
    path = damaged(tmp_path, kind)
    before = sorted(tmp_path.iterdir())
    explained(cli(command, path), 3, *words)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("command", ["inspect", "compress", "bench", "eval"])
def test_an_unknown_builtin_model(command: str, cli: Command) -> None:
    explained(
        cli(command, "builtin:vit-digit"),
        2,
        "unknown built-in model builtin:vit-digit",
        "Did you mean builtin:vit-digits?",
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "tpu"], ["unknown device 'tpu'"]),
        (["--device", "meta"], ["unsupported device 'meta'"]),
        (["--dtype", "int8"], ["unknown dtype 'int8'", "float32, bfloat16, float16"]),
        (["--batch-size", "0"], ["--batch-size"]),
        (["--threads", "0"], ["--threads"]),
        (["--heads", "0"], ["--heads"]),
        (["--img-size", "0"], ["--img-size"]),
        (["--img-size", "64"], ["--img-size 64", "takes images of 32x32: its position table has that size"]),
        (["--seconds", "-1"], ["--seconds"]),
        (["--calibration-images", "3"], ["--calibration-images"]),
        (["--model", "vit_bas_patch16_224"], ["unknown model 'vit_bas_patch16_224'", "Did you mean"]),
        (["--no-such-option"], ["--no-such-option"]),
        (["-o", "."], [". already exists"]),
    ],
)
def test_options_of_compress(arguments: list[str], words: list[str], cli: Command, dense: Path) -> None:
    explained(cli("compress", dense, *arguments), 2, *words)


def test_cuda_without_cuda(cli: Command, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    explained(cli("compress", dense, "--device", "cuda"), 2, "torch finds no CUDA device", "Use --device cpu.")


class TestOutput:
    def test_an_existing_file(self, cli: Command, dense: Path, recipe: Path, tmp_path: Path) -> None:
        (tmp_path / "out.safetensors").write_text("precious")
        outcome = cli("compress", dense, "-r", recipe, "-o", "out.safetensors")
        explained(outcome, 2, "out.safetensors already exists", "--force")
        assert (tmp_path / "out.safetensors").read_text() == "precious"

    def test_a_missing_folder(self, cli: Command, dense: Path, recipe: Path) -> None:
        explained(cli("compress", dense, "-r", recipe, "-o", "no/out.safetensors"), 1, "folder no does not exist")

    def test_a_folder_that_cannot_be_written(self, cli: Command, dense: Path, recipe: Path) -> None:
        outcome = cli("compress", dense, "-r", recipe, *QUICK, "-o", "/proc/out.safetensors")
        explained(outcome, 1, "cannot")

    def test_a_full_disk(self, cli: Command, dense: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from repshift_cli.checkpoints import artifact

        def half(tensors: object, path: Path, metadata: object) -> None:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(artifact, "save_file", half)
        before = sorted(dense.parent.iterdir())
        explained(cli("compress", dense, "-r", recipe, *QUICK, "-o", "out.safetensors"), 1, "No space left on device")
        assert sorted(dense.parent.iterdir()) == before


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed checkpoint, which tests copy."""
    folder = tmp_path_factory.mktemp("written")
    dense = save_weights(tiny_vit(embed_dim=128), folder / "dense.safetensors")
    compressed = repshift_cli.compress(dense, make_recipe(metric="{kind: token_norm}"))
    return compressed.save(folder / "small.safetensors")


class TestCompressedAlready:
    @pytest.fixture
    def small(self, written: Path, tmp_path: Path) -> Path:
        return Path(shutil.copy(written, tmp_path))

    def change(self, path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as archive:
            document = json.loads(archive.metadata()["repshift"])
        edit(document)
        save_file(load_file(path), path, metadata={"format": "pt", "repshift": json.dumps(document)})

    def test_compressing_it_again(self, small: Path, cli: Command) -> None:
        explained(cli("compress", small), 3, "is already compressed: its own plan would be lost", "--force")

    @pytest.mark.parametrize("command", ["inspect", "bench", "compress"])
    def test_a_newer_format(self, command: str, small: Path, cli: Command) -> None:
        self.change(small, lambda document: document.update(format_version=99))
        explained(
            cli(command, small), 3, "written by a newer repshift (format 99", "pip install --upgrade repshift-cli"
        )

    @pytest.mark.parametrize("command", ["inspect", "bench"])
    def test_a_damaged_plan(self, command: str, small: Path, cli: Command) -> None:
        self.change(small, lambda document: document["plan"]["sites"][0].update(tokens_out=99))
        explained(cli(command, small), 3, "metadata is damaged: plan.sites.0")


class TestCalibrationData:
    @pytest.mark.parametrize("option", ["--calibration", "--data"])
    def test_a_missing_folder(self, option: str, cli: Command, dense: Path) -> None:
        explained(cli("compress", dense, option, "./nowhere"), 4, "nowhere does not exist")

    def test_a_folder_without_images(self, cli: Command, dense: Path, tmp_path: Path) -> None:
        (tmp_path / "none").mkdir()
        explained(cli("compress", dense, "--calibration", "./none"), 4, "there are no images in none")

    @pytest.mark.parametrize(("count", "left"), [(3, 2), (8, 7)])
    def test_too_few_images(self, cli: Command, dense: Path, photos: Path, count: int, left: int) -> None:
        for path in sorted(photos.iterdir())[count:]:
            path.unlink()
        outcome = cli("compress", dense, "--calibration", photos)
        said = f"of the {count} given, 1 is set aside to compare predictions, which leaves {left}"
        explained(outcome, 4, f"calibration needs at least 8 images: {said}")

    def test_no_metric_beats_random_dropping(self, cli: Command, dense: Path, photos: Path, tmp_path: Path) -> None:
        text = "version: 1\nmetric: {kind: representation_shift}\nlayers: [{layer: 0, drop_ratio: 0.5}]\n"
        (tmp_path / "r.yaml").write_text(text)
        outcome = cli(
            "compress", dense, "--recipe", "./r.yaml", "--calibration", photos, *QUICK, "-o", "out.safetensors"
        )
        explained(outcome, 5, "than random dropping", "--force")
        assert not (tmp_path / "out.safetensors").exists()


class TestRecipesCommand:
    def test_show_of_an_unknown_name(self, cli: Command) -> None:
        explained(cli("recipes", "show", "deit_smal_paper"), 2, "Did you mean deit_small_paper?")

    def test_show_of_a_dense_checkpoint(self, cli: Command, dense: Path) -> None:
        explained(cli("recipes", "show", dense), 3, "contains no recipe")

    def test_check_of_an_invalid_recipe(self, cli: Command, tmp_path: Path) -> None:
        (tmp_path / "bad.yaml").write_text("version: 1\nmetric: {kind: x}\nlayers: [{layer: 0, drop_ratio: 0.2}]\n")
        explained(cli("recipes", "check", "bad.yaml"), 2, "bad.yaml:2:10: metric.kind: unknown metric 'x'")


def test_an_unknown_command(cli: Command) -> None:
    explained(cli("compres"), 2, "compres")


def test_an_unexpected_error_is_one_message(cli: Command, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by [nothing]")

    monkeypatch.setattr("repshift_cli.checkpoints.artifact.load_checkpoint", broken)
    outcome = cli("inspect", dense)
    assert outcome.rc == 1
    assert "unexpected: ZeroDivisionError: by [nothing]" in outcome.stderr
    assert "repshift --debug" in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_debug_shows_the_traceback(shell: Command) -> None:
    outcome = shell("--debug", "recipes", "show", "missing.yaml")
    assert outcome.rc == 2
    assert "Traceback" in outcome.stderr
    assert "RecipeError" in outcome.stderr


def test_names_with_brackets_are_not_markup(cli: Command) -> None:
    explained(cli("inspect", "a[bold]b.safetensors"), 3, "there is no file a[bold]b.safetensors")
