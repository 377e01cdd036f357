"""`repshift` on the video classifiers of transformers: labelled videos, calibration on videos, errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from _shape_videos import write_clip
from outcome import Command, explained
from PIL import Image
from tiny_clips import BUILD, CLASSES, FRAMES, PROCESSORS, SIDE, save_model, write_videos

import repshift_cli
from repshift_cli.checkpoints.artifact import open_model
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.data.catalog import open_dataset
from repshift_cli.data.inputs import load_inputs
from repshift_cli.data.loader import cut_batches, image_loader
from repshift_cli.data.video.decode import frame_indices, read_clip
from repshift_cli.errors import CheckpointError, DataError, UsageError
from repshift_cli.evaluation.classification.evaluate import evaluate
from repshift_cli.evaluation.classification.predictions import load_predictions
from repshift_cli.planning.recipe import Recipe
from repshift_cli.utils.progress import Silent

RECIPE = "version: 1\nmetric: {kind: token_norm}\nlayers: [{layer: 0, drop_ratio: 0.25}, {layer: 1, keep_tokens: 3}]\n"
MAE, VIVIT = BUILD
PER_CLASS = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of both models, dense and compressed (`-fast`)."""
    root = tmp_path_factory.mktemp("models")
    for name in BUILD:
        save_model(name, root / name)
        repshift_cli.compress(root / name, Recipe.parse(RECIPE)).save(root / f"{name}-fast")
    return root


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_videos(tmp_path_factory.mktemp("videos") / "set", PER_CLASS)


@pytest.fixture
def changed(videos: Path, tmp_path: Path) -> Path:
    """The videos with one that is empty and one that is too short."""
    folder = Path(shutil.copytree(videos, tmp_path / "set"))
    (folder / "ant" / "1.mp4").write_bytes(b"")
    write_clip(np.full((2, SIDE, SIDE, 3), 90, np.uint8), folder / "bee" / "2.mp4")
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name in CLASSES:
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for index in range(2):
            Image.new("RGB", (20 + index, 20), (40 * index,) * 3).save(tmp_path / "pictures" / name / f"{index}.png")
    return tmp_path / "pictures"


def by_the_library(name: str, videos: Path) -> tuple[torch.Tensor, list[int]]:
    """Clips of all videos by the processor of the library, and the labels."""
    kind, values = PROCESSORS[name]
    processor = getattr(hf, kind)(**values)
    paths = sorted(videos.glob("*/*.mp4"))
    clips = [processor(read_clip(path, FRAMES).frames, return_tensors="pt")["pixel_values"][0] for path in paths]
    inputs = torch.stack([torch.as_tensor(clip) for clip in clips])
    return inputs, [CLASSES.index(path.parent.name) for path in paths]


