"""`compress --recover` changes a few weights of the compressed model and says which; the dense model keeps its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from outcome import Command
from safetensors.torch import load_file, save_file
from tiny import images

from repshift_cli.calibration import recover as recovery
from repshift_cli.checkpoints import artifact
from repshift_cli.checkpoints.weights import METADATA_KEY, read_weights
from repshift_cli.errors import CheckpointError

QUICK = ("--seconds", "0", "-b", "4", "--threads", "1")


@pytest.fixture
def keep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every result: random weights have nothing to recover."""
    monkeypatch.setattr(recovery, "CLEAR_SIGMAS", -1e9)
    monkeypatch.setattr(recovery.Deviation, "agreement", None)


@pytest.fixture
def files(cli: Command, dense: Path, recipe: Path, photos: Path, keep: None) -> tuple[Path, Path, str]:
    """A compressed checkpoint without and with recovery, and what the second command printed."""
    cli("compress", dense, "-r", recipe, "--calibration", photos, "-o", "plain.safetensors", *QUICK)
    options = ("--calibration", photos, "--calibration-images", "16", "--recover", "1", *QUICK)
    outcome = cli("compress", dense, "-r", recipe, "-o", "small.safetensors", *options)
    assert outcome.rc == 0, outcome.stderr
    return Path("plain.safetensors").absolute(), Path("small.safetensors").absolute(), outcome.stdout


def test_the_file(files: tuple[Path, Path, str], dense: Path) -> None:
    plain, small, shown = files
    assert "Recovery: 1 passes, 16 unlabelled images" in shown
    assert "dense weights and 37 tensors changed" in shown
    document = read_weights(small).document
    assert document is not None
    assert document["format_version"] == 8
    assert document["recovered"].keys() >= {"images", "passes", "tensors", "before", "after", "values"}
    assert document["recovered"]["images"] == 16
    before, after = load_file(dense), load_file(small)  # other tools open it as the dense model
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    first, second = artifact.load(plain), artifact.load(small)
    with torch.no_grad():
        assert not torch.allclose(first(images()), second(images()))
        with first.dense(), second.dense():
            assert torch.equal(first(images()), second(images()))


def test_inspect_diff_and_dense(files: tuple[Path, Path, str], cli: Command, dense: Path) -> None:
    plain, small, _ = files
    names = json.loads(cli("inspect", small, "--json").stdout)["provenance"]["recovered"]
    assert "values" not in names
    assert "weights  37 tensors (norms, biases, last layer) changed by --recover" in cli("inspect", small).stdout
    differ = json.loads(cli("diff", plain, small, "--json").stdout)
    assert set(differ["weights_differ"]) == set(names["tensors"]) > {"head.weight"}
    assert not json.loads(cli("diff", small, small, "--json").stdout)["weights_differ"]
    assert cli("dense", small, "-o", "again.safetensors").rc == 0
    assert not json.loads(cli("diff", dense, "again.safetensors", "--json").stdout)["weights_differ"]


def test_the_folder_for_timm(files: tuple[Path, Path, str], cli: Command) -> None:
    """The export is compared with the recovered model, and timm reads the dense one."""
    _, small, _ = files
    outcome = cli("export", small, "--to", "hub", "-o", "hub")
    assert outcome.rc == 0, outcome.stderr
    assert "have other values" in Path("hub/README.md").read_text()
    with torch.no_grad():
        assert torch.equal(artifact.load(Path("hub"))(images()), artifact.load(small)(images()))


def test_a_dense_export(files: tuple[Path, Path, str], cli: Command) -> None:
    """It is compared with the dense model; a trace must not take its constants from the recovered weights."""
    outcome = cli("export", files[1], "--to", "pt2", "--dense", "-o", "dense.pt2")
    assert outcome.rc == 0, outcome.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": "AAAA"}, "should be float32"),
        ({"values": ""}, "finite numbers"),
        ({"values": "!"}, "base64"),
        ({"tensors": ["head.weight", "nothing"]}, "no parameter nothing"),
        ({"tensors": []}, "tensors"),
        ({"passes": 0}, "passes"),
    ],
)
def test_damage(change: dict[str, Any], message: str, files: tuple[Path, Path, str], tmp_path: Path) -> None:
    document = read_weights(files[1]).document
    assert document is not None
    document["recovered"] |= change
    metadata = {METADATA_KEY: json.dumps(document)}
    save_file(load_file(files[1]), tmp_path / "bad.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match=message):
        artifact.load(tmp_path / "bad.safetensors")


def test_a_result_that_is_not_kept(
    cli: Command, dense: Path, recipe: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "CLEAR_SIGMAS", 1e9)
    arguments = ("-r", recipe, "--calibration", photos, "--recover", "1", "-o", "small.safetensors", *QUICK)
    outcome = cli("compress", dense, *arguments, "--json")
    assert outcome.rc == 0, outcome.stderr
    assert "not clearly better" in outcome.stderr
    assert not json.loads(outcome.stdout)["recovery"]["kept"]
    document = read_weights(Path("small.safetensors")).document
    assert document is not None
    assert "recovered" not in document
    assert document["format_version"] < 8


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--dtype", "bfloat16"), "needs float32"), ((), "no images of the model's own kind")],
)
def test_refused(options: tuple[str, ...], message: str, cli: Command, dense: Path, recipe: Path) -> None:
    outcome = cli("compress", dense, "-r", recipe, "--recover", "3", *options, *QUICK)
    assert outcome.rc == 2
    assert message in outcome.stderr
