"""The built-in video models on videos that were encoded and decoded again: what fewer tokens cost in quality."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from _shape_videos import write_dataset
from outcome import Command

from repshift_cli.data.builtin.moving_shapes import TEST_SEED

VIDEOS = 60

MERGED = """\
version: 1
metric: {kind: representation_shift, operation: attention, distance: l2, reading: update, polarity: largest}
reducer: {kind: vid_tldr}
layers:
  - {layer: 0, drop_ratio: 0.2}
  - {layer: 2, drop_ratio: 0.2}
  - {layer: 4, drop_ratio: 0.2}
"""
RANDOM = MERGED.replace(MERGED.splitlines()[1], "metric: {kind: random}").replace("vid_tldr", "prune")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos") / "set"
    write_dataset(folder, VIDEOS, TEST_SEED + 77, frames=20, size=96)
    return folder


def evaluated(shell: Command, tmp_path: Path, videos: Path, task: str, recipe: str) -> dict[str, Any]:
    """Compress the built-in model of a task by a recipe, and evaluate it with its dense model."""
    (tmp_path / "r.yaml").write_text(recipe)
    model = "builtin:umt-shapes" + ("-qa" if task == "qa" else "")
    done = shell("compress", model, "--recipe", "r.yaml", "-o", "small.safetensors", "--seconds", "0", "--force")
    assert done.rc == 0, done.stderr
    answers = ["--answers", videos / "answers.json"] if task == "qa" else []
    own = ["--annotations", videos / f"{task}.json", "--videos", videos / "videos", *answers]
    found = shell("eval", "small.safetensors", *own, "--compare-dense", "--json")
    assert found.rc == 0, found.stderr
    document: dict[str, Any] = json.loads(found.stdout)
    assert document["skipped"] == document["missing"] == 0
    return document


@pytest.mark.slow
def test_retrieval_survives_merging_by_shift(shell: Command, tmp_path: Path, videos: Path) -> None:
    found = evaluated(shell, tmp_path, videos, "retrieval", MERGED)
    assert (found["videos"], found["captions"]) == (VIDEOS, VIDEOS)
    assert found["gmacs"] < 0.7 * found["dense"]["gmacs"]
    for direction in ("text_to_video", "video_to_text"):
        assert found["dense"][direction]["r1"] > 90
        assert found[direction]["r1"] > 88


@pytest.mark.slow
def test_answers_survive_merging_by_shift(shell: Command, tmp_path: Path, videos: Path) -> None:
    found = evaluated(shell, tmp_path, videos, "qa", MERGED)
    assert found["questions"] == 2 * VIDEOS
    assert found["dense"]["accuracy"] > 80
    assert found["accuracy"] > 78


@pytest.mark.slow
def test_shift_beats_random_dropping_at_a_lower_cost(shell: Command, tmp_path: Path, videos: Path) -> None:
    strong = MERGED.replace("drop_ratio: 0.2}", "drop_ratio: 0.35}")
    random = RANDOM.replace("drop_ratio: 0.2}", "drop_ratio: 0.35}")
    merged, dropped = (evaluated(shell, tmp_path, videos, "qa", recipe) for recipe in (strong, random))
    assert merged["gmacs"] < 1.1 * dropped["gmacs"]
    assert merged["accuracy"] > dropped["accuracy"]
