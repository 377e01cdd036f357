"""Fine-tune a compressed model: gradients flow through the kept tokens.

    python examples/finetune.py

Drops so many tokens that accuracy suffers, then recovers some of it in a few steps on built-in scenes. Parameter names
do not change, so `model.state_dict()` also fits the dense model, and `model.save("tuned.safetensors")` writes both
weights and plan.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from repshift_cli import Recipe, compress
from repshift_cli.data.builtin.digits import DigitScenes
from repshift_cli.data.preprocessing import Preprocessing

RECIPE = """
version: 1
metric: {kind: representation_shift, operation: mlp, distance: l2, reading: update, polarity: largest}
reducer: {kind: prune}
layers:
  - {layer: 1, drop_ratio: 0.5}
  - {layer: 4, drop_ratio: 0.5}
"""
STEPS = 20
BATCH = 32


def load(scenes: DigitScenes, start: int, count: int, preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
    """Images `[count, C, H, W]` and labels `[count]`."""
    transform = preprocessing.transform()
    images, labels = zip(*(scenes[start + index] for index in range(count)), strict=True)
    return torch.stack([transform(image) for image in images]), torch.tensor(labels)


@torch.inference_mode()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> str:
    """Loss and accuracy as text."""
    model.eval()
    logits = torch.cat([model(part) for part in images.split(64)])
    accuracy = (logits.argmax(-1) == labels).float().mean()
    return f"loss {cross_entropy(logits, labels):.3f}, accuracy {accuracy:.1%}"


def main() -> None:
    torch.manual_seed(0)
    # copy for training: a loaded model is frozen and its weights may be a view of the file
    model = copy.deepcopy(compress("builtin:vit-digits", Recipe.parse(RECIPE))).requires_grad_(True)
    preprocessing = model.preprocessing
    test = load(DigitScenes("test", 256), 0, 256, preprocessing)
    with model.dense():
        print(f"dense:  {evaluate(model, *test)}")
    print(f"before: {evaluate(model, *test)}  ({model.dense_macs() / model.macs():.2f}x fewer multiply-accumulates)")

    scenes = DigitScenes("train", STEPS * BATCH, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for step in range(STEPS):
        images, labels = load(scenes, step * BATCH, BATCH, preprocessing)
        model.train()
        loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"after:  {evaluate(model, *test)}  ({STEPS} steps of {BATCH} scenes)")


if __name__ == "__main__":
    main()
