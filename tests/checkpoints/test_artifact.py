"""Compressed checkpoints: writing, loading, errors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from paths import TESTS
from safetensors import SafetensorError, safe_open
from tiny import VARIANTS, images, make_plan, make_recipe, save_weights, tiny_vit
from torch import nn

import repshift_cli
from repshift_cli.checkpoints import artifact
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.checkpoints.loaded import LoadedModel
from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.checkpoints.weights import FORMAT_VERSION, METADATA_KEY
from repshift_cli.compression.api import compress_dense
from repshift_cli.errors import CheckpointError, OutputError, UsageError
from repshift_cli.planning.recipe import ComponentSpec, Recipe
from repshift_cli.reduction.compressed_model import attach
from repshift_cli.reduction.metrics.base import metric_kinds
from repshift_cli.reduction.metrics.fitted import Fitted

OPTIONS = {"embed_dim": 64}
PAIRS = [
    pytest.param(variant, metric, marks=() if variant == "plain" or metric == "token_norm" else pytest.mark.slow)
    for variant in ("plain", "registers", "mean_pooling", "map_pooling", "layer_scale", "qk_norm")
    for metric in metric_kinds()
]
"""Models and metrics. They are stored apart: each is run once, and all pairs by slow tests."""

DOCUMENT_KEYS = {
    "format_version",
    "repshift_version",
    "created",
    "model",
    "plan",
    "recipe",
    "source",
    "calibration",
    "measured",
    "versions",
}


def write(model: nn.Module, folder: Path, recipe: Recipe | None = None) -> tuple[Path, LoadedModel]:
    """Save the model dense, load it, and save it compressed."""
    recipe = recipe or make_recipe()
    loaded = load_checkpoint(save_weights(model, folder / "dense.safetensors"), LoadOptions(heads=2))
    plan = make_plan(loaded.model, recipe)
    document = artifact.make_document(loaded, plan, recipe, None, {"ratio": {"macs": 1.5}})
    artifact.save(folder / "small.safetensors", loaded, document)
    return folder / "small.safetensors", loaded


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as archive:
        return archive.metadata()


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the document of a compressed checkpoint."""
    document = json.loads(metadata(path)[METADATA_KEY])
    changed = change(document)
    tensors = safetensors.torch.load_file(path)
    text = changed if isinstance(changed, str) else json.dumps(document)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt", METADATA_KEY: text})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense and a compressed checkpoint, which tests copy."""
    return write(tiny_vit(**OPTIONS), tmp_path_factory.mktemp("written"))[0].parent