@pytest.mark.parametrize("name", BUILD)
class TestClassification:
    def test_clips_are_those_of_the_processor(self, name: str, models: Path, videos: Path) -> None:
        preprocessing = load_checkpoint(models / name).description.preprocessing
        data = open_dataset(str(videos), None, unit="clip")
        assert (data.unit, data.classes, len(data)) == ("videos", CLASSES, 3 * PER_CLASS)
        loader = image_loader(data, preprocessing, cut_batches(12, 5), workers=0, pinned=False, warn=print)
        batches = list(loader)
        inputs, labels = by_the_library(name, videos)
        found = torch.cat([batch.pixels for batch in batches if batch.pixels is not None])
        assert found.shape == (12, FRAMES, 3, SIDE, SIDE)
        torch.testing.assert_close(found, inputs, atol=1e-5, rtol=1e-5)
        assert [int(answer) for batch in batches for answer in batch.answers[:, 0]] == labels

    def test_counts_are_those_of_the_library(
        self, name: str, models: Path, videos: Path, cli: Command, tmp_path: Path
    ) -> None:
        done = cli(
            *("eval", models / f"{name}-fast", "--dataset", videos, "--compare-dense", "--json", "--workers", 0),
            *("--save-predictions", tmp_path / "p.npz", "--batch-size", 5),
        )
        assert done.rc == 0, done.stderr
        found = json.loads(done.stdout)
        inputs, labels = by_the_library(name, videos)
        model: Any = getattr(hf, name).from_pretrained(models / name).eval()
        fast: Any = repshift_cli.load(models / f"{name}-fast")
        with torch.no_grad():
            dense, reduced = model(inputs).logits.argmax(1), fast(inputs).argmax(1)
        assert found["images"] == found["of"] == 12
        assert found["dense"]["top1_correct"] == int((dense == torch.tensor(labels)).sum())
        assert found["top1_correct"] == int((reduced == torch.tensor(labels)).sum())
        assert len(dense.unique()) > 1 and not torch.equal(dense, reduced)
        assert found["agreement"] == pytest.approx(float((dense == reduced).float().mean()))
        assert load_predictions(tmp_path / "p_dense.npz").top[:, 0].tolist() == dense.tolist()
        saved = load_predictions(tmp_path / "p.npz")
        assert (saved.top[:, 0].tolist(), saved.answers[:, 0].tolist()) == (reduced.tolist(), labels)
        assert saved.ids[0] == "ant/0.mp4"
        assert found["padded"] == 0

    def test_tokens_of_every_layer_follow_the_plan(self, name: str, models: Path, videos: Path) -> None:
        opened = open_model(models / f"{name}-fast")
        assert opened.compressed is not None
        prefix = int(name == VIVIT)
        assert [site.tokens_out - prefix for site in opened.compressed.plan.sites] == [6, 3]
        tower: Any = getattr(opened.loaded.model, "inner")  # noqa: B009
        blocks = tower.videomae.encoder.layer if name == MAE else tower.vivit.layers
        seen: list[int] = []
        for block in blocks:
            block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
        clips = load_inputs(videos, 2, opened.loaded.description.preprocessing, 0).tensor
        with torch.no_grad():
            opened.module(clips)
        assert seen == [8 + prefix, 6 + prefix, 3 + prefix]


def test_compress_and_evaluate_by_commands(models: Path, videos: Path, cli: Command, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.replace("token_norm", "representation_shift"))
    given = ("--recipe", tmp_path / "r.yaml", "--calibration", videos, "--frame-step", 2, "-o", tmp_path / "fast")
    done = cli("compress", models / MAE, *given, "--seconds", 0.1, "--force", "--json")
    assert done.rc == 0, done.stderr
    assert json.loads(done.stdout)["calibration"]["images"] == 10
    done = cli("eval", tmp_path / "fast", "--dataset", videos, "--compare-dense", "--workers", 1)
    assert done.rc == 0, done.stderr
    assert f"{videos}, 12 videos" in done.stdout.replace("\n", "")
    assert "videos/s" in done.stdout
    assert f"preprocessing: {FRAMES} frames (2 apart) of {SIDE}x{SIDE}x3" in done.stdout
    assert all(len(line.rstrip()) <= 80 for line in done.stdout.splitlines())
    other = cli("eval", tmp_path / "fast", "--dataset", videos, "--frame-step", 3)
    explained(other, 2, "--frame-step:", "was compressed for another preprocessing")


def test_broken_and_short_videos(models: Path, changed: Path, cli: Command) -> None:
    done = cli("eval", models / MAE, "--dataset", changed, "--json", "--workers", 0)
    assert done.rc == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["images"], found["of"], found["skipped"], found["padded"]) == (11, 12, 1, 1)
    assert Path(found["skipped_files"][0]["file"]).relative_to(changed).as_posix() == "ant/1.mp4"
    assert Path(found["padded_files"][0]).relative_to(changed).as_posix() == "bee/2.mp4"
    assert "1 videos could not be read" in done.stderr
    assert "1.mp4: the file is empty" in done.stderr
    assert "shorter than a clip" in done.stderr
    assert "spread over its whole video" in " ".join(done.stderr.split())
    stopped = cli("eval", models / MAE, "--dataset", changed, "--strict", "--workers", 0)
    assert stopped.rc == 4
    assert "1.mp4 cannot be read: the file is empty" in stopped.stderr


