"""Files of timm's EVA, DINOv3, PE, BEiT, CaiT, relative position and NaFlex models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny import images
from torch import Tensor

from repshift_cli.checkpoints.create import quickly_on_meta
from repshift_cli.checkpoints.identify import timm_transformer, vit
from repshift_cli.checkpoints.identify.cnn import names_digest
from repshift_cli.checkpoints.identify.computation import computation
from repshift_cli.checkpoints.identify.match import identify
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.errors import CheckpointError

CLEAR = [
    "eva_giant_patch14_224",
    "eva02_tiny_patch14_224",
    "eva02_base_patch14_448",
    "beit_base_patch16_224",
    "cait_xxs24_384",
    "vit_relpos_base_patch32_plus_rpn_256",
    "vit_srelpos_small_patch16_224",
    "naflexvit_base_patch16_map",
]
"""Some models whose tensors no other one has."""


def weights_of(name: str, **args: Any) -> dict[str, Tensor]:
    return dict(quickly_on_meta(name, args).state_dict())


@pytest.mark.parametrize("name", CLEAR)
def test_by_tensors(name: str) -> None:
    identity = identify(weights_of(name, num_classes=7), "weights.pth", LoadOptions(), "weights")
    assert computation(quickly_on_meta(identity.name, identity.args)) == computation(
        quickly_on_meta(name, {"num_classes": 7})
    )
    assert "positions. If the model has others, its results are wrong" in identity.notes[-1]


@pytest.mark.parametrize("name", CLEAR)
def test_by_name(name: str) -> None:
    found = identify(weights_of(name, num_classes=7), "weights.pth", LoadOptions(model_name=name), "weights")
    assert (found.name, found.args) == (name, {"num_classes": 7})


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for module in timm_transformer.MODULES for name in timm.list_models(module=module)]
)
def test_no_model_is_taken_for_one_that_computes_something_else(name: str) -> None:
    weights = weights_of(name)
    assert identify(weights, "weights.pth", LoadOptions(model_name=name), "weights").name == name
    assert identify(weights, "weights.pth", LoadOptions(), f"{name}_best").name == name
    try:
        found = identify(weights, "weights.pth", LoadOptions(), "weights")
    except CheckpointError as error:
        assert "--model" in str(error)
    else:
        assert computation(quickly_on_meta(found.name, found.args)) == computation(quickly_on_meta(name, {}))


def test_several_models_have_the_tensors() -> None:
    with pytest.raises(CheckpointError, match="several models have exactly these tensors") as caught:
        identify(weights_of("vit_small_patch16_lingbot"), "weights.pth", LoadOptions(), "weights")
    assert "vit_small_patch16_lingbot, vit_small_patch16_dinov3_qkvb" in str(caught.value)


def test_the_name_of_the_file_chooses() -> None:
    weights = weights_of("vit_small_patch16_rope_224")
    found = identify(weights, "x.pth", LoadOptions(), "vit_small_patch16_rope_224")
    assert found.name == "vit_small_patch16_rope_224"


def test_tensors_of_no_model() -> None:
    weights = weights_of("eva02_tiny_patch14_224")
    shorter = {key: value for key, value in weights.items() if not key.startswith("blocks.11.")}
    with pytest.raises(
        CheckpointError, match=r"no model of timm has exactly these tensors; .* eva02_tiny_patch14"
    ) as caught:
        identify(shorter, "weights.pth", LoadOptions(), "weights")
    assert "--model-args" in str(caught.value)
    with pytest.raises(CheckpointError, match="no model of timm has exactly these tensors"):
        identify(weights, "weights.pth", LoadOptions(heads=5), "weights")


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "beit_base_patch16_224"])
def test_load(name: str, tmp_path: Path) -> None:
    """The loaded model computes what timm's does."""
    args = {"depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
    size = 32 if "dinov3" in name else 28 if "eva02" in name else 32
    if "dinov3" not in name:
        args["img_size"] = size
    model = timm.create_model(name, **args).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    options = LoadOptions(model_name=name, model_args=args, img_size=size if "dinov3" in name else None)
    loaded = load_checkpoint(tmp_path / "weights.safetensors", options)
    assert loaded.description.preprocessing.input_size == (3, size, size)
    with torch.no_grad():
        assert torch.equal(loaded.model(images(2, size)), model(images(2, size)))


@pytest.mark.slow
def test_the_stored_widths_and_names_are_those_of_the_models() -> None:
    known = {name: values for name, values in vit.stored().items() if timm.is_model(name)}
    assert len(known) > 300
    modules = (*vit.MODULES, *vit.HYBRIDS, *timm_transformer.MODULES)
    for model in vit.registered(tuple(dict.fromkeys(modules))):
        if model.name in known:
            width = model.block["blocks.0.norm1.weight"][0]
            assert tuple(known.pop(model.name)) == (width, names_digest([*model.block, *model.others]))
    assert not known
