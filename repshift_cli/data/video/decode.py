"""Decode clips: a few frames, evenly spaced over a video file or over a folder of frame images."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, ClassVar

from repshift_cli.data.decode import FRAME_SUFFIXES, VIDEO_SUFFIXES, UnreadableSample, decode_file
from repshift_cli.data.sources.class_labels import natural_key
from repshift_cli.data.sources.folder import has_suffix
from repshift_cli.errors import DataError, UsageError
from repshift_cli.utils.ranges import check_ranges

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream
    from PIL import Image

Convert = Callable[["Image.Image"], Any]

_DEMUXERS = "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,m4v,h264,hevc,ivf"
"""The supported containers. Playlists (HLS, concat, DASH) are not among them, because they open other files."""

_LARGEST_FRAME = 2**27
"""Maximum pixels of a frame, so that a damaged or malicious file does not exhaust the memory."""

_LEAST_SHARE = 0.5
"""Share of the declared frames that must be there; a file with fewer is truncated."""


class UnreadableVideo(UnreadableSample):
    """One video that cannot be decoded; arguments as `UnreadableSample`."""

    what: ClassVar[str] = "video"


@dataclass(frozen=True)
class Clip:
    """Frames of one video, in order.

    Attributes:
        frames: RGB images, or what `convert` made of them, as many as requested.
        available: number of frames that can be decoded.
        padded: whether the video is shorter than the clip: frames are closer than requested, or the last is repeated.
        declared: number of frames in the header of the file; 0 if it has none.
    """

    frames: list[Any]
    available: int
    padded: bool
    declared: int = 0


def frame_indices(available: int, frames: int, step: int | None = None) -> list[int]:
    """The numbers of the frames of a clip, ascending, of a video with the frames `0 .. available - 1`.

    With a `step` every step-th frame, from the middle of the video. Without one, or if the video is too short for it,
    the middles of `frames` equal parts: the `middle` sampling of UMT and VindLU. If there are fewer frames than parts,
    all frames are used and the last one is repeated.
    """
    import numpy as np

    if step is not None and (first := available - _span(frames, step)) >= 0:
        return [first // 2 + number * step for number in range(frames)]
    parts = min(frames, available)
    # numpy's rounding as in UMT; exact fractions give other frames for some lengths
    edges: list[int] = np.linspace(0, available, parts + 1).astype(int).tolist()
    middles = [(edges[part] + edges[part + 1] - 1) // 2 for part in range(parts)]
    return middles + middles[-1:] * (frames - parts)


def _span(frames: int, step: int | None) -> int:
    """Frames of a video that a clip reaches over."""
    return (frames - 1) * (step or 1) + 1


def read_clip(
    path: Path,
    frames: int,
    first_seconds: float | None = None,
    convert: Convert = lambda image: image,
    step: int | None = None,
) -> Clip:
    """Decode `frames` frames, evenly spaced.

    Args:
        path: a video file, or a folder of frame images in the natural order of their names (`2` before `10`).
        frames: how many.
        first_seconds: use only this part of a video, as UMT does for DiDeMo; ignored for a folder.
        convert: applied to each frame as it is decoded, so that only one is kept at its full size.
        step: as for `frame_indices`.

    Raises:
        UnreadableVideo: missing, empty, truncated, not a video, without a frame, too large to decode safely, or a
            folder of images of different sizes.
        UsageError: the number of frames is invalid, or PyAV is not installed.
    """
    check_ranges(frames=frames)
    try:
        is_folder = path.is_dir()
    except OSError as error:
        raise UnreadableVideo(str(path), error.strerror or str(error)) from error
    if is_folder:
        return _clip_of_images(path, frames, convert, step)
    return _clip_of_video(path, frames, first_seconds, convert, step)


def find_video(folder: Path, name: str) -> Path | None:
    """The file or folder of frames for a `name` in annotations; None if there is none.

    Annotations have names with a suffix, without one, or with another one. Tried in this order: the file itself, the
    name with each known suffix, its stem with each known suffix, a folder of frames with this name or stem.

    Raises:
        DataError: the name leads out of `folder`, or is not a valid file name.
    """
    _check_name(name)
    stems = list(dict.fromkeys((name, _without_suffix(name))))
    files = [name, *(stem + suffix for stem in stems for suffix in VIDEO_SUFFIXES)]
    try:
        found = next((folder / file for file in files if (folder / file).is_file()), None)
        return found or next((folder / stem for stem in stems if (folder / stem).is_dir()), None)
    except PermissionError as error:
        raise DataError(f"the videos in {folder} cannot be read: {error.strerror}") from error
    except (OSError, ValueError) as error:  # too long, or with invalid characters
        raise DataError(f"{name[:80]!r} is not a valid name of a video: {error}") from error


def _check_name(name: str) -> None:
    parts = (*PurePosixPath(name).parts, *PureWindowsPath(name).parts)
    rooted = name.startswith(("/", "\\")) or bool(PureWindowsPath(name).drive)
    if not parts or "\0" in name:
        raise DataError(f"{name[:80]!r} is not a valid name of a video")
    if rooted or ".." in parts:
        raise DataError(
            f"the video name {name[:80]!r} leads out of the folder of videos", "Names must be relative to that folder."
        )


def _without_suffix(name: str) -> str:
    suffix = PurePosixPath(name).suffix
    # only suffixes of videos: the names of LSMDC have times with dots
    return name[: -len(suffix)] if suffix.lower() in VIDEO_SUFFIXES else name


def _clip_of_images(folder: Path, frames: int, convert: Convert, step: int | None) -> Clip:
    paths = _frame_images(folder)
    if not paths:
        raise UnreadableVideo(str(folder), "there are no images in the folder")
    indices = frame_indices(len(paths), frames, step)
    sizes: set[tuple[int, int]] = set()

    def decoded(path: Path) -> Any:
        image = decode_file(path)
        sizes.add(image.size)
        return convert(image)

    try:
        images = {index: decoded(paths[index]) for index in sorted(set(indices))}
    except UnreadableSample as problem:
        raise UnreadableVideo(str(folder), f"its frame {Path(problem.sample).name}: {problem.reason}") from problem
    if len(sizes) > 1:
        raise UnreadableVideo(str(folder), "its images have different sizes, so they are not the frames of one video")
    return Clip([images[index] for index in indices], len(paths), _span(frames, step) > len(paths), len(paths))


def _frame_images(folder: Path) -> list[Path]:
    try:
        found = [entry for entry in folder.iterdir() if has_suffix(entry.name, FRAME_SUFFIXES)]
    except OSError as error:
        raise UnreadableVideo(str(folder), error.strerror or str(error)) from error
    return sorted(found, key=lambda path: (natural_key(path.name), path.name))  # `01` and `1` have equal keys


@dataclass(frozen=True)
class _Survey:
    """Properties of a video that are known without decoding it.

    Attributes:
        packets: compressed frames in the file.
        declared: number of frames in the header; 0 if it has none.
        rate: frames per second; 0 if it is unknown.
    """

    packets: int
    declared: int
    rate: float

    def within(self, available: int, seconds: float | None) -> int:
        """How many of the first `available` frames are in the first `seconds`."""
        if seconds is None or not self.rate or available / self.rate <= seconds:
            return available
        return max(1, int(seconds * self.rate))


def _clip_of_video(path: Path, frames: int, first_seconds: float | None, convert: Convert, step: int | None) -> Clip:
    _check_file(path)
    _check_pyav()
    survey = _survey(path)
    available = survey.packets
    # packets are counted, as decord does; a second pass is needed only if some packets have no frame
    for _ in range(2):
        _check_enough(path, available, survey.declared)
        usable = survey.within(available, first_seconds)
        indices = frame_indices(usable, frames, step)
        images, available = _take(path, indices, convert)
        if indices[-1] in images:
            return Clip([images[index] for index in indices], usable, _span(frames, step) > usable, survey.declared)
    raise UnreadableVideo(str(path), "decoding its frames twice gives different results")


def _check_pyav() -> None:
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "reading videos needs PyAV, which is not installed",
            "Install it: pip install 'repshift-cli[video]'. Folders of frame images are read without it.",
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
        raise UnreadableVideo(str(path), "no frame can be decoded")
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
            pass  # the rest of the file is damaged; the frames before it are used
        return _Survey(packets, stream.frames, float(stream.average_rate or 0))


def _take(path: Path, indices: Sequence[int], convert: Convert) -> tuple[dict[int, Any], int]:
    """The frames with these numbers, as far as they can be decoded, and the number of decoded frames."""
    wanted = set(indices)
    images: dict[int, Any] = {}
    count = 0
    # from the start, frame by frame: seeking is inexact in many containers
    with closing(_decoded(path)) as frames:
        for frame in frames:
            if count in wanted:
                images[count] = convert(_image(path, frame))
            count += 1
            if count > indices[-1]:
                break
    return images, count


def _decoded(path: Path) -> Generator[VideoFrame, None, None]:
    """Every frame that can be decoded; damaged parts are skipped, as in players."""
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


def _image(path: Path, frame: VideoFrame) -> Image.Image:
    _check_size(path, frame.width, frame.height)
    try:
        image: Image.Image = frame.to_image()
    except Exception as error:
        # many kinds of exceptions are raised for unsupported pixel formats
        raise UnreadableVideo(str(path), str(error) or type(error).__name__) from error
    # phones store rotated frames, with the rotation in the metadata
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def _check_size(path: Path, width: int, height: int) -> None:
    if width * height > _LARGEST_FRAME:
        raise UnreadableVideo(str(path), f"too many pixels to decode safely ({width} x {height})")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open the container and its video stream; raises UnreadableVideo if there is none that can be decoded."""
    with _container(path) as container:
        stream = _video_stream(path, container)
        _check_size(path, stream.codec_context.width, stream.codec_context.height)
        yield container, stream


def _container(path: Path) -> InputContainer:
    import av

    options = {"protocol_whitelist": "file", "format_whitelist": _DEMUXERS}
    try:
        # an absolute path has no prefix that looks like a protocol
        return av.open(str(path.absolute()), container_options=options, metadata_errors="replace")
    except (av.error.InvalidDataError, av.error.ArgumentError, av.error.EOFError) as error:
        raise UnreadableVideo(str(path), "no video in a known format, or a truncated one") from error
    except Exception as error:
        # many kinds of exceptions are raised for damaged bytes
        raise UnreadableVideo(str(path), getattr(error, "strerror", None) or str(error)) from error


def _video_stream(path: Path, container: InputContainer) -> VideoStream:
    from av.stream import Disposition

    # a cover image is a video stream, too
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        raise UnreadableVideo(str(path), "it has no video stream")
    # without a decoder PyAV sets no codec context, and decoding would crash the process
    if getattr(streams[0], "codec_context", None) is None:
        raise UnreadableVideo(str(path), "its video cannot be decoded: an unknown codec, or a truncated file")
    return streams[0]
