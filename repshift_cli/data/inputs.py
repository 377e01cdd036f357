"""Images, clips or spectrograms drawn from a folder, a dataset or the built-in scenes, preprocessed for a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repshift_cli.data.catalog import data_errors, is_dataset_name, open_dataset
from repshift_cli.data.dataset import DatasetInfo, ImageDataset, shuffled
from repshift_cli.data.decode import UnreadableSample
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.data.sources.folder import readable_name
from repshift_cli.errors import DataError, UsageError
from repshift_cli.utils.ranges import check_ranges

if TYPE_CHECKING:
    from torch import Tensor

_DIGITS, _SHAPES, _SHAPES_QA = "builtin:digits", "builtin:shapes", "builtin:shapes-qa"
_NOISE = "builtin:noise"

_FIRST_TRAINING_SEED = 20_000
"""Added to the seed of training scenes of digits: the built-in models were trained on other seeds."""

_ALIKE_SHARE = 0.7

_FIRST_TRAINING_CLIP = 1_000_000
"""Number of the first training clip: the built-in models were trained on smaller numbers."""


@dataclass(frozen=True)
class ImageBatch:
    """Preprocessed images, clips or spectrograms.

    Attributes:
        tensor: float32 `[n, C, H, W]`, of clips `[n, T, C, H, W]`, of spectrograms `[n, time, frequency]`.
        identity: `where`, `count`, `seed`, and `sha256` of names and sizes, or of the parameters of scenes.
        description: one line for the user.
        builtin: whether these are built-in scenes.
        skipped: inputs that were drawn but could not be read, each with the reason; others took their places.
        names: path or name of each input; the caption of a built-in clip.
        labels: int64 `[n]`, indices of the head's classes; None if there are none that fit the head.
        unlabelled: why there are no labels; None if there are.
        classes: class names of the head, if the labels have names.
    """

    tensor: Tensor
    identity: dict[str, Any]
    description: str
    builtin: bool
    skipped: list[str] = field(default_factory=list)
    names: tuple[str, ...] = ()
    labels: Tensor | None = None
    unlabelled: str | None = None
    classes: tuple[str, ...] | None = None
    info: DatasetInfo = field(default_factory=DatasetInfo)


def load_inputs(
    where: str | Path | None,
    count: int,
    preprocessing: Preprocessing,
    seed: int,
    *,
    num_classes: int | None = None,
    class_names: Sequence[str] = (),
    test_scenes: bool = False,
    class_order: str | None = None,
    without: Collection[str] = (),
) -> ImageBatch:
    """Draw images, clips or spectrograms, as the model takes. The same arguments and files give the same inputs.

    Args:
        where: for images a folder, searched at any depth, or the name of a dataset; for clips a folder of videos and
            of folders of frames, or one video; for spectrograms a folder of `.npy` files; None for built-in scenes, or
            random spectrograms.
        count: maximum number of inputs.
        preprocessing: the model's own transform.
        seed: seed of the random order; built-in scenes depend on it too.
        num_classes: outputs of the model's head; without it, no labels are loaded.
        class_names: names of the outputs, if the model states them.
        test_scenes: draw built-in scenes, or images of `fashion-mnist`, of the test split instead of the training
            split, which no evaluation uses.
        class_order: as for `open_dataset`.
        without: `ImageBatch.names` of inputs that are not drawn.

    Raises:
        DataError: there is no input, or none that can be read; or they are nearly equal (unless `test_scenes`).
        UsageError: the count is not positive or too large, or PyAV is not installed.
    """
    import torch

    check_ranges(images=count)
    with data_errors():
        unit = preprocessing.unit
        if unit == "clip" and (where is None or where in {_SHAPES, _SHAPES_QA}):
            source = _clip_source(count, preprocessing, seed, test_scenes)
        elif unit == "spectrogram" and where is None:
            source = _noise_source(count, preprocessing, seed)
        else:
            files = _open_images(where, count, seed, num_classes, class_names, test_scenes, class_order, unit)
            source = _file_source(*files, preprocessing)
    places, tensors, labels, skipped = _draw(source, count, seed, without)
    if not test_scenes:
        _check_distinct(tensors, source, preprocessing)
    unlabelled = source.unlabelled
    for place, label in zip(places, labels, strict=True):
        if not unlabelled and not 0 <= label < (num_classes or 0):
            unlabelled = f"{source.sample_id(place)} has label {label}, the head of the model has {num_classes} outputs"
    builtin = source.name in {_DIGITS, _SHAPES, _NOISE}
    if source.name == _NOISE:
        kind = source.kind
    elif builtin:
        kind = f"built-in {'test' if test_scenes else 'training'} {source.kind}"
    else:
        kind = f"of {source.total} {source.kind} in {source.name}"
    digest = sha256("\n".join(map(source.fingerprint, places)).encode("utf-8", "backslashreplace")).hexdigest()
    return ImageBatch(
        tensor=torch.stack(tensors),
        identity={"where": readable_name(source.name), "count": len(tensors), "seed": seed, "sha256": digest},
        description=f"{len(tensors)} {kind}, seed {seed}",
        builtin=builtin,
        skipped=skipped,
        names=tuple(readable_name(source.sample_id(place)) for place in places),
        labels=None if unlabelled else torch.tensor(labels, dtype=torch.int64),
        unlabelled=unlabelled,
        classes=None if unlabelled else source.classes,
        info=replace(source.info, warning=None) if unlabelled else source.info,
    )


def open_images(where: str | Path | None, count: int, seed: int = 0) -> ImageDataset:
    """Open images without their labels: a folder, searched at any depth, a dataset by name, or built-in scenes.

    Args:
        count: number of built-in scenes; of other sources all images are there.

    Raises:
        DataError: there is no image.
    """
    with data_errors():
        if isinstance(where, str) and where != _DIGITS and is_dataset_name(where):
            return open_dataset(where, None)
        return _open_images(where, count, seed, None, (), False, None, "image")[0]


@dataclass(frozen=True)
class _Source:
    """Inputs by number.

    Attributes:
        kind: what the inputs are called in messages.
        in_order: whether inputs are drawn in their order: built-in scenes, which are random already, and streams.
        load: returns the preprocessed input and its label.
        fingerprint: text that changes when the input does.
        unlabelled: why the labels cannot be used; None if they can.
    """

    name: str
    kind: str
    total: int
    in_order: bool
    load: Callable[[int], tuple[Tensor, int]]
    sample_id: Callable[[int], str]
    fingerprint: Callable[[int], str]
    unlabelled: str | None
    classes: tuple[str, ...] | None = None
    info: DatasetInfo = field(default_factory=DatasetInfo)


def _check_distinct(tensors: Sequence[Tensor], source: _Source, preprocessing: Preprocessing) -> None:
    """Raise DataError if most neighbours differ by less than one step of 8-bit pixels, so that nearly all are equal."""
    step = len(preprocessing.std) / sum(preprocessing.std) / 255
    equal = [float((one - other).square().mean().sqrt()) < step for one, other in pairwise(tensors)]
    if equal and sum(equal) > _ALIKE_SHARE * len(equal):
        raise DataError(
            f"the {len(tensors)} {source.kind} of {source.name} are (nearly) equal after preprocessing", "Give others."
        )


def _draw(
    source: _Source, count: int, seed: int, without: Collection[str]
) -> tuple[list[int], list[Tensor], list[int], list[str]]:
    """Draw readable inputs: their numbers, tensors and labels, and what was skipped."""
    places: list[int] = []
    tensors: list[Tensor] = []
    labels: list[int] = []
    skipped: list[str] = []
    for index in range(source.total) if source.in_order else shuffled(source.total, seed):
        if without and readable_name(source.sample_id(index)) in without:
            continue
        try:
            tensor, label = source.load(index)
        except UnreadableSample as error:
            skipped.append(f"{error.sample}: {error.reason}")
            continue
        places.append(index)
        tensors.append(tensor)
        labels.append(label)
        if len(places) == count:
            break
    if not places and not skipped:
        raise DataError(
            f"all {source.total} {source.kind} of {source.name} are used already", "Use fewer, or give another folder."
        )
    if not places:
        raise DataError(f"none of the {len(skipped)} {source.kind} in {source.name} can be read; {skipped[0]}")
    return places, tensors, labels, skipped


def _file_source(images: ImageDataset, unlabelled: str | None, preprocessing: Preprocessing) -> _Source:
    from repshift_cli.data.loader import decoded

    if images.name != _DIGITS:
        preprocessing.require_stated()
    transform = preprocessing.transform()

    def load(index: int) -> tuple[Tensor, int]:
        raw, label = images.load(index)
        return decoded(raw, preprocessing, transform)[0], label

    return _Source(
        name=images.name,
        kind="scenes" if images.name == _DIGITS else images.unit,
        total=len(images),
        in_order=images.name == _DIGITS or not images.random_access,
        load=load,
        sample_id=images.sample_id,
        fingerprint=images.fingerprint,
        unlabelled=unlabelled,
        classes=images.classes,
        info=images.info,
    )


def _open_images(  # noqa: PLR0917
    where: str | Path | None,
    count: int,
    seed: int,
    num_classes: int | None,
    class_names: Sequence[str],
    test_scenes: bool,
    class_order: str | None,
    unit: str,
) -> tuple[ImageDataset, str | None]:
    """The files of inputs of this unit, and why their labels cannot be used with a head of `num_classes` outputs."""
    from repshift_cli.data.builtin.digits import DigitDataset
    from repshift_cli.data.sources.folder import IMAGES, MEDIA, VIDEOS, open_folder, open_tree, open_videos

    images: ImageDataset
    labelled: ImageDataset | None = None
    media = MEDIA[unit]
    if media is not IMAGES and str(where).startswith("builtin:"):
        scenes = f", or {_SHAPES} for scenes" if media is VIDEOS else ""
        raise UsageError(f"there are no {media.taken} named {where}", f"Give a folder of {media.unit}{scenes}.")
    if where is None or where == _DIGITS:
        images = (
            DigitDataset("test", count, seed)
            if test_scenes
            else DigitDataset("train", count, _FIRST_TRAINING_SEED + seed)
        )
    elif media is IMAGES and (
        (isinstance(where, str) and is_dataset_name(where)) or not Path(where).expanduser().is_dir()
    ):
        images = open_dataset(str(where), None, class_order=class_order, train=not test_scenes)
    else:
        path = Path(where).expanduser()
        images = open_videos(path) if media is VIDEOS else open_tree(path, media)
        if num_classes:
            try:
                found = open_folder(str(where), path, class_order, media)
                labelled = found.for_head(num_classes, class_names)
            except DataError as error:
                if class_order is not None:
                    raise
                return images, error.message
    if not num_classes:
        return images, "the model has no classification head"
    labelled = labelled or images.for_head(num_classes, class_names)
    classes = labelled.classes
    if classes is not None and len(classes) != num_classes:
        return images, f"{labelled.name} has {len(classes)} classes, the head of the model {num_classes}"
    return labelled, None


def _clip_source(count: int, preprocessing: Preprocessing, seed: int, test_scenes: bool) -> _Source:
    from repshift_cli.data.builtin import moving_shapes as shapes
    from repshift_cli.data.video.dataset import VideoScenes

    if test_scenes:
        scenes = shapes.scenes(count, shapes.TEST_SEED + seed)
    else:
        first = _FIRST_TRAINING_CLIP * (1 + seed)
        scenes = [shapes.scene(number, shapes.TRAIN_SEED) for number in range(first, first + count)]
    videos, transform = VideoScenes(tuple(scenes)), preprocessing.transform()
    return _Source(
        name=_SHAPES,
        kind="clips",
        total=len(videos),
        in_order=True,
        load=lambda index: (videos.load(preprocessing, transform, index).pixels, -1),
        sample_id=videos.sample_id,
        fingerprint=videos.sample_id,
        unlabelled="the built-in clips have no labels",
    )


def _noise_source(count: int, preprocessing: Preprocessing, seed: int) -> _Source:
    import torch

    def load(index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(seed * _FIRST_TRAINING_CLIP + index)
        return torch.randn(*preprocessing.shape, generator=generator), -1

    return _Source(
        name=_NOISE,
        kind="random spectrograms",
        total=count,
        in_order=True,
        load=load,
        sample_id=str,
        fingerprint=str,
        unlabelled="random spectrograms have no labels",
    )
