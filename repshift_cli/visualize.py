"""Show which patches a compressed model keeps: as indices, and as a picture.

The first half runs the model and turns tensors into plain arrays and words; the second half only draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from repshift_cli.attach import CompressedModel
from repshift_cli.benchmark import PLOT_FORMATS
from repshift_cli.data.base import ImageDataset, UnreadableSample
from repshift_cli.errors import DataError, ModelError, UsageError
from repshift_cli.files import atomic_output
from repshift_cli.preprocessing import Preprocessing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from repshift_cli.artifact import Opened

__all__ = [
    "Guess",
    "Observed",
    "PatchGrid",
    "Reading",
    "Samples",
    "View",
    "draw_samples",
    "fade_dropped",
    "kept_indices_document",
    "kept_masks",
    "kept_tokens_figure",
    "observe",
    "patch_grid",
    "patch_grids",
    "restore_pictures",
    "save_figure",
    "view_kept",
]

_BATCH = 16


# ---------------------------------------------------------------------------------------------------------------------
# Patches and pixels


@dataclass(frozen=True)
class PatchGrid:
    """How the patches lie in the input.

    Attributes:
        rows, columns: how many there are; patch `i` is in row `i // columns`.
        height, width: of one patch, in pixels.
    """

    rows: int
    columns: int
    height: int
    width: int

    @property
    def patches(self) -> int:
        """How many there are in all."""
        return self.rows * self.columns


def patch_grid(model: nn.Module) -> PatchGrid:
    """Where the patch tokens of a model lie in its input.

    Raises:
        ModelError: the model does not tell.
    """
    embedding = getattr(model, "patch_embed", None)
    grid, patch = getattr(embedding, "grid_size", None), getattr(embedding, "patch_size", None)
    if grid is None or patch is None:
        raise ModelError(f"{type(model).__name__} does not tell where its patches lie, so they cannot be shown")
    rows, columns = (int(number) for number in grid)
    # patches may overlap: then each stands for the pixels up to the next one
    height, width = (int(number) for number in getattr(embedding, "stride", patch))
    return PatchGrid(rows, columns, height, width)


def patch_grids(model: CompressedModel) -> dict[int, PatchGrid]:
    """Where the tokens that reach each site of the plan lie in the input, by layer; for a feature map, its positions.

    Raises:
        ModelError: as `patch_grid`.
    """
    layers = [site.layer for site in model.plan.sites]
    if model.layout.map_size is None:
        return dict.fromkeys(layers, patch_grid(model.model))
    found: dict[int, PatchGrid] = {}
    high = wide = 1
    for site, (rows, columns) in model.layout.grids():
        high *= math.prod(window.stride[0] for window in site.windows)
        wide *= math.prod(window.stride[1] for window in site.windows)
        if site.layer in layers:
            found[site.layer] = PatchGrid(rows, columns, high, wide)
    return found


def restore_pictures(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Undo the normalisation of a model's input.

    Args:
        images: float `[B, C, H, W]` with 1 or 3 channels.
        mean, std: as in `Preprocessing`, one value per channel.

    Returns:
        uint8 `[B, H, W, 3]`.

    Raises:
        ModelError: another number of channels.
    """
    channels = images.shape[1]
    if channels not in (1, 3):
        raise ModelError(f"inputs with {channels} channels cannot be shown as pictures")
    offset, scale = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    pixels = (images.float().cpu() * scale + offset).mul(255).round().clamp(0, 255).to(torch.uint8)
    restored: np.ndarray = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    return restored


def kept_masks(kept: np.ndarray, patches: PatchGrid, height: int, width: int) -> np.ndarray:
    """Which pixels belong to kept patches; pixels beyond the last whole patch belong to none.

    Args:
        kept: int64 `[B, K]`, places in the patch grid.
        height, width: of the picture.

    Returns:
        bool `[B, height, width]`.
    """
    masks = np.zeros((len(kept), height, width), dtype=bool)
    whole = kept_cells(kept, patches).repeat(patches.height, axis=1).repeat(patches.width, axis=2)
    rows, columns = min(height, whole.shape[1]), min(width, whole.shape[2])
    masks[:, :rows, :columns] = whole[:, :rows, :columns]
    return masks


def kept_cells(kept: np.ndarray, patches: PatchGrid) -> np.ndarray:
    """Which cells of the patch grid are kept: int64 `[B, K]` to bool `[B, rows, columns]`."""
    cells = np.zeros((len(kept), patches.patches), dtype=bool)
    np.put_along_axis(cells, kept, True, axis=1)
    return cells.reshape(len(kept), patches.rows, patches.columns)


