"""`repshift search` and `repshift compress --target`, on small models with few images and few evaluations."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from matplotlib.colors import to_rgb
from outcome import Command
from paths import ROOT
from PIL import Image
from tiny import save_weights, tiny_vit
from tiny_transformers import tiny_transformer

import repshift_cli
from repshift_cli import compress
from repshift_cli.checkpoints import artifact
from repshift_cli.checkpoints.weights import read_weights
from repshift_cli.data.inputs import ImageBatch
from repshift_cli.errors import OutputError, RecipeError
from repshift_cli.planning.recipe import Recipe
from repshift_cli.reduction.plans import resolve_for
from repshift_cli.search.job import FinishedSearch
from repshift_cli.search.plot import MARKS
from repshift_cli.search.result import SearchResult, SearchSettings
from repshift_cli.search.search import search
from repshift_cli.search.state import keep_outputs

QUICK = ("--images", "16", "--evaluations", "2", "--seconds", "0")


def words(text: str) -> str:
    """The text with all white space replaced by single spaces."""
    return " ".join(text.split())


def narrow(text: str) -> bool:
    return all(len(line.rstrip()) <= 80 for line in text.splitlines())


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Ten class folders with two noise images each; `dense` has ten classes."""
    random = np.random.default_rng(1)
    for label in range(10):
        (tmp_path / "classes" / f"c{label}").mkdir(parents=True)
        for index in range(2):
            noise = random.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "classes" / f"c{label}" / f"{index}.png")
    return tmp_path / "classes"


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ((), {"search"}),
        (
            ("search",),
            {
                *("--target", "--recipe", "--data", "--images", "--evaluations", "--reducer", "--output", "--save"),
                *("--plot", "--state", "--model", "--heads", "--img-size", "--frames", "--checkpoint-frames"),
                *("--frame-step", "--mean", "--std"),
                *("--device", "--dtype", "--batch-size", "--threads", "--seconds", "--seed", "--json", "--force"),
            },
        ),
        (("compress",), {"--target"}),
    ],
)
def test_the_help_lists_every_option(command: tuple[str, ...], options: set[str], cli: Command) -> None:
    outcome = cli(*command, "-h")
    assert outcome.rc == 0
    assert {option for option in options if option not in outcome.stdout} == set()
    assert narrow(outcome.stdout)


