"""`compress` from end to end on small models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tiny import images, make_recipe, save_weights, tiny_vit

from repshift_cli.calibration.calibrate import Calibration, calibrate
from repshift_cli.checkpoints import artifact
from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.compression.api import compress
from repshift_cli.compression.measured import CompressReport
from repshift_cli.compression.run import compress_checkpoint
from repshift_cli.compression.settings import Settings
from repshift_cli.errors import (
    CheckFailed,
    CheckpointError,
    DataError,
    ModelError,
    OutputError,
    RecipeError,
    UsageError,
)
from repshift_cli.measure.macs import count_macs
from repshift_cli.utils.progress import Silent

FIXED = "{kind: representation_shift, operation: mlp, distance: l2, reading: update, polarity: largest}"
QUICK = Settings(load=LoadOptions(heads=2), seconds=0.0, batch_size=4)
NO_HEADS = LoadOptions()


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return save_weights(tiny_vit(embed_dim=64), tmp_path / "dense.safetensors")


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Twenty images of noise."""
    folder = tmp_path / "images"
    folder.mkdir()
    random = np.random.default_rng(0)
    for index in range(20):
        Image.fromarray(random.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


def recipe_file(folder: Path, metric: str = FIXED, extra: str = "", layers: str | None = None) -> str:
    recipe = make_recipe(layers, metric) if layers else make_recipe(metric=metric)
    (folder / "r.yaml").write_text(recipe.text + extra)
    return str(folder / "r.yaml")


def run(dense: Path, dry_run: bool = False, **changes: Any) -> CompressReport:
    return compress_checkpoint(str(dense), replace(QUICK, **changes), Silent(), dry_run)


class TestFile:
    @pytest.mark.slow
    def test_the_report_equals_the_file(self, dense: Path, tmp_path: Path) -> None:
        output = tmp_path / "small.safetensors"
        report = run(dense, recipe=recipe_file(tmp_path), output=output)
        assert report.output == output
        assert [site.tokens_out for site in report.plan.sites] == [13, 6]
        opened = artifact.open_model(output)
        assert opened.compressed is not None
        assert opened.compressed.plan == report.plan
        assert (opened.macs, opened.dense_macs) == (report.macs, report.dense_macs)
        assert opened.loaded.document is not None
        assert opened.loaded.document["measured"]["ratio"]["macs"] == report.to_dict()["ratio"]["macs"]
        assert opened.loaded.document["calibration"] is None

    @pytest.mark.slow
    def test_the_json_document(self, dense: Path, tmp_path: Path) -> None:
        report = run(dense, recipe=recipe_file(tmp_path), output=tmp_path / "small.safetensors")
        document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
        assert document.keys() >= {"output", "model", "plan", "dense", "compressed", "ratio", "agreement"}
        assert document["output"] == str(tmp_path / "small.safetensors")
        assert document["model"].keys() >= {"name", "family", "params"}
        assert document["model"]["params"] == sum(value.numel() for value in tiny_vit(embed_dim=64).parameters())
        assert [{key: row[key] for key in row if key != "metric"} for row in document["plan"]] == [
            {"site": "blocks.0", "layer": 0, "tokens_in": 17, "tokens_out": 13},
            {"site": "blocks.2", "layer": 2, "tokens_in": 13, "tokens_out": 6},
        ]
        for side in ("dense", "compressed"):
            assert document[side].keys() >= {"gmacs", "latency_ms", "throughput"}
            assert document[side]["latency_ms"].keys() == {"median", "p10", "p90"}
        assert document["ratio"].keys() >= {"macs", "latency"}
        assert document["ratio"]["macs"] == pytest.approx(report.dense_macs / report.macs, rel=1e-3)
        assert document["agreement"] is None  # built-in scenes are not images of this model's kind
        assert document["divergence"] >= 0

    @pytest.mark.slow
    def test_counts_equal_those_of_a_real_run(self, dense: Path, tmp_path: Path) -> None:
        report = run(dense, recipe=recipe_file(tmp_path), output=tmp_path / "small.safetensors")
        opened = artifact.open_model(tmp_path / "small.safetensors")
        assert opened.compressed is not None
        assert count_macs(opened.compressed.model, (3, 32, 32)) == report.macs

    def test_a_dry_run_writes_nothing_and_runs_nothing(
        self, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("repshift_cli.compression.inputs.load_inputs", None)
        monkeypatch.setattr("repshift_cli.compression.measured.measure_latency", None)
        recipe = recipe_file(tmp_path)
        before = sorted(tmp_path.iterdir())
        report = run(dense, dry_run=True, recipe=recipe, output=tmp_path / "small.safetensors")
        assert report.output is None
        assert report.measured is None
        assert sorted(tmp_path.iterdir()) == before
        document = report.to_dict()
        assert document["dense"] == {"gmacs": report.dense_macs / 1e9}
        assert "agreement" not in document

    def test_the_default_schedule_is_named(self, dense: Path) -> None:
        report = run(dense, dry_run=True)
        assert [site.layer for site in report.plan.sites] == [0, 1, 2]
        assert any("no recipe was given" in note and "matching --blocks 4" in note for note in report.notes)

    @pytest.mark.slow
    def test_a_model_without_a_head(self, tmp_path: Path) -> None:
        dense = save_weights(tiny_vit(embed_dim=64, num_classes=0), tmp_path / "dense.safetensors")
        report = run(dense, recipe=recipe_file(tmp_path), output=tmp_path / "small.safetensors")
        assert report.measured is not None
        assert report.measured.agreement is None
        assert 0 <= report.measured.divergence <= 2

    @pytest.mark.slow
    def test_bfloat16_runs_leave_the_file_in_float32(self, dense: Path, tmp_path: Path) -> None:
        run(dense, recipe=recipe_file(tmp_path), output=tmp_path / "small.safetensors", dtype="bfloat16")
        model = artifact.load(tmp_path / "small.safetensors")
        wanted = tiny_vit(embed_dim=64).state_dict()
        assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())


class TestCompressedAgain:
    @pytest.fixture
    def small(self, dense: Path, tmp_path: Path) -> Path:
        output = tmp_path / "small.safetensors"
        run(dense, recipe=recipe_file(tmp_path), output=output)
        return output

    def test_refused(self, small: Path, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="is already compressed: its own plan would be lost") as caught:
            run(small, recipe=recipe_file(tmp_path), output=tmp_path / "smaller.safetensors")
        assert caught.value.exit_code == 3
        assert "--force" in str(caught.value)
        assert not (tmp_path / "smaller.safetensors").exists()

    def test_force_compresses_its_dense_weights(self, small: Path, tmp_path: Path) -> None:
        output = tmp_path / "smaller.safetensors"
        recipe = recipe_file(tmp_path, layers="[{layer: 1, keep_tokens: 4}]")
        report = run(small, recipe=recipe, output=output, force=True)
        assert any("compressed again" in note for note in report.notes)
        again = artifact.load(output)
        assert again.plan.tokens_at(4) == (17, 17, 5, 5, 1)
        with torch.no_grad(), again.dense():
            assert torch.equal(again(images()), tiny_vit(embed_dim=64)(images()))

    def test_over_itself(self, small: Path, tmp_path: Path) -> None:
        recipe = recipe_file(tmp_path, layers="[{layer: 1, keep_tokens: 4}]")
        run(small, recipe=recipe, output=small, force=True)
        assert artifact.load(small).plan.tokens_at(4) == (17, 17, 5, 5, 1)


class TestRefusals:
    """Errors come before anything is run or written."""

    @pytest.fixture(autouse=True)
    def nothing_runs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("repshift_cli.compression.measured.measure_latency", None)

    @pytest.mark.parametrize(("name", "reason"), [("old.safetensors", "already exists"), ("old", "is not a folder")])
    def test_an_output_that_exists(self, name: str, reason: str, dense: Path, tmp_path: Path) -> None:
        (tmp_path / name).write_text("precious")
        with pytest.raises(UsageError, match=reason) as caught:
            run(dense, output=tmp_path / name)
        assert caught.value.exit_code == 2
        assert (tmp_path / name).read_text() == "precious"

    def test_an_output_folder_that_is_missing(self, dense: Path, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="does not exist"):
            run(dense, output=tmp_path / "missing" / "small.safetensors")

    def test_a_recipe_for_another_model(self, dense: Path, tmp_path: Path) -> None:
        model = "model: deit_small_patch16_224\n"
        with pytest.raises(RecipeError, match="is for deit_small_patch16_224, but the model is ViT of width 64"):
            run(dense, recipe=recipe_file(tmp_path, extra=model))

    def test_weights_that_do_not_fit_the_named_model(self, dense: Path) -> None:
        with pytest.raises(CheckpointError, match=r"do not fit deit_small_patch16_224: .*missing: .*shapes: "):
            run(dense, load=LoadOptions(model_name="deit_small_patch16_224"))

    @pytest.mark.parametrize("name", ["deit_tiny_patch16_224.fb_in1k", "deit_tiny_patch16_224"])
    def test_a_tag_does_not_change_what_a_recipe_is_for(self, name: str) -> None:
        settings = replace(QUICK, recipe="deit_tiny_paper", load=NO_HEADS)
        assert compress_checkpoint(name, settings, Silent(), dry_run=True).plan.sites[0].tokens_out == 158

    @pytest.mark.slow
    def test_a_recipe_chooses_among_two_equal_shapes(self, tmp_path: Path) -> None:
        weights = save_weights(timm.create_model("deit_tiny_patch16_224"), tmp_path / "weights.safetensors")
        settings = replace(QUICK, load=NO_HEADS)
        guessed = compress_checkpoint(str(weights), settings, Silent(), dry_run=True)
        planned = compress_checkpoint(str(weights), replace(settings, recipe="deit_tiny_paper"), Silent(), dry_run=True)
        assert guessed.loaded.description.name == "vit_tiny_patch16_224"
        assert planned.loaded.description.name == "deit_tiny_patch16_224"

    def test_a_recipe_that_contradicts_the_model_option(self, tmp_path: Path) -> None:
        path = recipe_file(tmp_path, extra="model: deit_small_patch16_224\n")
        with pytest.raises(
            RecipeError, match="the recipe is for deit_small_patch16_224, but the model is deit_tiny"
        ) as caught:
            compress_checkpoint(
                "deit_tiny_patch16_224", replace(QUICK, recipe=path, load=NO_HEADS), Silent(), dry_run=True
            )
        assert caught.value.message.startswith(f"{path}:5:1: ")
        assert caught.value.exit_code == 2

    def test_a_metric_without_its_tensors(self) -> None:
        with pytest.raises(RecipeError, match="class_attention needs attention_key"):
            compress(tiny_vit(attn_layer="diff"), make_recipe(metric="{kind: class_attention}"))

    def test_a_recipe_is_checked_before_the_weights_are_read(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="unknown metric 'mlp'"):
            run(tmp_path / "missing.safetensors", recipe=recipe_file(tmp_path, metric="{kind: mlp}"))

    def test_cuda_without_cuda(self, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(UsageError, match="no CUDA device"):
            run(dense, device="cuda")

    def test_a_missing_layer(self, dense: Path, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="the model has no layer 9"):
            run(dense, recipe=recipe_file(tmp_path, layers="[{layer: 9, drop_ratio: 0.5}]"))


class TestChecks:
    def test_a_wrong_count(self, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("repshift_cli.compression.measured.count_macs", lambda *_: 7)
        with pytest.raises(CheckFailed, match="runs 7 multiply-accumulates") as caught:
            run(dense, recipe=recipe_file(tmp_path), output=tmp_path / "small.safetensors")
        assert caught.value.exit_code == 5
        assert not (tmp_path / "small.safetensors").exists()

    def test_weights_that_are_not_finite(self, tmp_path: Path) -> None:
        model = tiny_vit(embed_dim=64)
        model.head.bias.data.fill_(float("nan"))
        dense = save_weights(model, tmp_path / "dense.safetensors")
        with pytest.raises(CheckFailed, match="not finite"):
            run(dense, recipe=recipe_file(tmp_path), output=tmp_path / "small.safetensors")


class TestCalibration:
    OPEN = "{kind: representation_shift, operation: block, distance: l2}"

    @pytest.mark.slow
    def test_a_warning_without_images(self, dense: Path, tmp_path: Path) -> None:
        report = run(dense, recipe=recipe_file(tmp_path, self.OPEN))
        assert report.calibration is None
        assert any("NOT CALIBRATED: there are no images of the model's own kind" in note for note in report.notes)
        assert report.plan.sites[0].metric.options["polarity"] == "largest"

    @pytest.mark.slow
    def test_a_warning_with_no_calibrate(self, dense: Path, image_folder: Path, tmp_path: Path) -> None:
        recipe = recipe_file(tmp_path, self.OPEN)
        report = run(dense, recipe=recipe, calibration=str(image_folder), calibrate=False)
        assert any("NOT CALIBRATED: --no-calibrate was given" in note for note in report.notes)

    @pytest.mark.slow
    def test_not_clear_is_an_error(self, dense: Path, image_folder: Path, tmp_path: Path) -> None:
        recipe, output = recipe_file(tmp_path, self.OPEN), tmp_path / "small.safetensors"
        with pytest.raises(CheckFailed, match="than random dropping: random dropping kept") as caught:
            run(dense, recipe=recipe, output=output, calibration=str(image_folder))
        assert caught.value.exit_code == 5
        assert not output.exists()
        assert caught.value.document["calibration"]["clear"] is False  # what `--json` prints
        assert caught.value.document["plan"]
        report = run(dense, recipe=recipe, output=output, calibration=str(image_folder), force=True)
        assert any("than random dropping: " in note for note in report.notes)
        document = artifact.open_model(output).loaded.document
        assert document is not None
        assert document["calibration"]["clear"] is False
        assert report.plan.sites[0].metric == report.calibration.specs[0]

    def test_calibration_and_check_use_different_images(
        self, dense: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[torch.Tensor] = []

        def watch(*arguments: Any, **options: Any) -> Calibration:
            seen.append(options["images"])
            return calibrate(*arguments, **options)

        monkeypatch.setattr("repshift_cli.compression.job.calibrate", watch)
        report = run(dense, recipe=recipe_file(tmp_path, self.OPEN), calibration=str(image_folder), force=True)
        assert report.measured is not None
        checked = report.measured.images.tensor
        assert (len(seen[0]), len(checked)) == (16, 4)
        assert not any(torch.equal(one, other) for one in seen[0] for other in checked)

    def test_one_image_is_too_few(self, dense: Path, tmp_path: Path) -> None:
        (tmp_path / "one").mkdir()
        Image.new("RGB", (40, 40)).save(tmp_path / "one" / "1.png")
        with pytest.raises(DataError, match="too few") as caught:
            run(dense, recipe=recipe_file(tmp_path, self.OPEN), calibration=str(tmp_path / "one"))
        assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    "options",
    [
        {"calibration_images": 10**9},
        {"calibration_images": -1},
        {"batch_size": 10**12},
        {"seconds": float("inf")},
        {"seconds": float("nan")},
        {"seconds": -1.0},
    ],
    ids=str,
)
def test_settings_out_of_range(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(UsageError, match=f"invalid {name.replace('_', ' ')}"):
        Settings(**options)


class TestModelInMemory:
    def test_a_module_and_a_recipe(self) -> None:
        model = compress(tiny_vit(), make_recipe())
        assert model.plan.tokens_at(4) == (17, 13, 13, 6, 1)
        assert str(model._hooks[0].metrics[0]) == "representation_shift (mlp, l2, update, largest)"

    def test_the_default_recipe(self) -> None:
        plan = compress(tiny_vit()).plan
        assert [site.layer for site in plan.sites] == [0, 1, 2]
        assert plan.reducer.kind == "bipartite"  # needs no images

    def test_the_default_recipe_with_images(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Calibration, "accepted", True)
        plan = compress(tiny_vit(), calibration=images(16)).plan
        assert plan.reducer.kind == "merge"
        assert {site.metric.kind for site in plan.sites} <= {"coverage", "grid", "random"}

    def test_the_default_recipe_of_a_model_that_cannot_merge(self) -> None:
        model = timm.create_model("resnet10t", num_classes=3).eval()
        plan = compress(model, img_size=64).plan
        assert (plan.reducer.kind, plan.sites[0].metric.kind) == ("prune", "representation_shift")

    def test_calibrated_on_a_tensor(self) -> None:
        from calibration.test_calibrate import planted

        model, batch = planted("smallest")
        recipe = make_recipe("[{layer: 0, keep_tokens: 8}]", "{kind: representation_shift, operation: block}")
        found = compress(model, recipe, calibration=batch)
        assert found.plan.sites[0].metric.options["polarity"] == "smallest"

    def test_calibration_that_is_not_clear(self) -> None:
        model = tiny_vit()
        with pytest.raises(CheckFailed, match="than random dropping: "):
            compress(model, make_recipe(metric=TestCalibration.OPEN), calibration=images(16))
        assert not any(part._forward_hooks for part in model.modules())

    def test_another_kind_of_module(self) -> None:
        with pytest.raises(ModelError, match="models of the kind Linear are not supported"):
            compress(torch.nn.Linear(2, 2))

    def test_a_file(self, tmp_path: Path) -> None:
        path = save_weights(tiny_vit(embed_dim=128), tmp_path / "dense.safetensors")
        model = compress(path, recipe_file(tmp_path))
        assert model(images()).shape == (2, 10)


class TestImages:
    """Which images are for calibration and which for the comparison."""

    OPEN = "{kind: representation_shift, operation: block, distance: l2, reading: update}"

    def test_the_same_folder_under_two_names_is_still_split(
        self, dense: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        recipe = recipe_file(tmp_path, self.OPEN)
        report = run(dense, recipe=recipe, calibration="images", data=str(image_folder), force=True)
        assert report.measured is not None
        assert report.calibration is not None
        assert report.measured.images.identity["part"] == "agreement"
        assert report.calibration.identity["part"] == "calibration"

    def test_calibration_images_are_used_for_the_comparison_if_nothing_is_open(
        self, dense: Path, image_folder: Path, tmp_path: Path
    ) -> None:
        report = run(dense, recipe=recipe_file(tmp_path), calibration=str(image_folder))
        assert report.measured is not None
        assert report.measured.images.identity["where"].endswith("images")
        assert any("only serve the comparison" in note for note in report.notes)

    def test_a_missing_folder_is_an_error_without_open_fields(self, dense: Path, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="does not exist"):
            run(dense, recipe=recipe_file(tmp_path), calibration=str(tmp_path / "none"))


@pytest.mark.slow
def test_parallel_blocks_work_without_a_recipe_and_without_images() -> None:
    settings = replace(QUICK, load=NO_HEADS)
    report = compress_checkpoint("vit_small_patch16_18x2_224", settings, Silent(), dry_run=True)
    assert {site.metric.options["operation"] for site in report.plan.sites} == {"block"}


def test_an_unsupported_metric_of_one_layer_is_reported_with_its_line(tmp_path: Path) -> None:
    layers = "[{layer: 0, drop_ratio: 0.2, metric: {kind: class_attention}}]"
    path = recipe_file(tmp_path, FIXED.replace("mlp", "block"), layers=layers)
    settings = replace(QUICK, load=NO_HEADS, recipe=path)
    with pytest.raises(RecipeError, match=r"r\.yaml:\d+:\d+: class_attention needs attention_key") as caught:
        compress_checkpoint("vit_small_patch16_18x2_224", settings, Silent(), dry_run=True)
    line = int(caught.value.message.split(":")[1])
    assert "class_attention" in Path(path).read_text().splitlines()[line - 1]


class TestNamedParts:
    """`--metric` and `--reducer`."""

    def test_in_place_of_the_default(self, dense: Path) -> None:
        report = run(dense, reducer="prune", metric="token_norm")
        assert (report.plan.reducer.kind, report.plan.sites[0].metric.kind) == ("prune", "token_norm")
        assert any("metric and reducer are as given" in note for note in report.notes)

    def test_in_place_of_those_of_a_recipe(self, dense: Path, tmp_path: Path) -> None:
        layers = "[{layer: 0, keep_tokens: 9, metric: {kind: class_attention}}]"
        report = run(dense, recipe=recipe_file(tmp_path, layers=layers), reducer="merge", metric="token_norm")
        assert (report.plan.reducer.kind, report.plan.sites[0].metric.kind) == ("merge", "token_norm")
        assert report.plan.sites[0].tokens_out == 10

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"metric": "fited"}, "--metric: unknown metric 'fited'"),
            ({"reducer": "prun"}, "--reducer: unknown reducer 'prun'"),
        ],
    )
    def test_an_unknown_part(self, options: dict[str, str], message: str, dense: Path) -> None:
        with pytest.raises(UsageError, match=message) as caught:
            run(dense, **options)
        assert "Did you mean" in str(caught.value.hint)

    def test_a_reducer_that_the_model_does_not_support(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="merge merges tokens"):
            run("builtin:cnn-digits", reducer="merge", load=LoadOptions())
