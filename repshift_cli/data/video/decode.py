"""Clips: a few frames, evenly spaced over a video file or over a folder of frame pictures."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, ClassVar

from repshift_cli.data.decode import UnreadableSample, decode_file
from repshift_cli.errors import DataError, UsageError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream
    from PIL import Image
    from torch import Tensor

__all__ = [
    "VIDEO_SUFFIXES",
    "Clip",
    "UnreadableVideo",
    "clip_tensor",
    "find_video",
    "frame_indices",
    "read_clip",
]

VIDEO_SUFFIXES = (
    ".mp4",
    ".webm",
    ".avi",
    ".mkv",
    ".mov",
    ".m4v",
    ".mpg",
    ".mpeg",
    ".wmv",
    ".flv",
    ".3gp",
    ".ts",
    ".gif",
)
"""Endings, in lower case, that a video's name may lack in annotations, in the order in which they are tried."""

_DEMUXERS = "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,m4v,h264,hevc,ivf"
"""The containers that are read. Playlists (HLS, concat, DASH) are none of them: they open files of their own choice."""

_LARGEST_FRAME = 2**28
"""Pixels; what a file says beyond that is damage, or meant to exhaust the memory."""

_LEAST_SHARE = 0.5
"""Of the frames that a container declares, as many must be there; a smaller rest is a truncated file."""


class UnreadableVideo(UnreadableSample):
    """One video that cannot be decoded; arguments as `UnreadableSample`."""

    what: ClassVar[str] = "video"


@dataclass(frozen=True)
class Clip:
    """Frames of one video, in the order of time.

    Attributes:
        frames: RGB pictures, as many as were asked for.
        available: how many frames they were chosen from: those of the video that can be decoded.
        padded: whether the video has fewer frames than were asked for, so that its last one stands repeated.
        declared: how many frames the file says to have; 0 where it does not say.
    """

    frames: list[Image.Image]
    available: int
    padded: bool
    declared: int = 0