class TestSearch:
    @pytest.mark.slow
    def test_everything_that_it_writes(self, shell: Command, tmp_path: Path) -> None:
        (tmp_path / "start.yaml").write_text(
            "version: 1\nmetric: {kind: representation_shift, operation: mlp, distance: l2}\nbudget: {macs: 0.65}\n"
        )
        outcome = shell(
            *("search", "builtin:vit-digits-small", "-r", "start.yaml", "--images", "16", "--evaluations", "1"),
            *("--seconds", "0.05", "--save", "s.safetensors", "--plot", "p.png", "--threads", "1"),
        )
        assert outcome.rc == 0, outcome.stderr
        assert narrow(outcome.stdout)
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "p.png",
            "s.safetensors",
            "start.yaml",
            "vit-digits-small_macs0.65.yaml",
        ]
        rows = {line[:26].strip(): line[26:].split() for line in outcome.stdout.splitlines()}
        assert rows["dense"][0] == "1.000"
        assert 0.6 < float(rows["the paper's schedule"][0]) <= 0.65
        assert 0.6 < float(rows["found"][0]) <= 0.65
        assert len(rows["found"]) == len(rows["dense"]) == 5  # MACs, latency, unchanged, KL, top-1
        assert "reducer prune\nTokens through each site" in outcome.stdout
        assert "searching for macs=0.65 on 16 built-in training scenes, seed 0" in outcome.stderr

        written = tmp_path / "vit-digits-small_macs0.65.yaml"
        recipe = Recipe.load(written)
        stored = artifact.load(tmp_path / "s.safetensors")
        assert resolve_for(artifact.open_model("builtin:vit-digits-small").loaded.model, recipe) == stored.plan
        assert f"{stored.macs() / stored.dense_macs():.3f}" == rows["found"][0]
        for text in (
            "# data   16 built-in training scenes, seed 0, labelled",
            "# search seed 0",
            "#   found  MACs 0.6",
        ):
            assert text in recipe.text
        assert "macs=0.65" in (recipe.description or "")

        document: dict[str, Any] = read_weights(tmp_path / "s.safetensors").document or {}
        assert document["recipe"]["text"] == written.read_text()
        assert document["search"]["target"] == "macs=0.65"
        assert document["search"]["data"]["count"] == 16
        assert document["search"]["measured_on"]["threads"] == 1
        assert document["measured"]["images"]["part"] == "held back"
        check_plot(tmp_path / "p.png", rows)

    def test_json_is_one_document(self, cli: Command, dense: Path, photos: Path, tmp_path: Path) -> None:
        outcome = cli(
            *("search", dense, "-t", "macs=0.7", "--data", photos, *QUICK, "-o", "r.yaml", "--json"),
            *("--batch-size", 4, "--device", "cpu", "--dtype", "bfloat16"),
        )
        assert outcome.rc == 0, outcome.stderr
        found = json.loads(outcome.stdout)
        assert (found["output"], found["checkpoint"], found["plot"]) == ("r.yaml", None, None)
        assert (found["target"], found["met"], found["labelled"]) == ("macs=0.7", True, False)
        assert found["held_back_met"] is None
        assert isinstance(found["held_back_decided"], bool)
        assert found["recipe"] == (tmp_path / "r.yaml").read_text()
        assert found["points"]["found"]["macs"] <= 0.7
        assert found["points"]["found"]["top1"] is None
        assert found["points"]["found"]["latency"] is None
        assert (found["measured_on"]["batch"], found["measured_on"]["dtype"]) == (4, "bfloat16")
        assert found["reducer"] in {"merge", "prune"}
        assert found["data"]["where"] == str(photos)
        assert len(found["tried"]) == found["evaluations"] > 1

    def test_warns_if_it_uses_builtin_scenes(self, cli: Command, dense: Path) -> None:
        outcome = cli("search", dense, "-t", "macs=0.7", *QUICK)
        assert outcome.rc == 0, outcome.stderr
        assert "no images were given, so the search uses built-in scenes" in words(outcome.stderr)
        assert "top-1" not in outcome.stdout

    def test_the_recipe_gives_metric_reducer_and_target(self, cli: Command, dense: Path, tmp_path: Path) -> None:
        (tmp_path / "start.yaml").write_text("version: 1\nmetric: {kind: token_norm}\nbudget: {macs: 0.7}\n")
        outcome = cli("search", dense, "--recipe", "start.yaml", *QUICK, "--json")
        assert outcome.rc == 0, outcome.stderr
        found = json.loads(outcome.stdout)
        assert found["output"] == "dense_macs0.7.yaml"
        assert {site["metric"]["kind"] for site in found["plan"]} == {"token_norm"}

    def test_the_target_of_the_command_line_takes_precedence(self, cli: Command, dense: Path, tmp_path: Path) -> None:
        (tmp_path / "start.yaml").write_text("version: 1\nmetric: {kind: token_norm}\nbudget: {macs: 0.7}\n")
        outcome = cli("search", dense, "--recipe", "start.yaml", "-t", "macs=0.8", *QUICK, "--json")
        found = json.loads(outcome.stdout)
        assert (found["output"], found["target"]) == ("dense_macs0.8.yaml", "macs=0.8")
        assert 0.7 < found["points"]["found"]["macs"] <= 0.8

    def test_the_search_starts_with_the_first_reducer(self, cli: Command, dense: Path, tmp_path: Path) -> None:
        (tmp_path / "start.yaml").write_text("version: 1\nmetric: {kind: token_norm}\nbudget: {macs: 0.7}\n")
        arguments = ("search", dense, "-r", "start.yaml", "--reducer", "merge", *QUICK, "--json")
        outcome = cli(*arguments)
        assert outcome.rc == 0, outcome.stderr
        found = json.loads(outcome.stdout)
        assert found["reducer"] == "merge"
        # from the start, not as an alternative to that of the recipe
        assert not [point["name"] for point in found["tried"] if point["name"].startswith("reducer")]
        assert "reducer: {kind: merge}" in found["recipe"]
        outcome = cli(*arguments, "--reducer", "prunne", "--force")
        assert outcome.rc == 2
        assert "unknown reducer 'prunne'" in outcome.stderr

    @pytest.mark.slow
    def test_another_seed_draws_other_images(self, cli: Command, dense: Path, photos: Path, tmp_path: Path) -> None:
        (tmp_path / "start.yaml").write_text("version: 1\nmetric: {kind: token_norm}\nbudget: {macs: 0.7}\n")
        found = [
            json.loads(
                cli(
                    *("search", dense, "-r", "start.yaml", "--data", photos, *QUICK),
                    *("--seed", seed, "--force", "--json"),
                ).stdout
            )
            for seed in (0, 0, 1)
        ]
        assert found[0]["recipe"] == found[1]["recipe"]
        assert found[0]["data"]["sha256"] == found[1]["data"]["sha256"] != found[2]["data"]["sha256"]
        assert found[2]["seed"] == 1

    @pytest.mark.slow
    def test_latency(self, cli: Command, dense: Path, photos: Path) -> None:
        outcome = cli(
            *("search", dense, "-t", "latency=0.9", "--data", photos, "--images", "16", "--evaluations", "1"),
            *("--seconds", "0.02", "--plot", "p.svg", "--force", "--json"),
        )
        assert outcome.rc == 0, outcome.stderr
        found = json.loads(outcome.stdout)
        assert found["points"]["found"]["latency"] > 0
        assert found["points"]["paper"]["latency"] > 0
        assert found["met"] == (found["points"]["found"]["latency"] <= 0.9)
        assert "not met" in outcome.stderr or found["met"]

    def test_agreement(self, cli: Command, dense: Path, photos: Path) -> None:
        outcome = cli("search", dense, "-t", "agreement=0.3", "--data", photos, *QUICK, "--json")
        assert outcome.rc == 0, outcome.stderr
        found = json.loads(outcome.stdout)
        assert found["nearest"] >= 0.3
        assert found["points"]["found"]["macs"] < 0.9

    def test_recall_of_an_encoder(self, cli: Command, photos: Path, tmp_path: Path) -> None:
        """Each half of the 20 images has 10, enough for the 3 nearest neighbours."""
        encoder = save_weights(tiny_vit(embed_dim=128, num_classes=0), tmp_path / "encoder.safetensors")
        few = ("--data", photos, "--images", "20", "--evaluations", "1", "--seconds", "0", "--force")
        shown = cli("search", encoder, "-t", "recall@3=0.3", *few, "--plot", "p.svg")
        assert shown.rc == 0, shown.stderr
        assert "recall@3" in shown.stdout
        assert narrow(shown.stdout)
        recipe = (tmp_path / "encoder_recall@3-0.3.yaml").read_text()
        assert "recall@3 100.00%" in recipe
        (tmp_path / "b.yaml").write_text("version: 1\nreducer: {kind: prune}\nbudget: {recall: 0.3, k: 3}\n")
        done = cli("search", encoder, "-r", "b.yaml", *few, "-o", "c.yaml", "--json")
        found = json.loads(done.stdout)
        assert found["target"] == "recall@3=0.3"
        assert found["nearest"] >= 0.3
        assert found["points"]["dense"]["recall"] == 1.0
        refused = cli("search", encoder, "-t", "agreement=0.9", *few, "-o", "x.yaml")
        assert refused.rc == 2
        assert "recall@10=0.99" in refused.stderr

    def test_max_drop_with_class_folders(self, cli: Command, dense: Path, classes: Path) -> None:
        outcome = cli(
            *("search", dense, "-t", "max-drop=40", "--data", classes, "--images", "20", "--evaluations", "1"),
            *("--seconds", "0", "--plot", "p.pdf", "--json"),
        )
        assert outcome.rc == 0, outcome.stderr
        found = json.loads(outcome.stdout)
        assert found["labelled"]
        assert found["nearest"] <= 40
        assert found["points"]["found"]["top1"] is not None
        assert found["output"] == "dense_max-drop40.yaml"