_FADED = 218.0  # light grey: dark and bright pictures both stand out against it
_FADED_SHARE = 0.82


def fade_dropped(pictures: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Leave kept pixels as they are and let the others fade to a light grey, in which their shapes just show.

    Args:
        pictures: uint8 `[B, H, W, 3]`.
        masks: bool `[B, H, W]`, True where kept.

    Returns:
        uint8 `[B, H, W, 3]`.
    """
    grey = pictures.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    faded = (_FADED_SHARE * _FADED + (1 - _FADED_SHARE) * grey).round().astype(np.uint8)
    return np.where(masks[..., None], pictures, faded[..., None])


# ---------------------------------------------------------------------------------------------------------------------
# Samples and what the model says about them


@dataclass(frozen=True)
class Samples:
    """Pictures to look at.

    Attributes:
        tensor: float32 `[n, C, H, W]`, preprocessed.
        names: path or name of each.
        labels: class of each, None where the dataset does not tell (or has other classes than the model).
        classes: names of the classes, None where they are only numbers.
        description: one line for people.
        skipped: pictures that could not be read, with the reason.
    """

    tensor: Tensor
    names: tuple[str, ...]
    labels: tuple[int | None, ...]
    classes: tuple[str, ...] | None
    description: str
    skipped: tuple[str, ...] = ()


def draw_samples(where: str, count: int, preprocessing: Preprocessing, num_classes: int, seed: int) -> Samples:
    """Draw pictures at random; the same arguments and files give the same pictures.

    Args:
        where: a folder (class folders or any tree of pictures) or the name of a dataset.
        count: how many; fewer come where there are fewer.
        num_classes: outputs of the model's head; labels are used only where the dataset has the same classes.

    Raises:
        DataError: there is no such dataset, no picture in it, or none that can be read.
    """
    source = _open_source(where, count, num_classes, seed)
    transform = preprocessing.transform()
    tensors: list[Tensor] = []
    found: list[tuple[str, int]] = []
    skipped: list[str] = []
    for index in _order(source, seed):
        try:
            picture, label = source.load(index)
        except UnreadableSample as problem:
            skipped.append(f"{problem.sample}: {problem.reason}")
            continue
        tensors.append(transform(picture))
        found.append((source.sample_id(index), label))
        if len(tensors) == count:
            break
    if not tensors:
        raise DataError(f"none of the {len(skipped)} pictures of {where} can be read; {skipped[0]}")
    classes = source.classes if source.classes and len(source.classes) == num_classes else None
    labelled = classes is not None or source.classes is None
    return Samples(
        tensor=torch.stack(tensors),
        names=tuple(name for name, _ in found),
        labels=tuple(label if labelled and 0 <= label < num_classes else None for _, label in found),
        classes=_readable(classes),
        description=f"{len(found)} pictures of {where}, seed {seed}",
        skipped=tuple(skipped),
    )


def _open_source(where: str, count: int, num_classes: int, seed: int) -> ImageDataset:
    from repshift_cli.data import is_dataset_name, open_dataset
    from repshift_cli.data.folder import PICTURE_SUFFIXES, FileDataset, find_pictures

    root = Path(where).expanduser()
    if is_dataset_name(where) or not root.is_dir():
        limit = count if where.startswith("builtin:") else None
        return open_dataset(where, None, limit, seed).for_head(num_classes)
    labelled = _class_folders(where, root, num_classes)
    if labelled is not None:
        return labelled
    found = find_pictures(root)
    if not found:
        endings = ", ".join(sorted(suffix[1:] for suffix in PICTURE_SUFFIXES))
        raise DataError(f"there are no pictures in {root}", f"Give a folder with pictures ({endings}).")
    return FileDataset(where, root, [(path, -1) for path in found], ())


def _class_folders(where: str, root: Path, num_classes: int) -> ImageDataset | None:
    """The folder as class folders, where it has those of the model."""
    from repshift_cli.data.folder import open_folder

    try:
        found = open_folder(where, root).for_head(num_classes)
    except DataError:
        return None
    return found if len(found.classes) == num_classes else None


def _order(source: ImageDataset, seed: int) -> Sequence[int]:
    """Places in the order in which they are tried; scenes are random already, and streams are read from their start."""
    if source.name.startswith("builtin:") or not source.random_access:
        return range(len(source))
    return [int(index) for index in np.random.default_rng(seed).permutation(len(source))]


def _readable(classes: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """ImageNet's ids as words, other names as they are."""
    from repshift_cli.data.imagenet import imagenet_wnids

    if classes is None or classes != imagenet_wnids():
        return classes
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return tuple(str(info.index_to_description(index)).split(",")[0] for index in range(len(classes)))


@dataclass(frozen=True)
class Observed:
    """What a compressed model and its dense self make of some images.

    Attributes:
        kept: int64 `[n, K]` by layer: places in the patch grid (or in the map) of what is left after it, ascending.
        dense, compressed: float32 `[n, K]`, what the two return.
    """

    kept: dict[int, np.ndarray]
    dense: Tensor
    compressed: Tensor


@torch.inference_mode()
def observe(model: CompressedModel, images: Tensor) -> Observed:
    """Run the model, traced and dense, on images `[n, C, H, W]` that are preprocessed; `n >= 1`."""
    sample = next(model.model.parameters())
    traces, dense = [], []
    for part in images.split(_BATCH):
        batch = part.to(device=sample.device, dtype=sample.dtype)
        traces.append(model.trace(batch))
        with model.dense() as original:
            dense.append(original(batch).float().cpu())
    kept = {layer: torch.cat([trace.kept[layer].cpu() for trace in traces]).numpy() for layer in traces[0].kept}
    return Observed(kept, torch.cat(dense), torch.cat([trace.output.float().cpu() for trace in traces]))


@dataclass(frozen=True)
class Guess:
    """A predicted class: its number, its name, and the probability that the model gives it (0 to 1)."""

    label: int
    name: str
    probability: float

    def to_dict(self) -> dict[str, Any]:
        return {"class": self.label, "name": self.name, "probability": round(self.probability, 4)}


@dataclass(frozen=True)
class Reading:
    """What is said beside one picture.

    Attributes:
        sample: path or name of the picture.
        label, label_name: the true class, None where it is not known.
        dense, compressed: the predictions, None where the model has no head.
        cosine: likeness of the features of the two, where the model has no head.
    """

    sample: str
    label: int | None = None
    label_name: str | None = None
    dense: Guess | None = None
    compressed: Guess | None = None
    cosine: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "image": self.sample,
            "label": self.label,
            "label_name": self.label_name,
            "dense": self.dense.to_dict() if self.dense else None,
            "compressed": self.compressed.to_dict() if self.compressed else None,
            "feature_cosine": None if self.cosine is None else round(self.cosine, 6),
        }


