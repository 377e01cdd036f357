"""Compress a model, compare it with the dense model, and list the patches that it keeps.

    python examples/compress_in_python.py

Runs in seconds on the built-in model and its scenes.
"""

from __future__ import annotations

import torch

from repshift_cli import Recipe, compress
from repshift_cli.data.builtin.digits import DigitScenes

RECIPE = """
version: 1
metric: {kind: representation_shift}      # calibration chooses operation, distance, reading and polarity
reducer: {kind: prune}
layers:
  - {layer: 3, drop_ratio: 0.3}
  - {layer: 6, drop_ratio: 0.3}
"""


@torch.inference_mode()
def main() -> None:
    # a file, a timm name or a model in memory; calibrated on built-in images here, else on a folder of yours
    model = compress("builtin:vit-digits", Recipe.parse(RECIPE), calibration="builtin:digits")
    print(f"score: {model.plan.sites[0].metric.options}")
    for site in model.plan.sites:
        print(f"{site.site}: {site.tokens_in} -> {site.tokens_out} tokens")
    print(f"multiply-accumulates: {model.dense_macs() / 1e6:.1f} -> {model.macs() / 1e6:.1f} million per image")

    # the same weights, with and without reduction
    transform = model.preprocessing.transform()
    others = torch.stack([transform(image) for image, _ in (DigitScenes("test", 32)[i] for i in range(32))])
    compressed = model(others)
    with model.dense() as dense_model:
        dense = dense_model(others)
    same = (compressed.argmax(-1) == dense.argmax(-1)).sum()
    print(f"predictions: {same} of {len(others)} are the same")

    # indices of the kept patches in the patch grid (row * columns + column)
    for layer, kept in model.trace(others[:1]).kept.items():
        print(f"kept after block {layer}: {kept[0].tolist()}")


if __name__ == "__main__":
    main()