def test_a_run_continues(models: Path, changed: Path, tmp_path: Path) -> None:
    opened = open_model(models / MAE)

    def run(resume: Path | None) -> Any:
        return evaluate(
            {"dense": opened.module},
            open_dataset(str(changed), None, unit="clip"),
            opened.loaded.description.preprocessing,
            batch_size=5,
            device="cpu",
            dtype=torch.float32,
            workers=0,
            strict=False,
            num_classes=3,
            progress=Silent(),
            resume=resume,
        )

    whole, first = run(None), run(tmp_path / "state")
    (tmp_path / "state" / "000001.json").unlink()
    again = run(tmp_path / "state")
    assert (first.fresh, again.fresh) == (11, 5)
    for each in (first, again):
        assert each.scores["dense"].top1_correct == whole.scores["dense"].top1_correct
        assert (each.skipped, each.padded, each.unit) == (whole.skipped, whole.padded, "videos")
    write_clip(np.full((8, SIDE, SIDE, 3), 90, np.uint8), changed / "bee" / "2.mp4")
    with pytest.raises(UsageError, match="differs in data"):
        run(tmp_path / "state")


def test_labels_of_a_search(models: Path, videos: Path) -> None:
    preprocessing = load_checkpoint(models / VIVIT).description.preprocessing
    plain = load_inputs(videos, 8, preprocessing, 1)
    found = load_inputs(videos, 8, preprocessing, 1, num_classes=3)
    assert plain.labels is None
    assert found.labels is not None
    assert [CLASSES[label] for label in found.labels] == [Path(name).parent.name for name in found.names]
    assert torch.equal(found.tensor, plain.tensor)
    assert found.identity == plain.identity
    other = load_inputs(videos, 8, preprocessing, 1, num_classes=4)
    assert other.unlabelled is not None
    assert "has 3 classes, the head of the model 4" in other.unlabelled


def test_folders_of_frames_are_videos(models: Path, tmp_path: Path) -> None:
    for name in CLASSES[:2]:
        (tmp_path / name / "one").mkdir(parents=True)
        for index in range(11):
            Image.new("RGB", (SIDE, SIDE), (20 * index,) * 3).save(tmp_path / name / "one" / f"{index}.png")
    (tmp_path / "ant" / "notes.txt").touch()
    data = open_dataset(str(tmp_path), None, unit="clip")
    assert [data.key(index) for index in range(len(data))] == ["ant/one", "bee/one"]
    assert data.info.left_out == {".txt": 1}
    assert any("2 folders of images" in note for note in data.info.notes)
    before = data.stamp(0)
    (tmp_path / "ant" / "one" / "3.png").unlink()
    assert data.stamp(0) != before
    for index in range(5):
        Image.new("RGB", (SIDE + 2, SIDE)).save(tmp_path / "ant" / "one" / f"{index}.png")
    preprocessing = load_checkpoint(models / MAE).description.preprocessing
    (batch,) = image_loader(data, preprocessing, {0: [0, 1]}, workers=0, pinned=False, warn=print)
    assert [index for index, _ in batch.broken] == [0]
    assert "different sizes" in batch.broken[0][1]


@pytest.mark.parametrize(
    ("available", "frames", "step", "wanted"),
    [
        (9, 4, 1, [2, 3, 4, 5]),
        (9, 4, 2, [1, 3, 5, 7]),
        (7, 4, 2, [0, 2, 4, 6]),
        (6, 4, 2, [0, 1, 3, 4]),
        (3, 4, 2, [0, 1, 2, 2]),
    ],
)
def test_frames_with_a_step(available: int, frames: int, step: int, wanted: list[int]) -> None:
    assert frame_indices(available, frames, step) == wanted


