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
from repshift_cli.bench_plot import PLOT_FORMATS
from repshift_cli.data import clips as clip_files
from repshift_cli.data.base import ImageDataset
from repshift_cli.data.images import draw_pictures
from repshift_cli.data.video import UnreadableVideo, clip_tensor, frame_indices, read_clip
from repshift_cli.errors import DataError, ModelError, UsageError
from repshift_cli.files import atomic_output
from repshift_cli.models.umt import UmtModel
from repshift_cli.preprocessing import Preprocessing
from repshift_cli.reducers import Merger, build_reducer

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
    "draw_clips",
    "draw_samples",
    "fade_dropped",
    "kept_clips_document",
    "kept_clips_figure",
    "kept_indices_document",
    "kept_masks",
    "kept_per_frame",
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
        frames: of a clip, each with all these rows: patches are counted frame by frame, as if the frames stood one
            below the other; None for a picture.
    """

    rows: int
    columns: int
    height: int
    width: int
    frames: int | None = None

    @property
    def lines(self) -> int:
        """Rows of all frames together."""
        return self.rows * (self.frames or 1)

    @property
    def patches(self) -> int:
        """How many there are in all."""
        return self.lines * self.columns


def patch_grid(model: nn.Module) -> PatchGrid:
    """Where the patch tokens of a model lie in its input.

    Raises:
        ModelError: the model does not tell.
    """
    if isinstance(model, UmtModel):
        shape = model.vision
        return PatchGrid(shape.side, shape.side, shape.patch_size, shape.patch_size, shape.frames)
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
        images: float `[..., C, H, W]` with 1 or 3 channels.
        mean, std: as in `Preprocessing`, one value per channel.

    Returns:
        uint8 `[..., H, W, 3]`.

    Raises:
        ModelError: another number of channels.
    """
    channels = images.shape[-3]
    if channels not in (1, 3):
        raise ModelError(f"inputs with {channels} channels cannot be shown as pictures")
    offset, scale = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    pixels = (images.float().cpu() * scale + offset).mul(255).round().clamp(0, 255).to(torch.uint8)
    restored: np.ndarray = pixels.expand(*pixels.shape[:-3], 3, -1, -1).movedim(-3, -1).numpy()
    return restored


def kept_masks(kept: np.ndarray, patches: PatchGrid, height: int, width: int) -> np.ndarray:
    """Which pixels belong to kept patches; pixels beyond the last whole patch belong to none.

    Args:
        kept: int64 `[B, K]`, places in the patch grid.
        height, width: of the picture; of a clip, of its frames one below the other.

    Returns:
        bool `[B, height, width]`.
    """
    masks = np.zeros((len(kept), height, width), dtype=bool)
    whole = kept_cells(kept, patches).repeat(patches.height, axis=1).repeat(patches.width, axis=2)
    rows, columns = min(height, whole.shape[1]), min(width, whole.shape[2])
    masks[:, :rows, :columns] = whole[:, :rows, :columns]
    return masks


def kept_cells(kept: np.ndarray, patches: PatchGrid) -> np.ndarray:
    """Which cells of the patch grid are kept: int64 `[B, K]` to bool `[B, lines, columns]`."""
    cells = np.zeros((len(kept), patches.patches), dtype=bool)
    np.put_along_axis(cells, kept, True, axis=1)
    return cells.reshape(len(kept), patches.lines, patches.columns)


def kept_per_frame(kept: np.ndarray, patches: PatchGrid) -> np.ndarray:
    """How many tokens each frame of a clip keeps: int64 `[B, K]` to int64 `[B, frames]`."""
    counts: np.ndarray = _by_frame(kept_cells(kept, patches), patches).sum(axis=(2, 3))
    return counts


