"""Models of the transformers library: their folders are read, compressed and written in their own form."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from outcome import Command, explained
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_transformers import MODELS, tiny_inputs, tiny_transformer
from torch import Tensor, nn

import repshift_cli
from repshift_cli.checkpoints import artifact
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.checkpoints.recovered import recovered_part
from repshift_cli.checkpoints.weights import read_weights
from repshift_cli.compression.job import CompressionJob, wrap_module
from repshift_cli.compression.notes import Notes
from repshift_cli.errors import CheckpointError, ModelError, UsageError
from repshift_cli.planning.recipe import Recipe
from repshift_cli.reduction.compressed_model import is_attached
from repshift_cli.reduction.families.transformer import tower_of
from repshift_cli.utils.progress import Silent

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


def test_recovered_weights(vit: Path, tmp_path: Path) -> None:
    """They are with the weights; a folder whose weights were written again by another tool is refused."""
    model, recipe = repshift_cli.compress(vit, Recipe.parse(RECIPE)), Recipe.parse(RECIPE)
    numbers = {"images": 8, "distance": 0.5, "agreement": 0.5}
    found = {"images": 16, "data": {}, "passes": 1, "before": numbers, "after": numbers, "sigmas": 4.0}
    bias = model.model.get_parameter("inner.classifier.bias")
    part = recovered_part(found, {"classifier.bias": bias + 1})
    document = artifact.make_document(load_checkpoint(vit), model.plan, recipe, None, {}, recovered=part)
    artifact.save(tmp_path / "out", load_checkpoint(vit), document)
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "out"), model(images()) + 1)
    transformers.ViTForImageClassification.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="another tool wrote the weights again"):
        load_checkpoint(tmp_path / "other")


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


FILES = [name for name in MODELS if not name.endswith("ForConditionalGeneration")]
"""The classes whose folders are read."""

IN_MEMORY = ("ViTModel", "DINOv3ViTModel", "CLIPModel", "VideoMAEModel", "BeitModel", "VisionEncoderDecoderModel")
"""The classes of the quick tests of models in memory and of compressed folders."""

RESTORED = (
    *("Dinov2Backbone", "DINOv3ViTBackbone", "BeitBackbone", "DepthAnythingForDepthEstimation", "InternVLVisionModel"),
    *("YolosModel", "YolosForObjectDetection"),
)
"""The classes of which all tokens are needed."""

FIRST = ("ViTModel", "DeiTModel", "ViTMSNModel", "VivitModel")
PROCESSOR_OF = {"videomae": "VideoMAE", "vivit": "Vivit", "dinov2": "Bit", "dinov2_with_registers": "Bit"}
PROCESSOR_OF |= {"clip_vision_model": "CLIP", "siglip_vision_model": "Siglip", "dinov3_vit": "DINOv3ViT"}
PROCESSOR_OF |= {"beit": "Beit", "deit": "DeiT"}
"""By the model type of the tower; others have that of ViT."""


COUNT = 4
"""Images. The rounding of products of fewer rows depends on where their matrices are in memory."""


def recipe_of(name: str) -> Recipe:
    return Recipe.parse(RECIPE + ("restore: true\n" if name in RESTORED else ""))


def library_output(model: Any, inputs: Tensor) -> Tensor:
    """The output of a model, by the code of the library alone."""
    name = type(model).__name__
    with torch.no_grad():
        if name in ("CLIPModel", "SiglipModel"):
            return model.get_image_features(pixel_values=inputs).pooler_output
        if name == "VisionEncoderDecoderModel":
            return model.encoder(inputs).last_hidden_state[:, 1:].mean(dim=1)
        if "MAEModel" in name or "MAEForPre" in name:
            order = {} if name.startswith("Video") else {"noise": torch.arange(16).expand(len(inputs), -1)}
            encoder = getattr(model, "vit", model)
            return encoder(inputs, **order).last_hidden_state[:, len(order) :].mean(dim=1)
        result = getattr(model, "backbone", model)(inputs)
    if "feature_maps" in result:
        return torch.cat([part if part.ndim == 3 else part.flatten(2).mT for part in result.feature_maps], dim=1)
    if name in (*FIRST, "IJepaModel", "InternVLVisionModel", "YolosModel"):
        tokens = result.last_hidden_state
        return tokens[:, 0] if name in FIRST else tokens.mean(dim=1) if name == "IJepaModel" else tokens
    return next(
        found
        for key in ("logits", "image_embeds", "pooler_output")
        if (found := getattr(result, key, None)) is not None
    )


def save_processor(model: nn.Module, size: int, folder: Path) -> None:
    tower = tower_of(model)
    assert tower is not None
    if tower.spec.axes == "WH":
        transformers.ASTFeatureExtractor(max_length=40, num_mel_bins=size).save_pretrained(folder)
        return
    kind = f"{PROCESSOR_OF.get(tower.module.config.model_type, 'ViT')}ImageProcessor"
    side = {"height": size, "width": size}
    shortest = kind.startswith(("CLIP", "Bit", "Video", "Vivit"))
    values = {"size": {"shortest_edge": size} if shortest else side}
    crop = {"crop_size": side} if shortest or kind.startswith("DeiT") else {}
    getattr(transformers, kind)(**values, **crop).save_pretrained(folder)


def written(name: str, folder: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """A folder with a model and its processor; the model, inputs and the output of the library."""
    model = tiny_transformer(name)
    inputs = tiny_inputs(model, COUNT)
    dense = library_output(model, inputs)
    model.save_pretrained(folder)
    save_processor(model, inputs.shape[-1], folder)
    return model, inputs, dense


class TestEveryClass:
    @pytest.mark.parametrize(
        "name",
        [pytest.param(name, marks=() if name in (*IN_MEMORY, *RESTORED) else pytest.mark.slow) for name in FILES],
    )
    def test_folders_are_read(self, name: str, tmp_path: Path) -> None:
        _, inputs, dense = written(name, tmp_path / "m")
        loaded = load_checkpoint(tmp_path / "m")
        assert torch.equal(loaded.model(inputs), dense)
        assert loaded.description.preprocessing.shape == inputs.shape[1:]
        # a folder never states which frames of a video its clips have
        assert any("assumed" in note for note in loaded.notes) == (loaded.description.preprocessing.frames is not None)

    @pytest.mark.parametrize(
        "name",
        [pytest.param(name, marks=() if name in (*IN_MEMORY, *RESTORED) else pytest.mark.slow) for name in FILES],
    )
    def test_folders_are_compressed(self, name: str, tmp_path: Path) -> None:
        model, inputs, dense = written(name, tmp_path / "m")
        compressed = repshift_cli.compress(tmp_path / "m", recipe_of(name))
        output = compressed.save(tmp_path / "out")
        assert (output / "preprocessor_config.json").exists()
        with torch.no_grad():
            reduced = compressed(inputs)
            assert torch.equal(repshift_cli.load(output)(inputs), reduced)
            with compressed.dense():
                assert torch.equal(compressed(inputs), dense)
        assert not torch.equal(reduced, dense)
        opened = type(model).from_pretrained(output).eval()
        assert torch.equal(library_output(opened, inputs), dense)

    @pytest.mark.parametrize(
        "name",
        [
            pytest.param(name, marks=[] if name in IN_MEMORY else [pytest.mark.slow])
            for name in FILES
            if not name.startswith("ViTMAE")
        ],
    )
    def test_models_in_memory(self, name: str, tmp_path: Path) -> None:
        model = tiny_transformer(name)
        inputs = tiny_inputs(model, COUNT)
        dense = library_output(model, inputs)
        compressed = repshift_cli.compress(model, recipe_of(name))
        assert compressed.preprocessing is not None
        assert compressed.preprocessing.shape == inputs.shape[1:]
        reduced = library_output(model, inputs)
        assert not torch.equal(reduced, dense)
        for output in (tmp_path / "x.safetensors", tmp_path / "out"):
            loaded = repshift_cli.load(compressed.save(output))
            assert loaded.preprocessing == compressed.preprocessing
            with torch.no_grad():
                assert torch.equal(loaded(inputs), reduced)
        opened = type(model).from_pretrained(tmp_path / "out").eval()
        assert torch.equal(library_output(opened, inputs), dense)


class TestModelsInMemory:
    @pytest.mark.parametrize("name", ["ViTForImageClassification", "CLIPModel", "VideoMAEModel", "ASTModel"])
    def test_calibration_and_search_run_on_one_tensor(self, name: str) -> None:
        model = tiny_transformer(name)
        recipe = Recipe.parse(
            "version: 1\nmetric: {kind: representation_shift}\nlayers: [{layer: 0, keep_tokens: 5}]\n"
        )
        job = CompressionJob(wrap_module(model, None), recipe, Notes(Silent()))
        found = job.calibrate(tiny_inputs(model, 16), {"where": "tensor", "count": 16}, batch_size=8)
        assert len(found.specs) == 1
        assert not is_attached(model)

    def test_a_changed_model_is_not_saved(self, tmp_path: Path) -> None:
        model = tiny_transformer("ViTForImageClassification")
        model.vit.layers[1].mlp.activation_fn = nn.ReLU()
        compressed = repshift_cli.compress(model, Recipe.parse(RECIPE))
        with pytest.raises(ModelError, match="does not compute what its configuration describes"):
            compressed.save(tmp_path / "x.safetensors")
        model.classifier = nn.Linear(32, 3)
        with pytest.raises(ModelError, match=r"classifier\.bias is \[3\], not \[7\]"):
            compressed.save(tmp_path / "x.safetensors")

    def test_image_sizes(self) -> None:
        with pytest.raises(UsageError, match="takes inputs of 32x32"):
            repshift_cli.compress(tiny_transformer("ViTModel"), Recipe.parse(RECIPE), img_size=48)
        compressed = repshift_cli.compress(tiny_transformer("Dinov2Model"), Recipe.parse(RECIPE), img_size=48)
        assert (compressed.plan.patch_tokens, compressed.preprocessing.input_size) == (36, (3, 48, 48))

    def test_the_model_of_a_folder(self, vit: Path, tmp_path: Path) -> None:
        loaded = load_checkpoint(vit)
        model = repshift_cli.compress(loaded.model, Recipe.parse(RECIPE))
        assert torch.equal(run(model.save(tmp_path / "out")), run(compressed(vit, tmp_path / "wanted")))


def photos(folder: Path, count: int = 40) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(count):
        noise = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        noise.resize((40, 36), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return folder


RELOAD = """
import sys, torch, transformers, repshift_cli
from safetensors.torch import load_file, save_file
name, folder, given, output = sys.argv[1:]
x = load_file(given)["x"]
model = getattr(transformers, name).from_pretrained(folder).eval()
with torch.no_grad():
    dense = model.get_image_features(pixel_values=x) if name == "CLIPModel" else model(x)
    found = {"reduced": repshift_cli.load(folder)(x), "dense": dense.pooler_output}
