"""Draw which patches a compressed model keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.data.video.decode import frame_indices
from repshift_cli.errors import UsageError
from repshift_cli.utils.figures import PLOT_FORMATS
from repshift_cli.utils.files import atomic_output
from repshift_cli.visualize.patches import PatchGrid, by_frame, fade_dropped, kept_cells, kept_masks, kept_per_frame
from repshift_cli.visualize.readings import Reading

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


__all__ = ["check_page", "kept_clips_figure", "kept_tokens_figure", "save_figure"]

_DPI = 200
_SIDE, _FRAME_SIDE = 1.8, 1.0  # inches: the longer side of an image, and of a frame
_LEAST_ROW = 1.1  # inches, for the lines beside an image
_GAP = 0.12  # inches
_WORDS_BELOW, _WORDS_ABOVE = 0.2, 0.5  # inches, of a film strip and of a clip
_TALLEST = 150  # inches
_MOST_FRAMES = 8
_CLIP_LETTERS = 72
_SHOWN_LETTERS = 24
_TITLE_SIZE, _TEXT, _SMALL = 10.0, 7.5, 6.0  # points
_LEADING = 13  # points
_LETTER = 0.62  # mean width of a letter, as a share of the size of the font
_INK, _PALE, _WRONG, _EDGE = "#1a1a1a", "#767676", "#c23b00", "#d55e00"


def kept_tokens_figure(
    images: np.ndarray,
    kept: Mapping[int, np.ndarray],
    patches: Mapping[int, PatchGrid],
    readings: Sequence[Reading] | None = None,
    *,
    title: str = "Kept tokens",
    remark: str = "",
) -> Figure:
    """Draw one row per image: the image, and the kept patches after each site.

    Args:
        images: uint8 `[n, H, W, 3]`.
        kept: int64 `[n, K]` by layer: indices in the grid of that layer.
        patches: the grid of each layer.
        readings: text beside each row.
    """
    height, width = images.shape[1:3]
    captions = [_lines(reading) for reading in readings or ()]
    unit = _SIDE / max(height, width)
    size = (len(kept) + 1) * (unit * width + _GAP) + _text_width(captions)
    tall = len(images) * (max(unit * height, _LEAST_ROW) + _GAP)
    figure, panels = _page((len(images), len(kept) + 1), (size, tall), title, remark)
    counts = {grid.patches for grid in patches.values()}
    _write_above(panels[0, 0], "original", f"{counts.pop()} patches" if len(counts) == 1 else "")
    for column, (layer, rows) in enumerate(kept.items(), start=1):
        grid = patches[layer]
        _write_above(panels[0, column], f"after block {layer}", f"{rows.shape[1]} of {grid.patches} kept")
        faded = fade_dropped(images, kept_masks(rows, grid, height, width))
        for panel, image, cells in zip(panels[:, column], faded, kept_cells(rows, grid), strict=True):
            panel.imshow(image, interpolation="nearest")
            _outline(panel, cells, grid)
    for panel, image in zip(panels[:, 0], images, strict=True):
        panel.imshow(image, interpolation="nearest")
    for panel, beside in zip(panels[:, 0], captions, strict=False):
        _write_beside(panel, beside)
    return figure


def save_figure(figure: Figure, path: Path, force: bool) -> None:
    """Write a figure in the format of the suffix; `path` is written whole or not at all.

    Raises:
        UsageError: unknown suffix, or the file exists and `force` is False.
        OutputError: as `files.atomic_output`.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in PLOT_FORMATS:
        raise UsageError(f"{path}: unknown suffix for a figure", "Allowed are .png, .svg and .pdf.")
    with atomic_output(path, force) as temporary:
        figure.savefig(temporary, format=kind, bbox_inches="tight", pad_inches=0.15)