class TestRefused:
    @pytest.mark.parametrize("command", ["eval", "compress"])
    def test_images_for_a_video_model(self, models: Path, pictures: Path, command: str, cli: Command) -> None:
        if command == "eval":
            done = cli("eval", models / MAE, "--dataset", pictures)
            explained(done, 4, "there are no videos in the 3 class folders of", "but 6 images; the model takes clips")
        else:
            (pictures.parent / "r.yaml").write_text(RECIPE)
            done = cli("compress", models / MAE, "--recipe", "r.yaml", "--calibration", pictures)
            explained(done, 4, "none of the 3 videos in", "they are not the frames of one video")
        assert "mp4" in done.stderr or command == "compress"

    def test_videos_for_an_image_model(self, videos: Path, cli: Command) -> None:
        done = cli("eval", "builtin:vit-digits-small", "--dataset", videos)
        explained(done, 4, "there are no images in the 3 class folders of", "but 12 videos; the model takes images")
        Path("r.yaml").write_text(RECIPE.replace("token_norm", "representation_shift"))
        done = cli("compress", "builtin:vit-digits-small", "--calibration", videos, "--recipe", "r.yaml")
        explained(done, 4, "but 12 videos; the model takes images")

    @pytest.mark.parametrize(
        ("rc", "arguments", "message"),
        [
            (4, ["--dataset", "imagenet-val"], "the model takes clips, but imagenet-val is a dataset of images"),
            (4, ["--dataset", "torch/cifar10"], "the model takes clips, but torch/cifar10 is a dataset of images"),
            (4, ["--dataset", "./nowhere"], "does not exist"),
            (2, ["--dataset", "msrvtt"], "takes labelled videos, but msrvtt is a dataset of videos with texts"),
            (2, ["--annotations", "a.json", "--dataset", "."], "--annotations is not used by"),
            (2, ["--dataset", ".", "--frames", "8"], "clips of 4 frames"),
        ],
    )
    def test_other_datasets(self, models: Path, rc: int, arguments: list[str], message: str, cli: Command) -> None:
        explained(cli("eval", models / MAE, *arguments), rc, message)

    def test_a_step_for_an_image_model(self, cli: Command) -> None:
        explained(cli("eval", "--frame-step", 2), 2, "takes single images, not clips", "--frame-step")

    def test_bench_from_files(self, models: Path, videos: Path, cli: Command) -> None:
        explained(cli("bench", models / f"{MAE}-fast", "--data", videos), 2, "--data is for images")

    def test_no_readable_video(self, models: Path, tmp_path: Path, cli: Command) -> None:
        for name in CLASSES:
            (tmp_path / "set" / name).mkdir(parents=True)
            (tmp_path / "set" / name / "1.mp4").write_bytes(b"no video" * 40)
        done = cli("eval", models / VIVIT, "--dataset", tmp_path / "set", "--workers", 0)
        assert done.rc == 4
        assert f"none of the 3 videos of {tmp_path / 'set'} can be read" in " ".join(done.stderr.split())

    def test_classes_that_do_not_fit_the_head(self, models: Path, videos: Path, tmp_path: Path, cli: Command) -> None:
        folder = Path(shutil.copytree(videos, tmp_path / "set"))
        (folder / "dog").mkdir()
        done = cli("eval", models / MAE, "--dataset", folder)
        assert done.rc == 4
        assert "has 4 classes, but the head of the model has 3" in done.stderr

    def test_images_in_memory(self, models: Path) -> None:
        opened = open_model(models / MAE)
        form = {"batch_size": 1, "device": "cpu", "dtype": torch.float32, "workers": 0, "strict": False}
        with pytest.raises(DataError, match="the model takes clips, but builtin:digits holds images"):
            evaluate(
                {"dense": opened.module},
                open_dataset("builtin:digits", None, 2),
                opened.loaded.description.preprocessing,
                num_classes=10,
                progress=Silent(),
                **form,
            )


@pytest.mark.parametrize(
    ("name", "values", "error"),
    [
        (MAE, {"image_mean": None}, "preprocessor_config.json"),
        (VIVIT, {"image_mean": "imagenet"}, "imagenet"),
        (MAE, {"image_mean": [0.5]}, "mean and std should have 3 values"),
        (MAE, {"size": {}}, "preprocessor_config.json"),
        (
            VIVIT,
            {"size": {"shortest_edge": 16}, "crop_size": {"height": 20, "width": 20}},
            "of 20x20, but .* takes 16x16",
        ),
        (MAE, {"size": None}, "size {}"),
        (VIVIT, {"video_processor_type": "VivitVideoProcessor", "do_sample_frames": True, "fps": 2}, "fps is not"),
    ],
)
def test_processors_that_are_refused(name: str, values: dict[str, Any], error: str, tmp_path: Path) -> None:
    if "fps" in values:
        values = {**values, "image_processor_type": None}
    with pytest.raises(CheckpointError, match=error):
        load_checkpoint(save_model(name, tmp_path / "m", **values))