@pytest.fixture
def small(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    return tmp_path / "small.safetensors"


class TestRoundTrip:
    @pytest.mark.parametrize(("variant", "metric"), PAIRS)
    def test_outputs_are_the_same_bit_for_bit(self, variant: str, metric: str, tmp_path: Path) -> None:
        recipe = make_recipe(metric=f"{{kind: {metric}}}")
        path, loaded = write(tiny_vit(**OPTIONS, **VARIANTS[variant]), tmp_path, recipe)
        wanted = attach(loaded.model, make_plan(loaded.model, recipe))
        again = artifact.load(path)
        assert again.plan == wanted.plan
        with torch.no_grad():
            assert torch.equal(again(images(3)), wanted(images(3)))
            with again.dense(), wanted.dense():
                assert torch.equal(again(images(3)), wanted(images(3)))

    def test_in_another_process(self, small: Path, tmp_path: Path) -> None:
        self.run_elsewhere(small, tmp_path)

    @pytest.mark.slow
    def test_merging_in_another_process(self, tmp_path: Path) -> None:
        recipe = make_recipe(reducer="merge, similarity: keys")
        model = tiny_vit(**OPTIONS, **VARIANTS["mean_pooling_with_class_token"])
        path, loaded = write(model, tmp_path, recipe)
        wanted, again = attach(loaded.model, make_plan(loaded.model, recipe)), artifact.load(path)
        assert again.plan == wanted.plan
        assert again.plan.reducer == ComponentSpec(kind="merge", similarity="keys")
        pruned = attach(tiny_vit(**OPTIONS, **VARIANTS["mean_pooling_with_class_token"]), make_plan(model))
        with torch.no_grad():
            assert torch.equal(again(images(3)), wanted(images(3)))
            assert not torch.allclose(again(images(3)), pruned(images(3)), atol=1e-3)
        self.run_elsewhere(path, tmp_path)

    def run_elsewhere(self, path: Path, folder: Path) -> None:
        """Compare the outputs in a new process with those in this one."""
        with torch.no_grad():
            torch.save({"images": images(3), "output": artifact.load(path)(images(3))}, folder / "wanted.pt")
        program = (
            "import sys, torch, repshift_cli\n"
            "torch.set_num_threads(1)\n"
            "stored = torch.load(sys.argv[2])\n"
            "with torch.no_grad():\n"
            "    output = repshift_cli.load(sys.argv[1])(stored['images'])\n"
            "assert torch.equal(output, stored['output']), (output - stored['output']).abs().max()\n"
        )
        command = [sys.executable, "-c", program, str(path), str(folder / "wanted.pt")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr

    def test_the_tensors_are_those_of_the_dense_file(self, small: Path) -> None:
        dense = safetensors.torch.load_file(small.with_name("dense.safetensors"))
        found = safetensors.torch.load_file(small)
        assert set(found) == set(dense)
        assert all(torch.equal(found[key], dense[key]) for key in dense)

    def test_half_precision_stays_in_the_file(self, tmp_path: Path) -> None:
        path, _ = write(tiny_vit(**OPTIONS).half(), tmp_path)
        assert {tensor.dtype for tensor in safetensors.torch.load_file(path).values()} == {torch.float16}

    def test_timm_opens_it_as_the_dense_model(self, tmp_path: Path) -> None:
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3).eval()
        path = save_weights(model, tmp_path / "dense.safetensors")
        loaded = load_checkpoint(path, LoadOptions(model_name="vit_tiny_patch16_224"))
        recipe = make_recipe("[{layer: 0, keep_tokens: 2}]")
        document = artifact.make_document(loaded, make_plan(loaded.model, recipe), recipe, None, {})
        artifact.save(tmp_path / "small.safetensors", loaded, document)
        options = {"img_size": 32, "num_classes": 3, "checkpoint_path": str(tmp_path / "small.safetensors")}
        again = timm.create_model("vit_tiny_patch16_224", **options).eval()
        with torch.no_grad():
            assert torch.equal(again(images(2)), model(images(2)))

    def test_loads_as_a_dense_model(self, small: Path) -> None:
        loaded = load_checkpoint(small)
        with torch.no_grad():
            assert torch.equal(loaded.model(images()), tiny_vit(**OPTIONS)(images()))

    def test_tied_weights_can_be_written(self, tmp_path: Path) -> None:
        model = tiny_vit(**OPTIONS)
        model.blocks[1].norm1.weight = model.blocks[0].norm1.weight
        torch.save(model.state_dict(), tmp_path / "dense.pth")
        loaded = load_checkpoint(tmp_path / "dense.pth", LoadOptions(heads=2))
        recipe = make_recipe()
        artifact.save(
            tmp_path / "small.safetensors",
            loaded,
            artifact.make_document(loaded, make_plan(loaded.model, recipe), recipe, None, {}),
        )
        with torch.no_grad(), artifact.load(tmp_path / "small.safetensors").dense() as again:
            assert torch.equal(again(images()), model(images()))


class TestDocument:
    @pytest.mark.parametrize(
        ("metric", "reducer", "version"),
        [
            ("{kind: token_norm}", "prune", 1),
            ("{kind: attention_entropy}", "prune", 3),
            ("{kind: token_norm}", "merge", 4),
            ("{kind: token_norm}", "fuse", 4),
            ("{kind: token_norm}", "bipartite", 4),
            ("{kind: redundancy}", "prune", 8),
            ("{kind: grid}", "prune", 8),
            ("{kind: coverage}", "prune", 8),
            (f"{{kind: fitted, weights: {Fitted.of([0.5] * 32).weights}}}", "prune", 4),
        ],
    )
    def test_version_is_the_first_that_supports_all_parts(
        self, metric: str, reducer: str, version: int, tmp_path: Path
    ) -> None:
        save_weights(tiny_vit(**OPTIONS), tmp_path / "dense.safetensors")
        loaded = load_checkpoint(tmp_path / "dense.safetensors", LoadOptions(heads=2))
        recipe = make_recipe(metric=metric, reducer=reducer)
        document = artifact.make_document(loaded, make_plan(loaded.model, recipe), recipe, None, {})
        assert document["format_version"] == version <= FORMAT_VERSION

    def test_keys(self, small: Path) -> None:
        document = json.loads(metadata(small)[METADATA_KEY])
        assert set(document) == DOCUMENT_KEYS
        assert document["format_version"] == 1 < FORMAT_VERSION
        assert document["repshift_version"] == repshift_cli.__version__
        assert document["recipe"] == {"name": "recipe", "text": make_recipe().text}
        assert document["plan"]["sites"][0]["tokens_out"] == 13
        assert document["versions"].keys() == {"python", "torch", "timm"}
        assert document["model"].keys() == {"name", "architecture", "args", "preprocessing"}
        assert document["measured"] == {"ratio": {"macs": 1.5}}

    def test_the_source_is_named_without_its_folder(self, small: Path) -> None:
        from hashlib import sha256

        source = json.loads(metadata(small)[METADATA_KEY])["source"]
        dense = small.with_name("dense.safetensors")
        assert source == {
            "origin": "file",
            "name": "dense.safetensors",
            "sha256": sha256(dense.read_bytes()).hexdigest(),
        }

    def test_the_recipe_inside_gives_the_plan_again(self, small: Path) -> None:
        document = json.loads(metadata(small)[METADATA_KEY])
        plan = make_plan(tiny_vit(), Recipe.parse(document["recipe"]["text"]))
        assert plan.model_dump(mode="json")["sites"] == document["plan"]["sites"]


def set_plan(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["plan"].update(changes)


def set_site(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["plan"]["sites"][1].update(changes)


class TestDamage:
    @pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 99])
    def test_a_newer_format_says_what_to_do(self, version: int, small: Path) -> None:
        rewrite(small, lambda document: document.update(format_version=version))
        known = FORMAT_VERSION
        with pytest.raises(CheckpointError, match=rf"by a newer repshift \(format {version}, supported up to {known}"):
            artifact.load(small)
        with pytest.raises(CheckpointError, match="pip install --upgrade repshift-cli"):
            artifact.load(small)

    def test_a_newer_format_with_another_model_description(self, small: Path) -> None:
        newer = {"format_version": FORMAT_VERSION + 1, "model": {"graph": "something new"}}
        rewrite(small, lambda document: document.update(newer))
        with pytest.raises(CheckpointError, match="written by a newer repshift"):
            artifact.load(small)

    @pytest.mark.parametrize("version", [None, 0, -1, "1", 1.0])
    def test_an_invalid_version(self, version: object, small: Path) -> None:
        rewrite(small, lambda document: document.update(format_version=version))
        with pytest.raises(CheckpointError, match="invalid metadata version"):
            artifact.load(small)

    @pytest.mark.parametrize(
        "change",
        [
            set_plan(sites=[]),
            set_plan(sites=None),
            set_plan(patch_tokens="many"),
            set_plan(surprise=1),
            set_plan(family="resnet"),
            set_plan(prefix_tokens=2),
            set_plan(reducer={"kind": "melt"}),
            set_plan(reducer=None),
            set_site(tokens_in=99),
            set_site(tokens_out=0),
            set_site(layer=9),
            set_site(site="blocks.9"),
            set_site(metric={"kind": "astrology"}),
            set_site(metric={"kind": "representation_shift", "operation": "dance"}),
            set_site(metric={}),
            lambda document: document.update(plan=None),
            lambda document: document.update(plan=[1]),
            lambda document: document.update(model=None),
            lambda document: document.update(model={}),
            lambda document: document["model"].update(args={"no_such": 3}),
            lambda document: document["model"].update(args=[]),
            lambda document: document["model"].update(architecture="no_such_model"),
            lambda document: document["model"].update(architecture=7),
            lambda document: document["model"].update(preprocessing={"mean": 3}),
            lambda document: document["model"]["args"].update(depth=3),
            lambda document: document.pop("plan"),
            lambda _: "{",
            lambda _: "[]",
            lambda _: "[" * 100_000,
            lambda _: "",
        ],
    )
    def test_an_invalid_document(self, change: Callable[[dict[str, Any]], Any], small: Path) -> None:
        rewrite(small, change)
        with pytest.raises(CheckpointError) as caught:
            artifact.load(small)
        assert caught.value.exit_code == 3
        assert str(small) in caught.value.message

    def test_a_truncated_file(self, small: Path) -> None:
        small.write_bytes(small.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match="damaged"):
            artifact.load(small)

    def test_a_dense_file(self, small: Path, tmp_path: Path) -> None:
        model = timm.create_model("test_vit", num_classes=3)
        path = save_weights(model, tmp_path / "test_vit.safetensors")
        with pytest.raises(CheckpointError, match="is a dense checkpoint"):
            artifact.load(path) if load_checkpoint(path, LoadOptions(model_name="test_vit")) else None

    def test_a_model_name_that_contradicts_the_file(self, small: Path) -> None:
        with pytest.raises(UsageError, match="Leave --model out"):
            artifact.open_model(small, LoadOptions(model_name="deit_small_patch16_224"))


class TestOpened:
    def test_dense(self, small: Path) -> None:
        opened = artifact.open_model(small.with_name("dense.safetensors"), LoadOptions(heads=2))
        assert opened.compressed is None
        assert opened.module is opened.loaded.model
        assert opened.macs == opened.dense_macs

    def test_compressed(self, small: Path) -> None:
        opened = artifact.open_model(small)
        assert opened.module is opened.compressed
        assert opened.macs < opened.dense_macs

    def test_a_recipe_on_top_of_a_plan_is_refused(self, small: Path) -> None:
        with pytest.raises(CheckpointError, match="already compressed"):
            compress_dense(small, recipe_name="deit_small_paper")


class TestWriting:
    def attempt(self, folder: Path, force: bool) -> None:
        loaded = load_checkpoint(folder / "dense.safetensors", LoadOptions(heads=2))
        recipe = make_recipe()
        document = artifact.make_document(loaded, make_plan(loaded.model, recipe), recipe, None, {})
        artifact.save(folder / "small.safetensors", loaded, document, force)

    def test_an_existing_file_is_kept(self, small: Path) -> None:
        before = small.read_bytes()
        with pytest.raises(UsageError, match="already exists"):
            self.attempt(small.parent, force=False)
        assert small.read_bytes() == before
        self.attempt(small.parent, force=True)
        artifact.load(small)

    @pytest.mark.parametrize(
        "problem", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left (os error 28)")]
    )
    @pytest.mark.parametrize("existing", [True, False])
    def test_a_full_disk(
        self, existing: bool, problem: Exception, small: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = small.read_bytes()
        if not existing:
            small.unlink()

        def half(tensors: object, path: Path, metadata: object) -> None:
            Path(path).write_bytes(b"half a file")
            raise problem

        monkeypatch.setattr(artifact, "save_file", half)
        with pytest.raises(OutputError, match="No space left") as caught:
            self.attempt(small.parent, force=existing)
        assert caught.value.exit_code == 1
        names = {path.name for path in small.parent.iterdir()}
        assert names == {"dense.safetensors", *(["small.safetensors"] if existing else [])}
        assert not existing or small.read_bytes() == before

    @pytest.mark.slow
    @pytest.mark.parametrize("existing", [True, False])
    def test_a_file_size_limit_of_the_system(self, existing: bool, small: Path) -> None:
        """Write errors of the kernel, in a separate process."""
        before = small.read_bytes()
        if not existing:
            small.unlink()
        program = (
            "import resource, signal, sys\n"
            "from pathlib import Path\n"
            "sys.path[:0] = sys.argv[2:]\n"
            "from test_artifact import TestWriting\n"
            "from repshift_cli.errors import OutputError\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
            "try:\n"
            "    TestWriting().attempt(Path(sys.argv[1]), force=True)\n"
            "except OutputError as error:\n"
            "    print(error)\n"
        )
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-c", program, str(small.parent), str(TESTS), str(Path(__file__).parent)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)
        assert done.returncode == 0, done.stderr
        assert "cannot write" in done.stdout
        names = {path.name for path in small.parent.iterdir()}
        assert names == {"dense.safetensors", *(["small.safetensors"] if existing else [])}
        assert not existing or small.read_bytes() == before