def check_plot(path: Path, rows: dict[str, list[str]]) -> None:
    """The plot shows the dense model, the paper's schedule and the found one, over MACs and over latency."""
    with Image.open(path) as opened:
        page = np.asarray(opened.convert("RGB")).astype(int)
    panels = page[:-60]  # without the legend
    middle = page.shape[1] / 2

    def place(role: str, left: bool) -> tuple[int, float, float]:
        """Number and mean position of the pixels with the color of a mark in one panel."""
        wanted = np.array([round(255 * part) for part in to_rgb(MARKS[role]["color"])])
        ys, xs = np.nonzero(np.abs(panels - wanted).sum(axis=-1) == 0)
        here = (xs < middle) == left
        return int(here.sum()), float(xs[here].mean()), float(ys[here].mean())

    (dense, dense_x, dense_y), (found, found_x, found_y) = place("dense", left=True), place("found", left=True)
    assert min(dense, found) > 100
    assert found_x < dense_x - 100
    assert found_y >= dense_y - 2  # not better than the dense model
    assert place("paper", left=True)[0] > 10  # the found schedule may be drawn over it, and is smaller
    assert place("found", left=False)[0] > 100
    # times of so small a model may be equal on a busy machine; then one mark hides the other
    if (latency := float(rows["found"][1])) < 0.8:
        assert place("found", left=False)[1] < place("dense", left=False)[1]
    assert latency > 0


