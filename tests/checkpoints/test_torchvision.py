"""torchvision's vision transformers: files are identified by their shapes, compressed and written."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.models import VisionTransformer

import repshift_cli
from repshift_cli.checkpoints import artifact
from repshift_cli.checkpoints.create import on_meta
from repshift_cli.checkpoints.libraries.torchvision import Torchvision
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.checkpoints.loaded import ModelDescription
from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.errors import CheckpointError, ModelError
from repshift_cli.planning.recipe import Recipe
from repshift_cli.reduction.plans import resolve_for

SHAPE = {"image_size": 32, "patch_size": 8, "num_layers": 3, "hidden_dim": 32, "mlp_dim": 64, "num_classes": 5}
RECIPE = "version: 1\nmetric: {kind: token_norm}\nlayers: [{layer: 0, drop_ratio: 0.25}, {layer: 1, keep_tokens: 5}]\n"
HEADS = LoadOptions(heads=4)


def tiny(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(**{**SHAPE, "num_heads": 4, **options}).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def saved(path: Path, **options: Any) -> Path:
    save_file(tiny(**options).state_dict(), path)
    return path


def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return saved(tmp_path / "vit.safetensors")


@pytest.mark.parametrize("options", [{}, {"representation_size": 20}], ids=["plain", "hidden"])
def test_outputs_are_those_of_the_library(options: dict[str, Any], tmp_path: Path) -> None:
    loaded = load_checkpoint(saved(tmp_path / "vit.safetensors", **options), HEADS)
    with torch.no_grad():
        assert torch.equal(loaded.model(images()), tiny(**options)(images()))
    assert loaded.description.architecture == "torchvision:VisionTransformer"
    assert loaded.description.args == {**SHAPE, "num_heads": 4, **options}
    assert loaded.model.num_classes == 5


def test_a_training_checkpoint_with_old_names(tmp_path: Path) -> None:
    def old(key: str) -> str:
        return "module." + key.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2.")

    path = tmp_path / "vit.pth"
    torch.save({"model": {old(key): value for key, value in tiny().state_dict().items()}}, path)
    loaded = load_checkpoint(path, HEADS)
    with torch.no_grad():
        assert torch.equal(loaded.model(images()), tiny()(images()))


def test_a_model_in_memory(tmp_path: Path) -> None:
    compressed = repshift_cli.compress(tiny(representation_size=20), Recipe.parse(RECIPE))
    assert compressed.preprocessing is not None
    assert compressed.preprocessing.input_size == (3, 32, 32)
    loaded = repshift_cli.load(compressed.save(tmp_path / "x.safetensors"))
    with torch.no_grad():
        assert torch.equal(loaded(images()), compressed(images()))
    changed = tiny(norm_layer=partial(torch.nn.LayerNorm, eps=0.1))
    with pytest.raises(ModelError, match="was built with arguments that are not sizes"):
        repshift_cli.compress(changed, Recipe.parse(RECIPE)).save(tmp_path / "y.safetensors")


def test_a_compressed_file(file: Path, tmp_path: Path) -> None:
    loaded, recipe = load_checkpoint(file, HEADS), Recipe.parse(RECIPE)
    model = artifact.attach_loaded(loaded, resolve_for(loaded.model, recipe), recipe)
    output = tmp_path / "out.safetensors"
    artifact.save(output, loaded, artifact.make_document(loaded, model.plan, recipe, None, {}))
    again = artifact.load(output)
    with torch.no_grad():
        assert torch.equal(again(images()), model(images()))
        with again.dense():
            assert torch.equal(again(images()), tiny()(images()))
        # for the library it is the dense model
        dense = tiny()
        dense.load_state_dict(load_file(output))
        assert torch.equal(dense(images()), tiny()(images()))


@pytest.mark.parametrize(
    ("name", "size", "interpolation", "crop"),
    [("vit_b_16", 224, "bilinear", 0.875), ("vit_b_16", 384, "bicubic", 1.0), ("vit_l_32", 224, "bilinear", 0.875)],
)
def test_published_sizes_are_identified(name: str, size: int, interpolation: str, crop: float) -> None:
    with on_meta():
        tensors = torchvision.models.get_model(name, image_size=size, num_classes=7).state_dict()
    identity = Torchvision().identify(tensors, "file", LoadOptions())
    assert identity.architecture == f"torchvision:{name}"
    assert identity.args == {"image_size": size, "num_classes": 7}
    assert (identity.preprocessing.interpolation, identity.preprocessing.crop_pct) == (interpolation, crop)
    assert any("assumed the preprocessing of ViT_" in note for note in identity.notes)
    with pytest.raises(CheckpointError, match="attention heads, not 2"):
        Torchvision().identify(tensors, "file", LoadOptions(heads=2))


def test_unknown_sizes_are_refused_with_the_known_ones(file: Path) -> None:
    with pytest.raises(CheckpointError, match="no model of torchvision has these sizes") as error:
        load_checkpoint(file)
    assert "Give --heads. Known are vit_b_16: patch_size 16, num_layers 12" in str(error.value.hint)
    with pytest.raises(CheckpointError, match="vit_b_16 has patch_size 16"):
        load_checkpoint(file, LoadOptions(model_name="vit_b_16"))
    with pytest.raises(CheckpointError, match="5 heads do not divide a width of 32"):
        load_checkpoint(file, LoadOptions(heads=5))


def test_damaged_tensors_are_refused(tmp_path: Path) -> None:
    tensors = tiny().state_dict()
    for key, value in (
        ("heads.head.weight", None),
        ("encoder.pos_embedding", torch.zeros(1, 18, 32)),
        ("encoder.ln.bias", torch.zeros(3)),
        ("encoder.ln.bias", torch.zeros(32, dtype=torch.int64)),
        ("conv_proj.weight", torch.zeros(32)),
    ):
        changed = {**tensors, key: value} if value is not None else {k: v for k, v in tensors.items() if k != key}
        save_file(changed, tmp_path / "vit.safetensors")
        with pytest.raises(CheckpointError):
            load_checkpoint(tmp_path / "vit.safetensors", HEADS)


@pytest.mark.parametrize(
    ("architecture", "args", "reason"),
    [
        ("torchvision:resnet18", {}, "unknown model 'resnet18' of torchvision"),
        ("torchvision:vit_b_16", {"weights": 1}, "unsupported model arguments weights"),
        ("torchvision:vit_b_16", {"weights": "DEFAULT"}, "unsupported model arguments weights"),
        ("torchvision:vit_b_16", {"image_size": 7}, "cannot be built"),
        ("torchvision:VisionTransformer", {**SHAPE, "num_heads": 4, "num_layers": 10**6}, "1000000 blocks"),
        ("torchvision:VisionTransformer", {**SHAPE, "num_heads": 5}, "cannot be built"),
    ],
)
def test_hostile_descriptions(architecture: str, args: dict[str, Any], reason: str, file: Path) -> None:
    described = load_checkpoint(file, HEADS).description
    description = ModelDescription("x", architecture, args, described.preprocessing)
    with pytest.raises(CheckpointError, match=reason):
        Torchvision().build(description, tiny().state_dict(), "file")


def test_a_resnet_of_torchvision_is_one_of_timm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=5).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    loaded = load_checkpoint(tmp_path / "weights.safetensors", LoadOptions(model_name="resnet18.tv_in1k"))
    inputs = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded.model(inputs), model(inputs))
    preprocessing = loaded.description.preprocessing
    assert (preprocessing.interpolation, preprocessing.crop_pct) == ("bilinear", 0.875)
