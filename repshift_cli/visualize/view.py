"""Run the model on the samples and collect the kept tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from repshift_cli.data.inputs import ImageBatch, load_inputs
from repshift_cli.data.sources.class_labels import imagenet_wnids
from repshift_cli.errors import CheckFailed, UsageError
from repshift_cli.models.tensor_model import class_names
from repshift_cli.planning.layout import PatchGrid
from repshift_cli.reduction.compressed_model import CompressedModel
from repshift_cli.reduction.reducers.base import Merger, build_reducer
from repshift_cli.visualize.draw import check_page, kept_clips_figure, kept_tokens_figure
from repshift_cli.visualize.patches import kept_per_frame, patch_grids, restore_images
from repshift_cli.visualize.predictions import Prediction, SampleResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from repshift_cli.checkpoints.artifact import Opened

_BATCH = 16
_CLIP_DIMS = 5  # [n, T, C, H, W]


@dataclass(frozen=True)
class TracedOutputs:
    """Kept tokens of some images or clips, and the outputs of both models.

    Attributes:
        kept: int64 `[n, K]` by layer: ascending positions of the remaining tokens in the patch grid; for merged tokens,
            of those that the others were merged into.
        groups: int64 `[n, N]` by layer, as in `Trace`; empty where tokens are dropped.
        dense, compressed: float32 `[n, K]`.
    """

    kept: dict[int, np.ndarray]
    groups: dict[int, np.ndarray]
    dense: Tensor
    compressed: Tensor


@torch.inference_mode()
def trace_samples(model: CompressedModel, images: Tensor) -> TracedOutputs:
    """Run both models on preprocessed images `[n, C, H, W]` or clips `[n, T, C, H, W]`."""
    sample = next(model.model.parameters())
    traces, dense = [], []
    for part in images.split(max(1, _BATCH // math.prod(images.shape[1:-3]))):
        batch = part.to(device=sample.device, dtype=sample.dtype)
        traces.append(model.trace(batch))
        with model.dense() as dense_model:
            dense.append(dense_model(batch).float().cpu())
    outputs = (torch.cat(dense), torch.cat([trace.output.float().cpu() for trace in traces]))
    if not all(bool(output.isfinite().all()) for output in outputs):
        raise CheckFailed("the model returns values that are not finite", "Check its weights.")
    kept = {layer: torch.cat([trace.kept[layer].cpu() for trace in traces]) for layer in traces[0].kept}
    in_order = {layer: rows.sort(dim=1).values.numpy() for layer, rows in kept.items()}  # merging changes the order
    groups = {layer: torch.cat([trace.groups[layer].cpu() for trace in traces]).numpy() for layer in traces[0].groups}
    return TracedOutputs(in_order, groups, *outputs)


def _results(samples: ImageBatch, outputs: TracedOutputs, has_head: bool) -> tuple[SampleResult, ...]:
    if not has_head:
        likeness = torch.nn.functional.cosine_similarity(outputs.dense.double(), outputs.compressed.double(), dim=-1)
        return tuple(
            SampleResult(name, cosine=cosine) for name, cosine in zip(samples.names, likeness.tolist(), strict=True)
        )
    classes = class_words(samples.classes)
    labels = [None] * len(samples.names) if samples.labels is None else samples.labels.tolist()
    columns = (
        samples.names,
        labels,
        _predictions(outputs.dense, classes),
        _predictions(outputs.compressed, classes),
    )
    return tuple(
        SampleResult(name, label, None if label is None else _class_name(label, classes), dense, compressed)
        for name, label, dense, compressed in zip(*columns, strict=True)
    )


def _predictions(logits: Tensor, classes: tuple[str, ...] | None) -> Iterator[Prediction]:
    best = logits.softmax(-1).max(-1)
    for label, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        yield Prediction(label, _class_name(label, classes), probability)


def _class_name(label: int, classes: tuple[str, ...] | None) -> str:
    return f"class {label}" if classes is None else classes[label]


def class_words(classes: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """ImageNet's ids as words, other class names unchanged."""
    if classes is None or classes != imagenet_wnids():
        return classes
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return tuple(str(info.index_to_description(index)).split(",")[0] for index in range(len(classes)))


