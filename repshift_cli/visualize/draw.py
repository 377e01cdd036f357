"""Draw the kept patches of images and clips."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.data.video.decode import frame_indices
from repshift_cli.errors import UsageError
from repshift_cli.planning.layout import PatchGrid
from repshift_cli.utils.figures import PLOT_FORMATS, figure_format, write_figure
from repshift_cli.utils.files import atomic_output
from repshift_cli.visualize.patches import by_frame, fade_dropped, kept_cells, kept_masks, kept_per_frame
from repshift_cli.visualize.predictions import SampleResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 200
_SIDE, _FRAME_SIDE = 1.8, 1.0  # inches: the longer side of an image, and of a frame
_LEAST_ROW = 1.1  # inches, for the lines next to an image
_GAP = 0.12  # inches
_WORDS_BELOW, _WORDS_ABOVE = 0.2, 0.5  # inches, of a film strip and of a clip
_TALLEST = 150  # inches
_MOST_FRAMES = 8
_CLIP_LETTERS, _LETTERS = 72, 24  # longest name above a clip, and next to an image
_TITLE_SIZE, _TEXT, _SMALL = 10.0, 7.5, 6.0  # points
_LEADING = 13  # points
_LETTER = 0.62  # mean width of a letter, divided by the font size
_INK, _PALE, _WRONG, _EDGE = "#1a1a1a", "#767676", "#c23b00", "#d55e00"


def kept_tokens_figure(
    images: np.ndarray,
    kept: Mapping[int, np.ndarray],
    patches: Mapping[int, PatchGrid],
    results: Sequence[SampleResult] | None = None,
    *,
    title: str = "Tokens that are kept",
    remark: str = "",
) -> Figure:
    """Draw one row per image: the image, and its kept patches after each site.

    Args:
        images: uint8 `[n, H, W, 3]`.
        kept: int64 `[n, K]` by layer: positions in the grid of that layer, `patches`.
        results: written next to each row.
    """
    height, width = images.shape[1:3]
    captions = [_lines(result) for result in results or ()]
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
    for panel, lines in zip(panels[:, 0], captions, strict=False):
        _write_left(panel, lines)
    return figure


def save_figure(figure: Figure, path: Path, force: bool) -> None:
    """Write a figure in the format of the suffix, one of `PLOT_FORMATS`; errors as `files.atomic_output`."""
    kind = figure_format(path)
    if kind not in PLOT_FORMATS:
        raise UsageError(f"{path}: unknown image format: allowed: .png, .svg, .pdf")
    with atomic_output(path, force) as temporary:
        write_figure(figure, temporary, kind, bbox_inches="tight", pad_inches=0.15)


def kept_clips_figure(
    clips: np.ndarray,
    kept: Mapping[int, np.ndarray],
    patches: Mapping[int, PatchGrid],
    results: Sequence[SampleResult] | None = None,
    *,
    title: str = "Tokens that are kept",
    remark: str = "",
    merged: bool = False,
) -> Figure:
    """Draw film strips of each clip: the clip, and below it its kept patches after each site.

    Args:
        clips: uint8 `[n, T, H, W, 3]`, with H and W multiples of the patch size. Of more than 8 frames, 8 evenly spaced
            ones are drawn.
        kept: int64 `[n, K]` by layer: positions in the grid of that layer, `patches`, of T frames.
        results: written above each clip.
        merged: whether the other tokens were merged.
    """
    count, frames, height, width = clips.shape[:4]
    shown = list(range(frames)) if frames <= _MOST_FRAMES else frame_indices(frames, _MOST_FRAMES)
    if len(shown) < frames:
        remark = f"{remark}; {len(shown)} of {frames} frames are shown".removeprefix("; ")
    strips = [strip for clip in range(count) for strip in _strips(clips[clip], clip, kept, patches, merged)]
    sites = len(kept) + 1
    headers = [
        f"{_shortened(Path(result.sample).name, _CLIP_LETTERS)}\nfeatures moved by {result.moved:.4f} (1 - cosine)"
        for result in results or ()
    ]
    unit = _FRAME_SIDE / max(height, width)
    lines = [[_Line(line) for line in header.splitlines()] for header in headers]
    wide = max(len(shown) * (unit * width + _GAP), _text_width(lines)) + _text_width([each.lines for each in strips])
    size = wide, _clips_height(count, sites, unit * height)
    figure, panels = _page((len(strips), 1), size, title, remark)
    for row, (panel, strip) in enumerate(zip(panels[:, 0], strips, strict=True)):
        _draw_strip(panel, strip, shown, pitch=width + max(1, round(_GAP / unit)))
        if row % sites == 0 and headers:
            panel.set_title(headers[row // sites], loc="left", size=_TEXT, color=_INK, parse_math=False)
    return figure


@dataclass(frozen=True)
class _Strip:
    """A film strip of frames, uint8 `[T, H, W, 3]`, with text next to it (`lines`) and below each frame (`words`).

    `cells` are the kept patches of the grid, bool `[T, rows, columns]`; None for the input.
    """

    frames: np.ndarray
    lines: list[_Line]
    words: list[str]
    grid: PatchGrid | None = None
    cells: np.ndarray | None = None


def _strips(
    frames: np.ndarray, clip: int, kept: Mapping[int, np.ndarray], patches: Mapping[int, PatchGrid], merged: bool
) -> Iterator[_Strip]:
    """The input of a clip, and its kept patches after each site."""
    count, height, width = frames.shape[:3]
    plural = "frame" if count == 1 else "frames"

    def lines(name: str, *details: str) -> list[_Line]:
        return [_Line(name, weight="bold"), *(_Line(detail, _PALE) for detail in details)]

    total = next(iter(patches.values())).patches
    words = [f"frame {frame}" for frame in range(count)]
    yield _Strip(frames, lines("input", f"{total} patches", f"{count} {plural}"), words)
    for layer, all_rows in kept.items():
        grid, rows = patches[layer], all_rows[[clip]]
        stacked = frames.reshape(1, count * height, width, 3)
        faded = fade_dropped(stacked, kept_masks(rows, grid, count * height, width)).reshape(frames.shape)
        per_frame, left = kept_per_frame(rows, grid)[0], rows.shape[1]
        tokens = f"merged into {left} of {grid.patches}" if merged else f"{left} of {grid.patches} kept"
        details = lines(f"after block {layer}", tokens, f"in {np.count_nonzero(per_frame)} of {count} {plural}")
        words = [f"{number} of {grid.rows * grid.columns}" for number in per_frame]
        yield _Strip(faded, details, words, grid, by_frame(kept_cells(rows, grid), grid)[0])


def _draw_strip(panel: Axes, strip: _Strip, shown: Sequence[int], pitch: int) -> None:
    """Draw the frames `shown` of a clip, `pitch` pixels apart."""
    height, width = strip.frames.shape[1:3]
    film = np.full((height, pitch * (len(shown) - 1) + width, 3), 255, dtype=np.uint8)
    for place, frame in enumerate(shown):
        film[:, place * pitch : place * pitch + width] = strip.frames[frame]
        if strip.grid is not None and strip.cells is not None:
            _outline(panel, strip.cells[frame], strip.grid, place * pitch)
    panel.imshow(film, interpolation="nearest")
    panel.set_anchor("W")
    centers = [place * pitch + (width - 1) / 2 for place in range(len(shown))]
    panel.set_xticks(centers, [strip.words[frame] for frame in shown], size=_SMALL, color=_PALE, parse_math=False)
    _write_left(panel, strip.lines)


def _clips_height(clips: int, strips: int, frame: float) -> float:
    """Height in inches of some clips with film strips for frames of this height."""
    return clips * (strips * (max(frame, _FRAME_SIDE / 2) + _WORDS_BELOW + _GAP) + _WORDS_ABOVE)


def check_page(clips: int, sites: int, preprocessing: Preprocessing) -> None:
    """Raise UsageError for more clips than fit on one page."""
    _, height, width = preprocessing.input_size
    fitting = int(_TALLEST / _clips_height(1, sites + 1, _FRAME_SIDE * height / max(height, width)))
    if clips > max(1, fitting):
        raise UsageError(f"{clips} clips with {sites} sites do not fit on one page", f"Give --count {max(1, fitting)}.")


def _page(shape: tuple[int, int], size: tuple[float, float], title: str, remark: str) -> tuple[Figure, Any]:
    """A figure with a grid of panels; `size` is that of the panels with their text."""
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
    """Write text `shift` points away from a place, which is a fraction of the panel."""
    # "$" would start a formula
    where: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "parse_math": False}
    panel.annotate(text, place, shift, **where, **style)


def _write_above(panel: Axes, name: str, detail: str) -> None:
    _write(panel, name, (0.5, 1), (0, 5 + _LEADING), ha="center", size=8.5, weight="bold", color=_INK)
    _write(panel, detail, (0.5, 1), (0, 5), ha="center", size=_TEXT, color=_PALE)


def _write_left(panel: Axes, lines: Sequence[_Line]) -> None:
    for index, line in enumerate(lines):
        shift = (-8, ((len(lines) - 1) / 2 - index) * _LEADING)
        style = {"size": line.size, "color": line.color, "weight": line.weight}
        _write(panel, line.text, (0, 0.5), shift, ha="right", va="center", **style)


def _outline(panel: Axes, cells: np.ndarray, patches: PatchGrid, left: int = 0) -> None:
    """Draw a line between kept and dropped patches; `left` is the first column of the image."""
    from matplotlib.collections import LineCollection

    high, wide = patches.height, patches.width
    across, down = np.argwhere(cells[1:] != cells[:-1]), np.argwhere(cells[:, 1:] != cells[:, :-1])
    segments = [[(column, row + 1), (column + 1, row + 1)] for row, column in across]
    segments += [[(column + 1, row), (column + 1, row + 1)] for row, column in down]
    if segments:
        scaled = np.array(segments) * (wide, high) + (left - 0.5, -0.5)  # the center of the first pixel is at 0
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


def _lines(result: SampleResult) -> list[_Line]:
    """The lines next to an image."""
    lines = []
    if result.label_name is not None:
        lines.append(_Line(f"true: {_shortened(result.label_name)}"))
    expected = result.label if result.label is not None else result.dense and result.dense.label
    for model, prediction in (("dense", result.dense), ("compressed", result.compressed)):
        if prediction is not None:
            right = prediction.label == expected
            mark = "" if right else " \N{BALLOT X}"  # readable without colour
            text = f"{model}: {_shortened(prediction.name)} ({prediction.probability:.0%}){mark}"
            lines.append(_Line(text, _INK if right else _WRONG))
    if result.cosine is not None:
        lines.append(_Line(f"features: cosine {result.cosine:.3f}"))
    path = Path(result.sample)
    return [*lines, _Line(_shortened(path.name if path.suffix else result.sample), _PALE, _SMALL)]


def _text_width(captions: Sequence[Sequence[_Line]]) -> float:
    """Estimated width of the longest line in inches."""
    widths = (len(line.text) * line.size * _LETTER / 72 for lines in captions for line in lines)
    return max(widths, default=0.0)


def _shortened(text: str, letters: int = _LETTERS) -> str:
    return text if len(text) <= letters else text[: letters - 3] + "..."
