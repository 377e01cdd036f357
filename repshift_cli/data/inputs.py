"""Unlabelled pictures, ready for the model: what calibration and agreement are measured on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repshift_cli.data.builtin.moving_shapes import TRAIN_SEED, scene_tensor
from repshift_cli.data.dataset import ImageDataset, shuffled
from repshift_cli.data.decode import UnreadableSample, decode_file
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import DataError, UsageError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


__all__ = [
    "Drawn",
    "ImageBatch",
    "Labelled",
    "batch_of",
    "calibration_scenes",
    "draw_pictures",
    "drawn",
    "find_clips",
    "load_clips",
    "load_images",
    "load_inputs",
    "load_labelled",
    "open_pictures",
    "picture_batch",
]


_SCENES = "builtin:digits"


_SCENE_SEED = 20_000
"""Added to the seed of built-in scenes: the built-in models were trained on others, and the test draws others."""


@dataclass(frozen=True)
class ImageBatch:
    """Pictures, or clips of them, that went through the model's own transform.

    Attributes:
        tensor: float32 `[n, C, H, W]`, of clips `[n, T, C, H, W]`.
        identity: what names these pictures: `where`, `count`, `seed`, `sha256` (of names and sizes, or of the
            parameters of scenes).
        description: one line for people.
        builtin: whether these are the built-in scenes rather than pictures of the user.
        skipped: pictures that were drawn but could not be read, each with the reason; others took their places.
    """

    tensor: Tensor
    identity: dict[str, Any]
    description: str
    builtin: bool
    skipped: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Drawn:
    """Pictures out of a source, in the order in which they were drawn.

    Attributes:
        tensors: each through the model's own transform.
        places, labels: their places in the source, and what it says that they show.
        skipped: those that could not be read, each with the reason.
    """

    tensors: list[Tensor] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def draw_pictures(source: ImageDataset, count: int, preprocessing: Preprocessing, seed: int, name: str) -> Drawn:
    """Draw readable pictures: at random, but scenes, which are random already, and streams from their start.

    Args:
        count: how many; fewer come where there are fewer.
        name: of the source, for messages.

    Raises:
        DataError: none can be read.
    """
    drawn, transform = Drawn(), preprocessing.transform()
    as_they_lie = source.name.startswith("builtin:") or not source.random_access
    for index in range(len(source)) if as_they_lie else shuffled(len(source), seed):
        try:
            picture, label = source.load(index)
        except UnreadableSample as problem:
            drawn.skipped.append(f"{problem.sample}: {problem.reason}")
            continue
        drawn.tensors.append(transform(picture))
        drawn.places.append(index)
        drawn.labels.append(label)
        if len(drawn.tensors) == count:
            break
    if not drawn.tensors:
        raise DataError(f"none of the {len(drawn.skipped)} pictures of {name} can be read; {drawn.skipped[0]}")
    return drawn


def calibration_scenes(count: int, seed: int) -> ImageDataset:
    """Built-in scenes of the training digits, which no evaluation uses."""
    from repshift_cli.data.builtin.digits import DigitDataset

    return DigitDataset("train", count, _SCENE_SEED + seed)


def picture_batch(source: ImageDataset, drawn: Drawn, seed: int) -> ImageBatch:
    """Pictures that were drawn from a source, with what names them."""
    builtin = source.name == _SCENES
    what = "built-in training scenes" if builtin else f"of {len(source)} pictures in {source.name}"
    description = f"{len(drawn.tensors)} {what}, seed {seed}"
    prints = [source.fingerprint(index) for index in drawn.places]
    return batch_of(source.name, description, drawn.tensors, prints, drawn.skipped, seed=seed, builtin=builtin)


def load_images(where: str | Path | None, count: int, preprocessing: Preprocessing, seed: int) -> ImageBatch:
    """Draw pictures for calibration; the same arguments and files give the same pictures.

    Args:
        where: a folder, searched at any depth; the name of a dataset (labels are not used); None for built-in scenes
            (of the training digits, which no evaluation uses).
        count: how many; fewer come where there are fewer.
        preprocessing: the model's own transform.
        seed: which ones are drawn.

    Raises:
        DataError: there is no picture, or none that can be read.
        UsageError: the count is not positive.
    """
    if count < 1:
        raise UsageError(f"{count} images were asked for", "Give a number of 1 or more.")
    source = _open(where, count, seed)
    return picture_batch(source, draw_pictures(source, count, preprocessing, seed, source.name), seed)


def open_pictures(where: str | Path, count: int, seed: int = 0) -> ImageDataset:
    """Pictures whose labels do not matter: a folder, searched at any depth, or a dataset by name.

    Args:
        count: how many built-in scenes; of other sources all are there.
        seed: which built-in scenes.

    Raises:
        DataError: there is no picture.
    """
    return _open(where, count, seed)


def batch_of(
    where: str,
    description: str,
    tensors: Sequence[Tensor],
    prints: Sequence[str],
    skipped: Sequence[str] = (),
    *,
    seed: int,
    builtin: bool = False,
) -> ImageBatch:
    """Inputs that were drawn, with the text that names each one (`prints`); the other arguments as `ImageBatch`."""
    import torch

    digest = sha256("\n".join(prints).encode()).hexdigest()
    identity = {"where": where, "count": len(tensors), "seed": seed, "sha256": digest}
    return ImageBatch(torch.stack(list(tensors)), identity, description, builtin, list(skipped))


def _open(where: str | Path | None, count: int, seed: int) -> ImageDataset:
    from repshift_cli.data.catalog import is_dataset_name, open_dataset

    if where is None or where == _SCENES:
        return calibration_scenes(count, seed)
    if isinstance(where, str) and is_dataset_name(where):
        return open_dataset(where, None)
    return _open_tree(Path(where).expanduser())


def _open_tree(root: Path) -> ImageDataset:
    from repshift_cli.data.catalog import dataset_names
    from repshift_cli.data.sources.folder import PICTURE_SUFFIXES, find_pictures

    endings = ", ".join(sorted(suffix[1:] for suffix in PICTURE_SUFFIXES))
    hint = f"Give a folder with pictures ({endings}; class folders or not), or a dataset: {', '.join(dataset_names())}."
    if not root.exists():
        raise DataError(f"the folder {root} does not exist", hint)
    if not root.is_dir():
        raise DataError(f"{root} is a file, not a folder", hint)
    paths = find_pictures(root)
    if not paths:
        raise DataError(f"there are no pictures in {root}", hint)
    return _PictureTree(root, paths)


class _PictureTree(ImageDataset):
    """Pictures without labels, at any depth below a folder."""

    def __init__(self, root: Path, paths: list[Path]) -> None:
        self.name = str(root)
        self.root = root
        self.paths = paths

    @property
    def description(self) -> str:
        return f"{len(self)} pictures in {self.root}"

    @property
    def classes(self) -> None:
        return None

    def __len__(self) -> int:
        return len(self.paths)

    def sample_id(self, index: int) -> str:
        return str(self.paths[index])

    def load(self, index: int) -> tuple[Image.Image, int]:
        return decode_file(self.paths[index]), -1

    def fingerprint(self, index: int) -> str:
        from repshift_cli.data.sources.folder import file_fingerprint

        return file_fingerprint(self.paths[index], self.root)


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


def _scenes(count: int, preprocessing: Preprocessing, seed: int) -> ImageBatch:
    from repshift_cli.data.builtin import moving_shapes

    transform, frames = preprocessing.transform(), preprocessing.frames or 1
    numbers = [_FIRST_SCENE * (1 + seed) + index for index in range(count)]
    scenes = [moving_shapes.scene(number, TRAIN_SEED) for number in numbers]
    tensors = [
        scene_tensor(moving_shapes.render(scene, frames, preprocessing.input_size[1]), transform) for scene in scenes
    ]
    prints = [moving_shapes.caption(scene) for scene in scenes]
    return batch_of(_SCENES, f"{count} built-in training clips, seed {seed}", tensors, prints, seed=seed, builtin=True)


def _files(root: Path, count: int, preprocessing: Preprocessing, seed: int) -> ImageBatch:
    from repshift_cli.data.video.decode import UnreadableVideo, clip_tensor, read_clip

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
    from repshift_cli.data.sources.folder import file_fingerprint, find_pictures

    if path.is_dir():
        return [file_fingerprint(frame, root) for frame in find_pictures(path)]
    return [file_fingerprint(path, root if root.is_dir() else root.parent)]


def find_clips(root: Path) -> list[Path]:
    """Video files, and folders that hold pictures, at any depth, in the order of their names."""
    from repshift_cli.data.sources.folder import PICTURE_SUFFIXES, find_files, find_pictures
    from repshift_cli.data.video.decode import VIDEO_SUFFIXES

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


_SCENES = "builtin:digits"


@dataclass(frozen=True)
class Labelled:
    """Inputs of a model and, where known, what they show.

    Attributes:
        batch: the inputs.
        labels: int64 `[n]`, indices of the head's classes; None where the source tells none that fit the head.
        unlabelled: why there are no labels; None where there are.
    """

    batch: ImageBatch
    labels: Tensor | None
    unlabelled: str | None


def load_labelled(
    where: str | None, count: int, preprocessing: Preprocessing, num_classes: int | None, seed: int
) -> Labelled:
    """Draw inputs as `load_inputs` does, with labels where `repshift eval` would find some for this head.

    Args:
        where: a folder, the name of a dataset, or None for built-in scenes (of the training digits, which no evaluation
            uses).
        count: how many; fewer come where there are fewer.
        preprocessing: the model's own transform.
        num_classes: outputs of its head; None or 0 where it has none.
        seed: which ones are drawn.

    Raises:
        DataError, UsageError: as `load_inputs`.
    """
    if preprocessing.frames is not None:
        return Labelled(load_inputs(where, count, preprocessing, seed), None, "clips come without labels")
    if not num_classes:
        return Labelled(load_inputs(where, count, preprocessing, seed), None, "the model has no classification head")
    found = _labelled_source(where, count, num_classes, seed)
    if isinstance(found, str):
        return Labelled(load_inputs(where, count, preprocessing, seed), None, found)
    return _draw(found, count, preprocessing, num_classes, seed)


def _labelled_source(where: str | None, count: int, num_classes: int, seed: int) -> ImageDataset | str:
    """The source with its labels, or why it has none for this head."""
    from repshift_cli.data.catalog import is_dataset_name, open_dataset
    from repshift_cli.data.sources.folder import class_folders, open_folder

    if where is None or where == _SCENES:
        source = calibration_scenes(count, seed)
    elif is_dataset_name(where):
        source = open_dataset(where, None).for_head(num_classes)
    else:
        root = Path(where).expanduser()
        if not root.is_dir() or not class_folders(root):
            return f"{where} has no class folders"
        try:
            source = open_folder(where, root).for_head(num_classes)
        except DataError:
            return f"the pictures of {where} do not lie in class folders"
    classes = source.classes
    if classes is None:
        return f"{source.name} does not name its classes"
    if len(classes) != num_classes:
        return f"{source.name} has {len(classes)} classes, the head of the model {num_classes}"
    return source


def _draw(source: ImageDataset, count: int, preprocessing: Preprocessing, num_classes: int, seed: int) -> Labelled:
    import torch

    drawn = draw_pictures(source, count, preprocessing, seed, source.name)
    for index, label in zip(drawn.places, drawn.labels, strict=True):
        if not 0 <= label < num_classes:
            raise DataError(f"{source.sample_id(index)} has label {label}, the head {num_classes} outputs")
    return Labelled(picture_batch(source, drawn, seed), torch.tensor(drawn.labels, dtype=torch.int64), None)
