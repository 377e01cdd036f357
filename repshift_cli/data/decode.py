"""Decode image files safely."""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, ClassVar

from repshift_cli.errors import DataError
from repshift_cli.utils.files import open_file

if TYPE_CHECKING:
    from PIL import Image

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""The formats that are decoded. Pillow has others, some of which start other programs (EPS)."""

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}
)
"""Lower-case suffixes of image files in all readers: those of `_FORMATS`."""

VIDEO_SUFFIXES = (
    *(".mp4", ".webm", ".avi", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg"),
    *(".wmv", ".flv", ".3gp", ".ts", ".gif"),
)
"""Lower-case suffixes of video files, in the order in which they are tried for names in annotations."""

FRAME_SUFFIXES = IMAGE_SUFFIXES - set(VIDEO_SUFFIXES)
"""Suffixes of frames in a folder; a GIF is a clip of its own."""

_MAX_PIXELS = 89_478_485
"""At most 0.7 GB while an image is converted to RGB. Pillow warns above this number."""

_GRAY_BITS = 16
_BITS_PER_SAMPLE = 258  # a tag of TIFF

_MAX_ASPECT_RATIO = 200
"""An image of 1 x 100,000 would become 200 x 20,000,000 when it is resized."""


class UnreadableSample(DataError):
    """One image that cannot be decoded.

    Args:
        sample: its path or name.
        reason: the message of the decoder.

    Attributes:
        what: its name in messages.
    """

    what: ClassVar[str] = "image"

    def __init__(self, sample: str, reason: str) -> None:
        super().__init__(f"the {self.what} {sample} cannot be read: {reason}")
        self.sample = sample
        self.reason = reason

    def __reduce__(self) -> tuple[type[UnreadableSample], tuple[str, str]]:
        # the default calls the constructor with the message alone, which fails when a worker process returns the error
        return type(self), (self.sample, self.reason)


def decode_file(path: Path) -> Image.Image:
    """Decode an image file to RGB; raises as `decode_bytes`."""
    try:
        with open_file(path) as stream:
            return _decode(stream, str(path))
    except OSError as error:
        raise UnreadableSample(str(path), error.strerror or str(error)) from error


def decode_bytes(content: bytes, sample: str) -> Image.Image:
    """Decode an image to RGB as timm's readers do: no rotation by EXIF, transparency dropped.

    Raises:
        UnreadableSample: it is empty, truncated, not an image, too large to decode safely, or has pixels of an unknown
            range.
    """
    return _decode(BytesIO(content), sample)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an opened image to RGB; 16-bit gray is scaled, where Pillow makes nearly all of it white.

    Raises:
        ValueError: its pixels are numbers of an unknown range.
    """
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in {"PNG", "PPM"}):
        bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (_GRAY_BITS,))[0]  # Pillow does not scale 12 bits
        image = Image.fromarray((np.asarray(image) >> (bits - 8)).astype(np.uint8))
    elif image.mode in {"I", "F"}:
        raise ValueError(f"the range of its pixels is unknown (mode {image.mode})")
    return image.convert("RGB")


def _decode(stream: IO[bytes], sample: str) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            # Pillow warns about large images and raises for huge ones
            warnings.simplefilter("ignore")
            with Image.open(stream, formats=_FORMATS) as image:
                _check_size(*image.size)
                return to_rgb(image)
    except UnidentifiedImageError as error:
        reason = "the file is empty" if _is_empty(stream) else "not an image in a known format"
        raise UnreadableSample(sample, reason) from error
    except Image.DecompressionBombError as error:
        raise UnreadableSample(sample, f"too many pixels to decode safely ({error})") from error
    except Exception as error:
        # decoders raise many kinds of exceptions for damaged bytes (SyntaxError, struct.error, EOFError, ...)
        raise UnreadableSample(sample, str(error) or type(error).__name__) from error


def _check_size(width: int, height: int) -> None:
    from PIL import Image

    if width * height > _MAX_PIXELS:
        raise Image.DecompressionBombError(f"{width} x {height}")
    if max(width, height) > _MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(f"{width} x {height} is not a valid shape of an image")


def _is_empty(stream: IO[bytes]) -> bool:
    stream.seek(0)
    return not stream.read(1)
