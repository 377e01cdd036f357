"""Models of open_clip: folders and files are read, compressed and written in the form of open_clip."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import open_clip
import open_clip.factory
import pytest
import torch
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import repshift_cli
from repshift_cli.checkpoints import artifact
from repshift_cli.checkpoints.artifact import open_model
from repshift_cli.checkpoints.libraries.open_clip import OpenClip
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.errors import CheckpointError, ModelError, OutputError, UsageError
from repshift_cli.planning.recipe import Recipe
from repshift_cli.reduction.plans import resolve_for

TEXT = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
VISION = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 3}
PLAIN: dict[str, Any] = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "quick": {**PLAIN, "quick_gelu": True},
    "custom_text": {**PLAIN, "custom_text": True},
    "average": {**PLAIN, "vision_cfg": {**VISION, "pool_type": "avg", "final_ln_after_pool": True}},
    "coca": {
        **PLAIN,
        "custom_text": True,
        "vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_queries": 5, "output_tokens": True},
        "text_cfg": {**TEXT, "embed_cls": True},
        "multimodal_cfg": {"context_length": 8, "width": 16, "heads": 2, "layers": 1},
    },
    "convnext": {
        **PLAIN,
        "custom_text": True,
        "vision_cfg": {"timm_model_name": "test_convnext", "timm_pool": "", "image_size": 64},
    },
}
TRUNK = {
    **PLAIN,
    "custom_text": True,
    "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "", "image_size": 160},
}
RECIPE = "version: 1\nmetric: {kind: token_norm}\nlayers: [{layer: 0, drop_ratio: 0.25}, {layer: 1, keep_tokens: 5}]\n"
PREPROCESS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2], "interpolation": "bicubic", "resize_mode": "squash"}


def made(config: dict[str, Any]) -> Any:
    values = deepcopy(config)
    kind = (CoCa if "multimodal_cfg" in values else CustomTextCLIP) if values.pop("custom_text", False) else CLIP
    torch.manual_seed(0)
    model = kind(**values).eval().requires_grad_(False)  # products round differently for weights with gradients
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def saved(folder: Path, config: dict[str, Any], **more: Any) -> Path:
    """A folder as open_clip writes it."""
    folder.mkdir()
    save_file(made(config).state_dict(), folder / "open_clip_model.safetensors")
    content = {"model_cfg": config, "preprocess_cfg": PREPROCESS, **more}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return folder


def images(size: int = 32) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def encoded(model: Any, size: int = 32) -> Tensor:
    arguments = {"normalize": False} if isinstance(model, CoCa) else {}
    result: Tensor = model.encode_image(images(size), **arguments)
    return result


def compressed(source: Path, output: Path, options: LoadOptions | None = None) -> Path:
    recipe = Recipe.parse(RECIPE)
    loaded = load_checkpoint(source, options)
    model = artifact.attach_loaded(loaded, resolve_for(loaded.model, recipe), recipe)
    document = artifact.make_document(loaded, model.plan, recipe, None, {})
    artifact.save(output, loaded, document)
    return output


@pytest.fixture
def registered(tmp_path: Path) -> Iterator[Callable[[str, dict[str, Any]], None]]:
    """Adds configurations to open_clip for one test."""
    before, paths = dict(open_clip.factory._MODEL_CONFIGS), list(open_clip.factory._MODEL_CONFIG_PATHS)

    def add(name: str, config: dict[str, Any]) -> None:
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(config))
        open_clip.add_model_config(path)

    yield add
    open_clip.factory._MODEL_CONFIGS, open_clip.factory._MODEL_CONFIG_PATHS[:] = before, paths


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_of_a_folder_are_those_of_the_library(name: str, tmp_path: Path) -> None:
    config, size = CONFIGS[name], CONFIGS[name]["vision_cfg"]["image_size"]
    loaded = load_checkpoint(saved(tmp_path / "m", config))
    with torch.no_grad():
        assert torch.equal(loaded.model(images(size)), encoded(made(config), size))
    assert loaded.description.architecture == "open_clip:custom"
    assert loaded.description.args == {"model_cfg": config}
    assert loaded.tensors.keys() == made(config).state_dict().keys()
    assert not any(buffer.is_meta for buffer in loaded.model.buffers())
    preprocessing = loaded.description.preprocessing
    assert (preprocessing.crop_mode, preprocessing.mean) == ("squash", (0.5, 0.4, 0.3))
    assert not any("assumed" in note for note in loaded.notes)


@pytest.mark.parametrize("name", ["plain", "custom_text", "coca"])
def test_the_text_tower_still_works(name: str, tmp_path: Path) -> None:
    loaded: Any = load_checkpoint(saved(tmp_path / "m", CONFIGS[name])).model
    text = torch.randint(0, 32, (2, 7 if name == "coca" else 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded.inner.encode_text(text), made(CONFIGS[name]).encode_text(text))


@pytest.mark.parametrize("name", ["plain", "quick", "custom_text", "coca"])
def test_a_compressed_folder(name: str, tmp_path: Path) -> None:
    source = saved(tmp_path / "m", CONFIGS[name])
    (source / "tokenizer.json").write_text("{}")
    output = compressed(source, tmp_path / "out")
    model = artifact.load(output)
    assert [site.tokens_out - 1 for site in model.plan.sites] == [12, 5]
    expected = encoded(made(CONFIGS[name]))
    with torch.no_grad():
        with model.dense():
            assert torch.equal(model(images()), expected)
        assert not torch.allclose(model(images()), expected)
    assert (output / "tokenizer.json").read_text() == "{}"
    # for the library it is the dense model with its text tower
    dense, _, transform = open_clip.create_model_and_transforms(f"local-dir:{output}")
    assert torch.equal(encoded(dense.eval().requires_grad_(False)), expected)
    assert load_file(output / "open_clip_model.safetensors").keys() == made(CONFIGS[name]).state_dict().keys()
    photo = Image.effect_noise((70, 50), 60).convert("RGB")
    assert model.preprocessing is not None
    assert torch.equal(transform(photo), model.preprocessing.transform()(photo))


def test_the_plan_is_in_the_configuration_too(tmp_path: Path) -> None:
    output = compressed(saved(tmp_path / "m", PLAIN), tmp_path / "out")
    with torch.no_grad():
        expected = artifact.load(output)(images())
        weights = output / "open_clip_model.safetensors"
        save_file(load_file(weights), weights)  # without metadata
        assert torch.equal(artifact.load(output)(images()), expected)


def test_a_compressed_file(tmp_path: Path) -> None:
    source = saved(tmp_path / "m", PLAIN)
    output = compressed(source, tmp_path / "out.safetensors")
    with torch.no_grad():
        model = artifact.load(output)
        with model.dense():
            assert torch.equal(model(images()), encoded(made(PLAIN)))
    assert load_file(output).keys() == load_file(source / "open_clip_model.safetensors").keys()


def test_a_file_of_a_known_model(registered: Any, tmp_path: Path) -> None:
    registered("tiny-16", PLAIN)
    registered("tiny-16-alt", {**PLAIN, "vision_cfg": {**VISION, "patch_dropout": 0.5}})
    path = tmp_path / "weights.pt"
    torch.save(
        {"epoch": 1, "state_dict": {f"module.{key}": value for key, value in made(PLAIN).state_dict().items()}}, path
    )
    loaded = load_checkpoint(path)
    with torch.no_grad():
        assert torch.equal(loaded.model(images()), encoded(made(PLAIN)))
    assert loaded.description.architecture == "open_clip:tiny-16"
    assert any("detected tiny-16" in note for note in loaded.notes)
    assert any("assumed mean" in note for note in loaded.notes)


def test_a_file_whose_activation_is_not_known(registered: Any, tmp_path: Path) -> None:
    registered("tiny-16", PLAIN)
    registered("tiny-16-quickgelu", CONFIGS["quick"])
    path = tmp_path / "weights.safetensors"
    save_file(made(CONFIGS["quick"]).state_dict(), path)
    with pytest.raises(CheckpointError, match="tiny-16, tiny-16-quickgelu") as error:
        load_checkpoint(path)
    assert "--model tiny-16" in str(error.value.hint)
    options = LoadOptions(model_name="tiny-16-quickgelu")
    output = compressed(path, tmp_path / "out.safetensors", options)
    model = artifact.load(output)
    with torch.no_grad(), model.dense():
        assert torch.equal(model(images()), encoded(made(CONFIGS["quick"])))
    with torch.no_grad():
        assert not torch.equal(
            load_checkpoint(path, LoadOptions(model_name="tiny-16")).model(images()), model(images())
        )


def test_a_file_of_another_model(registered: Any, tmp_path: Path) -> None:
    registered("tiny-16", PLAIN)
    path = tmp_path / "weights.safetensors"
    save_file(made({**PLAIN, "vision_cfg": {**VISION, "layers": 2}}).state_dict(), path)
    with pytest.raises(CheckpointError, match="no configuration of open_clip has exactly these tensors"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="do not fit tiny-16: missing: "):
        load_checkpoint(path, LoadOptions(model_name="tiny-16"))
    with pytest.raises(UsageError, match="unknown model 'tiny-61'"):
        load_checkpoint(path, LoadOptions(model_name="tiny-61"))
    save_file({"cls_token": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="does not hold the tensors of a tiny-16"):
        load_checkpoint(path, LoadOptions(model_name="tiny-16"))


def test_a_file_without_the_text_tower(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({key: value for key, value in made(PLAIN).state_dict().items() if key.startswith("visual.")}, path)
    with pytest.raises(CheckpointError, match="a CLIP without a text tower of open_clip"):
        load_checkpoint(path)


def test_heads_that_the_configuration_does_not_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="2 attention heads, not 4"):
        load_checkpoint(saved(tmp_path / "m", PLAIN), LoadOptions(heads=4))


def changed(**values: Any) -> dict[str, Any]:
    return {**PLAIN, **values}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({}, "no model_cfg"),
        ({"model_cfg": changed(text_cfg=3)}, "no model_cfg"),
        ({"model_cfg": changed(cast_dtype="x")}, "unknown keys in model_cfg: cast_dtype"),
        ({"model_cfg": changed(text_cfg={"hf_model_name": "a/b"})}, "'a/b' is a model of the Hugging Face hub"),
        ({"model_cfg": changed(vision_cfg={"timm_model_name": "hf-hub:a/b"})}, "'hf-hub:a/b' is not a model of timm"),
        ({"model_cfg": changed(vision_cfg={**VISION, "width": "x"})}, "cannot be built"),
        ({"model_cfg": changed(vision_cfg={**VISION, "image_size": "x"})}, "image_size is 'x'"),
        ({"model_cfg": changed(vision_cfg={**VISION, "layers": 10**6})}, "1000000 blocks"),
        (
            {"model_cfg": changed(vision_cfg={**VISION, "layers": [1, 1, 1, 1]})},
            "ModifiedResNet, which is not supported",
        ),
        ({"model_cfg": changed(vision_cfg={**VISION, "width": 48})}, "do not fit"),
        ({"model_cfg": changed(text_cfg={**TEXT, "context_length": 10**6})}, "context_length is 1000000"),
        ({"model_cfg": PLAIN, "preprocess_cfg": {"resize_mode": "x"}}, "invalid preprocess_cfg"),
        ({"model_cfg": PLAIN, "preprocess_cfg": {"mean": [1]}}, "preprocess_cfg"),
        ({"model_cfg": PLAIN, "repshift": {"format_version": 99}}, "newer repshift"),
    ],
)
def test_invalid_configurations(content: dict[str, Any], reason: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", PLAIN)
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(folder)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", PLAIN)
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no weights of open_clip"):
        load_checkpoint(folder)
    (folder / "open_clip_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not readable JSON"):
        load_checkpoint(folder)


def test_preprocessing_that_is_not_stated(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", PLAIN, preprocess_cfg={"resize_mode": "longest"})
    notes = load_checkpoint(folder).notes
    assert any("assumed mean, std, which" in note for note in notes)
    assert any("open_clip fills with black" in note for note in notes)


def test_a_missing_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", PLAIN)
    monkeypatch.setattr("repshift_cli.checkpoints.libraries.base.find_spec", lambda _: None)
    with pytest.raises(CheckpointError, match="needs open_clip") as error:
        load_checkpoint(folder)
    assert "repshift-cli[openclip]" in str(error.value.hint)


def in_memory(config: dict[str, Any]) -> Any:
    """As `create_model_and_transforms` returns it."""
    model = made(config)
    open_clip.set_model_preprocess_cfg(model, {"size": 32, "mode": "RGB", **PREPROCESS})
    return model


@pytest.mark.parametrize("name", ["plain", "average", "coca"])
def test_a_model_in_memory(name: str, registered: Any, tmp_path: Path) -> None:
    registered("tiny-16", CONFIGS[name])
    # create_model can change the activation and the class of the text tower
    config = {**CONFIGS[name], "quick_gelu": True, "custom_text": True} if name == "average" else CONFIGS[name]
    model, expected = in_memory(config), encoded(made(config))
    if isinstance(model, CLIP):
        model.output_dict = True
    with pytest.raises(UsageError, match="takes inputs of 32x32"):
        repshift_cli.compress(model, Recipe.parse(RECIPE), img_size=48)
    compressed = repshift_cli.compress(model, Recipe.parse(RECIPE))
    reduced = encoded(model)
    assert not torch.allclose(reduced, expected)
    for output in (tmp_path / "x.safetensors", tmp_path / "out"):
        loaded = repshift_cli.load(compressed.save(output))
        assert loaded.preprocessing == compressed.preprocessing
        with torch.no_grad():
            assert torch.equal(loaded(images()), reduced)
    dense, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    assert torch.equal(encoded(dense.eval().requires_grad_(False)), expected)
    photo = Image.effect_noise((70, 50), 60).convert("RGB")
    assert compressed.preprocessing is not None
    assert torch.equal(transform(photo), compressed.preprocessing.transform()(photo))
    described = open_model(tmp_path / "out").loaded.description
    assert described.architecture == ("open_clip:custom" if name == "average" else "open_clip:tiny-16")


@pytest.mark.parametrize("config", [PLAIN, TRUNK])
def test_an_image_tower_in_memory(config: dict[str, Any], registered: Any, tmp_path: Path) -> None:
    registered("tiny-16", config)
    size, tower = config["vision_cfg"]["image_size"], in_memory(config).visual
    with torch.no_grad():
        dense, compressed = tower(images(size)), repshift_cli.compress(tower, Recipe.parse(RECIPE))
        loaded = repshift_cli.load(compressed.save(tmp_path / "x.safetensors"))
        assert torch.equal(loaded(images(size)), tower(images(size)))
    other = made(config).visual
    other.load_state_dict(load_file(tmp_path / "x.safetensors"))
    assert torch.equal(other(images(size)), dense)
    with pytest.raises(OutputError, match="holds a whole model"):
        compressed.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_in_memory_that_are_not_known(registered: Any, tmp_path: Path) -> None:
    compressed = repshift_cli.compress(made(PLAIN), Recipe.parse(RECIPE))
    with pytest.raises(ModelError, match="no image_mean and image_std") as error:
        compressed.save(tmp_path / "out")
    assert "set_model_preprocess_cfg" in str(error.value.hint)
    registered("tiny-16", {**PLAIN, "vision_cfg": {**VISION, "head_width": 8}})  # the same tensors
    with pytest.raises(ModelError, match="no configuration of open_clip computes the same as this CLIP"):
        repshift_cli.compress(in_memory(PLAIN), Recipe.parse(RECIPE)).save(tmp_path / "out")


def test_every_configuration_of_open_clip_is_compared() -> None:
    assert {"ViT-B-16", "ViT-B-16-quickgelu"} <= set(OpenClip().names())


@pytest.mark.slow
def test_the_file_of_a_published_size(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(open_clip.create_model("ViT-S-32").state_dict(), path)
    assert load_checkpoint(path).description.architecture == "open_clip:ViT-S-32"