class TestRefused:
    def test_existing_files_are_refused_before_the_checkpoint_is_loaded(self, cli: Command, tmp_path: Path) -> None:
        (tmp_path / "no_macs0.65.yaml").write_text("mine")
        outcome = cli("search", "no.safetensors", "-t", "macs=0.65")
        assert outcome.rc == 2
        assert "no_macs0.65.yaml already exists" in outcome.stderr  # although the checkpoint does not exist
        assert (tmp_path / "no_macs0.65.yaml").read_text() == "mine"

    @pytest.mark.parametrize("option", ["--save", "--plot"])
    def test_so_are_existing_plots_and_checkpoints(self, option: str, cli: Command, tmp_path: Path) -> None:
        (tmp_path / "there.png").write_text("mine")
        outcome = cli("search", "no.safetensors", "-t", "macs=0.65", option, "there.png")
        assert outcome.rc == 2
        assert "there.png already exists" in outcome.stderr

    @pytest.mark.parametrize(
        ("arguments", "rc", "message"),
        [
            ((), 2, "no target is given"),
            (("-t", "mac=0.65"), 2, "unknown target 'mac' Did you mean macs?"),
            (("-t", "macs"), 2, "invalid target 'macs': must have the form kind=value"),
            (("-t", "macs=1.5"), 2, "invalid target macs=1.5: must be in (0, 1)"),
            (("-t", "macs=0.5", "--plot", "p.gif"), 2, "invalid --plot p.gif: must end in .png, .svg or .pdf"),
            (("-t", "macs=0.5", "-o", "a", "--save", "a"), 2, "both name a"),
            (("-t", "macs=0.5", "-o", "a", "--state", "a"), 2, "both name a"),
            (("-t", "macs=0.5", "--images", "8"), 2, "--images"),
            (("-t", "macs=0.5", "--evaluations", "0"), 2, "--evaluations"),
            (("-t", "macs=0.5", "--device", "tpu"), 2, "device"),
            (("-t", "macs=0.5", "--dtype", "int8"), 2, "unknown dtype"),
            (("-t", "macs=0.5"), 3, "nowhere.safetensors"),
        ],
    )
    def test_invalid_arguments(self, arguments: tuple[str, ...], rc: int, message: str, cli: Command) -> None:
        outcome = cli("search", "nowhere.safetensors", *arguments)
        assert outcome.rc == rc
        assert message in words(outcome.stderr)
        assert "Traceback" not in outcome.stderr

    @pytest.mark.parametrize(
        ("option", "value", "rc", "message"),
        [
            ("--heads", 3, 3, "3 heads do not divide a width of 128"),
            ("--model", "resnet50", 3, "the weights do not fit resnet50"),
            ("--img-size", 33, 2, "--img-size 33: "),
            ("--frames", 4, 2, "takes single images, not clips"),
            ("--checkpoint-frames", 4, 2, "takes single images, not clips"),
        ],
    )
    def test_model_options_reach_the_loader(
        self, *, option: str, value: object, rc: int, message: str, cli: Command, dense: Path
    ) -> None:
        outcome = cli("search", dense, "-t", "macs=0.5", option, value)
        assert outcome.rc == rc
        assert message in outcome.stderr

    @pytest.mark.slow
    def test_a_missed_target_writes_nothing_without_force(self, cli: Command, dense: Path, tmp_path: Path) -> None:
        arguments = ("search", dense, "-t", "macs=0.2", *QUICK, "-o", "r.yaml", "--save", "s.safetensors")
        outcome = cli(*arguments)
        assert outcome.rc == 5
        assert "the target macs=0.2 cannot be met: the nearest is macs=0." in outcome.stderr
        assert not (tmp_path / "r.yaml").exists()
        assert not (tmp_path / "s.safetensors").exists()
        assert (tmp_path / "r.yaml.state.json").is_file()
        outcome = cli(*arguments, "--force")
        assert outcome.rc == 0
        assert "is not met: the nearest is" in outcome.stderr
        assert "NOT MET" in Recipe.load(tmp_path / "r.yaml").text
        assert artifact.load(tmp_path / "s.safetensors").macs() > 0
        assert not (tmp_path / "r.yaml.state.json").exists()

    def test_max_drop_without_labels(self, cli: Command, dense: Path, photos: Path) -> None:
        outcome = cli("search", dense, "-t", "max-drop=1", "--data", photos, *QUICK)
        assert outcome.rc == 2
        assert f"the target max-drop=1 needs labels: there are no class folders in {photos}" in words(outcome.stderr)

    def test_too_few_images(self, cli: Command, dense: Path, classes: Path) -> None:
        outcome = cli("search", dense, "-t", "macs=0.7", "--data", classes / "c0", *QUICK)
        assert outcome.rc == 4
        assert "at least 16 images, there are 2" in words(outcome.stderr)


