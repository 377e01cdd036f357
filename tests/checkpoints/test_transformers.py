"""Models of the transformers library: their folders are read, compressed and written in their own form."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import repshift_cli
from repshift_cli.checkpoints import artifact
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.checkpoints.weights import read_weights
from repshift_cli.planning.recipe import Recipe

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
CLASSES: dict[str, tuple[str, dict[str, Any], str]] = {
    "ViTForImageClassification": ("ViTConfig", {**SMALL, "num_labels": 5}, "logits"),
    "Dinov2Model": ("Dinov2Config", SMALL, "pooler_output"),
    "DINOv3ViTModel": ("DINOv3ViTConfig", {**SMALL, "num_register_tokens": 2}, "pooler_output"),
}
"""Class of the configuration, its values, and the output that is used."""

RECIPE = "version: 1\nmetric: {kind: token_norm}\nlayers: [{layer: 0, drop_ratio: 0.25}, {layer: 1, keep_tokens: 5}]\n"


@cache
def made(name: str) -> nn.Module:
    kind, values, _ = CLASSES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, name)(getattr(transformers, kind)(**values))
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def saved(name: str, folder: Path, **options: Any) -> Path:
    """A folder as transformers writes it."""
    made(name).save_pretrained(folder, **options)
    return folder


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def output_of(model: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        return getattr(model(images()), CLASSES[name][2])


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    return saved("ViTForImageClassification", tmp_path / "vit")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


def compressed(folder: Path, output: Path, force: bool = False) -> Path:
    """Compress without the command line."""
    loaded = load_checkpoint(folder)
    model = repshift_cli.compress(folder, Recipe.parse(RECIPE))
    document = artifact.make_document(loaded, model.plan, Recipe.parse(RECIPE), None, {})
    artifact.save(output, loaded, document, force)
    return output


def edit(folder: Path, name: str = "config.json", **values: Any) -> Path:
    path = folder / name
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**config, **values}))
    return folder


def run(path: Path) -> Tensor:
    with torch.no_grad():
        return artifact.load(path)(images())


@pytest.mark.parametrize("name", CLASSES)
class TestClasses:
    def test_outputs_are_those_of_the_library(self, name: str, tmp_path: Path) -> None:
        loaded = load_checkpoint(saved(name, tmp_path / "m"))
        with torch.no_grad():
            assert torch.equal(loaded.model(images()), output_of(made(name), name))
        assert loaded.description.architecture == f"transformers:{name}"
        assert loaded.tensors.keys() == load_file(tmp_path / "m" / "model.safetensors").keys()
        assert loaded.source.origin == "folder"
        assert loaded.source.sha256 is not None

    def test_the_compressed_folder(self, name: str, tmp_path: Path) -> None:
        folder = saved(name, tmp_path / "m")
        (folder / "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessor", "size": 32}')
        output = compressed(folder, tmp_path / "out")
        model = artifact.load(output)
        assert [site.tokens_out - model.plan.prefix_tokens for site in model.plan.sites] == [12, 5]
        with torch.no_grad(), model.dense():
            assert torch.equal(model(images()), output_of(made(name), name))
        # for the library it is the dense model
        dense = getattr(transformers, name).from_pretrained(output).eval()
        assert torch.equal(output_of(dense, name), output_of(made(name), name))
        # the plan is in the configuration too
        dense.save_pretrained(tmp_path / "again")
        assert read_weights(tmp_path / "again" / "model.safetensors").document is None
        assert torch.equal(run(tmp_path / "again"), run(output))
        assert not torch.equal(run(output), output_of(made(name), name))