save_file({key: value.contiguous() for key, value in found.items()}, output)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Dinov2Model", "CLIPModel"])
def test_all_commands_in_new_processes(name: str, shell: Command, tmp_path: Path) -> None:
    model = tiny_transformer(name)
    inputs = tiny_inputs(model, COUNT)
    folder, output = tmp_path / "m", tmp_path / "out"
    model.save_pretrained(folder)
    save_processor(model, 32, folder)
    given = photos(tmp_path / "photos")
    for command in (
        ("inspect", folder),
        ("compress", folder, "--calibration", given, "-o", output, "--seconds", 0, "--force"),
        ("inspect", output),
        ("bench", output, "--seconds", 0),
        ("export", output, "--to", "onnx", "-o", tmp_path / "x.onnx"),
        ("visualize", output, "--data", given, "-o", tmp_path / "x.png"),
    ):
        outcome = shell(*command)
        assert outcome.rc == 0, (command, outcome.stderr)
    explained(shell("export", output, "--to", "hub"), 2, "-o FOLDER` writes the form of transformers")
    save_file({"x": inputs}, tmp_path / "x.safetensors")
    paths = [str(path) for path in (output, tmp_path / "x.safetensors", tmp_path / "y.safetensors")]
    subprocess.run([sys.executable, "-c", RELOAD, name, *paths], check=True, timeout=120)
    found = load_file(tmp_path / "y.safetensors")
    assert torch.equal(found["dense"], library_output(model, inputs))
    with torch.no_grad():
        assert torch.equal(found["reduced"], repshift_cli.load(output)(inputs))
    assert not torch.equal(found["reduced"], found["dense"])


