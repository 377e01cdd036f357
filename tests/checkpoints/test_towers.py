"""The vision tower of a language model: only it is read and compressed, and the whole folder is written back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from PIL import Image
from tiny import images, save_weights, tiny_vit
from tiny_transformers import tiny_transformer
from torch import Tensor, nn

import repshift_cli
from repshift_cli.checkpoints.artifact import open_model
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.compression.job import CompressionJob, load_dense
from repshift_cli.compression.notes import Notes
from repshift_cli.data.inputs import load_inputs
from repshift_cli.errors import CheckpointError, ModelError, OutputError, RecipeError, UsageError
from repshift_cli.planning.recipe import Recipe
from repshift_cli.utils.progress import Silent

VISION = LoadOptions(tower="vision")
TEXT = "version: 1\nmetric: {kind: token_norm}\nreducer: {kind: merge}\nrestore: true\n"
RECIPE = Recipe.parse(TEXT + "layers: [{layer: 0, keep_tokens: 9}]\n")


@pytest.fixture(scope="module")
def llava() -> Any:
    return tiny_transformer("LlavaForConditionalGeneration")


@pytest.fixture(scope="module")
def folder(llava: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("towers") / "llava"
    llava.save_pretrained(path, max_shard_size="60KB")
    hf.CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}).save_pretrained(path)
    return path


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """For a prompt with one image."""
    found: Tensor = model(input_ids=torch.tensor([[1, 2, *[63] * 16]]), pixel_values=images(1)).logits
    return found


def test_the_whole_folder_is_written_back(llava: Any, folder: Path, tmp_path: Path) -> None:
    compressed = repshift_cli.compress(folder, RECIPE, options=VISION)
    saved = compressed.save(tmp_path / "saved")
    assert len(list(folder.glob("*.safetensors"))) > 1
    for path in folder.iterdir():
        if path.name != "config.json":
            assert (saved / path.name).read_bytes() == path.read_bytes()
    config = json.loads((saved / "config.json").read_text())
    assert config.pop("repshift")["model"]["args"] == {"tower": "vision"}
    assert config == json.loads((folder / "config.json").read_text())

    wanted, whole = logits(llava), repshift_cli.load(saved)
    assert type(whole.model) is hf.LlavaForConditionalGeneration
    assert not torch.allclose(logits(whole), wanted)
    with whole.dense() as dense:
        torch.testing.assert_close(logits(dense), wanted)
    torch.testing.assert_close(logits(hf.LlavaForConditionalGeneration.from_pretrained(saved)), wanted)
    hooked = repshift_cli.compress(llava, RECIPE)
    torch.testing.assert_close(logits(hooked), logits(whole))
    hooked.detach()

    with pytest.raises(ModelError, match="LlavaForConditionalGeneration was loaded whole") as caught:
        whole.save(tmp_path / "again")
    assert f"model.model.save_pretrained('{tmp_path / 'again'}')" in caught.value.hint
    whole.model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(repshift_cli.load(tmp_path / "again")), logits(whole))

    opened = open_model(saved)  # the tower, as other commands get it
    assert opened.compressed is not None
    assert opened.compressed(images()).shape == (2, 17, 32)
    with pytest.raises(UsageError, match=r"the compressed tower of .* is vision"):
        open_model(saved, LoadOptions(tower="text"))


def test_a_whole_model_in_memory_is_saved(llava: Any, tmp_path: Path) -> None:
    hooked: Any = repshift_cli.compress(llava, RECIPE)
    wanted = hooked.model.model.vision_tower(images()).last_hidden_state
    for name in "whole.safetensors", "folder":
        loaded = repshift_cli.load(hooked.save(tmp_path / name))
        torch.testing.assert_close(loaded(images()), wanted)
    hooked.detach()
    torch.testing.assert_close(
        logits(hf.LlavaForConditionalGeneration.from_pretrained(tmp_path / "folder")), logits(llava)
    )


def test_only_the_tower_is_read(folder: Path) -> None:
    loaded = load_checkpoint(folder, VISION)
    assert {key.partition(".")[0] for key in loaded.tensors} <= {
        "embeddings",
        "encoder",
        "pre_layrnorm",
        "post_layernorm",
    }
    assert loaded.description.preprocessing.crop_pct == pytest.approx(0.8)


def test_the_tower_alone(folder: Path, tmp_path: Path) -> None:
    compressed = repshift_cli.compress(folder, RECIPE, options=VISION)
    with torch.no_grad():
        next(compressed.parameters()).add_(1)  # as fine-tuning would
        wanted = compressed(images())
    with pytest.raises(OutputError, match=r"class_embedding is not as in .*llava") as caught:
        compressed.save(tmp_path / "saved")
    assert ".safetensors" in caught.value.hint
    loaded = repshift_cli.load(compressed.save(tmp_path / "tower.safetensors"))
    torch.testing.assert_close(loaded(images()), wanted)


def test_it_must_restore(folder: Path) -> None:
    plain = Recipe.parse(TEXT.replace("restore: true\n", "") + "layers: [{layer: 0, keep_tokens: 9}]\n")
    with pytest.raises(RecipeError, match=r"recipe:1:1: what reads the tokens of CLIPVisionModel needs all of them"):
        repshift_cli.compress(folder, plain, options=VISION)
    notes = Notes(Silent())
    assert CompressionJob(load_dense(folder, VISION, None, notes), None, notes).plan.restore  # the default recipe


class TestRefused:
    @pytest.mark.parametrize(
        ("tower", "kind", "text"),
        [
            ("vison", UsageError, r"--tower vison: .* has no part of this name\nDid you mean vision\? .*text, vision"),
            ("text", CheckpointError, "the class LlamaModel of transformers is not supported"),
            (None, CheckpointError, "a model of images and texts\nGive --tower vision"),
        ],
    )
    def test_towers(self, folder: Path, tower: str | None, kind: type[Exception], text: str) -> None:
        with pytest.raises(kind) as caught:
            load_checkpoint(folder, LoadOptions(tower=tower))
        assert re.search(text, str(caught.value))

    def test_other_checkpoints(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"--tower vision: .* is not a folder of transformers"):
            load_checkpoint(save_weights(tiny_vit(), tmp_path / "a.safetensors"), VISION)

    def test_a_folder_without_its_files(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
            load_checkpoint(tmp_path, VISION)
        for path in folder.glob("*.safetensors*"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
        notes = load_checkpoint(tmp_path, VISION).notes  # without a processor
        assert any(note.startswith("assumed mean, std, crop_pct, interpolation") for note in notes)
        photos = tmp_path / "photos"
        photos.mkdir()
        for index in range(3):
            Image.new("RGB", (40, 40), (index, 9, 9)).save(photos / f"{index}.png")
        for given in VISION, LoadOptions(tower="vision", crop_pct=1.0):
            unstated = load_checkpoint(tmp_path, given).description.preprocessing
            load_inputs(None, 2, unstated, 0)  # built-in scenes, to compare the speed
            with pytest.raises(CheckpointError, match=r"has no preprocessor_config\.json, which states") as caught:
                load_inputs(str(photos), 2, unstated, 0)
            assert "--mean and --std" in caught.value.hint
        stated = load_checkpoint(tmp_path, LoadOptions(tower="vision", mean=(0.5,), std=(0.5,)))
        assert len(load_inputs(str(photos), 2, stated.description.preprocessing, 0).tensor) == 2
