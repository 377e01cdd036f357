"""How a compressed checkpoint was made is shown, two can be compared, and the dense one can be written back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from outcome import Command
from safetensors.torch import load_file, save_file

from repshift_cli.checkpoints.weights import METADATA_KEY, read_weights
from repshift_cli.cli.show.provenance import describe

QUICK = ("--seconds", "0", "--calibration-images", "16")


@pytest.fixture
def small(cli: Command, dense: Path, photos: Path, tmp_path: Path) -> Path:
    outcome = cli("compress", dense, "--calibration", photos, "-o", "small.safetensors", "--force", *QUICK)
    assert (tmp_path / "small.safetensors").exists(), outcome.stderr
    return tmp_path / "small.safetensors"


def test_inspect_shows_how_it_was_made(cli: Command, small: Path, dense: Path) -> None:
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in cli("inspect", small).stdout.splitlines() if line}
    assert {"made", "source", "recipe", "metrics", "speed", "quality"} <= lines.keys()
    assert lines["source"].startswith("dense.safetensors (SHA-256 ")
    found = json.loads(cli("inspect", small, "--json").stdout)["provenance"]
    assert found["source"]["sha256"] == read_weights(dense).source.sha256
    assert found["recipe"]["text"]
    assert found["measured"]["ratio"]["latency"] > 0
    assert json.loads(cli("inspect", dense, "--json").stdout)["provenance"] is None


def test_the_dense_checkpoint_comes_back(cli: Command, small: Path, dense: Path, tmp_path: Path) -> None:
    outcome = cli("dense", small, "--json")
    assert outcome.rc == 0, outcome.stderr
    written = tmp_path / "small_dense.safetensors"
    assert json.loads(outcome.stdout)["output"] == str(written)
    before, after = load_file(dense), load_file(written)
    assert before.keys() == after.keys()
    assert all(before[key].dtype == after[key].dtype and torch.equal(before[key], after[key]) for key in before)
    assert not json.loads(cli("inspect", written, "--json").stdout)["compressed"]
    assert cli("dense", small).rc == 2  # it exists
    again = cli("dense", written)
    assert again.rc == 3
    assert "already a dense checkpoint" in again.stderr


def test_what_differs(cli: Command, small: Path, dense: Path, tmp_path: Path) -> None:
    assert "Everything else is equal" in cli("diff", small, small).stdout
    tensors = load_file(small)
    name = sorted(tensors)[0]
    document = read_weights(small).document
    assert document is not None
    tensors[name] = tensors[name] + 1
    document["recipe"]["name"] = "another"
    save_file(tensors, tmp_path / "other.safetensors", metadata={METADATA_KEY: json.dumps(document)})
    found = json.loads(cli("diff", small, "other.safetensors", "--json").stdout)
    assert found["weights_differ"] == [name]
    assert found["differing"].keys() == {"recipe"}
    assert found["differing"]["recipe"]["b"] == "another"
    assert max(map(len, cli("diff", small, "other.safetensors").stdout.splitlines())) <= 80


@pytest.mark.parametrize("part", [None, {}, {"agreement": "x"}, 3, "text", {"ratio": {"latency": 10**400}}])
def test_any_content_is_described(part: Any) -> None:
    document = dict.fromkeys(("calibration", "search", "measured"), part)
    document |= {"created": "2026", "repshift_version": "1", "recipe": {"name": "r"}}
    document["source"] = {"name": None, "origin": "file", "sha256": None}
    found = describe(document)
    assert found["source"] == "file"
    assert set(found.values()) <= {"2026 by repshift 1", "file", "r", "cannot be read"}


def test_predictions_on_images_of_another_kind_are_not_shown() -> None:
    document: dict[str, Any] = {"measured": {"agreement": 0.5, "images": {"where": "builtin:digits", "count": 32}}}
    assert describe({**document, "model": {"name": "vit-digits"}})["quality"].startswith("50.0% of predictions")
    assert describe({**document, "model": {"name": "deit_small"}})["quality"].startswith("not measured")
