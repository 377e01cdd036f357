"""Datasets of video files and scenes that worker processes read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from repshift_cli.data.builtin import moving_shapes
from repshift_cli.data.builtin.moving_shapes import scene_tensor
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.data.video.decode import UnreadableVideo, clip_tensor, read_clip
from repshift_cli.errors import RepshiftError

__all__ = [
    "PreparedVideos",
    "VideoBatch",
    "VideoFiles",
    "VideoScenes",
    "Videos",
    "collate_videos",
]


class Videos(ABC):
    """Clips by number. Loader processes get a copy."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """The path or name of one video."""

    @abstractmethod
    def load(
        self, index: int, preprocessing: Preprocessing, transform: Callable[[Image.Image], Tensor]
    ) -> tuple[Tensor, bool]:
        """One clip, float32 `[T, C, H, W]`, and whether its last frame had to be repeated.

        Raises:
            UnreadableVideo: it cannot be decoded.
        """


@dataclass(frozen=True)
class VideoFiles(Videos):
    """Clips of video files."""

    paths: tuple[Path, ...]
    first_seconds: float | None

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def load(
        self, index: int, preprocessing: Preprocessing, transform: Callable[[Image.Image], Tensor]
    ) -> tuple[Tensor, bool]:
        clip = read_clip(self.paths[index], preprocessing.frames or 1, self.first_seconds)
        return clip_tensor(clip, transform), clip.padded


@dataclass(frozen=True)
class VideoScenes(Videos):
    """Clips of built-in scenes."""

    scenes: tuple[moving_shapes.Scene, ...]

    def __len__(self) -> int:
        return len(self.scenes)

    def name(self, index: int) -> str:
        return f"scene {index}"

    def load(
        self, index: int, preprocessing: Preprocessing, transform: Callable[[Image.Image], Tensor]
    ) -> tuple[Tensor, bool]:
        frames = moving_shapes.render(self.scenes[index], preprocessing.frames or 1, preprocessing.input_size[1])
        return scene_tensor(frames, transform), False


@dataclass
class _Sample:
    """A preprocessed clip, or why there is none."""

    index: int
    clip: Tensor | None = None
    padded: bool = False
    problem: RepshiftError | None = None


@dataclass
class VideoBatch:
    """What was read of some videos: float32 `[b, T, C, H, W]`, and what could not be read."""

    indices: list[int]
    video: Tensor | None
    padded: list[int]
    problems: list[tuple[int, RepshiftError]]

    @property
    def broken(self) -> list[tuple[int, str]]:
        return [(index, problem.reason) for index, problem in self.problems if isinstance(problem, UnreadableVideo)]

    def pin_memory(self) -> VideoBatch:
        """Called by the loader when the device copies faster from pinned memory."""
        if self.video is not None:
            self.video = self.video.pin_memory()
        return self


class PreparedVideos(TorchDataset[_Sample]):
    """The clips through the transform. What goes wrong in a loader process is reported, not raised there."""

    def __init__(self, videos: Videos, preprocessing: Preprocessing) -> None:
        self.videos = videos
        self.preprocessing = preprocessing
        self.transform = preprocessing.transform()

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> _Sample:
        try:
            clip, padded = self.videos.load(index, self.preprocessing, self.transform)
        except RepshiftError as problem:
            return _Sample(index, problem=problem)
        return _Sample(index, clip, padded)


def collate_videos(samples: Sequence[_Sample]) -> VideoBatch:
    """Join samples to a batch."""
    clips = [sample.clip for sample in samples if sample.clip is not None]
    return VideoBatch(
        indices=[sample.index for sample in samples if sample.clip is not None],
        video=torch.stack(clips) if clips else None,
        padded=[sample.index for sample in samples if sample.padded],
        problems=[(sample.index, sample.problem) for sample in samples if sample.problem is not None],
    )
