"""Images of one shade of red, and a model that reads it."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor, nn

from repshift_cli.data.dataset import ImageDataset
from repshift_cli.data.decode import UnreadableSample
from repshift_cli.data.preprocessing import Preprocessing

__all__ = ["PLAIN", "Reader", "Shades"]

PLAIN = Preprocessing((3, 8, 8), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "nearest", 1.0)


class Shades(ImageDataset):
    """Images whose red value is their label; some can be unreadable."""

    def __init__(self, labels: list[int], classes: int | None = None, broken: tuple[int, ...] = ()) -> None:
        self.name = "shades"
        self.labels = labels
        self.broken = broken
        self.count = classes

    @property
    def description(self) -> str:
        return "shades of red"

    @property
    def classes(self) -> tuple[str, ...] | None:
        return None if self.count is None else tuple(str(number) for number in range(self.count))

    def __len__(self) -> int:
        return len(self.labels)

    def sample_id(self, index: int) -> str:
        return f"shade-{index}"

    def load(self, index: int) -> tuple[Image.Image, int]:
        if index in self.broken:
            raise UnreadableSample(self.sample_id(index), "made to fail")
        label = self.labels[index]
        return Image.new("RGB", (8, 8), (label % 256, 0, 0)), label


class Reader(nn.Module):
    """Predicts red value + `shift`; the following classes are the next most likely."""

    def __init__(self, classes: int, shift: int = 0) -> None:
        super().__init__()
        self.classes = classes
        self.shift = shift
        self.weight = nn.Parameter(torch.zeros(1))
        self.batches: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        label = (images[:, 0].mean(dim=(1, 2)).float() * 255).round().long()
        places = torch.arange(self.classes)[None, :]
        return -((places - label[:, None] - self.shift) % self.classes).float().to(images.dtype)
