"""`repshift` on the Audio Spectrogram Transformer of transformers: folders, spectrograms in files, errors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from outcome import Command, explained
from tiny_transformers import tiny_transformer

import repshift_cli
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.data.inputs import load_inputs
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.data.spectrogram import UnreadableSpectrogram, read_spectrogram
from repshift_cli.errors import CheckpointError, DataError

NAME, SHAPE = "ASTForAudioClassification", (40, 16)
RECIPE = "version: 1\nmetric: {kind: token_norm}\nlayers: [{layer: 0, drop_ratio: 0.25}, {layer: 1, keep_tokens: 5}]\n"
OPEN = "version: 1\nmetric: {kind: fitted}\nlayers: [{layer: 1, drop_ratio: 0.5}]\n"
QUICK = ("--seconds", "0", "-b", "2", "--threads", "1")


def save_model(folder: Path) -> Path:
    tiny_transformer(NAME).save_pretrained(folder)
    hf.ASTFeatureExtractor(max_length=SHAPE[0], num_mel_bins=SHAPE[1]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense folder, and beside it a compressed one."""
    folder = save_model(tmp_path_factory.mktemp("models") / "ast")
    repshift_cli.compress(folder, repshift_cli.Recipe.parse(RECIPE)).save(folder.parent / "fast")
    return folder


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders with spectrograms: as many classes as the head has."""
    root, random = tmp_path_factory.mktemp("sounds"), np.random.default_rng(0)
    for index in range(42):
        path = root / f"class{index % 7}" / f"{index}.npy"
        path.parent.mkdir(exist_ok=True)
        np.save(path, random.normal(size=SHAPE).astype(np.float64 if index % 2 else np.float32))
    return root


@pytest.fixture(autouse=True)
def recipes(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "open.yaml").write_text(OPEN)


def test_a_folder_is_compressed(model: Path, tmp_path: Path, cli: Command) -> None:
    done = cli("inspect", model)
    assert done.rc == 0, done.stderr
    for text in ("spectrogram of 40 x 16 (time, frequency)", "GMACs per spectrogram", "18 patches"):
        assert text in done.stdout
    assert "assumed" not in done.stderr
    done = cli("compress", model, "--recipe", "r.yaml", "-o", "out", *QUICK)
    assert done.rc == 0, done.stderr
    assert "give spectrograms of the model's own kind with --data" in " ".join(done.stdout.split())
    name = "preprocessor_config.json"
    assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
    inputs = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    dense, again = (hf.ASTForAudioClassification.from_pretrained(folder).eval() for folder in (model, tmp_path / "out"))
    reduced = repshift_cli.compress(model, repshift_cli.Recipe.parse(RECIPE))
    with torch.no_grad():
        assert torch.equal(again(inputs).logits, dense(inputs).logits)
        wanted = reduced(inputs)
        with reduced.dense():
            assert torch.equal(reduced(inputs), dense(inputs).logits)
        assert torch.equal(repshift_cli.load(tmp_path / "out")(inputs), wanted)
    document = json.loads(cli("inspect", "out", "--json").stdout)
    assert document["preprocessing"]["spectrogram"] is True
    assert [row["tokens_out"] - 2 for row in document["plan"]] == [14, 5]
    bench = json.loads(cli("bench", "out", "--min-runs", "1", *QUICK, "--json").stdout)
    assert [run["name"] for run in bench["runs"]] == ["dense", "compressed"]


def test_calibration_and_accuracy_on_files(model: Path, sounds: Path, cli: Command) -> None:
    arguments = ("--calibration", sounds, "--calibration-images", "32", "--force")
    done = cli("compress", model, "--recipe", "open.yaml", *arguments, "-o", "out", *QUICK, "--json")
    assert done.rc == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["calibration"]["images"], document["images"]["where"]) == (32, str(sounds))
    assert document["agreement"] is not None
    done = cli("eval", "out", "--dataset", sounds, "--compare-dense", "--workers", "0", "--json")
    assert done.rc == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["images"], document["outputs"], document["skipped"]) == (42, 7, 0)
    loaded, paths = load_checkpoint(model), sorted(sounds.glob("*/*.npy"))
    inputs = torch.stack([torch.from_numpy(np.load(path)).float() for path in paths])
    found = loaded.model(inputs).argmax(dim=-1) == torch.tensor([int(path.parent.name[-1]) for path in paths])
    assert document["dense"]["top1"] == pytest.approx(100 * float(found.float().mean()))


@pytest.mark.slow
def test_a_new_process_computes_the_same(model: Path, tmp_path: Path) -> None:
    inputs = torch.randn(3, *SHAPE)
    with torch.no_grad():
        wanted = repshift_cli.compress(model, repshift_cli.Recipe.parse(RECIPE))(inputs)
    torch.save((inputs, wanted), tmp_path / "wanted.pt")
    code = (
        "import sys, torch, repshift_cli; torch.set_num_threads(1); x, wanted = torch.load('wanted.pt')\n"
        "with torch.no_grad(): assert torch.equal(repshift_cli.load(sys.argv[1])(x), wanted)"
    )
    subprocess.run([sys.executable, "-c", code, model.parent / "fast"], check=True, cwd=tmp_path)


@pytest.mark.slow
def test_onnx(model: Path, cli: Command) -> None:
    done = cli("export", model.parent / "fast", "--to", "onnx", "-o", "out.onnx", "--json")
    assert done.rc == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["ports"]["input"] == {"name": "spectrograms", "shape": [None, *SHAPE], "dtype": "float32"}
    assert document["verified"]["passed"] is True
    assert cli("bench", "out.onnx", "--min-runs", "1", *QUICK).rc == 0


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    good = np.zeros(SHAPE, np.float32)
    np.save(tmp_path / "half.npy", good.astype(np.float16))
    np.save(tmp_path / "fortran.npy", np.asfortranarray(good + np.arange(16, dtype=np.float32)))
    assert read_spectrogram(tmp_path / "half.npy", SHAPE).dtype == torch.float32
    assert read_spectrogram(tmp_path / "fortran.npy", SHAPE)[3].tolist() == list(range(16))
    arrays = {
        r"its shape is \[16, 40\], and the model takes \[40, 16\]": good.T,
        "its values are int16, not floating point": good.astype(np.int16),
        "some of its values are not finite": np.full(SHAPE, np.nan),
        "not finite": np.full(SHAPE, 1e300),
        "allow_pickle": np.array([print], dtype=object),
    }
    for reason, array in arrays.items():
        np.save(tmp_path / "bad.npy", array)
        with pytest.raises(UnreadableSpectrogram, match=f"the spectrogram .*bad.npy cannot be read: .*{reason}"):
            read_spectrogram(tmp_path / "bad.npy", SHAPE)
    np.save(tmp_path / "bad.npy", good)
    content = (tmp_path / "bad.npy").read_bytes()
    huge = content.replace(b"(40, 16), }        ", b"(9999999999, 16), }")
    assert huge != content
    for damaged in (b"", b"x" * 300, content[:-1], content[:40], huge):
        (tmp_path / "bad.npy").write_bytes(damaged)
        with pytest.raises(UnreadableSpectrogram):
            read_spectrogram(tmp_path / "bad.npy", SHAPE)


def test_other_files_are_skipped_or_refused(model: Path, sounds: Path, tmp_path: Path, cli: Command) -> None:
    preprocessing = load_checkpoint(model).description.preprocessing
    folder = Path(shutil.copytree(sounds, tmp_path / "set"))
    np.save(folder / "class0" / "0.npy", np.zeros((41, 16)))
    batch = load_inputs(folder, 99, preprocessing, 0)
    assert (len(batch.tensor), len(batch.skipped)) == (41, 1)
    assert not torch.equal(*(load_inputs(None, 1, preprocessing, seed).tensor for seed in (0, 1)))
    with pytest.raises(DataError, match=r"there are no images in .*, but 42 spectrograms; the model takes images"):
        load_inputs(folder, 4, Preprocessing((3, 32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0), 0)
    (tmp_path / "empty").mkdir()
    done = cli("compress", model, "--recipe", "open.yaml", "--calibration", "empty")
    explained(done, 4, "there are no spectrograms in empty", "Give a folder with spectrograms (npy)")


def test_what_is_refused(model: Path, cli: Command) -> None:
    fast, words = model.parent / "fast", "the model takes spectrograms"
    explained(cli("inspect", model, "--mean", "0.5"), 2, f"--mean: {words}")
    explained(cli("inspect", model, "--img-size", "64"), 2, "its position table has that size")
    explained(cli("bench", fast, "--data", "."), 2, f"--data is for images, and {words}")
    explained(cli("bench", fast, "--memory-format", "channels_last"), 2, f"channels_last is for images, and {words}")
    explained(cli("advise", fast), 2, words)
    explained(cli("search", model, "--target", "macs=0.7"), 4, "a search needs spectrograms", "Give a folder of .npy")
    explained(cli("eval", fast, "--dataset", "imagenet-val"), 4, f"{words}, but imagenet-val is a dataset of images")
    explained(cli("visualize", fast, "--data", "."), 3, "spectrograms, whose patches cannot be shown")


def test_an_extractor_of_another_size(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    hf.ASTFeatureExtractor(max_length=48, num_mel_bins=16).save_pretrained(folder)
    with pytest.raises(CheckpointError, match="max_length is 48, but the model takes 40"):
        load_checkpoint(folder)
