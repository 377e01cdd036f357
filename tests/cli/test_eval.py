"""`repshift eval`: its output and its exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from outcome import Command
from PIL import Image

from repshift_cli.cli.torchrun import own_device

KEYS = {"dataset", "images", "skipped", "top1", "top5", "images_per_s", "gmacs"}


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    surroundings = {key: value for key, value in os.environ.items() if key != "REPSHIFT_DATA_DIR"}
    return subprocess.run(
        [sys.executable, "-m", "repshift_cli", "eval", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**surroundings, "COLUMNS": "80", **environment},
    )


def document(*arguments: str) -> Any:
    done = call(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """Ten class folders of built-in scenes, named as the classes of the built-in model."""
    from repshift_cli.data.builtin.digits import DigitScenes

    for label in range(10):
        (tmp_path / "digits" / str(label)).mkdir(parents=True)
    scenes = DigitScenes("test", 30)
    for index in range(len(scenes)):
        scene_image, label = scenes[index]
        scene_image.save(tmp_path / "digits" / str(label) / f"{index}.png")
    return tmp_path / "digits"


@pytest.mark.slow
def test_without_arguments_the_builtin_model_is_evaluated_on_its_scenes() -> None:
    result = document("--limit", "200")
    assert set(result) >= KEYS
    assert (result["dataset"], result["images"], result["skipped"]) == ("builtin:digits", 200, 0)
    assert 80 < result["top1"] <= result["top5"] <= 100
    low, high = result["top1_interval"]
    assert low < result["top1"] < high or result["top1"] == 100
    assert "dense" not in result


def test_table_fits_80_columns(cli: Command) -> None:
    done = cli("eval", "--limit", "20")
    assert done.rc == 0, done.stderr
    assert "top-1" in done.stdout
    assert "preprocessing: 72x72x3" in done.stdout
    row = next(line for line in done.stdout.splitlines() if line.startswith("dense"))
    assert len(row.rstrip()) <= 80
    assert len(row.split()) == 7


@pytest.mark.slow
def test_same_numbers_from_files_and_from_scenes(digits: Path) -> None:
    scenes = document("--limit", "30")
    files = document("builtin:vit-digits", "--dataset", str(digits), "--workers", "1")
    assert (files["images"], files["top1"], files["top5"]) == (30, scenes["top1"], scenes["top5"])


@pytest.mark.slow
def test_unreadable_images_are_listed_on_stderr(digits: Path) -> None:
    (digits / "0" / "broken.png").write_bytes(b"")
    done = call("builtin:vit-digits", "--dataset", str(digits), "--json")
    assert done.returncode == 0
    result = json.loads(done.stdout)
    assert (result["images"], result["skipped"]) == (30, 1)
    assert result["skipped_files"][0]["file"].endswith("broken.png")
    assert "broken.png: the file is empty" in done.stderr


def test_strict_stops(cli: Command, digits: Path) -> None:
    (digits / "0" / "broken.png").write_bytes(b"")
    done = cli("eval", "builtin:vit-digits", "--dataset", str(digits), "--strict")
    assert done.rc == 4
    assert "broken.png" in done.stderr
    assert "Traceback" not in done.stderr


def test_compare_dense_needs_a_compressed_model(cli: Command) -> None:
    done = cli("eval", "--limit", "5", "--compare-dense")
    assert done.rc == 2
    assert "is a dense model" in done.stderr


def test_a_dataset_is_required_for_models_that_are_not_built_in(cli: Command, tmp_path: Path) -> None:
    done = cli("eval", str(tmp_path / "some.safetensors"))
    assert done.rc == 2
    assert "--dataset" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "imagenet"], "Did you mean imagenet-val"),
        (["--dataset", "imagenet-val"], "ILSVRC2012_img_val.tar"),
        (["--dataset", "./nowhere"], "does not exist"),
    ],
)
def test_data_errors_end_with_4(cli: Command, arguments: list[str], message: str) -> None:
    done = cli("eval", *arguments)
    assert done.rc == 4, done.stderr
    assert message in done.stderr
    assert done.stdout == ""


def test_classes_that_do_not_fit_the_head(cli: Command, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (20, 20)).save(tmp_path / name / "1.png")
    done = cli("eval", "--dataset", str(tmp_path))
    assert done.rc == 4
    assert "has 2 classes, but the head of the model has 10" in done.stderr


@pytest.mark.parametrize(("order", "used"), [(None, "natural"), ("text", "text"), ("classes.txt", "classes.txt")])
def test_the_order_of_classes(cli: Command, tmp_path: Path, order: str | None, used: str) -> None:
    from repshift_cli.data.builtin.digits import DigitScenes

    scenes = DigitScenes("test", 60)
    names = ["air", "bus", "cat", "dog", "elk", "fox", "gnu", "hen", "type2", "type10"]
    (tmp_path / "classes.txt").write_text("\n".join(names))
    for index in range(len(scenes)):
        scene_image, label = scenes[index]
        folder = tmp_path / "pair" / names[label]
        folder.mkdir(parents=True, exist_ok=True)
        scene_image.save(folder / f"{index}.png")
    (tmp_path / "pair/air/notes.txt").touch()
    given = ["--class-order", order] if order else []
    done = cli("eval", "builtin:vit-digits-small", "--dataset", "pair", "--workers", "0", "--json", *given)
    assert done.rc == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["class_order"] == used
    assert found["classes"] == (sorted(names) if order == "text" else names)
    assert found["left_out"] == {".txt": 1}
    assert (found["top1"] > 75) == (order != "text")
    assert "1 file with other endings left out (.txt 1)" in done.stderr
    assert ("in the natural order of timm" in done.stderr) == (order is None)


def test_no_better_than_guessing(cli: Command, tmp_path: Path) -> None:
    from repshift_cli.data.builtin.digits import DigitScenes

    scenes = DigitScenes("test", 120)
    for index in range(len(scenes)):
        scene_image, label = scenes[index]
        # each class folder has the digits of another one, in equal shares
        folder = tmp_path / "digits" / f"{(label + index // 12) % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        scene_image.save(folder / f"{index}.png")
    done = cli("eval", "builtin:vit-digits-small", "--dataset", tmp_path / "digits", "--workers", "0")
    assert done.rc == 0, done.stderr
    assert "no better than guessing among 10" in done.stderr


@pytest.mark.parametrize(
    ("device", "rank", "used"),
    [("cuda", None, "cuda"), ("cuda", "1", "cuda:1"), ("cuda:0", "1", "cuda:0"), ("cpu", "1", "cpu")],
)
def test_each_process_has_its_own_gpu(
    device: str, rank: str | None, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert own_device(device) == used
