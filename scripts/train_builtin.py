"""Train the built-in models on the built-in scenes, on a CPU, in under an hour each.

    python scripts/train_builtin.py vit-digits
    python scripts/train_builtin.py vit-digits-small

A `VisionTransformer` of timm is trained with AdamW on fresh scenes of the training digits. In the first part of the
run a second, temporary head also reads each patch (the digit that covers it, or background), as in token labelling
(Jiang et al. 2021); it only shortens the time to the first useful gradient, fades to nothing and is not stored.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from repshift_cli.data.digits import SCENE_SIZE, DigitScenes

ASSETS = Path(__file__).resolve().parents[1] / "repshift_cli" / "assets"
BACKGROUND = 10


@dataclass(frozen=True)
class Setup:
    """One built-in model and how it is trained."""

    width: int
    heads: int
    seed: int
    depth: int = 12
    patch: int = 8
    batch: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.05


SETUPS = {
    "vit-digits": Setup(width=96, heads=3, seed=0),
    "vit-digits-small": Setup(width=64, heads=2, seed=1),
}


def build(setup: Setup) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**model_args(setup))


def model_args(setup: Setup) -> dict[str, int]:
    return {
        "img_size": SCENE_SIZE,
        "patch_size": setup.patch,
        "embed_dim": setup.width,
        "depth": setup.depth,
        "num_heads": setup.heads,
        "num_classes": 10,
    }


def draw_batch(scenes: DigitScenes, start: int, setup: Setup) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures `[B, 3, H, W]` in -1..1, digits `[B]` and the digit on each patch `[B, N]` (10 = background)."""
    side = SCENE_SIZE // setup.patch
    pictures = np.empty((setup.batch, SCENE_SIZE, SCENE_SIZE), dtype=np.uint8)
    digits = np.empty(setup.batch, dtype=np.int64)
    patches = np.full((setup.batch, side, side), BACKGROUND, dtype=np.int64)
    for row in range(setup.batch):
        pictures[row], digits[row], (left, top, size) = scenes.render(start + row)
        # a patch counts as digit when at least its middle is covered
        near, far = setup.patch // 2, setup.patch // 2
        columns = slice((left + near) // setup.patch, (left + size + far) // setup.patch)
        rows = slice((top + near) // setup.patch, (top + size + far) // setup.patch)
        patches[row, rows, columns] = digits[row]
    scaled = torch.from_numpy(pictures).float().div_(127.5).sub_(1.0)
    images = scaled[:, None].expand(-1, 3, -1, -1)
    return images, torch.from_numpy(digits), torch.from_numpy(patches).flatten(1)


def rates(step_share: float, setup: Setup) -> tuple[float, float]:
    """Learning rate (linear warm-up, cosine) and weight of the patch loss at this share of the run."""
    warm = min(1.0, step_share / 0.04)
    rate = setup.learning_rate * warm * (0.5 + 0.5 * np.cos(np.pi * step_share))
    return max(rate, 1e-6), max(0.0, 1.0 - step_share / 0.5)


def train(setup: Setup, minutes: float) -> nn.Module:
    torch.manual_seed(setup.seed)
    model = build(setup)
    patch_head = nn.Linear(setup.width, BACKGROUND + 1)
    parameters = [*model.parameters(), *patch_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=setup.weight_decay, betas=(0.9, 0.98), fused=True)
    scenes = DigitScenes("train", count=10**9, seed=1000 + setup.seed)
    model.train()
    begin, step, right, seen = time.monotonic(), 0, 0, 0
    while (share := (time.monotonic() - begin) / (60 * minutes)) < 1.0:
        images, digits, patches = draw_batch(scenes, step * setup.batch, setup)
        rate, patch_weight = rates(share, setup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        tokens = model.forward_features(images)
        logits = model.forward_head(tokens)
        loss = cross_entropy(logits, digits)
        if patch_weight > 0:
            loss = loss + patch_weight * cross_entropy(patch_head(tokens[:, 1:]).flatten(0, 1), patches.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        right, seen = right + int((logits.argmax(-1) == digits).sum()), seen + len(digits)
        if step % 100 == 0:
            print(f"{share:6.1%}  step {step}  loss {loss.item():.3f}  top-1 {right / seen:.3f}", flush=True)
            right = seen = 0
    return model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, setup: Setup, count: int = 2048) -> float:
    scenes = DigitScenes("test", count=count, seed=0)
    right = 0
    for start in range(0, count, setup.batch):
        images, digits, _ = draw_batch(scenes, start, setup)
        right += int((model(images).argmax(-1) == digits).sum())
    return right / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SETUPS)
    parser.add_argument("--minutes", type=float, default=45.0, help="length of the run (the schedule is laid over it)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    setup = SETUPS[options.name]
    model = train(setup, options.minutes)
    top1 = accuracy(model, setup)
    print(f"{options.name}: top-1 {top1:.4f} on 2048 test scenes")
    save(model, setup, top1, options.output or ASSETS / f"{options.name.replace('-', '_')}.safetensors")


def save(model: nn.Module, setup: Setup, top1: float, path: Path) -> None:
    from safetensors.torch import save_file

    save_file(model.state_dict(), path, metadata={"args": json.dumps(model_args(setup)), "top1": str(top1)})
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