def _read(samples: Samples, observed: Observed, has_head: bool) -> tuple[Reading, ...]:
    """One reading per picture."""
    if not has_head:
        likeness = torch.nn.functional.cosine_similarity(observed.dense, observed.compressed, dim=-1)
        return tuple(
            Reading(name, cosine=cosine) for name, cosine in zip(samples.names, likeness.tolist(), strict=True)
        )
    columns = (samples.names, samples.labels, _guesses(observed.dense, samples), _guesses(observed.compressed, samples))
    return tuple(
        Reading(name, label, None if label is None else _class_name(label, samples.classes), dense, compressed)
        for name, label, dense, compressed in zip(*columns, strict=True)
    )


def _guesses(logits: Tensor, samples: Samples) -> Iterator[Guess]:
    best = logits.softmax(-1).max(-1)
    for label, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        yield Guess(label, _class_name(label, samples.classes), probability)


def _class_name(label: int, classes: tuple[str, ...] | None) -> str:
    return f"class {label}" if classes is None else classes[label]


# ---------------------------------------------------------------------------------------------------------------------
# All of it together


@dataclass(frozen=True)
class View:
    """All that `repshift visualize` shows.

    Attributes:
        patches: where the tokens that reach each layer lie.
        pictures: uint8 `[n, H, W, 3]`, what the model saw.
        kept: as in `Observed`.
    """

    title: str
    remark: str
    samples: Samples
    patches: Mapping[int, PatchGrid]
    pictures: np.ndarray
    kept: dict[int, np.ndarray]
    readings: tuple[Reading, ...]

    @property
    def unchanged(self) -> int | None:
        """How many predictions are the same as the dense model's; None where the model has no head."""
        pairs = [(reading.dense, reading.compressed) for reading in self.readings]
        same = [dense.label == compressed.label for dense, compressed in pairs if dense and compressed]
        return sum(same) if same else None

    def figure(self) -> Figure:
        """The picture."""
        return kept_tokens_figure(
            self.pictures, self.kept, self.patches, self.readings, title=self.title, remark=self.remark
        )

    def indices(self) -> dict[str, Any]:
        """The kept indices, for a JSON file."""
        return kept_indices_document(self.kept, self.patches, self.readings)


