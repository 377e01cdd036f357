"""Run the model on the samples and collect the kept tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from repshift_cli.errors import UsageError
from repshift_cli.reduction.compressed_model import CompressedModel
from repshift_cli.reduction.reducers.base import Merger, build_reducer
from repshift_cli.visualize.draw import check_page, kept_clips_figure, kept_tokens_figure
from repshift_cli.visualize.patches import PatchGrid, kept_per_frame, patch_grids, restore_images
from repshift_cli.visualize.readings import Guess, Reading
from repshift_cli.visualize.samples import Samples, draw_clips, draw_samples

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from repshift_cli.checkpoints.artifact import Opened


__all__ = ["Observed", "View", "kept_clips_document", "kept_indices_document", "observe", "view_kept"]

_BATCH = 16


@dataclass(frozen=True)
class Observed:
    """Kept tokens and outputs of a compressed model and its dense model.

    Attributes:
        kept: int64 `[n, K]` by layer: ascending indices of the kept tokens in the patch grid or map; of merged tokens,
            that of the token into which the others were merged.
        dense, compressed: float32 `[n, K]`, the outputs.
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
        with model.dense() as dense_model:
            dense.append(dense_model(batch).float().cpu())
    kept = {layer: torch.cat([trace.kept[layer].cpu() for trace in traces]) for layer in traces[0].kept}
    in_order = {layer: rows.sort(dim=1).values.numpy() for layer, rows in kept.items()}  # merging changes the order
    return Observed(in_order, torch.cat(dense), torch.cat([trace.output.float().cpu() for trace in traces]))


def _read(samples: Samples, observed: Observed, has_head: bool) -> tuple[Reading, ...]:
    """One reading per image or clip."""
    if not has_head:
        cosines = torch.nn.functional.cosine_similarity(observed.dense.double(), observed.compressed.double(), dim=-1)
        return tuple(Reading(name, cosine=cosine) for name, cosine in zip(samples.names, cosines.tolist(), strict=True))
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


@dataclass(frozen=True)
class View:
    """Everything that `repshift visualize` shows.

    Attributes:
        patches: patch grid by layer.
        images: uint8 `[n, H, W, 3]`, of clips `[n, T, H, W, 3]`, the inputs of the model.
        kept: as in `Observed`.
        merged: whether the other tokens were merged into the kept ones.
    """

    title: str
    remark: str
    samples: Samples
    patches: Mapping[int, PatchGrid]
    images: np.ndarray
    kept: dict[int, np.ndarray]
    readings: tuple[Reading, ...]
    merged: bool = False

    @property
    def of_clips(self) -> bool:
        """Whether clips are shown."""
        return self.samples.tensor.ndim == _CLIP_DIMS

    @property
    def unchanged(self) -> int | None:
        """Number of predictions equal to the dense model's; None if the model has no head."""
        pairs = [(reading.dense, reading.compressed) for reading in self.readings]
        same = [dense.label == compressed.label for dense, compressed in pairs if dense and compressed]
        return sum(same) if same else None

    def figure(self) -> Figure:
        """The figure."""
        seen = (self.images, self.kept, self.patches, self.readings)
        if self.of_clips:
            return kept_clips_figure(*seen, title=self.title, remark=self.remark, merged=self.merged)
        return kept_tokens_figure(*seen, title=self.title, remark=self.remark)

    def indices(self) -> dict[str, Any]:
        """The kept indices, for a JSON file."""
        if self.of_clips:
            return kept_clips_document(self.kept, self.patches, self.readings, self.merged)
        return kept_indices_document(self.kept, self.patches, self.readings)

    def samples_to_dict(self) -> dict[str, Any]:
        """Label and predictions of each image or clip, for JSON."""
        if self.of_clips:
            return {"clips": [reading.clip_to_dict() for reading in self.readings]}
        return {"images": [reading.to_dict() for reading in self.readings]}


_CLIP_DIMS = 5  # [n, T, C, H, W]