@dataclass(frozen=True)
class Visualization:
    """What `repshift visualize` shows.

    Attributes:
        images: uint8 `[n, H, W, 3]`, of clips `[n, T, H, W, 3]`: the input of the model.
        kept, groups: as in `TracedOutputs`.
        merged: whether the other tokens were merged.
    """

    title: str
    remark: str
    samples: ImageBatch
    patches: Mapping[int, PatchGrid]
    images: np.ndarray
    kept: dict[int, np.ndarray]
    results: tuple[SampleResult, ...]
    merged: bool = False
    groups: Mapping[int, np.ndarray] = field(default_factory=dict)

    @property
    def of_clips(self) -> bool:
        return self.samples.tensor.ndim == _CLIP_DIMS

    @property
    def unchanged(self) -> int | None:
        """Number of predictions that agree with the dense model; None without a head."""
        pairs = [(result.dense, result.compressed) for result in self.results]
        same = [dense.label == compressed.label for dense, compressed in pairs if dense and compressed]
        return sum(same) if same else None

    def figure(self) -> Figure:
        arguments = (self.images, self.kept, self.patches, self.results)
        if self.of_clips:
            return kept_clips_figure(*arguments, title=self.title, remark=self.remark, merged=self.merged)
        return kept_tokens_figure(*arguments, title=self.title, remark=self.remark)

    def document(self) -> dict[str, Any]:
        return kept_document(self.kept, self.patches, self.results, self.merged)


def visualize(opened: Opened, where: str, count: int, seed: int = 0, class_order: str | None = None) -> Visualization:
    """Run a compressed model, on its device, on some images or clips and collect the kept tokens.

    Args:
        opened: a compressed model, on the device to run on.
        where, count, seed, class_order: which images or clips, see `load_inputs`; built-in scenes are those of the
            test split.

    Raises:
        UsageError: the model is dense, `count` is 0, or more clips than fit on one page.
        ModelError: it has no patch grid.
        DataError: as `load_inputs`.
    """
    if opened.compressed is None:
        raise UsageError(
            f"{opened.loaded.description.name} is dense: it keeps all tokens, so there is nothing to show",
            "Give a checkpoint that `repshift compress` wrote.",
        )
    description, plan = opened.loaded.description, opened.compressed.plan
    preprocessing = description.preprocessing
    patches = patch_grids(opened.compressed)
    classes = int(getattr(opened.loaded.model, "num_classes", 0))
    samples = load_inputs(
        where,
        count,
        preprocessing,
        seed,
        num_classes=classes,
        class_names=class_names(opened.loaded.model),
        test_scenes=True,
        class_order=class_order,
    )
    if preprocessing.frames is not None:
        check_page(len(samples.tensor), len(plan.sites), preprocessing)
    outputs = trace_samples(opened.compressed, samples.tensor)
    score = ", ".join(dict.fromkeys(site.metric.kind.replace("_", " ") for site in plan.sites))
    merged = isinstance(build_reducer(plan.reducer), Merger)
    return Visualization(
        title=f"{description.name}: {'where tokens are left after merging' if merged else 'tokens that are kept'}",
        remark=f"{score}; {opened.dense_macs / opened.macs:.2f}x fewer MACs than dense",
        samples=samples,
        patches=patches,
        images=restore_images(samples.tensor, preprocessing.mean, preprocessing.std),
        kept=outputs.kept,
        results=_results(samples, outputs, classes > 0),
        merged=merged,
        groups=outputs.groups,
    )


def kept_document(
    kept: Mapping[int, np.ndarray],
    patches: Mapping[int, PatchGrid],
    results: Sequence[SampleResult],
    merged: bool = False,
) -> dict[str, Any]:
    """The kept positions as JSON.

    Args:
        kept: int64 `[n, K]` by layer.

    Returns:
        `grid` and `patch` (pixels) of the first layer; `layers` with their number of kept tokens, grid and patch; and
        `images` or `clips` with their result and `kept`, the ascending positions by layer: row * columns + column in
        the grid of that layer, for clips plus frame * rows * columns. Clips also have `per_frame`, the number of kept
        tokens in each frame by layer, and their document has `tokens`, which is "kept" or "merged".
    """
    grids = {layer: _grid_document(patches[layer]) for layer in kept}
    layers = [{"layer": layer, "kept": int(rows.shape[1]), **grids[layer]} for layer, rows in kept.items()]
    document = {**next(iter(grids.values())), "layers": layers}
    of_clips = "frames" in document["grid"]
    samples = []
    for index, result in enumerate(results):
        entry = result.to_dict(of_clips) | {"kept": {str(layer): rows[index].tolist() for layer, rows in kept.items()}}
        if of_clips:
            counts = {layer: kept_per_frame(rows[[index]], patches[layer])[0] for layer, rows in kept.items()}
            entry["per_frame"] = {str(layer): numbers.tolist() for layer, numbers in counts.items()}
        samples.append(entry)
    if of_clips:
        return {**document, "tokens": "merged" if merged else "kept", "clips": samples}
    return {**document, "images": samples}


def _grid_document(patches: PatchGrid) -> dict[str, Any]:
    frames = {} if patches.frames is None else {"frames": patches.frames}
    return {
        "grid": {**frames, "rows": patches.rows, "columns": patches.columns},
        "patch": {"height": patches.height, "width": patches.width},
    }
