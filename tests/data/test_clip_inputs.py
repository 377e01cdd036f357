"""Drawing clips from videos and folders of frames: repeatable, with the names of the clips."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from _shape_videos import write_clip
from PIL import Image

from repshift_cli.data.builtin.moving_shapes import (
    TEST_SEED,
    TRAIN_SEED,
    caption,
    render,
    scene,
    scene_tensor,
)
from repshift_cli.data.inputs import load_inputs
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.data.video.decode import read_clip
from repshift_cli.errors import DataError, UsageError

SMALL = Preprocessing((3, 32, 32), (0.5, 0.4, 0.3), (0.5, 0.6, 0.7), "bicubic", 1.0, "squash", 4)
IMAGES = Preprocessing((3, 32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", 1.0)


def video(path: Path, number: int, frames: int = 6) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_clip(render(scene(number, 5), frames, 48), path)
    return path


def frame_folder(path: Path, number: int, frames: int = 6) -> Path:
    path.mkdir(parents=True)
    for index, frame in enumerate(render(scene(number, 5), frames, 48)):
        Image.fromarray(frame).save(path / f"frame{index}.png")
    return path


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five videos and two folders of frames, at several depths."""
    root = tmp_path_factory.mktemp("clips")
    for number, name in enumerate(["a.mp4", "b.mp4", "deep/c.mp4", "deep/er/d.mp4", "e.MP4"]):
        video(root / name, number)
    frame_folder(root / "frames", 5)
    frame_folder(root / "deep" / "frames", 6, frames=3)
    (root / "notes.txt").write_text("no video")
    return root


@pytest.fixture
def tree(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "tree"))


def same_clip(one: torch.Tensor, batch: torch.Tensor) -> bool:
    return any(torch.equal(one, other) for other in batch)


class TestFolder:
    def test_shape_and_identity(self, original: Path) -> None:
        batch = load_inputs(original, 3, SMALL, seed=0)
        assert batch.tensor.shape == (3, 4, 3, 32, 32)
        assert batch.tensor.dtype == torch.float32
        assert not batch.builtin
        assert batch.skipped == []
        assert {**batch.identity, "sha256": ""} == {"where": str(original), "count": 3, "seed": 0, "sha256": ""}
        assert len(batch.identity["sha256"]) == 64
        assert batch.description == f"3 of 7 videos in {original}, seed 0"

    def test_all_kinds_and_depths_are_found(self, original: Path) -> None:
        batch = load_inputs(str(original), 99, SMALL, seed=0)
        assert len(batch.tensor) == batch.identity["count"] == 7
        transform = SMALL.transform()
        for path in (original / "deep" / "er" / "d.mp4", original / "frames", original / "deep" / "frames"):
            assert same_clip(torch.stack(read_clip(path, 4, convert=transform).frames), batch.tensor)

    def test_frames_of_a_folder_are_evenly_spaced(self, original: Path) -> None:
        batch = load_inputs(original / "frames", 1, SMALL, seed=0)
        drawn = render(scene(5, 5), 6, 48)[[0, 1, 3, 4]]
        assert torch.equal(batch.tensor[0], scene_tensor(drawn, SMALL.transform()))

    def test_the_last_frame_is_repeated_where_there_are_too_few(self, original: Path) -> None:
        clip = load_inputs(original / "deep" / "frames", 1, SMALL, seed=0).tensor[0]
        assert torch.equal(clip[2], clip[3])
        assert not torch.equal(clip[1], clip[2])

    def test_the_same_seed_draws_the_same_clips(self, original: Path) -> None:
        one, other = load_inputs(original, 3, SMALL, seed=4), load_inputs(original, 3, SMALL, seed=4)
        assert torch.equal(one.tensor, other.tensor)
        assert one.identity == other.identity

    def test_a_smaller_count_draws_the_first_clips(self, original: Path) -> None:
        few, more = load_inputs(original, 2, SMALL, seed=1), load_inputs(original, 5, SMALL, seed=1)
        assert torch.equal(more.tensor[:2], few.tensor)

    def test_another_seed_draws_other_clips(self, original: Path) -> None:
        digests = {load_inputs(original, 2, SMALL, seed=seed).identity["sha256"] for seed in range(4)}
        assert len(digests) > 1

    @pytest.mark.parametrize("kept", ["videos", "frames"])
    def test_the_digest_does_not_depend_on_the_location(self, kept: str, tree: Path, tmp_path: Path) -> None:
        if kept == "frames":
            for path in [*tree.rglob("*.mp4"), *tree.rglob("*.MP4")]:
                path.unlink()
        else:
            shutil.rmtree(tree / "frames")
            shutil.rmtree(tree / "deep" / "frames")
        copy = Path(shutil.copytree(tree, tmp_path / "elsewhere" / "copy"))
        one, two = load_inputs(tree, 9, SMALL, seed=1), load_inputs(copy, 9, SMALL, seed=1)
        assert torch.equal(one.tensor, two.tensor)
        assert one.identity["sha256"] == two.identity["sha256"]

    def test_another_video_under_the_same_name_changes_the_digest(self, tree: Path) -> None:
        before = load_inputs(tree, 9, SMALL, seed=0).identity["sha256"]
        video(tree / "a.mp4", 17, frames=9)
        assert load_inputs(tree, 9, SMALL, seed=0).identity["sha256"] != before

    def test_other_frames_under_the_same_name_change_the_digest(self, tree: Path) -> None:
        before = load_inputs(tree, 9, SMALL, seed=0).identity["sha256"]
        shutil.rmtree(tree / "frames")
        frame_folder(tree / "frames", 30, frames=9)
        assert load_inputs(tree, 9, SMALL, seed=0).identity["sha256"] != before

    def test_a_single_video(self, original: Path) -> None:
        path = original / "a.mp4"
        batch = load_inputs(path, 8, SMALL, seed=0)
        assert batch.tensor.shape == (1, 4, 3, 32, 32)
        assert torch.equal(batch.tensor[0], torch.stack(read_clip(path, 4, convert=SMALL.transform()).frames))

    def test_the_home_folder(self, original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(original.parent))
        assert len(load_inputs(f"~/{original.name}/deep/er", 1, SMALL, seed=0).tensor) == 1


