"""Compress a feature extractor without a head (DINOv2), and put its tokens back into a feature map.

    python examples/feature_extractor.py

Uses random weights, so that it runs in seconds. Pretrained weights work the same way.
"""

from __future__ import annotations

import timm
import torch
from torch import Tensor

from repshift_cli import Recipe, compress

RECIPE = """
version: 1
metric: {kind: representation_shift, operation: mlp, distance: l2, reading: update, polarity: largest}
reducer: {kind: prune}
layers:
  - {layer: 3, drop_ratio: 0.25}
  - {layer: 7, drop_ratio: 0.25}
"""


def to_grid(tokens: Tensor, kept: Tensor, rows: int, columns: int) -> Tensor:
    """Put kept patch tokens back into the patch grid.

    Args:
        tokens: `[B, K, C]`.
        kept: int64 `[B, K]`, indices in the grid, row by row.

    Returns:
        `[B, C, rows, columns]`, zero where a token was dropped.
    """
    grid = tokens.new_zeros(len(tokens), rows * columns, tokens.shape[-1])
    grid.scatter_(1, kept.unsqueeze(-1).expand_as(tokens), tokens)
    return grid.transpose(1, 2).unflatten(2, (rows, columns))


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    dense = timm.create_model("vit_small_patch14_dinov2", pretrained=False, num_classes=0, img_size=224).eval()
    model = compress(dense, Recipe.parse(RECIPE))
    images = torch.rand(2, 3, 224, 224)

    trace = model.trace(images)
    with model.dense() as dense_model:
        features_before = dense_model(images)
    cosine = torch.nn.functional.cosine_similarity(features_before, trace.output)
    print(f"one vector per image: {tuple(trace.output.shape)}, cosine to the dense model's {cosine.mean():.3f}")
    print(f"multiply-accumulates: {model.dense_macs() / 1e9:.2f} -> {model.macs() / 1e9:.2f} billion per image")

    tokens = model.model.forward_features(images)
    kept = trace.kept[max(trace.kept)]  # of the last site
    prefix = model.plan.prefix_tokens
    rows, columns = model.model.patch_embed.grid_size
    features = to_grid(tokens[:, prefix:], kept, rows, columns)
    print(f"tokens {tuple(tokens.shape)} -> feature map {tuple(features.shape)}; kept in the first image:")
    for row in features[0].abs().sum(0) > 0:
        print(" ".join("#" if there else "." for there in row))


if __name__ == "__main__":
    main()
