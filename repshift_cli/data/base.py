"""What a dataset is to the rest of the program: pictures by number, each with a label and a name."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, ClassVar

from repshift_cli.errors import DataError, UsageError

if TYPE_CHECKING:
    from PIL import Image

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What is decoded, whatever a file is called. Pillow knows many more, some of which start other programs (EPS)."""

_MOST_PIXELS = 178_956_970
"""Of one picture: half a gigabyte when decoded. Pillow's own limit, which other libraries like to switch off."""

_LONGEST_SHAPE = 200
"""How many times as long as wide a picture may be: one of 1 x 100,000 would be 200 x 20,000,000 when it is resized."""

__all__ = [
    "EvenSubset",
    "ImageDataset",
    "UnreadableSample",
    "decode_bytes",
    "decode_file",
    "even_indices",
    "limited",
    "shuffled",
]


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


class ImageDataset(ABC):
    """Pictures with labels, by number, in an order that never changes.

    Attributes:
        name: the name that the user gave.
        random_access: whether `load` may be called in any order and from several processes. Where it is False,
            read in ascending order from one process.
        outputs: places of the head's outputs among which a model chooses; None for all of them.
    """

    name: str
    random_access: bool = True
    outputs: tuple[int, ...] | None = None

    @property
    @abstractmethod
    def description(self) -> str:
        """One line for people: what it is and where it lies."""

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...] | None:
        """Class names, where label `i` is `classes[i]`; None where the source does not tell."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def sample_id(self, index: int) -> str:
        """The path or name of one picture."""

    @abstractmethod
    def load(self, index: int) -> tuple[Image.Image, int]:
        """One RGB picture and its label.

        Raises:
            UnreadableSample: the picture is truncated, empty, too large to be safe, or no picture at all.
        """

    def answers(self, index: int, label: int) -> tuple[int, ...]:
        """The outputs of the head that are right for a picture, where `load` gave `label`; one or more."""
        del index
        return (label,)

    def fingerprint(self, index: int) -> str:
        """A text that changes when another picture lies in this place; cheap, so not the pixels."""
        return self.sample_id(index)

    def key(self, index: int) -> str:
        """A name of one picture that does not depend on where the dataset lies; UTF-8."""
        return self.sample_id(index)

    def stamp(self, index: int) -> str:
        """As `fingerprint`, but also of when it was written, and of its label: what work that goes on relies on."""
        return self.fingerprint(index)

    def for_head(self, num_classes: int) -> ImageDataset:
        """The same pictures, labelled for a head of `num_classes` outputs where the source allows more than one way."""
        del num_classes
        return self


class EvenSubset(ImageDataset):
    """`count` pictures, evenly spaced over another dataset, so that each part of it has its share."""

    def __init__(self, whole: ImageDataset, count: int) -> None:
        self.whole = whole
        self.name = whole.name
        self.random_access = whole.random_access
        self.outputs = whole.outputs
        self.indices = even_indices(len(whole), count)

    @property
    def description(self) -> str:
        return f"{self.whole.description}; {len(self)} of {len(self.whole)} pictures, evenly spaced"

    @property
    def classes(self) -> tuple[str, ...] | None:
        return self.whole.classes

    def __len__(self) -> int:
        return len(self.indices)

    def sample_id(self, index: int) -> str:
        return self.whole.sample_id(self.indices[index])

    def load(self, index: int) -> tuple[Image.Image, int]:
        return self.whole.load(self.indices[index])

    def answers(self, index: int, label: int) -> tuple[int, ...]:
        return self.whole.answers(self.indices[index], label)

    def fingerprint(self, index: int) -> str:
        return self.whole.fingerprint(self.indices[index])

    def key(self, index: int) -> str:
        return self.whole.key(self.indices[index])

    def stamp(self, index: int) -> str:
        return self.whole.stamp(self.indices[index])

    def for_head(self, num_classes: int) -> ImageDataset:
        return EvenSubset(self.whole.for_head(num_classes), len(self))


def shuffled(count: int, seed: int) -> list[int]:
    """The numbers `0 .. count - 1` in the order in which a seed tries them."""
    import numpy as np

    return [int(index) for index in np.random.default_rng(seed).permutation(count)]


def even_indices(total: int, count: int) -> list[int]:
    """The middles of `count` equal parts of `0 .. total - 1`, ascending, no repeats; all where `count >= total`."""
    if count >= total:
        return list(range(total))
    return [(2 * part + 1) * total // (2 * count) for part in range(count)]


def limited(dataset: ImageDataset, limit: int | None) -> ImageDataset:
    """The dataset, or an evenly spaced part of it.

    Raises:
        UsageError: the limit is not positive.
    """
    check_limit(limit)
    if limit is None or limit >= len(dataset):
        return dataset
    return EvenSubset(dataset, limit)


def check_limit(limit: int | None) -> None:
    """Refuse a limit below one.

    Raises:
        UsageError: the limit is not positive.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"the limit is {limit}", "Give the number of pictures to use, 1 or more.")


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
