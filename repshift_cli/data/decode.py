"""Decode image files safely."""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, ClassVar

from repshift_cli.errors import DataError

if TYPE_CHECKING:
    from PIL import Image


__all__ = [
    "UnreadableSample",
    "decode_bytes",
    "decode_file",
]


_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What is decoded, whatever a file is called. Pillow knows many more, some of which start other programs (EPS)."""


_MOST_PIXELS = 178_956_970
"""Of one picture: half a gigabyte when decoded. Pillow's own limit, which other libraries like to switch off."""


_LONGEST_SHAPE = 200
"""How many times as long as wide a picture may be: one of 1 x 100,000 would be 200 x 20,000,000 when it is resized."""


class UnreadableSample(DataError):
    """One picture that cannot be decoded.

    Args:
        sample: its path or name.
        reason: what the decoder says, in a few words.

    Attributes:
        what: how messages call it.
    """

    what: ClassVar[str] = "picture"

    def __init__(self, sample: str, reason: str) -> None:
        super().__init__(f"the {self.what} {sample} cannot be read: {reason}")
        self.sample = sample
        self.reason = reason

    def __reduce__(self) -> tuple[type[UnreadableSample], tuple[str, str]]:
        # The default would rebuild it from the message alone, which fails on the way back from a loader process.
        return type(self), (self.sample, self.reason)


def decode_file(path: Path) -> Image.Image:
    """A picture file as RGB; errors as `decode_bytes`."""
    try:
        with path.open("rb") as stream:
            return _decode(stream, str(path))
    except OSError as error:
        raise UnreadableSample(str(path), error.strerror or str(error)) from error


def decode_bytes(content: bytes, sample: str) -> Image.Image:
    """An encoded picture as RGB, converted as timm's own readers do (no rotation by EXIF, transparency dropped).

    Raises:
        UnreadableSample: empty, truncated, not a picture, or of so many pixels that decoding is not safe.
    """
    return _decode(BytesIO(content), sample)


def _decode(stream: IO[bytes], sample: str) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures and refuses huge ones; the warning would only disturb the output.
            warnings.simplefilter("ignore")
            with Image.open(stream, formats=_FORMATS) as picture:
                _check_size(*picture.size)
                rgb: Image.Image = picture.convert("RGB")
                return rgb
    except UnidentifiedImageError as error:
        reason = "the file is empty" if _is_empty(stream) else "not a picture in a known format"
        raise UnreadableSample(sample, reason) from error
    except Image.DecompressionBombError as error:
        raise UnreadableSample(sample, f"too many pixels to decode safely ({error})") from error
    except Exception as error:
        # Decoders answer damaged bytes with almost any kind of exception (SyntaxError, struct.error, EOFError, ...).
        raise UnreadableSample(sample, str(error) or type(error).__name__) from error


def _check_size(width: int, height: int) -> None:
    from PIL import Image

    if width * height > _MOST_PIXELS:
        raise Image.DecompressionBombError(f"{width} x {height}")
    if max(width, height) > _LONGEST_SHAPE * min(width, height):
        raise ValueError(f"{width} x {height} is no shape of a picture")


def _is_empty(stream: IO[bytes]) -> bool:
    stream.seek(0)
    return not stream.read(1)
