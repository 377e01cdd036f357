"""Clips: the frames of each kind of file, and errors."""

from __future__ import annotations

import contextlib
import itertools
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from repshift_cli.data.video import decode
from repshift_cli.data.video.decode import Clip, UnreadableVideo, find_video, frame_indices, read_clip
from repshift_cli.errors import DataError, UsageError

SIZE = (64, 48)
FRAMES = 20


def shade(index: int) -> int:
    """The gray value that identifies a frame."""
    return 20 + 10 * index


def shades(clip: Clip) -> list[int]:
    return [round((float(np.asarray(frame).mean()) - 20) / 10) for frame in clip.frames]


def write_video(
    path: Path, codec: str = "mpeg4", count: int = FRAMES, bright_corner: bool = False, **options: str
) -> Path:
    """Frames of one gray value each, in ascending order; optionally with a white upper left corner."""
    with av.open(str(path), "w", options=options) as container:
        stream: Any = container.add_stream(codec, rate=10)
        stream.width, stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.gop_size = 5
        for index in range(count):
            image = Image.new("RGB", SIZE, (shade(index),) * 3)
            if bright_corner:
                image.paste((255, 255, 255), (0, 0, 16, 16))
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return path


def write_audio(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_frames(folder: Path, count: int, name: str = "frame{}.png") -> Path:
    folder.mkdir()
    for index in range(count):
        Image.new("RGB", SIZE, (shade(index),) * 3).save(folder / name.format(index))
    return folder


def upstream_indices(available: int, frames: int) -> list[int]:
    """The formula of UMT, VindLU and Singularity."""
    edges = np.linspace(start=0, stop=available, num=min(frames, available) + 1).astype(int)
    middles = [int(start + end - 1) // 2 for start, end in itertools.pairwise(edges)]
    return middles + [middles[-1]] * (frames - len(middles))


@given(available=st.integers(1, 20_000), frames=st.integers(1, 64))
def test_frame_indices_are_those_of_upstream(available: int, frames: int) -> None:
    found = frame_indices(available, frames)
    assert found == upstream_indices(available, frames)
    assert len(found) == frames
    assert found == sorted(found)
    assert found[0] >= 0
    assert found[-1] < available
    assert len(set(found)) == min(frames, available)


@pytest.mark.parametrize(
    ("available", "frames", "wanted"),
    [(8, 4, [0, 2, 4, 6]), (300, 4, [37, 112, 187, 262]), (3, 8, [0, 1, 2, 2, 2, 2, 2, 2]), (1, 2, [0, 0])],
)
def test_frame_indices_by_hand(available: int, frames: int, wanted: list[int]) -> None:
    assert frame_indices(available, frames) == wanted


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "mpeg4"),
        ("a.mp4", "libx264"),
        ("a.avi", "mpeg4"),
        ("a.mkv", "libx264"),
        ("a.ts", "libx264"),
        ("a.webm", "libvpx"),
        ("no_ending", "mpeg4"),
    ],
)
def test_the_right_frames_of_every_container(tmp_path: Path, name: str, codec: str) -> None:
    path = tmp_path / name
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV writes no {codec}")
    write_video(path if path.suffix else path.with_suffix(".mp4"), codec)
    if not path.suffix:
        path.with_suffix(".mp4").rename(path)
    clip = read_clip(path, 4)
    assert shades(clip) == frame_indices(FRAMES, 4)
    assert (clip.available, clip.padded) == (FRAMES, False)
    assert {(frame.mode, frame.size) for frame in clip.frames} == {("RGB", SIZE)}


def test_a_short_video_repeats_its_last_frame(tmp_path: Path) -> None:
    clip = read_clip(write_video(tmp_path / "a.mp4", count=3), 8)
    assert shades(clip) == [0, 1, 2, 2, 2, 2, 2, 2]
    assert (clip.available, clip.padded) == (3, True)


