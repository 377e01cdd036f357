"""Sample the images and clips to show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from repshift_cli.data import inputs as clip_files
from repshift_cli.data.dataset import ImageDataset
from repshift_cli.data.inputs import draw_pictures
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.data.video.decode import UnreadableVideo, clip_tensor, read_clip
from repshift_cli.errors import DataError, UsageError

__all__ = ["Samples", "draw_clips", "draw_samples"]


@dataclass(frozen=True)
class Samples:
    """Images or clips to show.

    Attributes:
        tensor: float32 `[n, C, H, W]`, of clips `[n, T, C, H, W]`, preprocessed.
        names: path or name of each; caption of a built-in clip.
        labels: class of each, None if unknown or if the model has other classes.
        classes: names of the classes, None if they have none.
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
    from repshift_cli.data.builtin import moving_shapes

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
    from repshift_cli.data.catalog import is_dataset_name, open_dataset
    from repshift_cli.data.sources.folder import PICTURE_SUFFIXES, FileDataset, find_pictures

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
    from repshift_cli.data.sources.folder import open_folder

    try:
        found = open_folder(where, root).for_head(num_classes)
    except DataError:
        return None
    return found if len(found.classes) == num_classes else None


def _readable(classes: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """ImageNet's ids as words, other names as they are."""
    from repshift_cli.data.sources.class_labels import imagenet_wnids

    if classes is None or classes != imagenet_wnids():
        return classes
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return tuple(str(info.index_to_description(index)).split(",")[0] for index in range(len(classes)))