def kept_clips_figure(
    clips: np.ndarray,
    kept: Mapping[int, np.ndarray],
    patches: Mapping[int, PatchGrid],
    readings: Sequence[Reading] | None = None,
    *,
    title: str = "Kept tokens",
    remark: str = "",
    merged: bool = False,
) -> Figure:
    """Draw rows of frames for each clip: the clip, and below it the kept patches after each site.

    Args:
        clips: uint8 `[n, T, H, W, 3]`; the patches cover each frame exactly. At most 8 evenly spaced frames are drawn.
        kept: int64 `[n, K]` by layer: indices in the grid of that layer.
        patches: the grid of each layer, of T frames.
        readings: text above each clip.
        merged: whether the other tokens were merged into the kept ones.
    """
    count, frames, height, width = clips.shape[:4]
    shown = _shown_frames(frames)
    if len(shown) < frames:
        remark = f"{remark}; {len(shown)} of {frames} frames are shown".removeprefix("; ")
    strips = _strips(clips, kept, patches, merged)
    headers = [_clip_lines(reading) for reading in readings or ()]
    unit = _FRAME_SIDE / max(height, width)
    wide = max(len(shown) * (unit * width + _GAP), _text_width(headers))
    wide += _text_width([caption for strip in strips for caption in strip.captions])
    size = wide, _clips_height(count, len(strips), unit * height)
    figure, panels = _page((count * len(strips), 1), size, title, remark)
    for row, panel in enumerate(panels[:, 0]):
        clip, number = divmod(row, len(strips))
        _draw_strip(panel, strips[number], clip, shown, pitch=width + max(1, round(_GAP / unit)))
        if number == 0 and headers:
            text = "\n".join(line.text for line in headers[clip])
            panel.set_title(text, loc="left", size=_TEXT, color=_INK, parse_math=False)
    return figure


@dataclass(frozen=True)
class _Strip:
    """One row of frames for each clip.

    Attributes:
        images: uint8 `[n, T, H, W, 3]`.
        captions: text beside each clip.
        words: text below each frame of each clip.
        grid, cells: the patches, and bool `[n, T, rows, columns]`, which of them are kept; None for the input.
    """

    images: np.ndarray
    captions: list[list[_Line]]
    words: list[list[str]]
    grid: PatchGrid | None = None
    cells: np.ndarray | None = None


def _strips(
    clips: np.ndarray, kept: Mapping[int, np.ndarray], patches: Mapping[int, PatchGrid], merged: bool
) -> list[_Strip]:
    """The input, and the kept patches after each site."""
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
        total_kept = f"merged into {left} of {grid.patches}" if merged else f"{left} of {grid.patches} kept"
        captions = [
            [
                _Line(f"after block {layer}", weight="bold"),
                _Line(total_kept, _PALE),
                _Line(f"in {np.count_nonzero(numbers)} of {frames} {plural}", _PALE),
            ]
            for numbers in counts
        ]
        words = [[f"{number} of {of_all}" for number in numbers] for numbers in counts]
        found.append(_Strip(faded, captions, words, grid, cells))
    return found


def _draw_strip(panel: Axes, strip: _Strip, clip: int, shown: Sequence[int], pitch: int) -> None:
    """The frames `shown` of a clip, `pitch` pixels apart, with their captions."""
    height, width = strip.images.shape[2:4]
    film = np.full((height, pitch * (len(shown) - 1) + width, 3), 255, dtype=np.uint8)
    for place, frame in enumerate(shown):
        film[:, place * pitch : place * pitch + width] = strip.images[clip, frame]
        if strip.grid is not None and strip.cells is not None:
            _outline(panel, strip.cells[clip, frame], strip.grid, place * pitch)
    panel.imshow(film, interpolation="nearest")
    panel.set_anchor("W")
    middles = [place * pitch + (width - 1) / 2 for place in range(len(shown))]
    words = [strip.words[clip][frame] for frame in shown]
    panel.set_xticks(middles, words, size=_SMALL, color=_PALE, parse_math=False)
    _write_beside(panel, strip.captions[clip])


def _shown_frames(frames: int) -> list[int]:
    """The frames to draw: all, or some that are evenly spaced."""
    return list(range(frames)) if frames <= _MOST_FRAMES else frame_indices(frames, _MOST_FRAMES)


def _clip_lines(reading: Reading) -> list[_Line]:
    """Text above a clip."""
    name = _shortened(Path(reading.sample).name, _CLIP_LETTERS)
    return [_Line(name), _Line(f"features moved by {reading.moved:.4f} (1 - cosine)")]


def _clips_height(clips: int, strips: int, frame: float) -> float:
    """Height in inches of this many clips with `strips` rows each."""
    return clips * (strips * (max(frame, _FRAME_SIDE / 2) + _WORDS_BELOW + _GAP) + _WORDS_ABOVE)


def check_page(clips: int, sites: int, preprocessing: Preprocessing) -> None:
    """Raise a UsageError for more clips than one figure holds."""
    _, height, width = preprocessing.input_size
    fitting = int(_TALLEST / _clips_height(1, sites + 1, _FRAME_SIDE * height / max(height, width)))
    if clips > max(1, fitting):
        raise UsageError(f"{clips} clips with {sites} sites do not fit one figure", f"Give --count {max(1, fitting)}.")