def _by_frame(lines: np.ndarray, patches: PatchGrid) -> np.ndarray:
    """Frames that stand one below the other, taken apart: `[B, frames * H, ...]` to `[B, frames, H, ...]`."""
    frames = patches.frames or 1
    return lines.reshape(len(lines), frames, lines.shape[1] // frames, *lines.shape[2:])


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
    """Pictures or clips to look at.

    Attributes:
        tensor: float32 `[n, C, H, W]`, of clips `[n, T, C, H, W]`, preprocessed.
        names: path or name of each; of a built-in clip, what it shows.
        labels: class of each, None where the dataset does not tell (or has other classes than the model).
        classes: names of the classes, None where they are only numbers.
        description: one line for people.
        skipped: those that could not be read, with the reason.
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
    drawn = draw_pictures(source, count, preprocessing, seed, where)
    classes = source.classes if source.classes and len(source.classes) == num_classes else None
    labelled = classes is not None or source.classes is None
    return Samples(
        tensor=torch.stack(drawn.tensors),
        names=tuple(source.sample_id(index) for index in drawn.places),
        labels=tuple(label if labelled and 0 <= label < num_classes else None for label in drawn.labels),
        classes=_readable(classes),
        description=f"{len(drawn.tensors)} pictures of {where}, seed {seed}",
        skipped=tuple(drawn.skipped),
    )


_CLIP_SCENES = ("builtin:shapes", "builtin:shapes-qa")
"""The same scenes; evaluation asks other things about them."""


def draw_clips(where: str, count: int, preprocessing: Preprocessing, seed: int) -> Samples:
    """Draw clips at random; the same arguments and files give the same clips.

    Args:
        where: a folder, searched at any depth for video files and for folders of frames; one video file; or
            `builtin:shapes` for built-in scenes, those of the test.
        count: how many; fewer come where there are fewer.
        preprocessing: the model's own, with the number of frames.

    Raises:
        UsageError: it is a dataset of pictures, or PyAV is not installed.
        DataError: there is no video, or none that can be read.
    """
    if where in _CLIP_SCENES:
        return _clip_scenes(where, count, preprocessing, seed)
    if where.startswith("builtin:"):
        raise UsageError(
            f"there are no clips of the name {where}", f"Give a folder of videos, or {_CLIP_SCENES[0]} for scenes."
        )
    root = Path(where).expanduser()
    transform = preprocessing.transform()
    found: dict[str, Tensor] = {}
    skipped: list[str] = []
    for path in clip_files.drawn(clip_files.find_clips(root), seed):
        try:
            clip = read_clip(path, preprocessing.frames or 1)
        except UnreadableVideo as problem:
            skipped.append(f"{problem.sample}: {problem.reason}")
            continue
        found[str(path)] = clip_tensor(clip, transform)
        if len(found) == count:
            break
    if not found:
        raise DataError(f"none of the {len(skipped)} videos in {root} can be read; {skipped[0]}")
    return _clip_samples(found, f"{_clips(len(found))} of {where}, seed {seed}", skipped)


def _clip_scenes(where: str, count: int, preprocessing: Preprocessing, seed: int) -> Samples:
    from repshift_cli.data import moving_shapes

    transform = preprocessing.transform()
    found = {}
    for scene in moving_shapes.scenes(count, moving_shapes.TEST_SEED + seed):
        frames = moving_shapes.render(scene, preprocessing.frames or 1, preprocessing.input_size[1])
        found[moving_shapes.caption(scene)] = clip_files.scene_tensor(frames, transform)
    return _clip_samples(found, f"{_clips(len(found))} of {where}, seed {seed}")


def _clips(count: int) -> str:
    return "1 clip" if count == 1 else f"{count} clips"


def _clip_samples(found: Mapping[str, Tensor], description: str, skipped: Sequence[str] = ()) -> Samples:
    clips = torch.stack(list(found.values()))
    return Samples(clips, tuple(found), (None,) * len(found), None, description, tuple(skipped))


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
    """What a compressed model and its dense self make of some images or clips.

    Attributes:
        kept: int64 `[n, K]` by layer: places in the patch grid (or in the map) of what is left after it, ascending;
            of merged tokens, the place of the one that the others flowed into.
        dense, compressed: float32 `[n, K]`, what the two return.
    """

    kept: dict[int, np.ndarray]
    dense: Tensor
    compressed: Tensor


@torch.inference_mode()
def observe(model: CompressedModel, images: Tensor) -> Observed:
    """Run the model, traced and dense, on images `[n, C, H, W]` or clips `[n, T, C, H, W]`, preprocessed; `n >= 1`."""
    sample = next(model.model.parameters())
    traces, dense = [], []
    for part in images.split(max(1, _BATCH // math.prod(images.shape[1:-3]))):
        batch = part.to(device=sample.device, dtype=sample.dtype)
        traces.append(model.trace(batch))
        with model.dense() as original:
            dense.append(original(batch).float().cpu())
    kept = {layer: torch.cat([trace.kept[layer].cpu() for trace in traces]) for layer in traces[0].kept}
    in_order = {layer: rows.sort(dim=1).values.numpy() for layer, rows in kept.items()}  # merging leaves another order
    return Observed(in_order, torch.cat(dense), torch.cat([trace.output.float().cpu() for trace in traces]))


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
    """What is said beside one picture or clip.

    Attributes:
        sample: path or name of it.
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

    @property
    def moved(self) -> float:
        """How far the features moved: one minus their cosine."""
        return 0.0 if self.cosine is None else max(0.0, 1 - self.cosine)

    def to_dict(self) -> dict[str, Any]:
        """Of a picture, for JSON."""
        return {
            "image": self.sample,
            "label": self.label,
            "label_name": self.label_name,
            "dense": self.dense.to_dict() if self.dense else None,
            "compressed": self.compressed.to_dict() if self.compressed else None,
            "feature_cosine": None if self.cosine is None else round(self.cosine, 6),
        }

    def clip_to_dict(self) -> dict[str, Any]:
        """Of a clip, for JSON."""
        return {"clip": self.sample, "features_moved": round(self.moved, 6)}


def _read(samples: Samples, observed: Observed, has_head: bool) -> tuple[Reading, ...]:
    """One reading per picture."""
    if not has_head:
        likeness = torch.nn.functional.cosine_similarity(observed.dense.double(), observed.compressed.double(), dim=-1)
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
        pictures: uint8 `[n, H, W, 3]`, of clips `[n, T, H, W, 3]`, what the model saw.
        kept: as in `Observed`.
        merged: whether the other tokens flowed into those that are left.
    """

    title: str
    remark: str
    samples: Samples
    patches: Mapping[int, PatchGrid]
    pictures: np.ndarray
    kept: dict[int, np.ndarray]
    readings: tuple[Reading, ...]
    merged: bool = False

    @property
    def of_clips(self) -> bool:
        """Whether clips are shown, not pictures."""
        return self.samples.tensor.ndim == _CLIP_DIMS

    @property
    def unchanged(self) -> int | None:
        """How many predictions are the same as the dense model's; None where the model has no head."""
        pairs = [(reading.dense, reading.compressed) for reading in self.readings]
        same = [dense.label == compressed.label for dense, compressed in pairs if dense and compressed]
        return sum(same) if same else None

    def figure(self) -> Figure:
        """The picture."""
        seen = (self.pictures, self.kept, self.patches, self.readings)
        if self.of_clips:
            return kept_clips_figure(*seen, title=self.title, remark=self.remark, merged=self.merged)
        return kept_tokens_figure(*seen, title=self.title, remark=self.remark)

    def indices(self) -> dict[str, Any]:
        """The kept indices, for a JSON file."""
        if self.of_clips:
            return kept_clips_document(self.kept, self.patches, self.readings, self.merged)
        return kept_indices_document(self.kept, self.patches, self.readings)

    def samples_to_dict(self) -> dict[str, Any]:
        """What is said of each picture or clip, for JSON."""
        if self.of_clips:
            return {"clips": [reading.clip_to_dict() for reading in self.readings]}
        return {"images": [reading.to_dict() for reading in self.readings]}


_CLIP_DIMS = 5  # [n, T, C, H, W]


def view_kept(opened: Opened, where: str, count: int, seed: int = 0) -> View:
    """Look at what a compressed model keeps of some pictures, or of some clips where it takes those.

    Args:
        opened: a compressed model, on the device where it is to run.
        where, count, seed: which pictures or clips, see `draw_samples` and `draw_clips`.

    Raises:
        UsageError: the model is dense, no picture is asked for, or more clips than a page holds.
        ModelError: its patches have no known place.
        DataError: as `draw_samples` and `draw_clips`.
    """
    if opened.compressed is None:
        raise UsageError(
            f"{opened.loaded.description.name} is a dense model, which keeps all tokens: there is nothing to show",
            "Give a checkpoint that `repshift compress` wrote.",
        )
    description, plan = opened.loaded.description, opened.compressed.plan
    preprocessing = description.preprocessing
    if count < 1:
        what = "pictures" if preprocessing.frames is None else "clips"
        raise UsageError(f"{count} {what} were asked for", "Give a number of 1 or more.")
    patches = patch_grids(opened.compressed)
    classes = int(getattr(opened.loaded.model, "num_classes", 0))
    if preprocessing.frames is None:
        samples = draw_samples(where, count, preprocessing, classes, seed)
    else:
        samples = draw_clips(where, count, preprocessing, seed)
        _check_page(len(samples.tensor), len(plan.sites), preprocessing)
    observed = observe(opened.compressed, samples.tensor)
    score = ", ".join(dict.fromkeys(site.metric.kind.replace("_", " ") for site in plan.sites))
    merged = isinstance(build_reducer(plan.reducer), Merger)
    return View(
        title=f"{description.name}: {'where tokens are left after merging' if merged else 'tokens that are kept'}",
        remark=f"{score}; {opened.dense_macs / opened.macs:.2f}x fewer MACs than dense",
        samples=samples,
        patches=patches,
        pictures=restore_pictures(samples.tensor, preprocessing.mean, preprocessing.std),
        kept=observed.kept,
        readings=_read(samples, observed, classes > 0),
        merged=merged,
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
    return {**_layer_words(kept, patches), "images": images}


def kept_clips_document(
    kept: Mapping[int, np.ndarray], patches: Mapping[int, PatchGrid], readings: Sequence[Reading], merged: bool
) -> dict[str, Any]:
    """The kept patches of clips as plain numbers.

    Args:
        kept, patches, readings: as for `kept_indices_document`.
        merged: whether the other tokens flowed into those that are left.

    Returns:
        For JSON: as for pictures, with `frames` in each `grid`; `tokens`, which is "kept" or "merged"; and `clips`,
        with the ascending places by layer (frame * rows * columns + row * columns + column) and, as `per_frame`, how
        many of them lie in each frame.
    """
    counts = {str(layer): kept_per_frame(rows, patches[layer]) for layer, rows in kept.items()}
    clips = [
        {
            **reading.clip_to_dict(),
            "kept": {str(layer): rows[index].tolist() for layer, rows in kept.items()},
            "per_frame": {layer: numbers[index].tolist() for layer, numbers in counts.items()},
        }
        for index, reading in enumerate(readings)
    ]
    return {**_layer_words(kept, patches), "tokens": "merged" if merged else "kept", "clips": clips}


def _layer_words(kept: Mapping[int, np.ndarray], patches: Mapping[int, PatchGrid]) -> dict[str, Any]:
    grids = [_grid_words(patches[layer]) for layer in kept]
    layers = [
        {"layer": layer, "kept": int(rows.shape[1]), **grid}
        for (layer, rows), grid in zip(kept.items(), grids, strict=True)
    ]
    return {**grids[0], "layers": layers}


def _grid_words(patches: PatchGrid) -> dict[str, Any]:
    frames = {} if patches.frames is None else {"frames": patches.frames}
    return {
        "grid": {**frames, "rows": patches.rows, "columns": patches.columns},
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
        cells = _by_frame(kept_cells(rows, grid), grid)
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


def _check_page(clips: int, sites: int, preprocessing: Preprocessing) -> None:
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