class TestBroken:
    def test_broken_clips_are_replaced_and_listed(self, tree: Path) -> None:
        (tree / "a.mp4").write_bytes(b"")
        (tree / "b.mp4").write_bytes(b"no video at all" * 20)
        (tree / "frames" / "frame0.png").write_bytes(b"no image")
        batch = load_inputs(tree, 4, SMALL, seed=0)
        assert len(batch.tensor) == 4
        everything = load_inputs(tree, 7, SMALL, seed=0)
        assert len(everything.tensor) == everything.identity["count"] == 4
        assert sorted(Path(line.split(": ")[0]).name for line in everything.skipped) == ["a.mp4", "b.mp4", "frames"]
        assert any("the file is empty" in line for line in everything.skipped)
        assert any("frame0.png" in line for line in everything.skipped)
        assert everything.description == f"4 of 7 videos in {tree}, seed 0"

    def test_nothing_can_be_read(self, tmp_path: Path) -> None:
        for name in ("a.mp4", "b.webm"):
            (tmp_path / name).write_bytes(b"")
        with pytest.raises(DataError, match=r"none of the 2 videos in .* can be read; .*the file is empty"):
            load_inputs(tmp_path, 1, SMALL, seed=0)

    def test_a_file_that_is_not_a_video(self, original: Path) -> None:
        with pytest.raises(DataError, match="none of the 1 videos in"):
            load_inputs(original / "notes.txt", 1, SMALL, seed=0)

    def test_no_video(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("nothing here")
        (tmp_path / "empty").mkdir()
        with pytest.raises(DataError, match="there are no videos in") as caught:
            load_inputs(tmp_path, 1, SMALL, seed=0)
        assert "mp4, webm" in caught.value.hint
        assert "jpeg, jpg, pbm, pgm, png" in caught.value.hint

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="does not exist"):
            load_inputs(tmp_path / "none", 1, SMALL, seed=0)

    @pytest.mark.parametrize("where", [None, "somewhere"])
    @pytest.mark.parametrize("count", [0, -1])
    def test_fewer_than_one_clip(self, count: int, where: str | None) -> None:
        with pytest.raises(UsageError, match=f"invalid images {count}"):
            load_inputs(where, count, SMALL, seed=0)

    @pytest.mark.parametrize("name", ["._a.mp4", ".cache/a.mp4", "__MACOSX/a.mp4"])
    def test_files_of_the_operating_system_are_not_videos(self, name: str, tree: Path) -> None:
        """As for images: neither counted nor reported as broken."""
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_bytes(b"\0" * 40)
        batch = load_inputs(tree, 99, SMALL, seed=0)
        assert batch.skipped == []
        assert batch.description == f"7 of 7 videos in {tree}, seed 0"


