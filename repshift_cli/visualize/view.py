"""Run the model on the samples and collect the kept tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from repshift_cli.data.inputs import ImageBatch, load_inputs
from repshift_cli.data.sources.class_labels import imagenet_wnids
from repshift_cli.errors import UsageError
from repshift_cli.reduction.compressed_model import CompressedModel
from repshift_cli.reduction.reducers.base import Merger, build_reducer
from repshift_cli.visualize.draw import check_page, kept_clips_figure, kept_tokens_figure
from repshift_cli.visualize.patches import PatchGrid, kept_per_frame, patch_grids, restore_pictures
from repshift_cli.visualize.readings import Guess, Reading

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from repshift_cli.checkpoints.artifact import Opened


__all__ = [
    "Observed",
    "View",
    "class_words",
    "kept_clips_document",
    "kept_indices_document",
    "observe",
    "view_kept",
]


_BATCH = 16


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


def _read(samples: ImageBatch, observed: Observed, has_head: bool) -> tuple[Reading, ...]:
    """One reading per image."""
    if not has_head:
        likeness = torch.nn.functional.cosine_similarity(observed.dense.double(), observed.compressed.double(), dim=-1)
        return tuple(
            Reading(name, cosine=cosine) for name, cosine in zip(samples.names, likeness.tolist(), strict=True)
        )
    classes = class_words(samples.classes)
    labels = [None] * len(samples.names) if samples.labels is None else samples.labels.tolist()
    columns = (samples.names, labels, _guesses(observed.dense, classes), _guesses(observed.compressed, classes))
    return tuple(
        Reading(name, label, None if label is None else _class_name(label, classes), dense, compressed)
        for name, label, dense, compressed in zip(*columns, strict=True)
    )


def _guesses(logits: Tensor, classes: tuple[str, ...] | None) -> Iterator[Guess]:
    best = logits.softmax(-1).max(-1)
    for label, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        yield Guess(label, _class_name(label, classes), probability)


def _class_name(label: int, classes: tuple[str, ...] | None) -> str:
    return f"class {label}" if classes is None else classes[label]


def class_words(classes: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """ImageNet's ids as words, other class names unchanged."""
    if classes is None or classes != imagenet_wnids():
        return classes
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return tuple(str(info.index_to_description(index)).split(",")[0] for index in range(len(classes)))


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
    samples: ImageBatch
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
        where, count, seed: which images or clips, see `load_inputs`; built-in scenes are those of the test split.

    Raises:
        UsageError: the model is dense, no picture is asked for, or more clips than a page holds.
        ModelError: its patches have no known place.
        DataError: as `load_inputs`.
    """
    if opened.compressed is None:
        raise UsageError(
            f"{opened.loaded.description.name} is a dense model, which keeps all tokens: there is nothing to show",
            "Give a checkpoint that `repshift compress` wrote.",
        )
    description, plan = opened.loaded.description, opened.compressed.plan
    preprocessing = description.preprocessing
    patches = patch_grids(opened.compressed)
    classes = int(getattr(opened.loaded.model, "num_classes", 0))
    samples = load_inputs(where, count, preprocessing, seed, num_classes=classes, test_scenes=True)
    if preprocessing.frames is not None:
        check_page(len(samples.tensor), len(plan.sites), preprocessing)
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
