"""Show which patches a compressed model keeps: as indices, and as a picture.

The first half runs the model and turns tensors into plain arrays and words; the second half only draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.data.video.decode import frame_indices
from repshift_cli.errors import UsageError
from repshift_cli.planning.layout import PatchGrid
from repshift_cli.utils.figures import PLOT_FORMATS
from repshift_cli.utils.files import atomic_output
from repshift_cli.visualize.patches import by_frame, fade_dropped, kept_cells, kept_masks, kept_per_frame
from repshift_cli.visualize.readings import Reading

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


__all__ = [
    "check_page",
    "kept_clips_figure",
    "kept_tokens_figure",
    "save_figure",
]


# ---------------------------------------------------------------------------------------------------------------------
# Drawing. All lengths are pixels of the PNG, so that every pixel of a picture covers a whole number of them.

_DPI = 200


_LONGER_SIDE = 360


_LEAST_COLUMN = 250


_LEAST_ROW = 200


_TITLE = 96


_HEADER = 90


_GAP = 24


_MARGIN = 36


_SHOWN_LETTERS = 24


_LINE = 36


_TITLE_SIZE, _TEXT, _SMALL = 10.0, 7.5, 6.0  # points


_LETTER = 0.62  # mean width of a letter, as a share of the size of the font


_INK, _PALE, _WRONG, _EDGE = "#1a1a1a", "#767676", "#c23b00", "#d55e00"


def kept_tokens_figure(
    pictures: np.ndarray,
    kept: Mapping[int, np.ndarray],
    patches: Mapping[int, PatchGrid],
    readings: Sequence[Reading] | None = None,
    *,
    title: str = "Tokens that are kept",
    remark: str = "",
) -> Figure:
    """Draw one row per picture: the picture, and after each site what is left of it.

    Args:
        pictures: uint8 `[n, H, W, 3]`.
        kept: int64 `[n, K]` by layer: places in the grid of that layer.
        patches: the grid of each layer.
        readings: what to write beside each row.
    """
    from matplotlib.figure import Figure

    height, width = pictures.shape[1:3]
    captions = [_lines(reading) for reading in readings or ()]
    sheet = _Sheet(len(pictures), len(kept) + 1, height, width, _caption_width(captions))
    figure = Figure(figsize=(sheet.width / _DPI, sheet.height / _DPI), dpi=_DPI, facecolor="white")
    sheet.write(figure, _MARGIN, _MARGIN, title, size=_TITLE_SIZE, weight="bold")
    sheet.write(figure, _MARGIN, _MARGIN + 40, remark, size=_TEXT, color=_PALE)
    counts = {grid.patches for grid in patches.values()}
    _draw_column(figure, sheet, 0, pictures, ("original", f"{counts.pop()} patches" if len(counts) == 1 else ""))
    for column, (layer, rows) in enumerate(kept.items(), start=1):
        grid = patches[layer]
        faded = fade_dropped(pictures, kept_masks(rows, grid, height, width))
        counted = f"{rows.shape[1]} of {grid.patches} kept"
        axes = _draw_column(figure, sheet, column, faded, (f"after block {layer}", counted))
        for panel, cells in zip(axes, kept_cells(rows, grid), strict=True):
            _outline(panel, cells, grid)
    for row, lines in enumerate(captions):
        _write_caption(figure, sheet, row, lines)
    return figure


def save_figure(figure: Figure, path: Path, force: bool) -> None:
    """Write a figure, in the format that the ending tells; nothing half-written ever stands under `path`.

    Raises:
        UsageError: the ending tells no format that can be drawn, or the file exists and `force` is off.
        OutputError: as `files.atomic_output`.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in PLOT_FORMATS:
        raise UsageError(f"{path} has no ending that tells a picture format", "Allowed are .png, .svg and .pdf.")
    with atomic_output(path, force) as temporary:
        figure.savefig(temporary, format=kind, dpi=_DPI)