def test_only_the_first_seconds(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4")  # ten frames a second
    clip = read_clip(path, 4, first_seconds=0.8)
    assert shades(clip) == [0, 2, 4, 6]
    assert clip.available == 8
    assert shades(read_clip(path, 4, first_seconds=30)) == frame_indices(FRAMES, 4)


def test_a_wrong_number_of_frames_is_corrected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4")
    monkeypatch.setattr(decode, "_survey", lambda _: decode._Survey(FRAMES + 10, FRAMES + 10, 10.0))
    clip = read_clip(path, 4)
    assert shades(clip) == frame_indices(FRAMES, 4)
    assert (clip.available, clip.declared) == (FRAMES, FRAMES + 10)


def test_a_rotated_video_is_turned_upright(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", bright_corner=True)
    content = path.read_bytes()
    upright = bytes.fromhex("00010000 00000000 00000000 00000000 00010000 00000000 00000000 00000000 40000000")
    turned = bytes.fromhex("00000000 00010000 00000000 ffff0000 00000000 00000000 00000000 00000000 40000000")
    place = content.index(upright, content.index(b"tkhd"))
    path.write_bytes(content[:place] + turned + content[place + len(turned) :])
    frame = read_clip(path, 1).frames[0]
    assert frame.size == (SIZE[1], SIZE[0])
    corners = [np.asarray(frame)[row, column].mean() for row in (4, -4) for column in (4, -4)]
    assert int(np.argmax(corners)) == 1  # upper left in the file, turned clockwise


@pytest.mark.parametrize("name", ["frame{}.png", "{:05d}.png", "clip_7_{}.png"])
def test_a_folder_of_frames(tmp_path: Path, name: str) -> None:
    folder = write_frames(tmp_path / "a.mp4", 12, name)
    (folder / "notes.txt").write_text("no frame")
    (folder / "._frame1.png").write_bytes(b"left by macOS")
    clip = read_clip(folder, 12)
    assert shades(clip) == list(range(12))
    assert (clip.available, clip.padded) == (12, False)
    assert shades(read_clip(folder, 3)) == frame_indices(12, 3)


def test_a_folder_with_a_damaged_frame(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "clip", 2)
    (folder / "frame1.png").write_bytes(b"")
    with pytest.raises(UnreadableVideo, match=r"clip cannot be read: its frame frame1\.png: the file is empty"):
        read_clip(folder, 2)


def damaged_files(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    good = write_video(tmp_path / "good.mp4").read_bytes()
    early = write_video(tmp_path / "early.mp4", movflags="faststart").read_bytes()
    made = {
        "missing": (None, "No such file"),
        "empty": (b"", "the file is empty"),
        "text": (b"1\n00:00:00,000 --> 00:00:01,000\nno video\n" * 40, "no video in a known format"),
        "playlist": (b"#EXTM3U\n#EXTINF:1,\ngood.mp4\n#EXT-X-ENDLIST\n", "no video in a known format"),
        "concat": (b"ffconcat version 1.0\nfile good.mp4\n", "no video in a known format"),
        "zeros": (bytes(5000), "no video in a known format"),
        "no index": (good[: len(good) // 2], "truncated"),
        "few frames": (early[: early.index(b"mdat") + 200], "truncated"),
        "no frames": (early[: early.index(b"mdat") + 4], "no frame|truncated"),
    }
    files = {}
    for name, (content, reason) in made.items():
        path = tmp_path / f"{name}.mp4"
        if content is not None:
            path.write_bytes(content)
        files[name] = (path, reason)
    write_frames(tmp_path / "empty folder", 0)
    files["audio"] = (write_audio(tmp_path / "audio.mp4"), "it has no video stream")
    files["folder"] = (tmp_path / "empty folder", "no images in the folder")
    return files


def test_unreadable_videos_have_a_reason(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, (path, reason) in damaged_files(tmp_path).items():
        with pytest.raises(UnreadableVideo, match=reason) as raised:
            read_clip(path, 4)
        assert raised.value.sample == str(path), name
        assert raised.value.exit_code == 4
    assert capfd.readouterr() == ("", "")


def test_a_slightly_truncated_video_is_read(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", movflags="faststart")
    content = path.read_bytes()
    start = content.index(b"mdat")
    path.write_bytes(content[: start + (len(content) - start) * 8 // 10])
    clip = read_clip(path, 4)
    assert FRAMES // 2 <= clip.available < clip.declared == FRAMES
    assert shades(clip) == frame_indices(clip.available, 4)


def test_any_damage_gives_a_clip_or_an_unreadable_video(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", "libx264" if "libx264" in av.codecs_available else "mpeg4")
    content = bytearray(path.read_bytes())
    random = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(content)
        for place in random.integers(0, len(content), 12):
            damaged[place] = random.integers(0, 256)
        path.write_bytes(damaged[: random.integers(1, len(damaged) + 1)] if random.random() < 0.3 else damaged)
        with contextlib.suppress(UnreadableVideo):
            assert len(read_clip(path, 4).frames) == 4


def test_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_LARGEST_FRAME", SIZE[0] * SIZE[1] - 1)
    with pytest.raises(UnreadableVideo, match=r"too many pixels to decode safely \(64 x 48\)"):
        read_clip(write_video(tmp_path / "a.mp4"), 4)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files by /proc")
def test_files_are_closed(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    path = write_video(tmp_path / "a.mp4")
    audio = write_audio(tmp_path / "audio.mp4")
    for _ in range(3):
        read_clip(path, 2)
        with pytest.raises(UnreadableVideo):
            read_clip(audio, 2)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_without_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UsageError, match=r"needs PyAV.*\n.*pip install 'repshift-cli\[video\]'"):
        read_clip(path, 4)
    assert len(read_clip(write_frames(tmp_path / "frames", 4), 4).frames) == 4


def test_zero_frames_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="invalid frames 0"):
        read_clip(tmp_path, 0)


def test_the_error_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(UnreadableVideo("a.mp4", "the file is empty")))
    assert (error.sample, error.reason) == ("a.mp4", "the file is empty")


@pytest.mark.parametrize("kind", ["video", "frames"])
def test_each_frame_is_converted_when_it_is_decoded(tmp_path: Path, kind: str) -> None:
    path = write_video(tmp_path / "a.mp4") if kind == "video" else write_frames(tmp_path / "frames", 12)
    made: list[tuple[int, int]] = []

    def convert(frame: Image.Image) -> Image.Image:
        made.append(frame.size)
        return frame.resize((4, 4))

    clip = read_clip(path, 5, convert=convert)
    assert [frame.size for frame in clip.frames] == [(4, 4)] * 5
    assert len(made) == 5
    assert [frame.tobytes() for frame in clip.frames] == [
        frame.resize((4, 4)).tobytes() for frame in read_clip(path, 5).frames
    ]


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, **options: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(UnreadableVideo, match="Permission denied"):
        read_clip(tmp_path / "clip", 2)


def test_clip_tensor(tmp_path: Path) -> None:
    transform: Callable[[Image.Image], torch.Tensor] = lambda image: torch.from_numpy(  # noqa: E731
        np.asarray(image, dtype=np.float32)
    ).permute(2, 0, 1)
    tensor = torch.stack(read_clip(write_frames(tmp_path / "frames", 4), 2, convert=transform).frames)
    assert tensor.shape == (2, 3, SIZE[1], SIZE[0])
    assert tensor.dtype == torch.float32
    assert tensor[:, 0, 0, 0].tolist() == [shade(0), shade(2)]


@pytest.mark.parametrize(
    ("there", "asked"),
    [
        ("video1.mp4", "video1.mp4"),
        ("video1.mp4", "video1"),
        ("video1.webm", "video1.mp4"),
        ("part/video1.avi", "part/video1"),
        ("a_00.00.51.926-00.00.54.129.avi", "a_00.00.51.926-00.00.54.129"),
        ("video1.odd", "video1.odd"),
        ("video1/", "video1.mp4"),
        ("video1/", "video1"),
        ("video1", "video1"),
    ],
)
def test_find_video(tmp_path: Path, there: str, asked: str) -> None:
    path = tmp_path / there
    if there.endswith("/"):
        path.mkdir(parents=True)
    else:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert find_video(tmp_path, asked) == path


def test_find_video_prefers_the_name_as_written(tmp_path: Path) -> None:
    for name in ("a.webm", "a.mp4"):
        (tmp_path / name).touch()
    assert find_video(tmp_path, "a.webm") == tmp_path / "a.webm"
    assert find_video(tmp_path, "b") is None


@pytest.mark.parametrize(
    "name", ["../a.mp4", "a/../../b", "/etc/passwd", "C:\\a.mp4", "..\\a", "\\\\host\\a", "", ".", "a\0b", "x" * 5000]
)
def test_find_video_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError):
        find_video(tmp_path, name)
