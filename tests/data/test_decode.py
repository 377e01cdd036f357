"""Decoding: every mode becomes the RGB image that it shows, or is unreadable; memory is bounded."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from repshift_cli.data.decode import UnreadableSample, decode_bytes

GRAY = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)


def saved(image: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def of_16_bits(kind: str, dtype: str = "<u2") -> bytes:
    return saved(Image.fromarray((GRAY.astype(np.uint16) * 257).astype(dtype)), kind)


@pytest.mark.parametrize(
    "content",
    [
        of_16_bits("PNG"),
        of_16_bits("TIFF"),
        of_16_bits("TIFF", ">u2"),
        of_16_bits("PPM"),
        *(saved(Image.fromarray(GRAY).convert(mode), "PNG") for mode in ("L", "LA", "RGBA", "RGB")),
        saved(Image.fromarray(GRAY).convert("LA"), "TIFF"),
        saved(Image.fromarray(GRAY).convert("CMYK"), "TIFF"),
        saved(Image.fromarray(GRAY), "PPM"),
        saved(Image.fromarray(GRAY), "GIF"),
    ],
)
def test_gray_stays_gray(content: bytes) -> None:
    found = np.asarray(decode_bytes(content, "x"))
    assert found.shape == (8, 8, 3)
    assert np.array_equal(found, np.repeat(GRAY[..., None], 3, axis=2))


def test_modes_that_pillow_converts_are_left_to_it() -> None:
    palette = Image.fromarray(GRAY).convert("P")
    palette.info["transparency"] = 3
    for image, kind in ((palette, "PNG"), (Image.fromarray(GRAY).convert("CMYK"), "JPEG")):
        content = saved(image, kind)
        with Image.open(io.BytesIO(content)) as opened:
            assert np.array_equal(np.asarray(decode_bytes(content, "x")), np.asarray(opened.convert("RGB")))


@pytest.mark.parametrize("kind", ["TIFF", "PPM"])
@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_numbers_without_a_range(kind: str, dtype: type) -> None:
    content = saved(Image.fromarray(GRAY.astype(dtype)), kind)
    if (kind, dtype) == ("PPM", np.int32):
        assert decode_bytes(content, "x").mode == "RGB"  # a PPM states its range
        return
    with pytest.raises(UnreadableSample, match="the range of its pixels is unknown"):
        decode_bytes(content, "x")


def _gif_with_a_large_screen() -> bytes:
    content = bytearray(saved(Image.fromarray(GRAY), "GIF"))
    content[6:10] = (16_000).to_bytes(2, "little") * 2
    return bytes(content)


def _bmp_with_a_large_size() -> bytes:
    content = bytearray(saved(Image.fromarray(GRAY).convert("RGB"), "BMP"))
    content[18:26] = (10_000).to_bytes(4, "little") * 2
    return bytes(content)


@pytest.mark.parametrize("content", [_gif_with_a_large_screen, _bmp_with_a_large_size])
def test_memory_is_bounded_before_pixels_are_decoded(content: Callable[[], bytes]) -> None:
    with pytest.raises(UnreadableSample, match="too many pixels"):
        decode_bytes(content(), "x")