def test_the_hub_is_for_models_of_timm(vit: Path, recipe: Path, cli: Command, tmp_path: Path) -> None:
    outcome = cli("export", vit, "-r", recipe, "--to", "hub", "-o", tmp_path / "hub")
    explained(outcome, 2, "this is a model of transformers", "-o FOLDER` writes the form of transformers")
    assert not (tmp_path / "hub").exists()


def test_a_masked_autoencoder_sees_all_patches(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    model = tiny_transformer("ViTMAEModel")
    model.save_pretrained(folder)
    edit(folder, mask_ratio=0.75)
    loaded = load_checkpoint(folder)
    assert torch.equal(loaded.model(images()), library_output(model, images()))
    assert any("mask_ratio is set to 0" in note for note in loaded.notes)
    output = repshift_cli.compress(folder, Recipe.parse(RECIPE)).save(tmp_path / "out")
    assert json.loads((output / "config.json").read_text())["mask_ratio"] == 0.75


class TestFolders:
    def test_shards(self, tmp_path: Path) -> None:
        folder = saved("ViTForImageClassification", tmp_path / "m", max_shard_size="60KB")
        shards = sorted(folder.glob("*.safetensors"))
        assert len(shards) > 1
        with torch.no_grad():
            output = load_checkpoint(folder).model(images())
        assert torch.equal(output, output_of(made("ViTForImageClassification"), "ViTForImageClassification"))
        written = compressed(folder, tmp_path / "out")
        assert {path.name for path in written.iterdir()} == {"config.json", "model.safetensors"}
        shards[0].unlink()
        with pytest.raises(CheckpointError, match=shards[0].name):
            load_checkpoint(folder)

    def test_a_pytorch_file(self, vit: Path) -> None:
        torch.save(load_file(vit / "model.safetensors"), vit / "pytorch_model.bin")
        (vit / "model.safetensors").unlink()
        assert load_checkpoint(vit).model(images()).shape == (3, 5)

    def test_keys_dtypes_and_other_files_are_kept(self, vit: Path, tmp_path: Path) -> None:
        tensors = {key: value.half() for key, value in load_file(vit / "model.safetensors").items()}
        tensors["text_model.extra"] = torch.ones(2)
        save_file(tensors, vit / "model.safetensors", metadata={"format": "pt"})
        edit(vit, auto_map={"AutoModel": "modeling.Evil"})
        for name in ("tokenizer.json", "modeling.py", "tf_model.h5", "pytorch_model.bin", ".hidden"):
            (vit / name).write_text("{}")
        loaded = load_checkpoint(vit)
        assert any("names code (AutoModel), which is not run" in note for note in loaded.notes)
        assert any("1 tensors are kept but not used" in note for note in loaded.notes)
        output = compressed(vit, tmp_path / "out")
        assert {path.name for path in output.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
        written = load_file(output / "model.safetensors")
        assert written.keys() == tensors.keys()
        assert all(torch.equal(written[key], tensors[key]) for key in tensors)
        assert {value.dtype for value in written.values()} == {torch.float16, torch.float32}
        config, before = (json.loads((each / "config.json").read_text()) for each in (output, vit))
        assert config.pop("repshift")["plan"]["family"] == "transformer"
        assert config == before

    def test_a_single_file(self, vit: Path, tmp_path: Path) -> None:
        one = compressed(vit, tmp_path / "x.safetensors")
        assert torch.equal(run(one), run(compressed(vit, tmp_path / "out")))
        loaded = load_checkpoint(one, LoadOptions(heads=2))
        assert loaded.description.args["config"]["image_size"] == 32
        # without its source, the folder has the configuration of the document
        artifact.save(tmp_path / "folder", loaded, loaded.document or {})
        assert torch.equal(run(tmp_path / "folder"), run(one))
        assert type(transformers.AutoConfig.from_pretrained(tmp_path / "folder")).__name__ == "ViTConfig"

    def test_what_is_replaced(self, vit: Path, tmp_path: Path) -> None:
        output = compressed(vit, tmp_path / "out")
        with pytest.raises(UsageError, match="already exists"):
            compressed(vit, output)
        (output / "notes.txt").write_text("mine")
        compressed(vit, output, force=True)
        assert (output / "notes.txt").read_text() == "mine"
        with pytest.raises(UsageError, match=r"has a config.json that repshift did not write"):
            compressed(vit, vit, force=True)

    def test_another_class_than_the_compressed_one(self, vit: Path, tmp_path: Path) -> None:
        output = compressed(vit, tmp_path / "out")
        transformers.ViTModel.from_pretrained(output).save_pretrained(tmp_path / "other")
        with pytest.raises(CheckpointError, match=r"is of transformers:ViTForImageClassification, but config\.json"):
            load_checkpoint(tmp_path / "other")

    def test_commands(self, vit: Path, recipe: Path, cli: Command, tmp_path: Path) -> None:
        outcome = cli("compress", vit, "-r", recipe, "--dry-run")
        assert outcome.rc == 0, outcome.stderr
        outcome = cli("compress", vit, "-r", recipe, "-o", tmp_path / "out", "--seconds", 0.1)
        assert outcome.rc == 0, outcome.stderr
        assert "assumed mean, std" in " ".join(outcome.stderr.split())
        document = json.loads(cli("inspect", tmp_path / "out", "--json").stdout)
        assert (document["compressed"], document["model"]["classes"]) == (True, 5)
        outcome = cli("bench", tmp_path / "out", "--seconds", 0.1, "--batch-size", 2)
        assert outcome.rc == 0, outcome.stderr
        explained(cli("inspect", vit, "--img-size", 64), 2, "takes images of 32x32")
        explained(cli("inspect", vit, "--heads", 4), 3, "has 2 attention heads, not 4")
        explained(cli("compress", "vit_tiny_patch16_224", "-o", tmp_path / "x"), 2, "is a safetensors file")

    @pytest.mark.slow
    def test_in_a_new_process(self, vit: Path, tmp_path: Path) -> None:
        output = compressed(vit, tmp_path / "out")
        code = (
            "import sys, torch, repshift_cli; from safetensors.torch import load_file, save_file\n"
            "with torch.no_grad(): y = repshift_cli.load(sys.argv[1])(load_file(sys.argv[2])['x'])\n"
            "save_file({'y': y}, sys.argv[3])"
        )
        save_file({"x": images()}, tmp_path / "x.safetensors")
        paths = [str(path) for path in (output, tmp_path / "x.safetensors", tmp_path / "y.safetensors")]
        subprocess.run([sys.executable, "-c", code, *paths], check=True, timeout=120)
        assert torch.equal(load_file(tmp_path / "y.safetensors")["y"], run(output))


class TestWeights:
    def change(self, folder: Path, edited: Callable[[dict[str, Tensor]], object], **config: Any) -> Path:
        tensors = load_file(folder / "model.safetensors")
        edited(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return edit(folder, **config)

    def test_missing_weights_of_the_output(self, vit: Path) -> None:
        self.change(vit, lambda tensors: tensors.pop("classifier.bias"))
        with pytest.raises(CheckpointError, match=r"missing: classifier\.bias"):
            load_checkpoint(vit)

    def test_missing_weights_that_the_output_does_not_need(self, vit: Path) -> None:
        self.change(vit, lambda tensors: None, architectures=["ViTModel"])
        loaded = load_checkpoint(vit)
        assert any("2 weights that the output does not need are missing: pooler" in note for note in loaded.notes)
        assert any("2 tensors are kept but not used by ViTModel: classifier" in note for note in loaded.notes)
        assert loaded.model.get_parameter("inner.pooler.dense.bias").isnan().all()
        # they are not written
        model = repshift_cli.compress(vit, Recipe.parse(RECIPE))
        for output, weights in ((vit.parent / "x.safetensors", ""), (vit.parent / "out", "model.safetensors")):
            assert torch.equal(run(model.save(output)), model(images()))
            tensors = load_file(output / weights)
            assert not any("pooler" in key or value.isnan().any() for key, value in tensors.items())

    @pytest.mark.parametrize(
        ("config", "error"),
        [
            ({"num_hidden_layers": 2}, r"unknown: vit\.layers\.2"),
            ({"num_hidden_layers": 4}, r"missing: vit\.layers\.3"),
            ({"num_hidden_layers": 10**6}, r"there are only \d+ tensors"),
            ({"hidden_size": 10**6}, "describes .* weights, but the file holds"),
            ({"hidden_size": 40}, "shapes: .* is"),
            ({"image_size": 64}, r"vit\.embeddings\.position_embeddings is \[1, 17, 32\], not \[1, 65, 32\]"),
            ({"id2label": {"0": "a"}, "label2id": {"a": 0}}, r"classifier\.bias is \[5\], not \[1\]"),
            ({"hidden_act": "magic"}, "cannot be built"),
            ({"hidden_size": "large"}, "cannot be built"),
            ({"num_attention_heads": 0}, "cannot be built"),
            ({"num_channels": 1}, "projection"),
            ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantized weights"),
            ({"architectures": ["ViTForImageClasification"]}, "Did you mean ViTForImageClassification"),
            ({"architectures": ["SwinModel"]}, "the class SwinModel of transformers is not supported"),
            ({"architectures": None}, "does not name the class"),
            ({"model_type": "clip"}, "model_type is 'clip', but ViTForImageClassification is of the type 'vit'"),
            ({"repshift": {"format_version": 99}}, "newer repshift"),
            ({"repshift": []}, "metadata is damaged"),
        ],
    )
    def test_contradictions(self, config: dict[str, Any], error: str, vit: Path) -> None:
        edit(vit, **config)
        with pytest.raises(CheckpointError, match=error) as caught:
            load_checkpoint(vit)
        assert "vit" in str(caught.value)

    def test_settings_that_change_the_result_are_ignored(self, vit: Path) -> None:
        edit(vit, return_dict=False, output_attentions=True, attn_implementation="kernels-community/evil")
        assert load_checkpoint(vit).model(images()).shape == (3, 5)

    def test_integers(self, vit: Path) -> None:
        self.change(vit, lambda tensors: tensors.update({"classifier.bias": torch.zeros(5, dtype=torch.int8)}))
        with pytest.raises(CheckpointError, match=r"not floating point: classifier\.bias is torch\.int8"):
            load_checkpoint(vit)

    def test_a_file_without_its_configuration(self, vit: Path) -> None:
        with pytest.raises(CheckpointError, match="Give the folder that holds the file"):
            load_checkpoint(vit / "model.safetensors")

    def test_damaged_and_missing_files(self, vit: Path) -> None:
        (vit / "config.json").write_text("{")
        with pytest.raises(CheckpointError, match="not readable JSON"):
            load_checkpoint(vit)
        edit_to = '{"architectures": ["ViTModel"], "model_type": "vit"}'
        (vit / "config.json").write_text(edit_to)
        (vit / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="is not a model folder"):
            load_checkpoint(vit)

    def test_a_model_name(self, vit: Path) -> None:
        with pytest.raises(UsageError, match="is a ViTForImageClassification, not a"):
            load_checkpoint(vit, LoadOptions(model_name="vit_tiny_patch16_224"))

    def test_without_transformers(self, vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(CheckpointError, match=r"pip install 'repshift-cli\[hf\]'"):
            load_checkpoint(vit)


def test_an_image_size_of_any_size(tmp_path: Path) -> None:
    loaded = load_checkpoint(saved("Dinov2Model", tmp_path / "m"), LoadOptions(img_size=48))
    assert loaded.description.preprocessing.input_size == (3, 48, 48)
    assert repshift_cli.compress(tmp_path / "m", Recipe.parse(RECIPE), img_size=48).plan.patch_tokens == 36


PROCESSORS: list[tuple[str, dict[str, Any]]] = [
    ("ViTImageProcessor", {"size": 32, "resample": 3}),
    ("CLIPImageProcessor", {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}),
    ("CLIPFeatureExtractor", {"size": 32, "crop_size": 32}),
    ("SiglipImageProcessorFast", {"size": {"height": 32, "width": 32}}),
    ("BitImageProcessor", {"size": {"shortest_edge": 38}, "crop_size": 32, "do_rescale": False}),
    ("DeiTImageProcessor", {"size": {"height": 36, "width": 36}, "crop_size": {"height": 32, "width": 32}}),
    ("DINOv3ViTImageProcessor", {"size": {"height": 32, "width": 32}}),
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 32}, "crop_pct": 0.8}),
    ("ConvNextFeatureExtractor", {"size": 32, "crop_pct": 0.875}),
    ("ViTImageProcessor", {"size": 32, "do_normalize": False}),
    ("ViTImageProcessor", {"size": 32, "rescale_factor": 1 / 127.5, "resample": 0}),
    ("VivitImageProcessor", {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}),
]


@pytest.mark.parametrize(("kind", "values"), PROCESSORS)
@pytest.mark.parametrize("size", [(64, 48), (50, 90)])
def test_processors(kind: str, values: dict[str, Any], size: tuple[int, int], vit: Path) -> None:
    """Within two of 256 steps, as PIL and torchvision resize 8-bit images.

    An odd margin is halved up by torchvision and down by transformers, so a crop can differ by one pixel; not here.
    """
    key = "feature_extractor_type" if kind.endswith("Extractor") else "image_processor_type"
    edit(vit, "preprocessor_config.json", **{key: kind, **values})
    loaded = load_checkpoint(vit)
    assert not any("assumed" in note for note in loaded.notes)
    noise = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize(size[::-1], Image.Resampling.BICUBIC)
    name = kind.removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor")
    theirs = getattr(transformers, name)(**values)(image, return_tensors="pt")["pixel_values"].reshape(3, 32, 32)
    ours = loaded.description.preprocessing.transform()(image)
    step = 1 / (255 * torch.tensor(loaded.description.preprocessing.std)[:, None, None])
    difference = (ours - theirs).abs() / step
    assert difference.max() < 2.01
    assert difference.mean() < 0.5


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"image_processor_type": "Siglip2ImageProcessor"}, "the processor Siglip2ImageProcessor is not supported"),
        ({"size": {"shortest_edge": 32}}, "size {'shortest_edge': 32} with no crop"),
        ({"size": {"longest_edge": 32}}, "is not supported"),
        ({"size": 32, "do_resize": False}, "images are not resized"),
        ({"size": 32, "resample": 9}, "resample 9"),
        ({"size": 32, "image_mean": [0.5]}, "mean and std should have 3 values"),
        ({"size": 32, "image_std": [0.0, 1.0, 1.0]}, "std"),
        ({"size": 32, "rescale_factor": 0.0}, "division by zero"),
        ({"size": 32, "do_pad": True}, "do_pad is not supported"),
        ({"size": 48}, "makes images of 48x48, but ViTForImageClassification takes 32x32"),
        ({"size": "large"}, "large"),
    ],
)
def test_processors_that_are_refused(values: dict[str, Any], error: str, vit: Path) -> None:
    edit(vit, "preprocessor_config.json", **values)
    with pytest.raises(CheckpointError, match=error):
        load_checkpoint(vit)