class TestInterrupted:
    @pytest.fixture
    def started(self, dense: Path, tmp_path: Path) -> subprocess.Popen[str]:
        """A search that takes minutes."""
        arguments = ["-t", "macs=0.7", "--images", "64", "--evaluations", "100000", "--seconds", "0", "-o", "r.yaml"]
        return subprocess.Popen(
            [sys.executable, "-m", "repshift_cli", "search", str(dense), *arguments, "--state", "where.json"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @pytest.mark.slow
    def test_the_best_schedule_is_written_and_the_search_continues(
        self, started: subprocess.Popen[str], cli: Command, dense: Path, tmp_path: Path
    ) -> None:
        state = tmp_path / "where.json"
        wait_for(lambda: state.is_file() and state.read_text().count('"judge ') > 6, started)
        started.send_signal(signal.SIGINT)
        _, errors = started.communicate(timeout=60)
        assert started.returncode == 130, errors
        assert "r.yaml is the best of" in words(errors)
        assert "The state is kept in where.json; the same command continues the search" in words(errors)
        first = Recipe.load(tmp_path / "r.yaml")
        assert "interrupted, this is the best so far" in first.text
        known = set(json.loads(state.read_text())["known"])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["dense.safetensors", "r.yaml", "where.json"]

        # without --force for the recipe that the interruption wrote
        arguments = ("-t", "macs=0.7", "--images", "64", "--evaluations", "4", "--seconds", "0", "-o", "r.yaml")
        outcome = cli("search", dense, *arguments, "--state", "where.json", "--json")
        assert outcome.rc == 0, outcome.stderr
        assert not state.exists()
        assert "interrupted" not in Recipe.load(tmp_path / "r.yaml").text
        assert len(known) > 10

    def test_only_files_of_the_interruption_are_replaced(self, cli: Command, tmp_path: Path) -> None:
        state, recipe = tmp_path / "where.json", tmp_path / "r.yaml"
        recipe.write_text("mine")
        arguments = ("search", "no.safetensors", "-t", "macs=0.65", "-o", "r.yaml", "--state", "where.json")
        state.write_text(json.dumps({"known": {}}))
        assert "r.yaml already exists" in cli(*arguments).stderr
        keep_outputs(state, {str(recipe): hashlib.sha256(b"mine").hexdigest()})
        assert cli(*arguments).rc == 3  # the checkpoint does not exist
        (tmp_path / "p.png").write_text("mine")
        assert "p.png already exists" in cli(*arguments, "--plot", "p.png").stderr
        recipe.write_text("mine, and changed")
        assert "r.yaml already exists" in cli(*arguments).stderr

    def test_an_output_that_cannot_be_recorded_is_removed(
        self, cli: Command, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*arguments: Any) -> None:
            raise OutputError("cannot write: the disk is full")

        monkeypatch.setattr("repshift_cli.search.state.keep_outputs", full)
        assert cli("search", dense, "-t", "macs=0.7", *QUICK, "-o", "r.yaml").rc == 1
        assert not (tmp_path / "r.yaml").exists()

    def test_the_best_so_far_may_miss_the_target(
        self, cli: Command, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*arguments: Any) -> SearchResult:
            return dataclasses.replace(search(*arguments), interrupted=True)

        monkeypatch.setattr("repshift_cli.search.job.search", interrupted)
        outcome = cli("search", dense, "-t", "macs=0.2", *QUICK)
        assert outcome.rc == 130
        assert "interrupted: the best schedule so far misses macs=0.2" in words(outcome.stderr)
        assert "The state is kept in dense_macs0.2.yaml.state.json; the same command continues" in words(outcome.stderr)
        assert not (tmp_path / "dense_macs0.2.yaml").exists()

    def test_before_the_first_schedule(
        self, cli: Command, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(_model: object, _family: object, settings: SearchSettings, _progress: object) -> None:
            assert settings.state is not None
            settings.state.write_text("{}")
            raise KeyboardInterrupt

        monkeypatch.setattr("repshift_cli.search.job.search", interrupted)
        outcome = cli("search", dense, "-t", "macs=0.7", *QUICK)
        assert outcome.rc == 130
        assert "The state is kept in dense_macs0.7.yaml.state.json; the same command continues" in words(outcome.stderr)
        assert "no partial output" not in outcome.stderr
        assert not (tmp_path / "dense_macs0.7.yaml").exists()

    def test_within_compress_nothing_is_written(
        self, cli: Command, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        best_so_far = SimpleNamespace(result=SimpleNamespace(interrupted=True))
        monkeypatch.setattr("repshift_cli.compression.run.find", lambda *_, **__: best_so_far)
        outcome = cli("compress", dense, "-t", "macs=0.7", "--calibration-images", "16", "-o", "s.safetensors")
        assert outcome.rc == 130
        assert "interrupted; no partial output was left" in outcome.stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == ["dense.safetensors"]

    @pytest.mark.slow
    def test_the_state_of_another_search_is_refused(self, cli: Command, dense: Path, tmp_path: Path) -> None:
        cli("search", dense, "-t", "macs=0.2", *QUICK, "--state", "where.json")
        before = (tmp_path / "where.json").read_text()
        outcome = cli("search", dense, "-t", "macs=0.7", *QUICK, "--state", "where.json")
        assert outcome.rc == 2
        assert "where.json is the state of another search: it differs in target" in words(outcome.stderr)
        assert (tmp_path / "where.json").read_text() == before


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    """Wait for a condition while the process runs."""
    end = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.02)


class TestCompress:
    def test_a_target(self, cli: Command, tmp_path: Path, dense: Path, photos: Path) -> None:
        few = ("--calibration", photos, "--calibration-images", "16", "--seconds", "0", "-b", "4")
        outcome = cli("compress", dense, "--target", "macs=0.7", *few, "-o", "s.safetensors")
        assert outcome.rc == 0, outcome.stderr
        assert narrow(outcome.stdout)
        assert "the paper's schedule" in outcome.stdout
        assert "wrote   s.safetensors" in outcome.stdout
        stored = artifact.load(tmp_path / "s.safetensors")
        assert stored.macs() <= 0.7 * stored.dense_macs()
        document: dict[str, Any] = read_weights(tmp_path / "s.safetensors").document or {}
        assert (document["search"]["target"], document["search"]["met"]) == ("macs=0.7", True)
        assert document["search"]["points"]["found"]["macs"] == pytest.approx(
            stored.macs() / stored.dense_macs(), abs=1e-5
        )
        assert document["search"]["data"]["count"] == 16
        assert (
            resolve_for(artifact.open_model(dense).loaded.model, Recipe.parse(document["recipe"]["text"]))
            == stored.plan
        )
        assert document["measured"]["images"]["count"] == 8  # the held-out images
        assert Recipe.parse(cli("recipes", "show", "s.safetensors").stdout).text == document["recipe"]["text"]

    @pytest.mark.slow
    def test_a_recipe_with_a_budget(self, cli: Command, tmp_path: Path, dense: Path, photos: Path) -> None:
        (tmp_path / "r.yaml").write_text("version: 1\nmetric: {kind: token_norm}\nbudget: {macs: 0.7}\n")
        few = ("--calibration", photos, "--calibration-images", "16", "--seconds", "0", "-b", "4")
        outcome = cli("compress", dense, "--recipe", "r.yaml", *few, "-o", "s.safetensors", "--json")
        assert outcome.rc == 0, outcome.stderr
        found = json.loads(outcome.stdout)
        assert found["search"]["target"] == "macs=0.7"
        assert found["compressed"]["gmacs"] <= 0.7 * found["dense"]["gmacs"]
        assert {site["metric"]["kind"] for site in found["plan"]} == {"token_norm"}

    @pytest.mark.slow
    def test_a_missed_target(self, cli: Command, tmp_path: Path, dense: Path, photos: Path) -> None:
        few = ("--calibration", photos, "--calibration-images", "16", "--seconds", "0", "-b", "4")
        outcome = cli("compress", dense, "--target", "macs=0.2", *few, "-o", "s.safetensors")
        assert outcome.rc == 5
        assert "the nearest is macs=0." in outcome.stderr
        assert not (tmp_path / "s.safetensors").exists()
        assert cli("compress", dense, "--target", "macs=0.2", *few, "-o", "s.safetensors", "--force").rc == 0
        assert (tmp_path / "s.safetensors").exists()

    def test_a_cost_and_a_quality(self, cli: Command, tmp_path: Path, dense: Path, classes: Path) -> None:
        """Labels are used if there are any; else changed predictions are counted."""
        few = ("-t", "macs=0.9", "--calibration-images", "16", "--seconds", "0", "-b", "4", "--json")
        outcome = cli("compress", dense, "--data", classes, "--max-drop", "99", *few, "-o", "s.safetensors")
        assert outcome.rc == 0, outcome.stderr
        found = json.loads(outcome.stdout)["search"]
        assert (found["target"], found["limit"]["target"]) == ("macs=0.9", "max-drop=99")
        points = found["points"]
        assert found["limit"]["reached"] == pytest.approx(points["dense"]["top1"] - points["found"]["top1"], abs=1e-6)
        outcome = cli("compress", dense, "--data", classes, "--max-drop", "99", *few[:-1], "-o", "t.safetensors")
        assert "limit   max-drop=99: reached max-drop=" in outcome.stdout
        assert narrow(outcome.stdout)

    def test_a_quality_that_is_missed(self, cli: Command, tmp_path: Path, dense: Path, photos: Path) -> None:
        few = ("-t", "macs=0.4", "--calibration-images", "16", "--seconds", "0", "-b", "4", "--json")
        outcome = cli("compress", dense, "--data", photos, "--max-drop", "0", *few, "-o", "s.safetensors")
        assert outcome.rc == 5, outcome.stderr
        assert "max-drop=0 is taken as agreement=1, which is stricter" in words(outcome.stderr)
        assert "at macs=0.4 the limit agreement=1 is missed: it is agreement=" in words(outcome.stderr)
        assert json.loads(outcome.stdout)["search"]["limit"]["reached"] < 1
        assert not (tmp_path / "s.safetensors").exists()

    @pytest.mark.parametrize(
        ("goals", "message"),
        [
            (("--speedup", "1.5", "-t", "macs=0.6"), "speedup=1.5 and macs=0.6 are goals of the same kind"),
            (("--max-drop", "1", "-t", "agreement=0.99"), "agreement=0.99 and max-drop=1 are goals of the same kind"),
            (("--speedup", "0.9"), "invalid target speedup=0.9: must be in (1, 20]"),
            (("--speedup", "fast"), "invalid target 'speedup=fast'"),
            (("-t", "macs=0.6", "-t", "recall@5=0.9"), "with a goal of cost, recall is measured at 10"),
            (("-t", "macs=0.6", "-t", "cosine=0.9"), "the outputs of the model are not embeddings"),
        ],
    )
    def test_goals_that_are_refused(self, goals: tuple[str, ...], message: str, cli: Command, dense: Path) -> None:
        outcome = cli("compress", dense, *goals)
        assert outcome.rc == 2
        assert message in words(outcome.stderr).replace("macs=0.6 and speedup=1.5", "speedup=1.5 and macs=0.6")

    @pytest.mark.parametrize(
        ("extra", "message"),
        [
            (("--dry-run",), "--dry-run: the plan for macs=0.7 is known only after a search"),
            (("--no-calibrate",), "--no-calibrate: the search for macs=0.7 needs images"),
        ],
    )
    def test_options_that_a_search_refuses(
        self, extra: tuple[str, ...], message: str, cli: Command, dense: Path
    ) -> None:
        outcome = cli("compress", dense, "--target", "macs=0.7", *extra)
        assert outcome.rc == 2
        assert message in words(outcome.stderr)


def test_several_processes_are_refused(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    outcome = cli("search", "no.safetensors", "-t", "macs=0.7")
    assert outcome.rc == 2
    assert words(outcome.stderr) == "error: repshift search runs in one process Start it without torchrun."


@pytest.mark.parametrize(("model", "reducer"), [("builtin:cnn-digits", "merge"), ("builtin:vim-digits", "vid_tldr")])
def test_a_reducer_that_does_not_fit_the_model_is_refused(model: str, reducer: str, cli: Command) -> None:
    outcome = cli("search", model, "-t", "macs=0.7", "--reducer", "prune", "--reducer", reducer, *QUICK)
    assert outcome.rc == 2
    assert f"{reducer} " in outcome.stderr
    assert "unexpected" not in outcome.stderr


@pytest.mark.slow
def test_one_process_prints_its_result_whatever_its_rank(
    cli: Command, dense: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    (tmp_path / "start.yaml").write_text("version: 1\nmetric: {kind: token_norm}\nbudget: {macs: 0.7}\n")
    outcome = cli("search", dense, "-r", "start.yaml", *QUICK)
    assert outcome.rc == 0, outcome.stderr
    assert "wrote   dense_macs0.7.yaml" in outcome.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "named"),
    [("builtin:vit-digits-small", True), pytest.param("timm", True, marks=pytest.mark.slow), ("dense", False)],
)
def test_a_recipe_with_fitted_weights_names_the_model(
    *, model: str, named: bool, cli: Command, dense: Path, photos: Path, tmp_path: Path
) -> None:
    if model == "timm":
        save_weights(timm.create_model("deit_tiny_patch16_224", num_classes=10), tmp_path / "timm.safetensors")
        arguments: tuple[object, ...] = ("timm.safetensors", "--model", "deit_tiny_patch16_224", "--data", photos)
    else:
        arguments = (dense if model == "dense" else model, "--data", photos)
    # random weights: whether random dropping is beaten depends on the rounding of the machine
    outcome = cli("search", *arguments, "-t", "macs=0.8", *QUICK, "--force", "-o", "r.yaml")
    assert outcome.rc == 0, outcome.stderr
    found = Recipe.load(tmp_path / "r.yaml")
    assert "weights" in found.text
    assert (found.model is not None) == named
    outcome = cli("compress", arguments[0], "-r", "r.yaml", "--data", photos, "--seconds", "0", "-o", "s.safetensors")
    assert outcome.rc == 0, outcome.stderr


class TestOtherUsersOfABudget:
    @pytest.fixture
    def budget(self, tmp_path: Path) -> str:
        (tmp_path / "b.yaml").write_text("version: 1\nbudget: {macs: 0.7}\n")
        return "b.yaml"

    def test_bench_refuses_it(self, cli: Command, dense: Path, budget: str) -> None:
        outcome = cli("bench", dense, "--recipe", budget, "--seconds", "0")
        assert outcome.rc == 2
        assert "b.yaml:2:1: the recipe has a budget instead of layers" in words(outcome.stderr)
        assert "`repshift search MODEL --recipe FILE` finds the layers" in words(outcome.stderr)

    def test_so_does_the_python_api(self, budget: str, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="budget instead of layers"):
            compress(tiny_vit(), Recipe.load(tmp_path / budget))

    def test_recipes_check_and_show(self, cli: Command, budget: str, tmp_path: Path) -> None:
        assert cli("recipes", "check", budget).stdout == "b.yaml: valid (a search for macs=0.7)\n"
        assert cli("recipes", "show", budget).stdout == (tmp_path / budget).read_text()


def test_the_second_half_is_held_out() -> None:
    batch = ImageBatch(torch.arange(7.0), {"where": "x", "count": 7, "seed": 0}, "7 of x", builtin=False)
    unused: Any = None
    found = FinishedSearch(unused, unused, unused, unused, batch, {})
    assert found.heldout.tensor.tolist() == [3, 4, 5, 6]  # the selection half is rounded down
    assert found.heldout.identity["count"] == 4
    assert batch.identity["count"] == 7


@pytest.mark.slow
def test_a_folder_name_cannot_end_a_comment(cli: Command, dense: Path, photos: Path, tmp_path: Path) -> None:
    odd = photos.rename(tmp_path / "a\nversion: 2\x1b")
    (tmp_path / "start.yaml").write_text("version: 1\nmetric: {kind: token_norm}\nbudget: {macs: 0.7}\n")
    outcome = cli("search", dense, "-r", "start.yaml", "--data", odd, *QUICK, "-o", "r.yaml")
    assert outcome.rc == 0, outcome.stderr
    assert "a?version: 2?" in Recipe.load(tmp_path / "r.yaml").text


@pytest.mark.slow
def test_a_model_without_a_head_compares_features(cli: Command, photos: Path, tmp_path: Path) -> None:
    save_weights(tiny_vit(embed_dim=128, num_classes=0), tmp_path / "bare.safetensors")
    outcome = cli("search", "bare.safetensors", "-t", "macs=0.7", "--data", photos, *QUICK, "--plot", "p.png")
    assert outcome.rc == 0, outcome.stderr
    assert "1 - cosine" in outcome.stdout
    assert "unchanged" not in outcome.stdout
    assert narrow(outcome.stdout)


@pytest.mark.slow
def test_a_failed_check_is_printed_as_json(cli: Command, dense: Path, photos: Path) -> None:
    outcome = cli("search", dense, "-t", "macs=0.2", "--data", photos, *QUICK, "--json")
    assert outcome.rc == 5
    document = json.loads(outcome.stdout)
    assert document["failed"]["message"].startswith("the target macs=0.2 cannot be met")
    assert (document["output"], document["met"]) == (None, False)
    assert document["points"]["found"]["macs"] < 1
    few = ("--calibration", photos, "--calibration-images", "16", "--seconds", "0", "-b", "4")
    outcome = cli("compress", dense, "-t", "macs=0.2", *few, "--json")
    assert outcome.rc == 5
    document = json.loads(outcome.stdout)
    assert document["failed"]["message"].startswith("the target macs=0.2 cannot be met")
    assert document["search"]["met"] is False
    assert document["plan"]


@pytest.mark.slow
def test_a_model_that_needs_all_tokens_is_searched_with_restored_ones(cli: Command, tmp_path: Path) -> None:
    tiny_transformer("InternVLVisionModel").save_pretrained(tmp_path / "model")
    quick = ("--images", "32", "--evaluations", "6", "--seconds", "0", "-b", "8", "--threads", "1", "--json")
    done = cli("search", "model", "--target", "macs=0.85", "-o", "found.yaml", "--save", "fast.safetensors", *quick)
    assert done.rc == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["points"]["found"]["macs"] <= 0.85
    assert "restore: true" in (tmp_path / "found.yaml").read_text()
    loaded = repshift_cli.load(tmp_path / "fast.safetensors")
    assert loaded.plan.restore
    assert loaded.macs() / loaded.dense_macs() == pytest.approx(document["points"]["found"]["macs"])
    inputs = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = loaded(inputs)
    with torch.no_grad(), loaded.dense() as dense:
        assert found.shape == dense(inputs).shape == (2, 17, 32)
        assert not torch.allclose(found, dense(inputs))
