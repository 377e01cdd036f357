"""`repshift eval` with several models and with `--against`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from outcome import Command, Outcome, explained
from PIL import Image
from tiny import make_recipe, save_weights, tiny_vit

QUIET = ("--workers", "0", "--threads", "1", "-b", "16")
IMAGES = 60
BASELINES = ["class-attention", "bipartite", "tome", "fuse", "random"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, two recipes, and images of noise in ten class folders."""
    root = tmp_path_factory.mktemp("several")
    random = np.random.default_rng(0)
    for index in range(IMAGES):
        path = root / "val" / str(index % 10) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((36, 36)).save(path)
    save_weights(tiny_vit(embed_dim=64), root / "slow.safetensors")
    (root / "a.yaml").write_text(make_recipe(metric="{kind: token_norm}").text)
    (root / "b.yaml").write_text(make_recipe("[{layer: 0, drop_ratio: 0.25}]", "{kind: token_norm}").text)
    return root


@pytest.fixture
def make(root: Path, cli: Command) -> Callable[..., Path]:
    def compress(name: str, recipe: str, *options: str) -> Path:
        path = root / f"{name}.safetensors"
        given = ("-o", path, "--heads", "2", "-r", root / recipe, "--seconds", "0", "--no-calibrate", "--threads", "1")
        if not path.exists():
            done = cli("compress", root / "slow.safetensors", *given, *options)
            assert done.rc == 0, done.stderr
        return path

    return compress


@pytest.fixture
def run(root: Path, cli: Command) -> Callable[..., Outcome]:
    def evaluate(*arguments: object) -> Outcome:
        return cli("eval", *arguments, "--dataset", root / "val", *QUIET)

    return evaluate


def rows(outcome: Outcome) -> dict[str, Any]:
    assert outcome.rc == 0, outcome.stderr
    return {row["name"]: row for row in json.loads(outcome.stdout)["models"]}


def test_rows_have_the_numbers_of_single_runs(
    make: Callable[..., Path], run: Callable[..., Outcome], cli: Command
) -> None:
    a, b = make("a", "a.yaml"), make("b", "b.yaml")
    found = rows(run(a, b, "--json"))
    assert list(found) == ["a", "a, dense", "b"]
    single = json.loads(run(a, "--compare-dense", "--json", "--save-predictions", "a.npz").stdout)
    for name, document in (("a", single), ("a, dense", single["dense"])):
        for key in ("top1_correct", "top5_correct", "top1_interval", "gmacs", "against_guessing"):
            assert found[name][key] == document[key], (name, key)
    assert found["a"]["agreement"] == single["agreement"]
    other = json.loads(run(b, "--json", "--save-predictions", "b.npz").stdout)
    assert found["b"]["top1_correct"] == other["top1_correct"]
    compared = json.loads(cli("compare", "a.npz", "b.npz", "--json").stdout)
    for key in ("difference", "difference_interval", "lost", "won", "mcnemar_p"):
        assert found["b"][key] == compared[key]
    assert (found["a"]["difference"], found["a"]["beyond_chance"], found["a, dense"]["agreement"]) == (None, None, None)


def test_baselines_have_the_macs_of_the_model(make: Callable[..., Path], run: Callable[..., Outcome]) -> None:
    a = make("b", "b.yaml")
    done = run(a, "--against", ",".join(BASELINES), "--json")
    found = rows(done)
    assert list(found) == ["compressed", "dense", *BASELINES]
    assert {key: json.loads(done.stdout)[key] for key in ("model", "reference", "first")} == {
        "model": str(a),
        "reference": "dense",
        "first": "compressed",
    }
    own = found["compressed"]["gmacs"]
    assert found["random"]["gmacs"] == found["fuse"]["gmacs"] == own < found["dense"]["gmacs"]
    assert all(found[name]["gmacs"] == pytest.approx(own, rel=0.1) for name in BASELINES)
    assert all(0 < found[name]["agreement"] <= 1 for name in BASELINES)


def test_the_table_marks_what_is_beyond_chance(make: Callable[..., Path], run: Callable[..., Outcome]) -> None:
    a = make("a", "a.yaml")
    chosen = rows(run(a, "--against", "random", "--json"))
    done = run(a, "--against", "random")
    assert done.rc == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    for name in ("dense", "random"):
        assert ("*" in lines[name]) is chosen[name]["beyond_chance"]
        assert len(lines[name]) <= 80
        assert len(lines[name].split()) == 8
    assert "beyond chance" in done.stdout


def test_other_preprocessing_is_another_pass(make: Callable[..., Path], run: Callable[..., Outcome]) -> None:
    a, c = make("a", "a.yaml"), make("c", "b.yaml", "--mean", "0.2")
    done = run(a, c, "--json")
    found = rows(done)
    assert list(found) == ["a", "a, dense", "c"]
    assert found["c"]["preprocessing"]["mean"] != found["a"]["preprocessing"]["mean"]
    assert found["c"]["top1_correct"] == json.loads(run(c, "--json").stdout)["top1_correct"]
    assert found["c"]["mcnemar_p"] is not None
    explained(run(a, c, "--resume", "state"), 2, "--resume: the models have different preprocessing")


def test_a_run_can_be_resumed(make: Callable[..., Path], run: Callable[..., Outcome], tmp_path: Path) -> None:
    a = make("a", "a.yaml")
    done = run(a, "--against", "tome", "--resume", "state", "--json")
    assert list(rows(done)) == ["compressed", "dense", "tome"]
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--against", "tomee"), ("unknown baseline 'tomee'", "Did you mean tome?")),
        (("--against", "explicit"), ("--against explicit: it predicts what dense predicts", "Allowed are dense,")),
        (("--against", "random", "--save-predictions", "p.npz"), ("--save-predictions is for one model",)),
        (("--against", "random", "--embeddings", "val"), ("--embeddings is for one model",)),
        (("builtin:cnn-digits", "--save-predictions", "p.npz"), ("--save-predictions is for one model",)),
        (("builtin:vit-digits",), ("a model is given twice",)),
        (("--against", "tome"), ("--against: no model is compressed", "repshift compress")),
        (("builtin:umt-shapes",), ("builtin:umt-shapes takes videos with texts",)),
    ],
    ids=str,
)
def test_refused(cli: Command, options: tuple[str, ...], words: tuple[str, ...]) -> None:
    explained(cli("eval", "builtin:vit-digits", *options, "--limit", "5"), 2, *words)


def test_models_of_other_classes(cli: Command, root: Path) -> None:
    save_weights(tiny_vit(embed_dim=64, num_classes=7), root / "seven.safetensors")
    done = cli("eval", root / "slow.safetensors", root / "seven.safetensors", "--heads", "2", "--dataset", root / "val")
    explained(done, 2, "slow has 10 classes, and seven has 7", "one by one")


@pytest.mark.slow
def test_in_a_process_of_its_own(make: Callable[..., Path], shell: Command, root: Path) -> None:
    done = shell("eval", make("a", "a.yaml"), make("b", "b.yaml"), "--dataset", root / "val", *QUIET, "--json")
    assert list(rows(done)) == ["a", "a, dense", "b"]
