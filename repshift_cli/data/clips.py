"""Unlabelled clips, ready for a video model; and one way to ask for the inputs of any model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from repshift_cli.data.base import shuffled
from repshift_cli.data.images import ImageBatch, batch_of, load_images
from repshift_cli.data.moving_shapes import TRAIN_SEED
from repshift_cli.errors import DataError, UsageError
from repshift_cli.preprocessing import Preprocessing

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL import Image
    from torch import Tensor

__all__ = ["drawn", "find_clips", "load_clips", "load_inputs", "scene_tensor"]

_SCENES = "builtin:shapes"

_FIRST_SCENE = 1_000_000
"""Built-in scenes of the training seed are drawn from here on, where training did not come."""


def load_inputs(where: str | Path | None, count: int, preprocessing: Preprocessing, seed: int) -> ImageBatch:
    """Pictures or clips, as the model takes them; see `load_images` and `load_clips`."""
    if preprocessing.frames is None:
        return load_images(where, count, preprocessing, seed)
    return load_clips(where, count, preprocessing, seed)


def load_clips(where: str | Path | None, count: int, preprocessing: Preprocessing, seed: int) -> ImageBatch:
    """Draw clips for calibration and comparison; the same arguments and files give the same clips.

    Args:
        where: a folder, searched at any depth for video files and for folders of frames; one video file; None for
            built-in scenes.
        count: how many; fewer come where there are fewer.
        preprocessing: the model's own transform, with the number of frames.
        seed: which ones are drawn.

    Returns:
        Its tensor is float32 `[n, T, C, H, W]`.

    Raises:
        DataError: there is no video, or none that can be read.
        UsageError: the count is not positive, or PyAV is not installed.
    """
    if count < 1:
        raise UsageError(f"{count} clips were asked for", "Give a number of 1 or more.")
    if where is None or where == _SCENES:
        return _scenes(count, preprocessing, seed)
    return _files(Path(where).expanduser(), count, preprocessing, seed)


def scene_tensor(frames: object, transform: Callable[[Image.Image], Tensor]) -> Tensor:
    """Rendered frames, uint8 `[T, H, W, 3]`, as the model takes them: float32 `[T, C, H, W]`."""
    import numpy as np
    import torch
    from PIL import Image

    return torch.stack([transform(Image.fromarray(frame)) for frame in np.asarray(frames)])


def _scenes(count: int, preprocessing: Preprocessing, seed: int) -> ImageBatch:
    from repshift_cli.data import moving_shapes

    transform, frames = preprocessing.transform(), preprocessing.frames or 1
    numbers = [_FIRST_SCENE * (1 + seed) + index for index in range(count)]
    scenes = [moving_shapes.scene(number, TRAIN_SEED) for number in numbers]
    tensors = [
        scene_tensor(moving_shapes.render(scene, frames, preprocessing.input_size[1]), transform) for scene in scenes
    ]
    prints = [moving_shapes.caption(scene) for scene in scenes]
    return batch_of(_SCENES, f"{count} built-in training clips, seed {seed}", tensors, prints, seed=seed, builtin=True)


def _files(root: Path, count: int, preprocessing: Preprocessing, seed: int) -> ImageBatch:
    from repshift_cli.data.video import UnreadableVideo, clip_tensor, read_clip

    paths = find_clips(root)
    transform = preprocessing.transform()
    tensors: list[Tensor] = []
    prints: list[str] = []
    skipped: list[str] = []
    for path in drawn(paths, seed):
        try:
            clip = read_clip(path, preprocessing.frames or 1)
        except UnreadableVideo as problem:
            skipped.append(f"{problem.sample}: {problem.reason}")
            continue
        tensors.append(clip_tensor(clip, transform))
        prints += _fingerprints(path, root)
        if len(tensors) == count:
            break
    if not tensors:
        raise DataError(f"none of the {len(skipped)} videos in {root} can be read; {skipped[0]}")
    description = f"{len(tensors)} of {len(paths)} videos in {root}, seed {seed}"
    return batch_of(str(root), description, tensors, prints, skipped, seed=seed)


def _fingerprints(path: Path, root: Path) -> list[str]:
    """Names and sizes of a video file, or of all frames of a clip."""
    from repshift_cli.data.folder import file_fingerprint, find_pictures

    if path.is_dir():
        return [file_fingerprint(frame, root) for frame in find_pictures(path)]
    return [file_fingerprint(path, root if root.is_dir() else root.parent)]


def find_clips(root: Path) -> list[Path]:
    """Video files, and folders that hold pictures, at any depth, in the order of their names."""
    from repshift_cli.data.folder import PICTURE_SUFFIXES, find_files, find_pictures
    from repshift_cli.data.video import VIDEO_SUFFIXES

    endings = ", ".join(suffix[1:] for suffix in VIDEO_SUFFIXES)
    pictures = ", ".join(sorted(suffix[1:] for suffix in PICTURE_SUFFIXES))
    hint = f"Give a folder with videos ({endings}) or with folders of frames ({pictures})."
    if not root.exists():
        raise DataError(f"the folder {root} does not exist", hint)
    if root.is_file():
        return [root]
    clips = {path.parent for path in find_pictures(root)}
    found = sorted([*find_files(root, VIDEO_SUFFIXES), *clips])
    if not found:
        raise DataError(f"there are no videos in {root}", hint)
    return found


def drawn(paths: list[Path], seed: int) -> Iterator[Path]:
    """All of them, in the order in which a seed tries them."""
    yield from (paths[index] for index in shuffled(len(paths), seed))
