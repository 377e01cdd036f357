"""Datasets of timm's factory: `torch/...`, `hfds/...`, `tfds/...`, `wds/...`. Nothing is downloaded."""

from __future__ import annotations

import importlib
import importlib.util
import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from hashlib import sha256
from pathlib import Path
from sys import stderr
from typing import TYPE_CHECKING, Any

from repshift_cli.data.dataset import ImageDataset
from repshift_cli.data.decode import UnreadableSample, decode_bytes, decode_file, to_rgb
from repshift_cli.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

_PACKAGES = {
    "torch": ("torchvision", "torchvision"),
    "hfds": ("datasets", "datasets"),
    "tfds": ("tensorflow_datasets", "tensorflow tensorflow-datasets"),
    "wds": ("webdataset", "webdataset"),
}

TIMM_PREFIXES = tuple(_PACKAGES)
"""Prefixes of timm's dataset names, before the first slash."""

_DEFAULT_SPLIT = "validation"


def is_timm_name(name: str) -> bool:
    """Whether a dataset name is one for timm, such as `torch/cifar10`, and not an existing path."""
    prefix, slash, _ = name.partition("/")
    return bool(slash) and prefix.lower() in _PACKAGES and not os.path.lexists(name)


def open_timm(name: str, data_dir: Path | None) -> ImageDataset:
    """Open `PREFIX/NAME` or `PREFIX/NAME@SPLIT` (validation if none is given) below `data_dir`.

    Raises:
        DataError: a package or the data are missing, or timm has no such dataset.
    """
    source, _, split = name.partition("@")
    prefix = source.partition("/")[0].lower()
    module, packages = _PACKAGES[prefix]
    if importlib.util.find_spec(module) is None:
        raise DataError(f"the dataset {name} needs the package {module}", f"Run `pip install {packages}`.")
    if data_dir is None and prefix != "hfds":
        raise DataError(f"the dataset {name} needs a folder", "Give it with --data-dir DIR or REPSHIFT_DATA_DIR.")
    opened = _create(name, source, split or _DEFAULT_SPLIT, data_dir)
    if not hasattr(opened, "__getitem__") or prefix in {"tfds", "wds"}:
        return _TimmStream(name, data_dir, opened)
    return _TimmTable(name, data_dir, opened)


def _create(name: str, source: str, split: str, data_dir: Path | None) -> Any:
    from timm.data.dataset_factory import create_dataset

    root = None if data_dir is None else str(data_dir)
    try:
        # some readers print to stdout, which is for the result
        with redirect_stdout(stderr), _offline():
            return create_dataset(source, root=root, split=split, download=False)
    except Exception as error:  # the libraries raise many kinds of errors
        where = "the local cache" if data_dir is None else str(data_dir)
        reason = str(error).strip() or type(error).__name__
        raise DataError(
            f"the dataset {name} (split {split}) cannot be opened in {where}: {reason}",
            "repshift downloads no datasets: download it with its library first, give its folder with --data-dir DIR, "
            "and another split as NAME@SPLIT.",
        ) from error


@contextmanager
def _offline() -> Iterator[None]:
    """Keep the Hugging Face libraries offline while a dataset is opened.

    They read the environment only when they are imported, so their settings are changed and restored.
    """
    import huggingface_hub.constants as hub

    holders: list[tuple[Any, str]] = [(hub, "HF_HUB_OFFLINE")]
    if importlib.util.find_spec("datasets") is not None:
        holders.append((importlib.import_module("datasets.config"), "HF_HUB_OFFLINE"))
    before = [(holder, key, getattr(holder, key, None)) for holder, key in holders]
    for holder, key in holders:
        setattr(holder, key, True)
    try:
        yield
    finally:
        for holder, key, value in before:
            setattr(holder, key, value)


