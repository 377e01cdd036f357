"""Documents in checkpoints that contradict themselves, builder arguments from files, and stated preprocessing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import open_family, stored
from outcome import Command, explained
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import make_plan, make_recipe, save_weights, tiny_vit

from repshift_cli.checkpoints import artifact
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.checkpoints.weights import METADATA_KEY, Source
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import CheckpointError, RepshiftError, UsageError
from repshift_cli.utils.documents import parse_json, readable

ODD = (None, True, 0, -2, 2**31, 2**63 - 1, 10**30, 0.5, -1e300, "x", [], [1, 2], {}, {"a": 1}, [[3]])


def rewritten(source: Path, path: Path, changes: dict[str, Any]) -> Path:
    """A copy of a compressed checkpoint with other values at dotted keys of its document."""
    with safe_open(source, "pt") as archive:
        document = json.loads(archive.metadata()[METADATA_KEY])
    for key, value in changes.items():
        *above, last = key.split(".")
        holder: Any = document
        for step in above:
            holder = holder[int(step)] if isinstance(holder, list) else holder[step]
        holder[last] = value
    save_file(load_file(source), path, {METADATA_KEY: json.dumps(document)})
    return path


class TestJson:
    @pytest.mark.parametrize("text", ["[NaN]", "[1e999]", "[-Infinity]", '["\\ud800"]', f"[{10**30}]", "[" * 100_000])
    def test_what_other_readers_refuse(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"\w"):
            parse_json(text)

    def test_names_that_are_not_utf8_are_escaped(self) -> None:
        assert readable({"a": ["\udcff", 1, None]}) == {"a": ["\\xff", 1, None]}


class TestArtifact:
    @pytest.mark.parametrize(
        ("changes", "key"),
        [
            ({"source": [1]}, "source"),
            ({"recipe": "x"}, "recipe"),
            ({"measured": {"agreement": float("nan")}}, "not JSON compliant"),
            ({"model.name": "\ud800"}, "surrogates"),
            ({"model.name": "a\x1b[0m"}, "model.name"),
            ({"plan.patch_tokens": 2**63}, "more than 64 bits"),
            ({"plan.prefix_tokens": -1}, "plan.prefix_tokens"),
            ({"plan.sites.0.layer": -1}, "plan.sites.0.layer"),
            ({"model.preprocessing.crop_pct": 1e-300}, "model.preprocessing.crop_pct"),
            ({"model.preprocessing.crop_pct": 0.001}, "model.preprocessing.crop_pct"),
            ({"model.preprocessing.crop_pct": 5}, "less than or equal to 4"),
            ({"model.preprocessing.input_size": [3, 10**6, 24]}, "model.preprocessing.input_size.1"),
            ({"versions": None}, "versions"),
        ],
    )
    def test_an_invalid_value(self, changes: dict[str, Any], key: str, tmp_path: Path) -> None:
        path = rewritten(stored(1), tmp_path / "a.safetensors", changes)
        with pytest.raises(CheckpointError, match="metadata is damaged") as caught:
            artifact.open_model(path)
        assert key in caught.value.message

    def test_notes_of_a_newer_version_are_ignored(self, tmp_path: Path) -> None:
        path = rewritten(stored(1), tmp_path / "a.safetensors", {"a_new_note": 1, "measured": {"dense": 3}})
        assert artifact.open_model(path).compressed is not None

    @pytest.mark.parametrize("command", ["inspect", "eval", "bench", "export"])
    def test_more_tokens_than_the_reducer_removes(self, command: str, cli: Command, tmp_path: Path) -> None:
        reducer = {"plan.reducer": {"kind": "bipartite"}, "plan.sites.0.tokens_out": 3, "format_version": 4}
        with safe_open(stored(1), "pt") as archive:
            sites = json.loads(archive.metadata()[METADATA_KEY])["plan"]["sites"]
        path = rewritten(stored(1), tmp_path / "a.safetensors", {"plan.sites": sites[:1], **reducer})
        more = {"eval": ("--dataset", "builtin:digits"), "export": ("--to", "hub")}
        explained(cli(command, path, *more.get(command, ())), 3, "the plan removes 7 of 9", "bipartite can remove 4")

    def test_a_map_that_becomes_too_small(self) -> None:
        opened = open_family("resnet")
        assert opened.compressed is not None
        model, plan = opened.compressed.detach(), opened.compressed.plan
        small = plan.sites[0].model_copy(update={"grid_out": (1, 1), "tokens_out": 1})
        with pytest.raises(RepshiftError, match="the plan: of the map, 1x1 would be left"):
            artifact.attach_loaded(opened.loaded, plan.model_copy(update={"sites": (small,)}))
        assert model is opened.loaded.model

    def test_a_hub_card_of_odd_measurements(self, tmp_path: Path, cli: Command) -> None:
        measured = {"dense": {"gmacs": "x"}, "compressed": {"gmacs": []}}
        path = rewritten(stored(1), tmp_path / "a.safetensors", {"measured": measured})
        assert cli("export", path, "--to", "hub", "-o", tmp_path / "hub").rc == 0
        assert "Nothing was measured." in (tmp_path / "hub" / "README.md").read_text()


@pytest.mark.parametrize(
    ("version", "argument"),
    [
        *(
            (1, name)
            for name in ("img_size", "num_heads", "mlp_ratio", "norm_layer", "drop_rate", "global_pool", "depth")
        ),
        *((2, name) for name in ("d_state", "stride", "depth", "class_token")),
        *((3, name) for name in ("vision", "embed_dim", "pooling")),
    ],
)
def test_odd_builder_arguments(version: int, argument: str, tmp_path: Path) -> None:
    for value in ODD:
        path = rewritten(stored(version), tmp_path / "a.safetensors", {f"model.args.{argument}": value})
        try:
            opened = artifact.open_model(path)
        except RepshiftError as error:
            assert error.exit_code == 3
            continue
        with torch.no_grad():
            opened.module(torch.zeros(1, *opened.loaded.description.preprocessing.shape))


class TestNames:
    def test_a_source_and_a_recipe_that_are_not_utf8(self, tmp_path: Path) -> None:
        loaded = load_checkpoint(save_weights(tiny_vit(embed_dim=64), tmp_path / "d.safetensors"), LoadOptions(heads=2))
        loaded.source = Source("file", "a\udcff.safetensors", None)
        recipe = make_recipe()
        document = artifact.make_document(loaded, make_plan(loaded.model, recipe), recipe, {"data": "b\udcfe"}, {})
        artifact.save(tmp_path / "small.safetensors", loaded, document)
        found = artifact.open_model(tmp_path / "small.safetensors").loaded.document
        assert found is not None
        assert (found["source"]["name"], found["calibration"]) == ("a\\xff.safetensors", {"data": "b\\xfe"})


class TestPreprocessing:
    OPTIONS = ("--mean", "0.1,0.2,0.3", "--std", "0.5", "--crop-pct", "1", "--interpolation", "bilinear")

    @pytest.fixture
    def dense(self, tmp_path: Path) -> Path:
        return save_weights(tiny_vit(embed_dim=128), tmp_path / "dense.safetensors")

    def test_what_is_assumed_is_said(self, dense: Path) -> None:
        notes = load_checkpoint(dense).notes
        assert any(note.startswith("assumed mean, std, crop_pct, interpolation, which the file") for note in notes)
        assert any("--mean, --std, --crop-pct, --interpolation" in note for note in notes)
        partly = load_checkpoint(dense, LoadOptions(mean=(0.5,), std=(0.5,))).notes
        assert any(note.startswith("assumed crop_pct, interpolation, which") for note in partly)

    def test_it_is_stored_in_every_document(self, dense: Path, cli: Command, tmp_path: Path) -> None:
        recipe = tmp_path / "r.yaml"
        recipe.write_text(make_recipe(metric="{kind: token_norm}").text)
        given = ("compress", dense, "-r", recipe, "--seconds", "0", "-o", "small.safetensors")
        assert cli(*given, *self.OPTIONS).rc == 0
        found = artifact.open_model(tmp_path / "small.safetensors").loaded.description.preprocessing
        assert found == Preprocessing((3, 32, 32), (0.1, 0.2, 0.3), (0.5,) * 3, "bilinear", 1.0)
        shown = cli("inspect", "small.safetensors", "--json", *self.OPTIONS)
        assert json.loads(shown.stdout)["preprocessing"]["mean"] == [0.1, 0.2, 0.3]
        words = ("--mean", "was compressed for another preprocessing")
        explained(cli("eval", "small.safetensors", "--dataset", "builtin:digits", "--mean", "0.4"), 2, *words)
        explained(cli("visualize", "small.safetensors", "--mean", "0.4"), 2, *words)

    def test_a_value_that_contradicts_the_file_is_noted(self, dense: Path) -> None:
        loaded = load_checkpoint("builtin:vit-digits", LoadOptions(crop_pct=0.5))
        assert loaded.description.preprocessing.crop_pct == 0.5
        assert any("crop 0.5" in note and "(--crop-pct) instead of" in note for note in loaded.notes)

    @pytest.mark.parametrize(
        ("option", "value", "words"),
        [
            ("--mean", "a,b", "must be one number or one per channel"),
            ("--mean", "nan", "mean.0"),
            ("--std", "0.5,0.5", "3 values, one per channel"),
            ("--std", "0", "std.0: should be greater than or equal to"),
            ("--crop-pct", "0.001", "crop_pct: should be greater than or equal to 0.1"),
            ("--interpolation", "magic", "should be 'nearest', 'bilinear'"),
        ],
    )
    def test_invalid_values(self, option: str, value: str, words: str, dense: Path, cli: Command) -> None:
        explained(cli("inspect", dense, option, value), 2, option, words)

    def test_models_of_other_sizes(self) -> None:
        with pytest.raises(UsageError, match=r"input_size / crop_pct should be at most"):
            load_checkpoint("resnet18", LoadOptions(img_size=4096, crop_pct=0.2))