class TestScenes:
    def test_shape_and_identity(self) -> None:
        batch = load_inputs(None, 3, SMALL, seed=2)
        assert batch.tensor.shape == (3, 4, 3, 32, 32)
        assert batch.tensor.dtype == torch.float32
        assert batch.builtin
        assert batch.description == "3 built-in training clips, seed 2"
        assert {**batch.identity, "sha256": ""} == {"where": "builtin:shapes", "count": 3, "seed": 2, "sha256": ""}

    def test_by_name(self) -> None:
        assert torch.equal(load_inputs("builtin:shapes", 2, SMALL, 0).tensor, load_inputs(None, 2, SMALL, 0).tensor)

    def test_the_same_seed_draws_the_same_clips(self) -> None:
        one, other = load_inputs(None, 4, SMALL, seed=1), load_inputs(None, 4, SMALL, seed=1)
        assert torch.equal(one.tensor, other.tensor)
        assert one.identity == other.identity
        assert torch.equal(load_inputs(None, 2, SMALL, seed=1).tensor, one.tensor[:2])

    def test_seeds_share_no_clip(self) -> None:
        batches = [load_inputs(None, 6, SMALL, seed=seed) for seed in range(3)]
        clips = torch.cat([batch.tensor for batch in batches])
        assert len(clips.flatten(1).unique(dim=0)) == 18
        assert len({batch.identity["sha256"] for batch in batches}) == 3

    def test_scenes_are_of_the_training_seed(self) -> None:
        """With numbers that training did not use, at the size and number of frames of the model."""
        clips = load_inputs(None, 2, SMALL, seed=0).tensor
        transform = SMALL.transform()
        for index, clip in enumerate(clips):
            drawn = render(scene(1_000_000 + index, TRAIN_SEED), 4, 32)
            assert torch.equal(clip, scene_tensor(drawn, transform))
            other = render(scene(1_000_000 + index, TEST_SEED), 4, 32)
            assert not torch.equal(clip, scene_tensor(other, transform))

    def test_the_digest_is_of_the_captions(self) -> None:
        first, second = load_inputs(None, 1, SMALL, seed=0), load_inputs(None, 1, SMALL, seed=1)
        assert caption(scene(1_000_000, TRAIN_SEED)) != caption(scene(2_000_000, TRAIN_SEED))
        assert first.identity["sha256"] != second.identity["sha256"]

    def test_another_size_and_number_of_frames(self) -> None:
        form = Preprocessing((3, 48, 48), (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0, "squash", 7)
        assert load_inputs(None, 1, form, seed=0).tensor.shape == (1, 7, 3, 48, 48)

    def test_a_wide_frame(self) -> None:
        form = Preprocessing((3, 32, 48), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "squash", 2)
        assert load_inputs(None, 1, form, seed=0).tensor.shape == (1, 2, 3, 32, 48)


class TestTensors:
    def test_pixels_are_normalised(self) -> None:
        frames = np.zeros((2, 32, 32, 3), np.uint8)
        frames[1] = 255
        clip = scene_tensor(frames, SMALL.transform())
        assert clip.shape == (2, 3, 32, 32)
        for channel, (mean, std) in enumerate(zip(SMALL.mean, SMALL.std, strict=True)):
            torch.testing.assert_close(clip[0, channel], torch.full((32, 32), -mean / std))
            torch.testing.assert_close(clip[1, channel], torch.full((32, 32), (1 - mean) / std))

    def test_clips_or_images_by_the_preprocessing(self, original: Path) -> None:
        assert load_inputs(None, 2, SMALL, 0).tensor.shape == (2, 4, 3, 32, 32)
        assert load_inputs(original, 1, SMALL, 0).tensor.shape == (1, 4, 3, 32, 32)
        assert load_inputs(None, 2, IMAGES, 0).tensor.shape == (2, 3, 32, 32)
        assert load_inputs(original, 2, IMAGES, 0).tensor.shape == (2, 3, 32, 32)