def frame_indices(available: int, frames: int) -> list[int]:
    """The middles of `frames` equal parts of `0 .. available - 1`, ascending: the `middle` sampling of UMT and VindLU.

    Where there are fewer frames than parts, all of them, and the last one again and again.

    Raises:
        UsageError: a number is not positive.
    """
    import numpy as np

    if available < 1 or frames < 1:
        raise UsageError(f"{frames} frames were asked for, of {available}", "Give numbers of 1 or more.")
    parts = min(frames, available)
    # numpy's own rounding, not exact fractions: for some lengths they name different frames
    edges: list[int] = np.linspace(0, available, parts + 1).astype(int).tolist()
    middles = [(edges[part] + edges[part + 1] - 1) // 2 for part in range(parts)]
    return middles + middles[-1:] * (frames - parts)


def read_clip(path: Path, frames: int, first_seconds: float | None = None) -> Clip:
    """Decode `frames` frames, evenly spaced.

    Args:
        path: a video file, or a folder of pictures, one per frame, in the natural order of their names (`2` before
            `10`).
        frames: how many.
        first_seconds: what lies behind is left out, as UMT does for DiDeMo; without meaning for a folder, which has
            no times.

    Raises:
        UnreadableVideo: missing, empty, truncated, not a video, without a frame, or too large to be safe.
        UsageError: the number of frames is not positive, or PyAV is not installed.
    """
    if frames < 1:
        raise UsageError(f"{frames} frames were asked for", "Give a number of 1 or more.")
    if path.is_dir():
        return _clip_of_pictures(path, frames)
    return _clip_of_video(path, frames, first_seconds)


def clip_tensor(clip: Clip, transform: Callable[[Image.Image], Tensor]) -> Tensor:
    """The frames as the model's input, float32 `[T, C, H, W]`.

    Args:
        clip: T frames.
        transform: what `Preprocessing.transform()` returns; built once, used for every clip.
    """
    import torch

    return torch.stack([transform(frame) for frame in clip.frames])


def find_video(folder: Path, name: str) -> Path | None:
    """The file or folder of frames that annotations call `name`; None where there is none.

    Annotations name videos with an ending, without, or with that of another copy, so in this order: the file itself,
    the name with each known ending, its stem with each known ending, a folder of frames of this name or stem.

    Raises:
        DataError: the name leads out of `folder`, or cannot be the name of a file.
    """
    _check_name(name)
    stems = list(dict.fromkeys((name, _without_suffix(name))))
    files = [name, *(stem + suffix for stem in stems for suffix in VIDEO_SUFFIXES)]
    try:
        found = next((folder / file for file in files if (folder / file).is_file()), None)
        return found or next((folder / stem for stem in stems if (folder / stem).is_dir()), None)
    except (OSError, ValueError) as error:  # too long, or of characters that no file system has
        raise DataError(f"{name[:80]!r} cannot be the name of a video: {error}") from error


def _check_name(name: str) -> None:
    parts = (*PurePosixPath(name).parts, *PureWindowsPath(name).parts)
    rooted = name.startswith(("/", "\\")) or bool(PureWindowsPath(name).drive)
    if not parts or "\0" in name:
        raise DataError(f"{name[:80]!r} cannot be the name of a video")
    if rooted or ".." in parts:
        raise DataError(
            f"the video name {name[:80]!r} leads out of the folder of videos", "Names are relative to that folder."
        )


def _without_suffix(name: str) -> str:
    suffix = PurePosixPath(name).suffix
    # only endings of videos: the names of LSMDC hold times with dots
    return name[: -len(suffix)] if suffix.lower() in VIDEO_SUFFIXES else name


def _clip_of_pictures(folder: Path, frames: int) -> Clip:
    paths = _frame_pictures(folder)
    if not paths:
        raise UnreadableVideo(str(folder), "there are no pictures in the folder")
    indices = frame_indices(len(paths), frames)
    try:
        pictures = {index: decode_file(paths[index]) for index in sorted(set(indices))}
    except UnreadableSample as problem:
        raise UnreadableVideo(str(folder), f"its frame {Path(problem.sample).name}: {problem.reason}") from problem
    return Clip([pictures[index] for index in indices], len(paths), frames > len(paths), len(paths))


def _frame_pictures(folder: Path) -> list[Path]:
    from repshift_cli.data.sources.folder import IMAGE_SUFFIXES

    try:
        entries = [entry for entry in folder.iterdir() if entry.suffix.lower() in IMAGE_SUFFIXES]
    except OSError as error:
        raise UnreadableVideo(str(folder), error.strerror or str(error)) from error
    return sorted((entry for entry in entries if not entry.name.startswith(".")), key=_natural)


def _natural(path: Path) -> tuple[list[tuple[int, str]], str]:
    """An order in which `frame2` comes before `frame10`; the name itself where two are equal so (`01` and `1`)."""
    pieces = re.split(r"([0-9]+)", path.name.lower())
    # Of numbers without leading zeros the longer one is the larger: no limit on digits, unlike int().
    numbers = (piece.lstrip("0") if place % 2 else piece for place, piece in enumerate(pieces))
    return [(len(piece) if place % 2 else 0, piece) for place, piece in enumerate(numbers)], path.name


@dataclass(frozen=True)
class _Survey:
    """What is known of a video without decoding it.

    Attributes:
        packets: compressed pictures that are there.
        declared: frames that the file says to have; 0 where it does not say.
        rate: frames in a second; 0 where it does not say.
    """

    packets: int
    declared: int
    rate: float

    def within(self, available: int, seconds: float | None) -> int:
        """How many of the first `available` frames lie in the first `seconds`."""
        if seconds is None or not self.rate or available / self.rate <= seconds:
            return available
        return max(1, int(seconds * self.rate))


def _clip_of_video(path: Path, frames: int, first_seconds: float | None) -> Clip:
    _check_file(path)
    _check_pyav()
    survey = _survey(path)
    available = survey.packets
    # Packets are counted, as decord does; a second pass is needed only where some of them give no frame.
    for _ in range(2):
        _check_enough(path, available, survey.declared)
        usable = survey.within(available, first_seconds)
        indices = frame_indices(usable, frames)
        pictures, available = _take(path, indices)
        if indices[-1] in pictures:
            return Clip([pictures[index] for index in indices], usable, frames > usable, survey.declared)
    raise UnreadableVideo(str(path), "its frames cannot be decoded twice in the same way")


def _check_pyav() -> None:
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "reading videos needs PyAV, which is not installed",
            "Install it: pip install 'repshift-cli[video]'. Folders of frame pictures are read without it.",
        ) from error


