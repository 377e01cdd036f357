"""ResNet and ConvNeXt of the transformers library: whole lines are dropped, and folders keep their form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_cnn import photos, shrink, traced_grids
from tiny_transformers_maps import CONFIGS, tiny_network
from torch import Tensor

import repshift_cli
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.compression.job import CompressionJob, wrap_module
from repshift_cli.compression.notes import Notes
from repshift_cli.errors import ModelError
from repshift_cli.measure.macs import count_macs
from repshift_cli.planning.recipe import Recipe
from repshift_cli.reduction.compressed_model import attach
from repshift_cli.reduction.families.base import Site, match
from repshift_cli.reduction.families.transformer import as_function
from repshift_cli.reduction.permute import TOLERANCE
from repshift_cli.reduction.shift import shift_difference
from repshift_cli.reduction.specs.maps import MAPS
from repshift_cli.utils.progress import Silent

SIZE = (193, 193)
STEPS = {"size": {"shortest_edge": 193}, "crop_pct": 0.9}

RECIPE = Recipe.parse(
    "version: 1\nmetric: {kind: representation_shift, operation: block}\n"
    "layers: [{layer: 0, drop_ratio: 0.2}, {layer: 3, drop_ratio: 0.2}]\n"
)

each_class = pytest.mark.parametrize("name", CONFIGS)


def output_of(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(photos(4, SIZE)).logits
    return found


def saved(model: Any, folder: Path, **steps: Any) -> Path:
    model.save_pretrained(folder)
    transformers.ConvNextImageProcessor(**(steps or STEPS)).save_pretrained(folder)
    return folder


def test_every_class_has_a_model_here() -> None:
    assert CONFIGS.keys() == MAPS.keys()


@each_class
def test_sizes_and_macs(name: str) -> None:
    """They are those of the plan, and nothing behind a site depends on the place of a line."""
    library = tiny_network(name)
    model: Any = as_function(library)
    model.pretrained_cfg = {"input_size": (3, *SIZE)}
    layout, sites = match(model).layout(model), match(model).sites(model)
    assert layout.family == "resnet"
    for site in (sites[0], sites[len(sites) // 2]):
        assert shift_difference(model, site) < TOLERANCE
    assert match(model).macs(model, None) == count_macs(model, (3, *SIZE))
    wrapped = attach(model, shrink(model, {0: (1, 2), len(sites) // 2: (1, 1)}))
    trace, seen = traced_grids(wrapped, photos(2, SIZE))
    wrapped.detach()
    assert seen == {site.name: grid for site, grid in layout.grids(wrapped.plan.grids_kept)}
    assert trace.output.shape == (2, 7)
    wrapped = attach(model, wrapped.plan)
    assert [trace.kept[site.layer].shape[1] for site in wrapped.plan.sites] == [
        site.tokens_out for site in wrapped.plan.sites
    ]
    assert count_macs(wrapped, (3, *SIZE)) == wrapped.macs() < wrapped.dense_macs()
    wrapped.detach()
    # a plan that keeps all lines changes no bit
    wrapped = attach(model, shrink(model, {0: (0, 0)}))
    assert torch.equal(wrapped(photos(4, SIZE)), output_of(tiny_network(name)))
    wrapped.detach()


@each_class
def test_folders(name: str, tmp_path: Path) -> None:
    model = tiny_network(name)
    dense, inputs = output_of(model), photos(4, SIZE)
    folder = saved(model, tmp_path / "m")
    loaded = load_checkpoint(folder)
    assert loaded.description.architecture == f"transformers:{name}"
    assert loaded.description.preprocessing.input_size == (3, *SIZE)
    assert not loaded.notes
    with torch.no_grad():
        assert torch.equal(loaded.model(inputs), dense)
    compressed = repshift_cli.compress(folder, RECIPE)
    output = compressed.save(tmp_path / "out")
    with torch.no_grad():
        reduced = compressed(inputs)
        assert torch.equal(repshift_cli.load(output)(inputs), reduced)
        with compressed.dense():
            assert torch.equal(compressed(inputs), dense)
    assert not torch.equal(reduced, dense)
    assert (output / "preprocessor_config.json").read_bytes() == (folder / "preprocessor_config.json").read_bytes()
    assert load_file(output / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    assert "repshift" in json.loads((output / "config.json").read_text())
    assert torch.equal(output_of(type(model).from_pretrained(output).eval()), dense)


def test_models_in_memory(tmp_path: Path) -> None:
    model = tiny_network("ResNetForImageClassification", layer_type="basic")
    dense = output_of(model)
    compressed = repshift_cli.compress(model, RECIPE, img_size=193)
    reduced = output_of(model)
    assert not torch.equal(reduced, dense)
    assert compressed.preprocessing is not None
    assert compressed.preprocessing.crop_pct == pytest.approx(0.875, abs=0.01)
    output = compressed.save(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(repshift_cli.load(output)(photos(4, SIZE)), reduced)
    assert torch.equal(output_of(type(model).from_pretrained(output).eval()), dense)


def test_calibration_in_memory() -> None:
    """It runs a function of the model, for images of the size of the plan."""
    recipe = Recipe.parse("version: 1\nmetric: {kind: representation_shift}\nlayers: [{layer: 0, drop_ratio: 0.2}]\n")
    model = tiny_network("ConvNextForImageClassification")
    job = CompressionJob(wrap_module(model, SIZE[0]), recipe, Notes(Silent()))
    assert len(job.calibrate(photos(8, SIZE), {"where": "tensor", "count": 8}, batch_size=4).specs) == 1


def test_an_assumed_image_size(tmp_path: Path) -> None:
    tiny_network("ResNetForImageClassification").save_pretrained(tmp_path / "m")
    loaded = load_checkpoint(tmp_path / "m")
    assert loaded.description.preprocessing.input_size == (3, 224, 224)
    assert any("assumed" in note and "224" in note for note in loaded.notes)
    loaded = load_checkpoint(tmp_path / "m", LoadOptions(img_size=193))
    assert loaded.description.preprocessing.input_size == (3, *SIZE)


def test_weights_of_older_versions(tmp_path: Path) -> None:
    """They have no counts of batches."""
    model = tiny_network("ResNetForImageClassification")
    path = saved(model, tmp_path / "m") / "model.safetensors"
    tensors = load_file(path)
    save_file({key: value for key, value in tensors.items() if "num_batches" not in key}, path, {"format": "pt"})
    loaded = load_checkpoint(tmp_path / "m")
    assert not loaded.notes
    with torch.no_grad():
        assert torch.equal(loaded.model(photos(4, SIZE)), output_of(model))


def test_a_model_without_a_head() -> None:
    with pytest.raises(ModelError, match="is supported with its head: ConvNextForImageClassification"):
        match(transformers.ConvNextModel(CONFIGS["ConvNextForImageClassification"]))


def test_the_shift_test_sees_a_table_of_positions() -> None:
    model: Any = tiny_network("ConvNextForImageClassification")
    name = "convnext.encoder.stages.0.layers.0"
    table = torch.randn(1, 8, 48, 48, dtype=torch.float64)
    model.convnext.encoder.stages[0].layers[1].register_forward_hook(lambda module, args, output: output + table)
    assert shift_difference(model, Site(name, 0, model.get_submodule(name), {}, {})) > TOLERANCE