class _Sheet:
    """Where things stand on the page, in pixels from its upper left corner."""

    def __init__(self, rows: int, columns: int, height: int, width: int, caption: int) -> None:
        self.scale = max(1, -(-_LONGER_SIDE // max(height, width)))
        self.panel_height, self.panel_width = self.scale * height, self.scale * width
        self.row = max(self.panel_height, _LEAST_ROW if caption else 0) + _GAP
        self.column = max(self.panel_width, _LEAST_COLUMN) + _GAP
        self.left = _MARGIN + caption
        self.top = _MARGIN + _TITLE + _HEADER
        self.width = self.left + columns * self.column - _GAP + _MARGIN
        self.height = self.top + rows * self.row - _GAP + _MARGIN

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """Left and top of a panel, which stands in the middle of its cell."""
        left = self.left + column * self.column + (self.column - _GAP - self.panel_width) // 2
        return left, self.top + row * self.row + (self.row - _GAP - self.panel_height) // 2

    def axes(self, figure: Figure, row: int, column: int) -> Axes:
        """An empty panel of exactly its size."""
        left, top = self.corner(row, column)
        bottom = self.height - top - self.panel_height
        place = (left / self.width, bottom / self.height)
        panel: Axes = figure.add_axes((*place, self.panel_width / self.width, self.panel_height / self.height))
        panel.set_axis_off()
        return panel

    def write(self, figure: Figure, left: float, top: float, text: str, **style: Any) -> None:
        """Text whose upper left (or, with `ha`, upper middle) is at this place."""
        style = {"va": "top", "color": _INK, **style}
        # "$" would start a formula
        figure.text(left / self.width, 1 - top / self.height, text, parse_math=False, **style)


_FRAME_SIDE = 200


_FRAME_GAP = 8


_UNDER = 40  # a line of words below each frame


_CLIP_HEADER = 76


_CLIP_GAP = 44


_MOST_FRAMES = 8


_CLIP_LETTERS = 72


_TALLEST = 30_000


class _FilmSheet(_Sheet):
    """Where the frames of film strips stand: one column per frame, and for each clip some strips below its name."""

    def __init__(
        self, clips: int, strips: int, shape: tuple[int, int, int], *, caption: int = 0, least: int = 0
    ) -> None:
        frames, height, width = shape
        self.scale = max(1, -(-_FRAME_SIDE // max(height, width)))
        self.panel_height, self.panel_width = self.scale * height, self.scale * width
        self.strips = strips
        self.row = self.panel_height + _UNDER
        self.column = self.panel_width + _FRAME_GAP
        self.left, self.top = _MARGIN + caption, _MARGIN + _TITLE
        self.group = _CLIP_HEADER + strips * self.row + _CLIP_GAP
        self.width = max(self.left + frames * self.column - _FRAME_GAP, _MARGIN + least) + _MARGIN
        self.height = self.top + clips * self.group - _CLIP_GAP + _MARGIN

    def header(self, clip: int) -> int:
        """Top of the words above a clip."""
        return self.top + clip * self.group

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """Left and top of a frame; rows are the strips of the first clip, then those of the second, ..."""
        clip, strip = divmod(row, self.strips)
        return self.left + column * self.column, self.header(clip) + _CLIP_HEADER + strip * self.row


def kept_clips_figure(
    clips: np.ndarray,
    kept: Mapping[int, np.ndarray],
    patches: Mapping[int, PatchGrid],
    readings: Sequence[Reading] | None = None,
    *,
    title: str = "Tokens that are kept",
    remark: str = "",
    merged: bool = False,
) -> Figure:
    """Draw film strips of each clip: the clip, and below it what is left of it after each site.

    Args:
        clips: uint8 `[n, T, H, W, 3]`; the patches cover each frame without a rest. Of more than 8 frames, 8 that are
            evenly spaced are drawn.
        kept: int64 `[n, K]` by layer: places in the grid of that layer.
        patches: the grid of each layer, of T frames.
        readings: what to write above each clip.
        merged: whether the other tokens flowed into those that are left.
    """
    from matplotlib.figure import Figure

    count, frames, height, width = clips.shape[:4]
    shown = _shown_frames(frames)
    if len(shown) < frames:
        remark = f"{remark}; {len(shown)} of {frames} frames are shown".removeprefix("; ")
    strips = _strips(clips, kept, patches, merged)
    headers = [_clip_lines(reading) for reading in readings or ()]
    page = [_Line(title, size=_TITLE_SIZE), _Line(remark), *(line for lines in headers for line in lines)]
    captions = [lines for strip in strips for lines in strip.captions]
    shape, widest = (len(shown), height, width), _caption_width([page])
    sheet = _FilmSheet(count, len(strips), shape, caption=_caption_width(captions), least=widest)
    figure = Figure(figsize=(sheet.width / _DPI, sheet.height / _DPI), dpi=_DPI, facecolor="white")
    sheet.write(figure, _MARGIN, _MARGIN, title, size=_TITLE_SIZE, weight="bold")
    sheet.write(figure, _MARGIN, _MARGIN + 40, remark, size=_TEXT, color=_PALE)
    for clip, lines in enumerate(headers):
        for index, line in enumerate(lines):
            top = sheet.header(clip) + index * _LINE
            sheet.write(figure, _MARGIN, top, line.text, size=line.size, color=line.color, weight=line.weight)
    for clip in range(count):
        for row, strip in enumerate(strips, start=clip * len(strips)):
            _draw_strip(figure, sheet, row, strip, clip=clip, shown=shown)
    return figure


@dataclass(frozen=True)
class _Strip:
    """One film strip for each clip.

    Attributes:
        pictures: uint8 `[n, T, H, W, 3]`.
        captions: of each clip, what is written beside it.
        words: of each clip, what is written below each frame.
        grid, cells: the patches, and bool `[n, T, rows, columns]`, which of them are kept; None for the input.
    """

    pictures: np.ndarray
    captions: list[list[_Line]]
    words: list[list[str]]
    grid: PatchGrid | None = None
    cells: np.ndarray | None = None


def _strips(
    clips: np.ndarray, kept: Mapping[int, np.ndarray], patches: Mapping[int, PatchGrid], merged: bool
) -> list[_Strip]:
    """The input, and what is left after each site."""
    count, frames, height, width = clips.shape[:4]
    total = next(iter(patches.values())).patches
    plural = "frame" if frames == 1 else "frames"
    beside = [_Line("input", weight="bold"), _Line(f"{total} patches", _PALE), _Line(f"{frames} {plural}", _PALE)]
    found = [_Strip(clips, [beside] * count, [[f"frame {frame}" for frame in range(frames)]] * count)]
    for layer, rows in kept.items():
        grid = patches[layer]
        tall = clips.reshape(count, frames * height, width, 3)
        faded = fade_dropped(tall, kept_masks(rows, grid, frames * height, width)).reshape(clips.shape)
        cells = by_frame(kept_cells(rows, grid), grid)
        counts = kept_per_frame(rows, grid)
        left, of_all = rows.shape[1], grid.rows * grid.columns
        told = f"merged into {left} of {grid.patches}" if merged else f"{left} of {grid.patches} kept"
        captions = [
            [
                _Line(f"after block {layer}", weight="bold"),
                _Line(told, _PALE),
                _Line(f"in {np.count_nonzero(numbers)} of {frames} {plural}", _PALE),
            ]
            for numbers in counts
        ]
        words = [[f"{number} of {of_all}" for number in numbers] for numbers in counts]
        found.append(_Strip(faded, captions, words, grid, cells))
    return found


def _draw_strip(figure: Figure, sheet: _FilmSheet, row: int, strip: _Strip, *, clip: int, shown: Sequence[int]) -> None:
    """The frames `shown` of a clip, with words below each one and beside them all."""
    for column, frame in enumerate(shown):
        panel = _draw_panel(figure, sheet, row, column, strip.pictures[clip, frame])
        left, top = sheet.corner(row, column)
        middle, below = left + sheet.panel_width / 2, top + sheet.panel_height + 5
        sheet.write(figure, middle, below, strip.words[clip][frame], size=_SMALL, color=_PALE, ha="center")
        if strip.grid is not None and strip.cells is not None:
            _outline(panel, strip.cells[clip, frame], strip.grid)
    lines = strip.captions[clip]
    first = sheet.corner(row, 0)[1] + (sheet.panel_height - _LINE * len(lines)) / 2
    for index, line in enumerate(lines):
        place = first + index * _LINE
        sheet.write(figure, _MARGIN, place, line.text, size=line.size, color=line.color, weight=line.weight)


def _shown_frames(frames: int) -> list[int]:
    """Those of a clip that are drawn: all, or some that are evenly spaced."""
    return list(range(frames)) if frames <= _MOST_FRAMES else frame_indices(frames, _MOST_FRAMES)


def _clip_lines(reading: Reading) -> list[_Line]:
    """What is written above a clip."""
    return [
        _Line(_shortened(Path(reading.sample).name, _CLIP_LETTERS), weight="bold", size=8.0),
        _Line(f"features moved by {reading.moved:.4f} (1 - cosine)", _PALE),
    ]


def check_page(clips: int, sites: int, preprocessing: Preprocessing) -> None:
    """Refuse what no picture holds, before the model runs."""
    _, height, width = preprocessing.input_size
    fitting = clips
    while fitting > 1 and _FilmSheet(fitting, sites + 1, (1, height, width)).height > _TALLEST:
        fitting -= 1
    if fitting < clips:
        raise UsageError(f"{clips} clips with {sites} sites do not fit one picture", f"Give --count {fitting}.")


def _draw_column(
    figure: Figure, sheet: _Sheet, column: int, pictures: np.ndarray, words: tuple[str, str]
) -> list[Axes]:
    """One panel per picture, below two lines of words."""
    middle = sheet.left + column * sheet.column + (sheet.column - _GAP) / 2
    sheet.write(figure, middle, sheet.top - _HEADER, words[0], size=8.5, weight="bold", ha="center")
    sheet.write(figure, middle, sheet.top - _HEADER + 38, words[1], size=_TEXT, color=_PALE, ha="center")
    return [_draw_panel(figure, sheet, row, column, picture) for row, picture in enumerate(pictures)]


def _draw_panel(figure: Figure, sheet: _Sheet, row: int, column: int, picture: np.ndarray) -> Axes:
    """One picture, uint8 `[H, W, 3]`, at its place."""
    height, width = picture.shape[:2]
    panel = sheet.axes(figure, row, column)
    panel.set(xlim=(0, width), ylim=(height, 0))
    # laid on the page pixel by pixel: an image inside axes is resampled, which older matplotlib rounds unevenly
    left, top = sheet.corner(row, column)
    enlarged = picture.repeat(sheet.scale, axis=0).repeat(sheet.scale, axis=1)
    figure.figimage(enlarged, left, sheet.height - top - sheet.panel_height, zorder=-1)  # below the outlines
    return panel


def _outline(panel: Axes, cells: np.ndarray, patches: PatchGrid) -> None:
    """A thin line wherever a kept patch meets a dropped one."""
    from matplotlib.collections import LineCollection

    high, wide = patches.height, patches.width
    across, down = np.nonzero(cells[1:] != cells[:-1]), np.nonzero(cells[:, 1:] != cells[:, :-1])
    segments = [
        [(column * wide, (row + 1) * high), ((column + 1) * wide, (row + 1) * high)]
        for row, column in zip(*across, strict=True)
    ]
    segments += [
        [((column + 1) * wide, row * high), ((column + 1) * wide, (row + 1) * high)]
        for row, column in zip(*down, strict=True)
    ]
    panel.add_collection(LineCollection(segments, colors=_EDGE, linewidths=0.6, capstyle="projecting"), autolim=False)


@dataclass(frozen=True)
class _Line:
    """One line of a caption, its size in points."""

    text: str
    color: str = _INK
    size: float = _TEXT
    weight: str = "normal"


def _lines(reading: Reading) -> list[_Line]:
    """What is written beside a picture."""
    lines = []
    if reading.label_name is not None:
        lines.append(_Line(f"true: {_shortened(reading.label_name)}"))
    wanted = reading.label if reading.label is not None else reading.dense and reading.dense.label
    for who, guess in (("dense", reading.dense), ("compressed", reading.compressed)):
        if guess is not None:
            right = guess.label == wanted
            mark = "" if right else " \N{BALLOT X}"  # colour alone would not tell everyone
            told = f"{who}: {_shortened(guess.name)} ({guess.probability:.0%}){mark}"
            lines.append(_Line(told, _INK if right else _WRONG))
    if reading.cosine is not None:
        lines.append(_Line(f"features: cosine {reading.cosine:.3f}"))
    path = Path(reading.sample)
    return [*lines, _Line(_shortened(path.name if path.suffix else reading.sample), _PALE, _SMALL)]


def _caption_width(captions: Sequence[Sequence[_Line]]) -> int:
    widths = (len(line.text) * line.size * _LETTER * _DPI / 72 for lines in captions for line in lines)
    return round(max(widths, default=-_GAP)) + _GAP


def _write_caption(figure: Figure, sheet: _Sheet, row: int, lines: Sequence[_Line]) -> None:
    top = sheet.top + row * sheet.row + (sheet.row - _GAP - _LINE * len(lines)) / 2
    for index, line in enumerate(lines):
        sheet.write(figure, _MARGIN, top + index * _LINE, line.text, size=line.size, color=line.color)


def _shortened(text: str, letters: int = _SHOWN_LETTERS) -> str:
    return text if len(text) <= letters else text[: letters - 3] + "..."