def _check_file(path: Path) -> None:
    try:
        size = path.stat().st_size
    except (OSError, ValueError) as error:
        raise UnreadableVideo(str(path), getattr(error, "strerror", None) or str(error)) from error
    if not path.is_file():
        raise UnreadableVideo(str(path), "it is neither a file nor a folder")
    if not size:
        raise UnreadableVideo(str(path), "the file is empty")


def _check_enough(path: Path, available: int, declared: int) -> None:
    if not available:
        raise UnreadableVideo(str(path), "there is no frame in it that can be decoded")
    if available < _LEAST_SHARE * declared:
        raise UnreadableVideo(str(path), f"it is truncated: {available} of its {declared} frames are there")


def _survey(path: Path) -> _Survey:
    from av import FFmpegError

    packets = 0
    with _opened(path) as (container, stream):
        try:
            for packet in container.demux(stream):
                packets += packet.size > 0 and not packet.is_discard
        except FFmpegError:
            pass  # the rest of the file is damaged; what came before it is a video
        return _Survey(packets, stream.frames, float(stream.average_rate or 0))


def _take(path: Path, indices: Sequence[int]) -> tuple[dict[int, Image.Image], int]:
    """The frames of these numbers as far as they come, and how many frames were decoded before reading stopped."""
    wanted = set(indices)
    pictures: dict[int, Image.Image] = {}
    count = 0
    # From the start, frame by frame: seeking is inexact in many containers.
    with closing(_decoded(path)) as frames:
        for frame in frames:
            if count in wanted:
                pictures[count] = _picture(path, frame)
            count += 1
            if count > indices[-1]:
                break
    return pictures, count


def _decoded(path: Path) -> Generator[VideoFrame, None, None]:
    """Every frame that can be decoded; damaged parts are left out, as players do."""
    from av import FFmpegError

    with _opened(path) as (container, stream):
        stream.thread_type = "AUTO"
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
            except FFmpegError:
                return
            if packet is None:
                return
            try:
                frames = stream.decode(packet)
            except FFmpegError:
                continue
            yield from frames


def _picture(path: Path, frame: VideoFrame) -> Image.Image:
    _check_size(path, frame.width, frame.height)
    try:
        picture: Image.Image = frame.to_image()
    except Exception as error:
        # Pixel formats that cannot be converted are answered with almost any kind of exception.
        raise UnreadableVideo(str(path), str(error) or type(error).__name__) from error
    # Telephones record lying frames and note how to turn them.
    return picture.rotate(frame.rotation, expand=True) if frame.rotation else picture


def _check_size(path: Path, width: int, height: int) -> None:
    if width * height > _LARGEST_FRAME:
        raise UnreadableVideo(str(path), f"too many pixels to decode safely ({width} x {height})")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its video, closed at the end.

    Raises:
        UnreadableVideo: it is no container, or has no video in it that can be decoded.
    """
    with _container(path) as container:
        stream = _video_stream(path, container)
        _check_size(path, stream.codec_context.width, stream.codec_context.height)
        yield container, stream


def _container(path: Path) -> InputContainer:
    import av

    options = {"protocol_whitelist": "file", "format_whitelist": _DEMUXERS}
    try:
        # An absolute path has no prefix that could be taken for a protocol.
        return av.open(str(path.absolute()), container_options=options, metadata_errors="replace")
    except (av.error.InvalidDataError, av.error.ArgumentError, av.error.EOFError) as error:
        raise UnreadableVideo(str(path), "no video in a known format, or a truncated one") from error
    except Exception as error:
        # Damaged bytes are answered with almost any kind of exception.
        raise UnreadableVideo(str(path), getattr(error, "strerror", None) or str(error)) from error


def _video_stream(path: Path, container: InputContainer) -> VideoStream:
    from av.stream import Disposition

    # a cover picture is a video stream, too
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        raise UnreadableVideo(str(path), "it has no video stream")
    # Without a decoder PyAV sets none, whatever its types say, and decoding would end the process.
    if getattr(streams[0], "codec_context", None) is None:
        raise UnreadableVideo(str(path), "its video cannot be decoded: an unknown codec, or a truncated file")
    return streams[0]
