"""Images with the patches that are left after each site, as data URIs and SVG paths."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass
from io import BytesIO
from pathlib import PurePath

import numpy as np
from PIL import Image

from repshift_cli.planning.layout import PatchGrid
from repshift_cli.visualize.patches import kept_cells
from repshift_cli.visualize.predictions import SampleResult
from repshift_cli.visualize.view import Visualization

_LARGEST = 384
"""Pixels of the longer side of an image in the page."""

MOST_BYTES = 2_400_000
"""Bytes of all images of a page with what is drawn over them."""

_IMAGE_BYTES, _QUALITIES = 70_000, (88, 70, 50, 30)
"""JPEG is compressed more until an image has this size."""

_LOSSLESS = 128
"""Images up to this side are PNG: few bytes, and shown enlarged."""

_MARKUP = 1000
"""Bytes of the elements around an image or one of its overlays."""


@dataclass(frozen=True)
class Overlay:
    """What is drawn over an image after one site; both paths have patches as unit."""

    grid: PatchGrid
    removed: str
    borders: str


@dataclass(frozen=True)
class ShownImage:
    """One image.

    Attributes:
        lines: what it shows and what the models predict, with their titles.
        groups: where tokens are merged, for the input and each site the patch that each patch went into.
    """

    name: str
    source: str
    height: int
    width: int
    pixelated: bool
    lines: tuple[tuple[str, str], ...]
    overlays: tuple[Overlay, ...]
    groups: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """Bytes in the page, roughly."""
        drawn = sum(len(each.removed) + len(each.borders) + _MARKUP for each in self.overlays)
        return len(self.source) + drawn + sum(len(str(each)) for each in self.groups) + 2 * _MARKUP


def shown_images(shown: Visualization) -> tuple[ShownImage, ...]:
    """The images of a visualization, which are not clips; fewer, if all would have more than `MOST_BYTES`."""
    found: list[ShownImage] = []
    for index, (image, result) in enumerate(zip(shown.images, shown.results, strict=True)):
        height, width = image.shape[:2]
        overlays, groups = [], []
        for layer, rows in shown.kept.items():
            grid, cells = shown.patches[layer], kept_cells(rows[[index]], shown.patches[layer])[0]
            owners = cells
            if layer in shown.groups:
                groups.append(tuple(shown.groups[layer][index].tolist()))
                owners = shown.groups[layer][index].reshape(grid.lines, grid.columns)
            overlays.append(Overlay(grid, cells_path(~cells), borders_path(owners)))
        if groups:
            groups.insert(0, tuple(range(len(groups[0]))))
        source, small = data_uri(image), max(height, width) <= _LOSSLESS
        name = PurePath(result.sample).name or result.sample
        name = f"scene {name}" if shown.samples.builtin else name
        lines = _lines(result)
        found.append(ShownImage(name, source, height, width, small, lines, tuple(overlays), tuple(groups)))
        if sum(each.size for each in found) > MOST_BYTES:
            return tuple(found[:-1])
    return tuple(found)


def stages(shown: Visualization) -> tuple[str, ...]:
    """The text of each position of the slider: the input, and the tokens after each site."""
    first = next(iter(shown.patches.values()))
    texts = ["input" if len(set(shown.patches.values())) > 1 else f"input: {first.patches} patches"]
    what = "tokens, merged from" if shown.merged else "of"
    for layer, rows in shown.kept.items():
        texts.append(f"after block {layer}: {rows.shape[1]} {what} {shown.patches[layer].patches} patches")
    return tuple(texts)


def data_uri(image: np.ndarray) -> str:
    """A uint8 image `[H, W, 3]` as PNG, or as JPEG of at most `_LARGEST` pixels."""
    drawn, file = Image.fromarray(image), BytesIO()
    if max(drawn.size) <= _LOSSLESS:
        drawn.save(file, "PNG", optimize=True)
    else:
        drawn.thumbnail((_LARGEST, _LARGEST))
        for quality in _QUALITIES:
            file = BytesIO()
            drawn.save(file, "JPEG", quality=quality)
            if file.tell() <= _IMAGE_BYTES:
                break
    kind = "png" if max(image.shape[:2]) <= _LOSSLESS else "jpeg"
    return f"data:image/{kind};base64,{b64encode(file.getvalue()).decode()}"


def cells_path(cells: np.ndarray) -> str:
    """The True cells of a bool grid `[rows, columns]` as rectangles; equal rows become one."""
    parts, row = [], 0
    while row < len(cells):
        end = row + 1
        while end < len(cells) and np.array_equal(cells[end], cells[row]):
            end += 1
        parts += [f"M{start} {row}H{stop}V{end}H{start}z" for start, stop in _runs(cells[row])]
        row = end
    return "".join(parts)


def borders_path(values: np.ndarray) -> str:
    """Lines between cells of a grid `[rows, columns]` with different values."""
    across, down = values[1:] != values[:-1], (values[:, 1:] != values[:, :-1]).T
    parts = [f"M{start} {row}H{stop}" for row, line in enumerate(across, 1) for start, stop in _runs(line)]
    parts += [f"M{column} {start}V{stop}" for column, line in enumerate(down, 1) for start, stop in _runs(line)]
    return "".join(parts)


def _runs(line: np.ndarray) -> list[tuple[int, int]]:
    """First index and end of each run of True."""
    edges = np.flatnonzero(np.diff(np.pad(line.astype(np.int8), 1)))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def _lines(result: SampleResult) -> tuple[tuple[str, str], ...]:
    lines = [("true class", result.label_name)] if result.label_name is not None else []
    for title, prediction in (("dense", result.dense), ("compressed", result.compressed)):
        if prediction is not None:
            lines.append((title, f"{prediction.name} ({prediction.probability:.0%})"))
    if result.dense and result.compressed and result.dense.label != result.compressed.label:
        lines.append(("changed", "the predictions differ"))
    if result.cosine is not None:
        lines.append(("features", f"cosine {result.cosine:.3f} to dense"))
    return tuple(lines)
