"""Spectrograms in `.npy` files, as the feature extractor of a model makes them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from repshift_cli.data.decode import UnreadableSample
from repshift_cli.errors import first_line
from repshift_cli.utils.files import open_file

if TYPE_CHECKING:
    from torch import Tensor

_LARGEST_FILE = 1 << 28


class UnreadableSpectrogram(UnreadableSample):
    """One spectrogram that cannot be read; arguments as `UnreadableSample`."""

    what: ClassVar[str] = "spectrogram"


def read_spectrogram(path: Path, shape: tuple[int, ...]) -> Tensor:
    """A spectrogram, float32 `[time, frequency]`, with the values of the file.

    Raises:
        UnreadableSpectrogram: the file is no array, or its array has another shape, is not floating point or not
            finite.
    """
    import numpy as np
    import torch

    try:
        with open_file(path, _LARGEST_FILE) as stream:
            values = np.lib.format.read_array(stream, allow_pickle=False)
    except OSError as error:
        raise UnreadableSpectrogram(str(path), error.strerror or str(error)) from error
    except Exception as error:  # a damaged header raises errors of many kinds
        raise UnreadableSpectrogram(str(path), first_line(error)) from error
    if values.shape != shape:
        raise UnreadableSpectrogram(str(path), f"its shape is {list(values.shape)}, and the model takes {list(shape)}")
    if values.dtype.kind != "f":
        raise UnreadableSpectrogram(str(path), f"its values are {values.dtype}, not floating point")
    with np.errstate(over="ignore"):
        found = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    if not bool(found.isfinite().all()):
        raise UnreadableSpectrogram(str(path), "some of its values are not finite")
    return found
