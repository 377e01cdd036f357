"""`repshift eval --embeddings`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from outcome import Command, explained
from PIL import Image
from tiny import make_recipe, save_weights, tiny_vit

from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.errors import DataError
from repshift_cli.evaluation.embeddings import check_origin, origin_of

QUIET = ("--workers", "0", "--threads", "1", "-b", "16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder without a head, compressed, with 30 images in nested folders."""
    root = tmp_path_factory.mktemp("encoder")
    random = np.random.default_rng(0)
    for index in range(30):
        image = Image.fromarray(random.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((40, 40))
        path = root / "photos" / f"{index % 3}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    model = tiny_vit(embed_dim=64, num_classes=0)
    save_weights(model, root / "dense.safetensors")
    (root / "r.yaml").write_text(make_recipe(metric="{kind: token_norm}").text)
    return root


@pytest.fixture
def fast(folder: Path, cli: Command) -> Path:
    path = folder / "fast.safetensors"
    if not path.exists():
        options = ("--heads", "2", "--recipe", folder / "r.yaml", "--seconds", "0", "--data", folder / "photos")
        done = cli("compress", folder / "dense.safetensors", "-o", path, *options, "--no-calibrate", "--threads", "1")
        assert done.rc == 0, done.stderr
    return path


def test_cosine_and_recall_are_those_of_the_embeddings(fast: Path, folder: Path, cli: Command, tmp_path: Path) -> None:
    save = ("--save-embeddings", "e.npy", "--compare-dense", "--recall-at", "1,5", "--json")
    done = cli("eval", fast, "--embeddings", folder / "photos", *save, *QUIET)
    assert done.rc == 0, done.stderr
    document = json.loads(done.stdout)
    given, dense = (torch.from_numpy(np.load(tmp_path / name)) for name in ("e.npy", "e_dense.npy"))
    given, dense = torch.nn.functional.normalize(given), torch.nn.functional.normalize(dense)
    assert given.shape == (30, 64)
    assert document["compressed"]["cosine"]["mean"] == pytest.approx(float((given * dense).sum(-1).mean()), abs=1e-5)
    correct = 0
    for row in range(30):
        others = [other for other in range(30) if other != row]
        truth = sorted(others, key=lambda other, row=row: -float(dense[row] @ dense[other]))[:5]
        found = sorted(others, key=lambda other, row=row: -float(given[row] @ dense[other]))[:5]
        correct += len(set(truth) & set(found))
    one, five = document["compressed"]["recall"]
    assert (one["k"], five["k"]) == (1, 5)
    assert five["share"] == pytest.approx(correct / 150, abs=1e-6)
    assert 0 < five["share"] < 1
    assert document["index"] == {"name": str(folder / "photos"), "entries": 30, "own_left_out": True}
    assert document["random"]["cosine"] != document["compressed"]["cosine"]
    assert document["saved"] == ["e.npy", "e_dense.npy"]


def test_random_dropping_is_that_of_a_random_plan(fast: Path, folder: Path) -> None:
    from repshift_cli.checkpoints.artifact import open_model
    from repshift_cli.planning.recipe import ComponentSpec
    from repshift_cli.reduction.compressed_model import attach

    del folder
    compressed = open_model(fast).compressed
    assert compressed is not None
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    usual = compressed(images)
    with compressed.at_random(3):
        found = compressed(images)
    assert compressed(images).equal(usual)
    plan = compressed.plan.with_metric(ComponentSpec.model_validate({"kind": "random", "seed": 3}))
    assert attach(compressed.detach(), plan)(images).equal(found)
    assert not found.equal(usual)


def test_the_table(fast: Path, folder: Path, cli: Command) -> None:
    done = cli("eval", fast, "--embeddings", folder / "photos", *QUIET)
    assert done.rc == 0, done.stderr
    for words in ("30 dense embeddings of", "own entry is left out", "recall@10", "at random"):
        assert words in " ".join(done.stdout.split())
    assert all(len(line.rstrip()) <= 80 for line in done.stdout.splitlines() if "/" not in line)
    row = next(line for line in done.stdout.splitlines() if line.startswith("at random"))
    assert len(row.split()) == 10  # on one line


def test_an_index_of_other_images_or_of_a_file(fast: Path, folder: Path, cli: Command, tmp_path: Path) -> None:
    """Queries of a part of the index leave out their own entries, by file."""
    options = ("--embeddings", folder / "photos" / "0", "--recall-at", "5", "--json", *QUIET)
    document = json.loads(cli("eval", fast, *options, "--index", folder / "photos").stdout)
    assert document["index"]["entries"] == 30
    assert document["index"]["own_left_out"]
    limited = ("--embeddings", folder / "photos", "--limit", "7", "--json", *QUIET)
    document = json.loads(cli("eval", fast, *limited, "--index", folder / "photos").stdout)
    assert (document["images"], document["index"]["entries"]) == (7, 30)
    assert document["index"]["own_left_out"]
    dense = ("eval", folder / "dense.safetensors", "--heads", "2", "--save-embeddings", tmp_path / "i.npy", *QUIET)
    saved = cli(*dense, "--embeddings", folder / "photos", "--json")
    assert saved.rc == 0, saved.stderr
    assert json.loads(saved.stdout)["compressed"] is None
    outcome = cli("eval", fast, "--embeddings", folder / "photos", "--index", "i.npy", "--json", *QUIET)
    same = cli("eval", fast, "--embeddings", folder / "photos", "--json", *QUIET)
    one, other = json.loads(outcome.stdout), json.loads(same.stdout)
    assert one["index"]["own_left_out"]
    assert one["compressed"] == other["compressed"]
    beside = tmp_path / "i.npy.json"
    stated = json.loads(beside.read_text())
    assert stated["model"] == "dense"
    assert stated["preprocessing"]["input_size"] == [3, 32, 32]
    for wrong, words in (
        (stated | {"weights_sha256": "0" * 64}, "i.npy are of a model with other weights"),
        (stated | {"model": "compressed"}, "i.npy are of a compressed model"),
        (stated | {"preprocessing": {}}, "i.npy are of another preprocessing"),
    ):
        beside.write_text(json.dumps(wrong))
        with pytest.raises(DataError, match=words):
            check_origin(tmp_path / "i.npy", origin_of(load_checkpoint(fast)))
    beside.unlink()
    note = check_origin(tmp_path / "i.npy", origin_of(load_checkpoint(fast)))
    assert note is not None
    assert "only the width" in note


def test_parquet_has_the_names(fast: Path, folder: Path, cli: Command, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    done = cli("eval", fast, "--embeddings", folder / "photos", "--save-embeddings", "e.parquet", *QUIET)
    assert done.rc == 0, done.stderr
    table = parquet.read_table(tmp_path / "e.parquet").to_pydict()
    assert table["file"][0] == "0/0.png"
    assert len(table["embedding"][0]) == 64
    stated = json.loads(parquet.read_schema(tmp_path / "e.parquet").metadata[b"repshift"])
    assert stated["model"] == "compressed"


def test_files_are_kept_without_force(fast: Path, folder: Path, cli: Command, tmp_path: Path) -> None:
    (tmp_path / "e.npy").write_text("kept")
    outcome = cli("eval", fast, "--embeddings", folder / "photos", "--save-embeddings", "e.npy", *QUIET)
    explained(outcome, 2, "e.npy already exists", "--force")
    assert (tmp_path / "e.npy").read_text() == "kept"


def test_identical_images_are_counted(fast: Path, folder: Path, cli: Command, tmp_path: Path) -> None:
    shutil.copytree(folder / "photos", tmp_path / "twice")
    shutil.copy(tmp_path / "twice" / "0" / "0.png", tmp_path / "twice" / "copy.png")
    (tmp_path / "twice" / "a.png").symlink_to("nowhere.png")
    done = cli("eval", fast, "--embeddings", "twice", "--json", *QUIET)
    assert json.loads(done.stdout)["identical_files"] == 2
    assert "2 of 32 files are identical to another one: recall@1 is ambiguous" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("options", "rc", "words"),
    [
        (["--embeddings", "PHOTOS", "--recall-at", "16"], 4, ["needs an index of at least 32 images", "has 30"]),
        (["--embeddings", "PHOTOS", "--recall-at", "0"], 2, ["invalid --recall-at '0'", "--recall-at 1,10"]),
        (["--embeddings", "PHOTOS", "--index", "wide.npy"], 4, ["width 8, the model of width 64"]),
        (["--embeddings", "PHOTOS", "--index", "no.npy"], 4, ["no.npy is not a .npy file of embeddings"]),
        (["--embeddings", "PHOTOS", "--index", "whole.npy"], 4, ["is not a matrix of floating-point numbers"]),
        (["--embeddings", "PHOTOS", "--dataset", "PHOTOS"], 2, ["--dataset is not used with --embeddings"]),
        (["--embeddings", "PHOTOS", "--vocab", "v.txt"], 2, ["--vocab is not used"]),
        (["--embeddings", "PHOTOS", "--save-embeddings", "e.txt"], 2, ["unknown suffix", ".npy and .parquet"]),
        (["--dataset", "PHOTOS", "--recall-at", "1"], 2, ["--recall-at needs --embeddings"]),
        (["--embeddings", "nowhere/here"], 4, ["nowhere/here"]),
    ],
)
def test_a_wrong_option_is_one_error(  # noqa: PLR0917
    options: list[str], rc: int, words: list[str], fast: Path, folder: Path, cli: Command, tmp_path: Path
) -> None:
    np.save(tmp_path / "wide.npy", np.zeros((40, 8), dtype=np.float32))
    np.save(tmp_path / "whole.npy", np.zeros(4, dtype=np.int64))
    given = [str(folder / "photos") if each == "PHOTOS" else each for each in options]
    explained(cli("eval", fast, *given, *QUIET), rc, *words)


def test_a_model_with_classes_or_without_a_plan_is_refused(folder: Path, cli: Command) -> None:
    photos = ("--embeddings", folder / "photos", *QUIET)
    explained(cli("eval", "builtin:vit-digits-small", *photos), 2, "head of 10 classes", "num_classes=0")
    dense = cli("eval", folder / "dense.safetensors", "--heads", "2", *photos)
    explained(dense, 2, "is a dense model", "--save-embeddings")
