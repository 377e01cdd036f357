"""Videos and built-in scenes as clips by number."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from repshift_cli.data.builtin import moving_shapes
from repshift_cli.data.builtin.moving_shapes import scene_tensor
from repshift_cli.data.loader import Sample
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.data.video.decode import read_clip

Transform = Callable[[Image.Image], Tensor]


class Videos(ABC):
    """Clips by number. Each worker process gets a copy."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def sample_id(self, index: int) -> str:
        """The path of a video, or the caption of a scene."""

    @abstractmethod
    def load(self, preprocessing: Preprocessing, transform: Transform, index: int) -> Sample:
        """One clip, float32 `[T, C, H, W]`.

        Raises:
            UnreadableVideo: it cannot be decoded.
        """


@dataclass(frozen=True)
class VideoFiles(Videos):
    """Clips of video files."""

    paths: tuple[Path, ...]
    first_seconds: float | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def sample_id(self, index: int) -> str:
        return str(self.paths[index])

    def load(self, preprocessing: Preprocessing, transform: Transform, index: int) -> Sample:
        frames, step = preprocessing.frames or 1, preprocessing.frame_step
        clip = read_clip(self.paths[index], frames, self.first_seconds, transform, step)
        return Sample(torch.stack(clip.frames), padded=clip.padded)


@dataclass(frozen=True)
class VideoScenes(Videos):
    """Clips of built-in scenes."""

    scenes: tuple[moving_shapes.Scene, ...]

    def __len__(self) -> int:
        return len(self.scenes)

    def sample_id(self, index: int) -> str:
        return moving_shapes.caption(self.scenes[index])

    def load(self, preprocessing: Preprocessing, transform: Transform, index: int) -> Sample:
        frames = moving_shapes.render(self.scenes[index], preprocessing.frames or 1, preprocessing.input_size[1])
        return Sample(scene_tensor(frames, transform))