def view_kept(opened: Opened, where: str, count: int, seed: int = 0) -> View:
    """Run a compressed model on some images or clips and collect the kept tokens.

    Args:
        opened: a compressed model, on its device.
        where, count, seed: of the images or clips, see `draw_samples` and `draw_clips`.

    Raises:
        UsageError: the model is dense, `count` is below 1, or more clips than a figure holds.
        ModelError: unknown patch grid.
        DataError: as `draw_samples` and `draw_clips`.
    """
    if opened.compressed is None:
        raise UsageError(
            f"{opened.loaded.description.name} is a dense model, which keeps all tokens: nothing to show",
            "Give a checkpoint that `repshift compress` wrote.",
        )
    description, plan = opened.loaded.description, opened.compressed.plan
    preprocessing = description.preprocessing
    if count < 1:
        raise UsageError(f"invalid count={count}: must be at least 1")
    patches = patch_grids(opened.compressed)
    classes = int(getattr(opened.loaded.model, "num_classes", 0))
    if preprocessing.frames is None:
        samples = draw_samples(where, count, preprocessing, classes, seed)
    else:
        samples = draw_clips(where, count, preprocessing, seed)
        check_page(len(samples.tensor), len(plan.sites), preprocessing)
    observed = observe(opened.compressed, samples.tensor)
    metrics = ", ".join(dict.fromkeys(site.metric.kind.replace("_", " ") for site in plan.sites))
    merged = isinstance(build_reducer(plan.reducer), Merger)
    return View(
        title=f"{description.name}: {'tokens after merging' if merged else 'kept tokens'}",
        remark=f"{metrics}; {opened.dense_macs / opened.macs:.2f}x fewer MACs than dense",
        samples=samples,
        patches=patches,
        images=restore_images(samples.tensor, preprocessing.mean, preprocessing.std),
        kept=observed.kept,
        readings=_read(samples, observed, classes > 0),
        merged=merged,
    )


def kept_indices_document(
    kept: Mapping[int, np.ndarray], patches: Mapping[int, PatchGrid], readings: Sequence[Reading]
) -> dict[str, Any]:
    """JSON document of the kept patches of images.

    Args:
        kept: int64 `[n, K]` by layer.
        patches: the grid of each layer.
        readings: one per image.

    Returns:
        `grid` and `patch` (pixels) of the first layer; `layers` with the number of kept tokens, grid and patch; and per
        image its reading and `kept`: ascending indices by layer (row * columns + column in the grid of that layer).
    """
    images = [
        {**reading.to_dict(), "kept": {str(layer): rows[index].tolist() for layer, rows in kept.items()}}
        for index, reading in enumerate(readings)
    ]
    return {**_layer_entries(kept, patches), "images": images}


def kept_clips_document(
    kept: Mapping[int, np.ndarray], patches: Mapping[int, PatchGrid], readings: Sequence[Reading], merged: bool
) -> dict[str, Any]:
    """JSON document of the kept patches of clips.

    Args:
        kept, patches, readings: as for `kept_indices_document`.
        merged: whether the other tokens were merged into the kept ones.

    Returns:
        As for images, with `frames` in each `grid`; `tokens`, which is "kept" or "merged"; and `clips` with ascending
        indices by layer (frame * rows * columns + row * columns + column) and their number in each frame, `per_frame`.
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
    return {**_layer_entries(kept, patches), "tokens": "merged" if merged else "kept", "clips": clips}


def _layer_entries(kept: Mapping[int, np.ndarray], patches: Mapping[int, PatchGrid]) -> dict[str, Any]:
    """Grid and patch of the first layer, and `layers`."""
    layers = []
    for layer, rows in kept.items():
        grid = patches[layer]
        frames = {} if grid.frames is None else {"frames": grid.frames}
        layers.append(
            {
                "layer": layer,
                "kept": int(rows.shape[1]),
                "grid": {**frames, "rows": grid.rows, "columns": grid.columns},
                "patch": {"height": grid.height, "width": grid.width},
            }
        )
    return {"grid": layers[0]["grid"], "patch": layers[0]["patch"], "layers": layers}