def view_kept(opened: Opened, where: str, count: int, seed: int = 0) -> View:
    """Look at what a compressed model keeps of some pictures.

    Args:
        opened: a compressed model, on the device where it is to run.
        where, count, seed: which pictures, see `draw_samples`.

    Raises:
        UsageError: the model is dense, or no picture is asked for.
        ModelError: its patches have no known place.
        DataError: as `draw_samples`.
    """
    if opened.compressed is None:
        raise UsageError(
            f"{opened.loaded.description.name} is a dense model, which keeps all tokens: there is nothing to show",
            "Give a checkpoint that `repshift compress` wrote.",
        )
    if count < 1:
        raise UsageError(f"{count} pictures were asked for", "Give a number of 1 or more.")
    patches = patch_grids(opened.compressed)
    description = opened.loaded.description
    classes = int(getattr(opened.loaded.model, "num_classes", 0))
    samples = draw_samples(where, count, description.preprocessing, classes, seed)
    observed = observe(opened.compressed, samples.tensor)
    kinds = dict.fromkeys(site.metric.kind.replace("_", " ") for site in opened.compressed.plan.sites)
    score = ", ".join(kinds)
    return View(
        title=f"{description.name}: tokens that are kept",
        remark=f"{score}; {opened.dense_macs / opened.macs:.2f}x fewer MACs than dense",
        samples=samples,
        patches=patches,
        pictures=restore_pictures(samples.tensor, description.preprocessing.mean, description.preprocessing.std),
        kept=observed.kept,
        readings=_read(samples, observed, classes > 0),
    )


def kept_indices_document(
    kept: Mapping[int, np.ndarray], patches: Mapping[int, PatchGrid], readings: Sequence[Reading]
) -> dict[str, Any]:
    """The kept patches as plain numbers.

    Args:
        kept: int64 `[n, K]` by layer.
        patches: the grid of each layer.
        readings: one per image.

    Returns:
        For JSON: `grid` and `patch` (pixels) of the first layer, `layers` with the number kept and their own grid and
        patch, and per image what was read and `kept`: the ascending indices by layer (row * columns + column in the
        grid of that layer).
    """
    images = []
    for index, reading in enumerate(readings):
        images.append(reading.to_dict() | {"kept": {str(layer): rows[index].tolist() for layer, rows in kept.items()}})
    grids = [_grid_words(patches[layer]) for layer in kept]
    return {
        **grids[0],
        "layers": [
            {"layer": layer, "kept": int(rows.shape[1]), **grid}
            for (layer, rows), grid in zip(kept.items(), grids, strict=True)
        ],
        "images": images,
    }


def _grid_words(patches: PatchGrid) -> dict[str, Any]:
    return {
        "grid": {"rows": patches.rows, "columns": patches.columns},
        "patch": {"height": patches.height, "width": patches.width},
    }


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
_TEXT, _SMALL = 7.5, 6.0  # points
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
    sheet.write(figure, _MARGIN, _MARGIN, title, size=10, weight="bold")
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


def _draw_column(
    figure: Figure, sheet: _Sheet, column: int, pictures: np.ndarray, words: tuple[str, str]
) -> list[Axes]:
    """One panel per picture, below two lines of words."""
    middle = sheet.left + column * sheet.column + (sheet.column - _GAP) / 2
    sheet.write(figure, middle, sheet.top - _HEADER, words[0], size=8.5, weight="bold", ha="center")
    sheet.write(figure, middle, sheet.top - _HEADER + 38, words[1], size=_TEXT, color=_PALE, ha="center")
    height, width = pictures.shape[1:3]
    panels = []
    for row, picture in enumerate(pictures):
        panel = sheet.axes(figure, row, column)
        panel.set(xlim=(0, width), ylim=(height, 0))
        # laid on the page pixel by pixel: an image inside axes is resampled, which older matplotlib rounds unevenly
        left, top = sheet.corner(row, column)
        enlarged = picture.repeat(sheet.scale, axis=0).repeat(sheet.scale, axis=1)
        figure.figimage(enlarged, left, sheet.height - top - sheet.panel_height, zorder=-1)  # below the outlines
        panels.append(panel)
    return panels


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
    step = 36
    top = sheet.top + row * sheet.row + (sheet.row - _GAP - step * len(lines)) / 2
    for index, line in enumerate(lines):
        sheet.write(figure, _MARGIN, top + index * step, line.text, size=line.size, color=line.color)


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_LETTERS else text[: _SHOWN_LETTERS - 3] + "..."
