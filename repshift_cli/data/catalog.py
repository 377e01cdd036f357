"""Open datasets by name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from repshift_cli.data.dataset import ImageDataset, limited
from repshift_cli.errors import DataError, UsageError
from repshift_cli.utils.ranges import check_ranges
from repshift_cli.utils.suggest import nearest

DATA_DIR_VARIABLE = "REPSHIFT_DATA_DIR"
"""The environment variable that replaces `--data-dir`."""

DEFAULT_SCENES = 1000
"""Number of built-in scenes in an evaluation without a limit."""

DATASET_NAMES = (
    "builtin:digits",
    "folder",
    "imagenet-val",
    "imagenet-real",
    "imagenet-v2",
    "imagenet-a",
    "imagenet-r",
    "fashion-mnist",
    "shards",
)
"""The named datasets of `open_dataset`, without paths and timm's names (`torch/cifar10`)."""


def is_dataset_name(name: str) -> bool:
    """Whether a name is that of a dataset, not the path of a folder."""
    from repshift_cli.data.sources.timm_reader import is_timm_name

    return name in DATASET_NAMES or is_timm_name(name)


def open_dataset(
    name: str,
    data_dir: Path | None,
    limit: int | None = None,
    seed: int = 0,
    class_order: str | None = None,
    *,
    unit: str = "image",
    train: bool = False,
) -> ImageDataset:
    """Open a dataset.

    Args:
        name: one of `DATASET_NAMES`, the path of a folder with class folders, of a tar or of several
            (`DIR/val-{0000..0007}.tar`), or a name of timm's factory with a prefix (`torch/cifar10`,
            `hfds/owner/name@test`).
        data_dir: the dataset's folder, or a folder that holds one with the dataset's name; the default is the
            environment variable REPSHIFT_DATA_DIR.
        limit: maximum number of images, evenly spaced over the sorted set (for built-in scenes: the number).
        seed: which built-in scenes are drawn; other datasets do not depend on it.
        class_order: as for `named_classes`.
        unit: of `Preprocessing`: for `clip` and `spectrogram` a folder with class folders of such files is opened.
        train: open the training split of `fashion-mnist`; other datasets do not depend on it.

    Raises:
        DataError: the dataset is unknown, missing, empty or damaged.
        UsageError: the limit is not positive; `data_dir` is given for a dataset that needs none, or `class_order` for
            one whose labels do not depend on names of folders.
    """
    check_ranges(limit=limit)
    dataset: ImageDataset
    if unit != "image":
        with data_errors():
            dataset = limited(_open_files(name, data_dir, class_order, unit), limit)
    elif name == "builtin:digits":
        from repshift_cli.data.builtin.digits import DigitDataset

        _refuse_data_dir(name, data_dir)
        dataset = DigitDataset("test", limit or DEFAULT_SCENES, seed)
    else:
        with data_errors():
            dataset = limited(_open_whole(name, data_dir, class_order, train), limit)
    if class_order is not None and dataset.info.class_order is None:
        raise UsageError(
            f"--class-order cannot be used with the dataset {name}: its labels do not depend on names of folders",
            "Omit it.",
        )
    return dataset


@contextmanager
def data_errors() -> Iterator[None]:
    """Turn system errors of the files of a dataset, such as a missing permission, into DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot read {error.filename or 'the data'}: {error.strerror or error}") from error


def _open_files(name: str, data_dir: Path | None, class_order: str | None, unit: str) -> ImageDataset:
    from repshift_cli.data.sources.folder import MEDIA, open_folder

    media = MEDIA[unit]
    if name == "folder":
        return open_folder(name, _given_folder(name, data_dir), class_order, media)
    folder = Path(name).expanduser()
    if is_dataset_name(name) and not folder.is_dir():
        hint = f"Give the path of a folder with one folder of {media.unit} per class."
        raise DataError(f"the model takes {media.taken}, but {name} is a dataset of images", hint)
    _refuse_data_dir(name, data_dir)
    return open_folder(name, folder, class_order, media)


def _given_folder(name: str, data_dir: Path | None) -> Path:
    folder = _data_folder(data_dir, (name,))
    if folder is None:
        raise DataError(f"the dataset {name} needs a folder", "Give it with --data-dir PATH.")
    return folder


def _open_whole(name: str, data_dir: Path | None, class_order: str | None, train: bool) -> ImageDataset:
    from repshift_cli.data.sources.folder import open_folder
    from repshift_cli.data.sources.idx import FASHION, FASHION_FOLDERS, open_fashion
    from repshift_cli.data.sources.imagenet_variants import TEST_SETS, open_imagenet
    from repshift_cli.data.sources.shards import is_shards, open_shards, shard_paths
    from repshift_cli.data.sources.timm_reader import TIMM_PREFIXES, is_timm_name, open_timm

    if name in TEST_SETS:
        return open_imagenet(name, _data_folder(data_dir, TEST_SETS[name]))
    if name == FASHION:
        return open_fashion(_data_folder(data_dir, FASHION_FOLDERS), train)
    if name in {"folder", "shards"}:
        folder = _given_folder(name, data_dir)
        if name == "folder":
            return open_folder(name, folder, class_order)
        return open_shards(name, shard_paths(str(folder)), class_order)
    if is_timm_name(name):
        prefix, _, bare = name.partition("@")[0].partition("/")
        # for the Hugging Face library the folder is a cache with its own layout
        names = () if prefix.lower() == "hfds" else (f"{prefix}/{bare}", bare)
        return open_timm(name, _data_folder(data_dir, names))
    path = Path(name).expanduser()
    found: ImageDataset
    if is_shards(name) and not path.is_dir():
        _refuse_data_dir(name, data_dir)
        found = open_shards(name, shard_paths(name), class_order)
    elif path.is_dir() or "/" in name or os.sep in name or name.startswith((".", "~")):
        _refuse_data_dir(name, data_dir)
        found = open_folder(name, path, class_order)
    else:
        raise _unknown(name)
    if name.partition("/")[0].lower() in TIMM_PREFIXES:
        note = f"{name} exists and is opened; without such a path, the name is one for timm"
        found.info = replace(found.info, notes=(note, *found.info.notes))
    return found


def _data_folder(data_dir: Path | None, names: tuple[str, ...]) -> Path | None:
    """The folder that the user gave, or the folder in it that has the name of the dataset."""
    if data_dir is None:
        value = os.environ.get(DATA_DIR_VARIABLE)
        if not value:
            return None
        data_dir = Path(value)
    data_dir = data_dir.expanduser()
    inner = (data_dir / name for name in names if name and not Path(name).is_absolute())
    return next((folder for folder in inner if folder.is_dir()), data_dir)


def _refuse_data_dir(name: str, data_dir: Path | None) -> None:
    if data_dir is not None:
        raise UsageError(
            f"--data-dir {data_dir} cannot be used with the dataset {name}, which needs no folder",
            "Omit --data-dir, or use `--dataset folder`.",
        )


def _unknown(name: str) -> DataError:
    prefixed = next((known for known in DATASET_NAMES if known.startswith(name.lower())), None)
    guess = f"Did you mean {prefixed}? " if prefixed else nearest(name.lower(), DATASET_NAMES)
    return DataError(
        f"there is no dataset {name!r}, and no folder of that name",
        f"{guess}Known: {', '.join(DATASET_NAMES)}, the path of a folder with class folders or of a tar, and names of "
        "timm's readers such as torch/cifar10, hfds/OWNER/NAME, tfds/NAME, wds/NAME.",
    )
