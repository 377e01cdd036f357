"""Patch grids of images and clips, and masks of kept patches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from repshift_cli.errors import ModelError
from repshift_cli.planning.layout import PatchGrid
from repshift_cli.reduction.compressed_model import CompressedModel


def patch_grids(model: CompressedModel) -> dict[int, PatchGrid]:
    """The grid of the tokens at each site, by layer; raises ModelError as `Family.patch_grid`."""
    layers = [site.layer for site in model.plan.sites]
    if model.layout.map_size is None:
        return dict.fromkeys(layers, model.family.patch_grid(model.model))
    found: dict[int, PatchGrid] = {}
    high = wide = 1
    for site, (rows, columns) in model.layout.grids():
        high *= math.prod(window.stride[0] for window in site.windows)
        wide *= math.prod(window.stride[1] for window in site.windows)
        if site.layer in layers:
            found[site.layer] = PatchGrid(rows, columns, high, wide)
    return found


def restore_images(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Undo the normalization of inputs: float `[..., C, H, W]` to uint8 `[..., H, W, 3]`.

    Raises:
        ModelError: not 1 or 3 channels.
    """
    channels = images.shape[-3]
    if channels not in (1, 3):
        raise ModelError(f"inputs with {channels} channels cannot be shown as images")
    offset, scale = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    pixels = (images.float().cpu() * scale + offset).mul(255).round().clamp(0, 255).to(torch.uint8)
    restored: np.ndarray = pixels.expand(*pixels.shape[:-3], 3, -1, -1).movedim(-3, -1).numpy()
    return restored


def kept_masks(kept: np.ndarray, patches: PatchGrid, height: int, width: int) -> np.ndarray:
    """Masks of the pixels in kept patches: positions int64 `[B, K]` to bool `[B, height, width]`.

    Height and width are those of the image; of a clip, of its frames stacked vertically.
    """
    masks = np.zeros((len(kept), height, width), dtype=bool)
    pixels = kept_cells(kept, patches).repeat(patches.height, axis=1).repeat(patches.width, axis=2)
    rows, columns = min(height, pixels.shape[1]), min(width, pixels.shape[2])
    masks[:, :rows, :columns] = pixels[:, :rows, :columns]
    return masks


def kept_cells(kept: np.ndarray, patches: PatchGrid) -> np.ndarray:
    """Mask of the patch grid: positions int64 `[B, K]` to bool `[B, lines, columns]`."""
    cells = np.zeros((len(kept), patches.patches), dtype=bool)
    np.put_along_axis(cells, kept, True, axis=1)
    return cells.reshape(len(kept), patches.lines, patches.columns)


def kept_per_frame(kept: np.ndarray, patches: PatchGrid) -> np.ndarray:
    """Number of kept tokens in each frame: positions int64 `[B, K]` to int64 `[B, frames]`."""
    counts: np.ndarray = by_frame(kept_cells(kept, patches), patches).sum(axis=(2, 3))
    return counts


def by_frame(lines: np.ndarray, patches: PatchGrid) -> np.ndarray:
    """Split vertically stacked frames: `[B, frames * H, ...]` to `[B, frames, H, ...]`."""
    frames = patches.frames or 1
    return lines.reshape(len(lines), frames, lines.shape[1] // frames, *lines.shape[2:])


_FADED = 218.0  # light grey, which contrasts with dark and bright images
_FADED_SHARE = 0.82


def fade_dropped(images: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Fade all pixels of images, uint8 `[B, H, W, 3]`, to a light grey where the masks, bool `[B, H, W]`, are False."""
    grey = images.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    faded = (_FADED_SHARE * _FADED + (1 - _FADED_SHARE) * grey).round().astype(np.uint8)
    return np.where(masks[..., None], images, faded[..., None])