def _page(shape: tuple[int, int], size: tuple[float, float], title: str, remark: str) -> tuple[Figure, Any]:
    """A figure with a grid of image panels; `size` is that of the panels with their captions, in inches."""
    from matplotlib.figure import Figure

    wide = max(size[0], _text_width([[_Line(title, size=_TITLE_SIZE, weight="bold"), _Line(remark)]]))
    figure = Figure(figsize=(wide + 2 * _GAP, size[1] + 1), dpi=_DPI, layout="constrained", facecolor="white")
    figure.suptitle(title, size=_TITLE_SIZE, weight="bold", color=_INK, parse_math=False)
    figure.supxlabel(remark, size=_TEXT, color=_PALE, parse_math=False)
    panels = figure.subplots(*shape, squeeze=False)
    for panel in panels.flat:
        panel.set(xticks=[], yticks=[])
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
    return figure, panels


def _write(panel: Axes, text: str, place: tuple[float, float], shift: tuple[float, float], **style: Any) -> None:
    """Text at `place` (fraction of the panel), shifted by points."""
    # parse_math: "$" is not a formula
    where: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "parse_math": False}
    panel.annotate(text, place, shift, **where, **style)


def _write_above(panel: Axes, name: str, counts: str) -> None:
    _write(panel, name, (0.5, 1), (0, 5 + _LEADING), ha="center", size=8.5, weight="bold", color=_INK)
    _write(panel, counts, (0.5, 1), (0, 5), ha="center", size=_TEXT, color=_PALE)


def _write_beside(panel: Axes, lines: Sequence[_Line]) -> None:
    for index, line in enumerate(lines):
        shift = (-8, ((len(lines) - 1) / 2 - index) * _LEADING)
        style = {"size": line.size, "color": line.color, "weight": line.weight}
        _write(panel, line.text, (0, 0.5), shift, ha="right", va="center", **style)


def _outline(panel: Axes, cells: np.ndarray, patches: PatchGrid, left: int = 0) -> None:
    """A thin line between kept and dropped patches; `left` is the first column of the image."""
    from matplotlib.collections import LineCollection

    high, wide = patches.height, patches.width
    across, down = np.argwhere(cells[1:] != cells[:-1]), np.argwhere(cells[:, 1:] != cells[:, :-1])
    segments = [[(column, row + 1), (column + 1, row + 1)] for row, column in across]
    segments += [[(column + 1, row), (column + 1, row + 1)] for row, column in down]
    if segments:
        scaled = np.array(segments) * (wide, high) + (left - 0.5, -0.5)  # the centre of the first pixel is at 0
        panel.add_collection(
            LineCollection(list(scaled), colors=_EDGE, linewidths=0.6, capstyle="projecting"), autolim=False
        )


@dataclass(frozen=True)
class _Line:
    """One line of a caption, its size in points."""

    text: str
    color: str = _INK
    size: float = _TEXT
    weight: str = "normal"


def _lines(reading: Reading) -> list[_Line]:
    """Text beside an image."""
    lines = []
    if reading.label_name is not None:
        lines.append(_Line(f"true: {_shortened(reading.label_name)}"))
    wanted = reading.label if reading.label is not None else reading.dense and reading.dense.label
    for who, guess in (("dense", reading.dense), ("compressed", reading.compressed)):
        if guess is not None:
            right = guess.label == wanted
            mark = "" if right else " \N{BALLOT X}"  # not by colour alone, for colour-blind readers
            text = f"{who}: {_shortened(guess.name)} ({guess.probability:.0%}){mark}"
            lines.append(_Line(text, _INK if right else _WRONG))
    if reading.cosine is not None:
        lines.append(_Line(f"features: cosine {reading.cosine:.3f}"))
    path = Path(reading.sample)
    return [*lines, _Line(_shortened(path.name if path.suffix else reading.sample), _PALE, _SMALL)]


def _text_width(captions: Sequence[Sequence[_Line]]) -> float:
    """Approximate width of the widest line in inches."""
    widths = (len(line.text) * line.size * _LETTER / 72 for lines in captions for line in lines)
    return max(widths, default=0.0)


def _shortened(text: str, letters: int = _SHOWN_LETTERS) -> str:
    return text if len(text) <= letters else text[: letters - 3] + "..."