class _TimmDataset(ImageDataset):
    def __init__(self, name: str, data_dir: Path | None, source: Any) -> None:
        self.name = name
        self.data_dir = data_dir
        self.source = source
        self.count = len(source)
        if self.count == 0:
            raise DataError(
                f"the dataset {name} is empty, or its number of images is unknown",
                "For shards without _info.json give the count: 'wds/@NAME-{0000..0007}.tar|5000'.",
            )

    @property
    def description(self) -> str:
        where = "the local cache" if self.data_dir is None else str(self.data_dir)
        return f"{len(self)} images of {self.name} in {where}"

    @property
    def classes(self) -> tuple[str, ...] | None:
        mapping = _class_index(self.source)
        if not mapping:
            return None
        ordered = sorted(mapping, key=mapping.__getitem__)
        return tuple(ordered) if [mapping[key] for key in ordered] == list(range(len(ordered))) else None

    def __len__(self) -> int:
        return self.count

    def sample_id(self, index: int) -> str:
        return f"{self.name}[{index}]"

    @abstractmethod
    def load(self, index: int) -> tuple[Image.Image, int]: ...

    def stamp(self, index: int) -> str:
        """With the size, time and label of the file of an image, else a digest of its pixels."""
        try:
            if file := self._file(index):
                status = file[0].stat()
                return f"{self.sample_id(index)}:{status.st_size}:{status.st_mtime_ns}:{file[1]}"
            image, label = self.load(index)
        except (OSError, UnreadableSample) as error:
            return f"{self.sample_id(index)}:{error}"
        return f"{self.sample_id(index)}:{sha256(image.tobytes()).hexdigest()}:{label}"

    def _file(self, index: int) -> tuple[Path, int] | None:
        """The file and label of an image, if the reader has a list of files."""
        samples = getattr(self.source, "samples", None)
        if not isinstance(samples, list) or not isinstance(samples[index][0], str):
            return None
        return Path(samples[index][0]), int(samples[index][1])


class _TimmTable(_TimmDataset):
    """A source with random access."""

    def load(self, index: int) -> tuple[Image.Image, int]:
        sample = self.sample_id(index)
        if file := self._file(index):
            return decode_file(file[0]), file[1]
        # timm's wrapper replaces an unreadable image by the next one; its reader does not
        reader = getattr(self.source, "reader", None)
        try:
            image, label = (self.source if reader is None else reader)[index]
            if hasattr(image, "convert"):
                return to_rgb(image), int(label)
            with image:
                content: bytes = image.read()
        except Exception as error:
            raise UnreadableSample(sample, str(error) or type(error).__name__) from error
        return decode_bytes(content, sample), int(label)


class _TimmStream(_TimmDataset):
    """A source that can only be read from its start; `load` reads forward to the index, or starts again."""

    random_access = False

    def __init__(self, name: str, data_dir: Path | None, source: Any) -> None:
        super().__init__(name, data_dir, source)
        self._stream: Iterator[tuple[Any, Any]] = iter(())
        self._next = self.count
        self._end = self.count

    def load(self, index: int) -> tuple[Image.Image, int]:
        if index >= self._end:
            raise self._too_short(index)
        if index < self._next:
            self._stream, self._next = iter(self.source), 0
        try:
            while True:
                image, label = next(self._stream)
                self._next += 1
                if self._next > index:
                    return to_rgb(image), int(label)
        except StopIteration:
            self._next, self._end = self.count, self._next
            raise self._too_short(index) from None
        except Exception as error:
            raise UnreadableSample(self.sample_id(index), str(error) or type(error).__name__) from error

    def _too_short(self, index: int) -> UnreadableSample:
        # timm skips images that it cannot decode, so the stream may be shorter than the length of the dataset
        return UnreadableSample(self.sample_id(index), f"the stream ended after {self._end} readable images")


def _class_index(source: Any) -> Mapping[str, int] | None:
    for holder in (getattr(source, "reader", None), source):
        mapping = getattr(holder, "class_to_idx", None)
        if isinstance(mapping, Mapping):
            return mapping
    return None