def test_a_processor_that_the_user_replaces(vit: Path) -> None:
    edit(vit, "preprocessor_config.json", image_processor_type="Siglip2ImageProcessor")
    given = LoadOptions(mean=(0.1,), std=(0.2,), crop_pct=0.8, interpolation="bicubic")
    loaded = load_checkpoint(vit, given)
    assert loaded.description.preprocessing.mean == (0.1, 0.1, 0.1)
    assert any("the given preprocessing is used" in note for note in loaded.notes)


def test_a_nested_processor(vit: Path) -> None:
    nested = {"image_processor_type": "ViTImageProcessor", "size": 32, "image_mean": [0.1, 0.2, 0.3]}
    edit(vit, "processor_config.json", processor_class="X", image_processor=nested)
    edit(vit, "preprocessor_config.json", size=99)
    assert load_checkpoint(vit).description.preprocessing.mean == (0.1, 0.2, 0.3)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_onnx(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from repshift_cli.export.job import export
    from repshift_cli.export.request import Request
    from repshift_cli.utils.progress import Silent

    opened = artifact.open_model(compressed(saved(name, tmp_path / "m"), tmp_path / "out"))
    found = export(opened, Request("onnx", tmp_path / "x.onnx"), Silent())
    assert found.document.verified is not None
    assert found.document.verified.passed
