"""Train the built-in models on the built-in scenes, on a CPU, in under an hour each.

    python scripts/train_builtin.py vit-digits
    python scripts/train_builtin.py vit-digits-small
    python scripts/train_builtin.py cnn-digits
    python scripts/train_builtin.py vim-digits

Each model is trained with AdamW on fresh scenes of the training digits, in two parts. First the scenes are crowded
with whole digits and a second, temporary head reads each patch (the digit that covers it, or background), as in token
labelling (Jiang et al. 2021). Then come scenes with one whole digit among fragments, as in the test; the patch loss
fades out and its head is not stored.

The CNN needs both too: a run of 400 steps gets to 92%, without the patch loss to 56%, without the crowd to 33%.
"""

from __future__ import annotations

import argparse
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from store_builtin import ASSETS, store
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from repshift_cli.checkpoints.create import create
from repshift_cli.checkpoints.loaded import ModelDescription
from repshift_cli.data.builtin.digits import SCENE_SIZE, DigitScenes
from repshift_cli.data.preprocessing import Preprocessing

BACKGROUND = 10
CROWD = 5
CROWDED_SHARE = 0.4


@dataclass(frozen=True, kw_only=True)
class Setup(ABC):
    """One built-in model and how it is trained; each kind of model is a subclass.

    Attributes:
        architecture: how a checkpoint names the kind, see `ModelDescription`.
        patch: side in pixels of the squares that the patch loss reads.
    """

    architecture: ClassVar[str | None]
    seed: int
    steps: int
    patch: int = 8
    batch: int = 64
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05

    @property
    @abstractmethod
    def patch_width(self) -> int:
        """Channels of the features of a patch."""

    @abstractmethod
    def args(self) -> dict[str, Any]:
        """What the builder of the architecture needs, as JSON holds it."""

    @abstractmethod
    def build(self) -> nn.Module:
        """The untrained model."""

    @abstractmethod
    def read(self, model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        """Run the model: logits `[B, 10]`, and the features of each patch in rows from the top, `[B, N, C]`."""


@dataclass(frozen=True, kw_only=True)
class VitSetup(Setup):
    """A `VisionTransformer` of timm; the patch loss reads its last tokens."""

    architecture: ClassVar[str | None] = None
    width: int
    heads: int
    depth: int = 12

    @property
    def patch_width(self) -> int:
        return self.width

    def args(self) -> dict[str, Any]:
        return {
            "img_size": SCENE_SIZE,
            "patch_size": self.patch,
            "embed_dim": self.width,
            "depth": self.depth,
            "num_heads": self.heads,
            "num_classes": 10,
        }

    def build(self) -> nn.Module:
        """Xavier weights and sin-cos positions suit a narrow ViT better than timm's defaults."""
        from timm.layers import build_sincos2d_pos_embed
        from timm.models.vision_transformer import VisionTransformer

        model = VisionTransformer(**self.args(), weight_init="jax")
        side = SCENE_SIZE // self.patch
        with torch.no_grad():
            model.get_parameter("pos_embed")[:, 1:] = build_sincos2d_pos_embed([side, side], self.width).unsqueeze(0)
        return model

    def read(self, model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = model.forward_features(images)
        return model.forward_head(tokens), tokens[:, 1:]


@dataclass(frozen=True, kw_only=True)
class CnnSetup(Setup):
    """A `ResNet` of timm; the patch loss reads the map of the second stage, whose stride is the 8 pixels of a patch."""

    architecture: ClassVar[str | None] = "resnet18"
    stem: int
    channels: tuple[int, int, int, int]
    layers: tuple[int, int, int, int]

    @property
    def patch_width(self) -> int:
        return self.channels[1]

    def args(self) -> dict[str, Any]:
        return {
            "num_classes": 10,
            "stem_type": "deep",
            "stem_width": self.stem,
            "channels": list(self.channels),
            "layers": list(self.layers),
        }

    def build(self) -> nn.Module:
        return create(self.architecture, self.args(), "the setup")

    def read(self, model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        last, (second,) = model.forward_intermediates(images, indices=[2])
        return model.forward_head(last), second.flatten(2).mT


@dataclass(frozen=True, kw_only=True)
class VimSetup(Setup):
    """A `VisionMamba`; the patch loss reads its last patch tokens."""

    architecture: ClassVar[str | None] = "vim"
    width: int
    depth: int
    state: int

    @property
    def patch_width(self) -> int:
        return self.width

    def args(self) -> dict[str, Any]:
        return {
            "img_size": SCENE_SIZE,
            "patch_size": self.patch,
            "depth": self.depth,
            "embed_dim": self.width,
            "d_state": self.state,
            "num_classes": 10,
        }

    def build(self) -> nn.Module:
        """Sin-cos positions, as for the ViTs; the class token in the middle keeps its own."""
        from timm.layers import build_sincos2d_pos_embed

        model = create(self.architecture, self.args(), "the setup")
        side = SCENE_SIZE // self.patch
        half = side * side // 2
        places = build_sincos2d_pos_embed([side, side], self.width)
        with torch.no_grad():
            positions = model.get_parameter("pos_embed")
            positions[0, :half], positions[0, half + 1 :] = places[:half], places[half:]
        return model

    def read(self, model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        stream = model.forward_features(images)
        return model.head(model.pool(stream)), model.patch_features(stream)


SETUPS: dict[str, Setup] = {
    "vit-digits": VitSetup(width=96, heads=3, seed=0, steps=3100),
    "vit-digits-small": VitSetup(width=64, heads=2, seed=1, steps=2600),
    "vim-digits": VimSetup(width=64, depth=6, state=4, seed=0, steps=2400),
    "cnn-digits": CnnSetup(
        stem=12, channels=(24, 64, 128, 128), layers=(3, 4, 3, 1), seed=2, steps=1600, learning_rate=2e-3
    ),
}


def draw_batch(scenes: DigitScenes, start: int, setup: Setup) -> tuple[Tensor, Tensor, Tensor]:
    """Draw `setup.batch` scenes.

    Returns:
        images: `[B, 3, H, W]` in -1..1.
        digits: `[B, 10]`, the share of each digit among the whole ones.
        patches: `[B, N]`, the digit on each patch (10 = background).
    """
    side = SCENE_SIZE // setup.patch
    pictures = np.empty((setup.batch, SCENE_SIZE, SCENE_SIZE), dtype=np.uint8)
    digits = torch.zeros(setup.batch, BACKGROUND)
    patches = np.full((setup.batch, side, side), BACKGROUND, dtype=np.int64)
    half = setup.patch // 2
    for row in range(setup.batch):
        pictures[row], placed = scenes.render(start + row)
        for whole in placed:
            digits[row, whole.label] += 1.0 / len(placed)
            # a patch counts as digit when at least its middle is covered
            columns = slice((whole.left + half) // setup.patch, (whole.left + whole.side + half) // setup.patch)
            rows = slice((whole.top + half) // setup.patch, (whole.top + whole.side + half) // setup.patch)
            patches[row, rows, columns] = whole.label
    scaled = torch.from_numpy(pictures).float().div_(127.5).sub_(1.0)
    return scaled[:, None].expand(-1, 3, -1, -1), digits, torch.from_numpy(patches).flatten(1)


def learning_rate(share: float, setup: Setup) -> float:
    """Linear warm-up, then cosine, at this share of the run."""
    warm = min(1.0, share / 0.03)
    return max(setup.learning_rate * warm * (0.5 + 0.5 * math.cos(math.pi * share)), 1e-6)


def patch_weight(share: float) -> float:
    """Weight of the patch loss: full while scenes are crowded, then fading to nothing."""
    return 1.0 if share < CROWDED_SHARE else max(0.0, 1.0 - (share - CROWDED_SHARE) / 0.3)


def train(setup: Setup) -> nn.Module:
    torch.manual_seed(setup.seed)
    model = setup.build()
    patch_head = nn.Linear(setup.patch_width, BACKGROUND + 1)
    parameters = [*model.parameters(), *patch_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=setup.weight_decay, betas=(0.9, 0.98), fused=True)
    crowded = DigitScenes("train", count=10**9, seed=2000 + setup.seed, whole=CROWD)
    single = DigitScenes("train", count=10**9, seed=1000 + setup.seed)
    model.train()
    history = []
    for step in range(setup.steps):
        share = step / setup.steps
        scenes = crowded if share < CROWDED_SHARE else single
        images, digits, patches = draw_batch(scenes, step * setup.batch, setup)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(share, setup)
        logits, features = setup.read(model, images)
        read = patch_head(features)
        loss = cross_entropy(logits, digits) + patch_weight(share) * cross_entropy(read.mT, patches)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        on_digit = patches < BACKGROUND
        top1 = (logits.argmax(-1) == digits.argmax(-1)).float().mean().item()
        history.append((top1, (read.argmax(-1) == patches)[on_digit].float().mean().item()))
        if (step + 1) % 100 == 0:
            top1, patch_top1 = (sum(column) / len(history) for column in zip(*history, strict=True))
            words = f"step {step + 1}  loss {loss.item():.3f}  top-1 {top1:.3f}  patches {patch_top1:.3f}"
            print(f"{share:6.1%}  {words}", flush=True)
            history = []
    return model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, setup: Setup, count: int = 2048) -> float:
    scenes = DigitScenes("test", count=count, seed=0)
    right = 0
    for start in range(0, count, setup.batch):
        images, digits, _ = draw_batch(scenes, start, setup)
        right += int((model(images).argmax(-1) == digits.argmax(-1)).sum())
    return right / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SETUPS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    setup = SETUPS[options.name]
    model = train(setup)
    top1 = accuracy(model, setup)
    print(f"{options.name}: top-1 {top1:.4f} on 2048 test scenes")
    save(model, setup, options.name, options.output or ASSETS / f"{options.name.replace('-', '_')}.safetensors")


def save(model: nn.Module, setup: Setup, name: str, path: Path) -> None:
    """Write a checkpoint that says itself how to build the model."""
    preprocessing = Preprocessing((3, SCENE_SIZE, SCENE_SIZE), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0)
    store(path, model.state_dict(), ModelDescription(name, setup.architecture, setup.args(), preprocessing))


if __name__ == "__main__":
    main()
