"""`--img-size` and the names of Vision Mamba, on every command that loads a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from outcome import Command
from tiny import images, save_weights
from tiny_vim import tiny_vim

import repshift_cli
from repshift_cli.checkpoints import artifact
from repshift_cli.errors import UsageError

VIM = "vim_tiny_patch16_224"
QUICK = ("--seconds", "0", "--batch-size", "1", "--no-calibrate")


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """Weights of a ResNet, in a file that is named after it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return save_weights(timm.create_model("resnetblur18", num_classes=5), tmp_path / "resnetblur18.safetensors")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text("version: 1\nmetric: {kind: token_norm}\nlayers: [{layer: 0, drop_ratio: 0.5}]\n")
    return path


@pytest.mark.slow
def test_the_plan_fits_another_image_size(network: Path, recipe: Path, cli: Command, tmp_path: Path) -> None:
    outcome = cli("compress", network, "-r", recipe, *QUICK, "--img-size", "64", "-o", "small.safetensors")
    assert outcome.rc == 0, outcome.stderr
    opened = artifact.open_model(tmp_path / "small.safetensors")
    assert opened.loaded.description.preprocessing.input_size == (3, 64, 64)
    assert opened.compressed is not None
    assert opened.compressed.plan.sites[0].tokens_in == 16 * 16
    assert opened.module(images(1, 64)).shape == (1, 5)

    described = json.loads(cli("inspect", "small.safetensors", "--json", "--img-size", "64").stdout)
    assert described["preprocessing"]["input_size"] == [3, 64, 64]
    for command in (["inspect"], ["bench"], ["eval", "--dataset", "builtin:digits"], ["visualize"]):
        refused = cli(command[0], "small.safetensors", *command[1:], "--img-size", "96")
        assert refused.rc == 2
        said = " ".join(refused.stderr.split())
        assert "--img-size 96: small.safetensors was compressed for another preprocessing (64x64x3" in said
        assert "compress the dense checkpoint again with it" in said


@pytest.mark.slow
def test_of_a_dense_network(network: Path, recipe: Path, cli: Command) -> None:
    at_64, at_128 = (
        json.loads(cli("inspect", network, "--json", "--img-size", size).stdout)["dense_gmacs"] for size in (64, 128)
    )
    assert 3.5 < at_128 / at_64 < 4.1
    options = ("--recipe", recipe, "--seconds", "0", "--min-runs", "1", "-b", "1")
    outcome = cli("bench", network, *options, "--img-size", "64", "--json")
    assert outcome.rc == 0, outcome.stderr
    assert "preprocessing set to 64x64x3" in " ".join(outcome.stderr.split())


def test_from_python() -> None:
    model = timm.create_model("test_resnet").eval()
    before = model.pretrained_cfg["input_size"]
    recipe = repshift_cli.Recipe.parse("version: 1\nlayers: [{layer: 0, drop_ratio: 0.2}]\n")
    assert repshift_cli.compress(model, recipe).preprocessing.input_size == before == (3, 160, 160)
    compressed = repshift_cli.compress(timm.create_model("test_resnet").eval(), recipe, img_size=64)
    assert compressed.preprocessing.input_size == (3, 64, 64)
    assert compressed.plan.sites[0].tokens_in == 16 * 16


def test_from_python_without_a_configuration() -> None:
    from timm.models.resnet import BasicBlock, ResNet

    recipe = repshift_cli.Recipe.parse("version: 1\nlayers: [{layer: 0, drop_ratio: 0.2}]\n")
    model = ResNet(BasicBlock, (2, 1, 1, 1), channels=(64, 8, 8, 8)).eval()
    assert repshift_cli.compress(model, recipe).preprocessing.input_size == (3, 224, 224)
    with pytest.raises(UsageError, match="VisionMamba takes images of 32x32"):
        repshift_cli.compress(tiny_vim(), img_size=64)


class TestVim:
    def test_by_its_name(self, cli: Command) -> None:
        outcome = cli("inspect", VIM, "--json")
        assert outcome.rc == 0, outcome.stderr
        assert json.loads(outcome.stdout)["model"]["name"] == VIM
        assert "RANDOM weights (seed 0)" in " ".join(outcome.stderr.split())

    def test_for_another_size(self, cli: Command, recipe: Path) -> None:
        options = ("--recipe", recipe, "--seconds", "0", "--min-runs", "1", "-b", "1", "--json")
        outcome = cli("bench", VIM, *options, "--img-size", "32")
        assert outcome.rc == 0, outcome.stderr
        outcome = cli("bench", VIM, *options, "--img-size", "33")
        assert outcome.rc == 2
        assert "patches of 16 at stride 16 leave a rest of an image of 33x33" in " ".join(outcome.stderr.split())

    def test_a_recipe_may_name_it_as_the_authors_do(self, recipe: Path, cli: Command) -> None:
        long = f"{VIM}_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
        recipe.write_text(recipe.read_text() + f"model: {long}\n")
        assert cli("compress", VIM, "-r", recipe, "--dry-run").rc == 0
        outcome = cli("compress", "builtin:vit-digits", "-r", recipe, "--dry-run")
        assert outcome.rc == 2
        assert f"the recipe is for {long}, but the model is vit-digits" in " ".join(outcome.stderr.split())

    def test_one_without_a_name_is_written_and_read(self, recipe: Path, cli: Command, tmp_path: Path) -> None:
        path = save_weights(tiny_vim(class_token="double"), tmp_path / "dense.safetensors")
        outcome = cli("compress", path, "-r", recipe, *QUICK, "-o", "small.safetensors")
        assert outcome.rc == 0, outcome.stderr
        opened = artifact.open_model(tmp_path / "small.safetensors")
        assert opened.loaded.description.architecture == "vim"
        assert opened.compressed is not None
        assert opened.module(images(1)).shape == (1, 10)
