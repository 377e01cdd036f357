"""Choose the metric by calibration on your own unlabelled images.

    python examples/calibrate_on_your_images.py                                # built-in model and scenes
    python examples/calibrate_on_your_images.py vit_base.safetensors photos/   # yours

In some models the tokens that a layer changes most are the important ones, in others those that it changes least.
Calibration tries all metrics on the images and chooses the one whose predictions are closest to the dense model's.
`repshift compress MODEL --calibration FOLDER` does the same and writes a checkpoint.
"""

from __future__ import annotations

import sys

import torch

from repshift_cli import CompressedModel, Recipe, compress
from repshift_cli.checkpoints.load import load_checkpoint as load_dense
from repshift_cli.data.inputs import load_inputs

FIXED = """
version: 1
metric: {{kind: representation_shift, operation: mlp, distance: l2, reading: update, polarity: {polarity}}}
reducer: {{kind: prune}}
layers: [{{layer: 0, drop_ratio: 0.2}}, {{layer: 3, drop_ratio: 0.2}}, {{layer: 6, drop_ratio: 0.2}}]
"""

OPEN = """
version: 1
metric: {kind: representation_shift}
reducer: {kind: prune}
layers: [{layer: 0, drop_ratio: 0.2}, {layer: 3, drop_ratio: 0.2}, {layer: 6, drop_ratio: 0.2}]
"""


@torch.inference_mode()
def divergence(model: CompressedModel, images: torch.Tensor) -> float:
    """Mean KL divergence in nats of the compressed predictions from the dense ones."""
    compressed = model(images).log_softmax(-1)
    with model.dense() as dense_model:
        dense = dense_model(images).log_softmax(-1)
    return float((dense.exp() * (dense - compressed)).sum(-1).mean())


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "builtin:vit-digits"
    folder = sys.argv[2] if len(sys.argv) > 2 else "builtin:digits"  # noqa: PLR2004
    preprocessing = load_dense(name).description.preprocessing
    images = load_inputs(folder, 96, preprocessing, seed=0).tensor
    # what is chosen on some images is judged on others
    border = len(images) * 2 // 3
    for_calibration, others = images[:border], images[border:]

    for polarity in ("largest", "smallest"):
        model = compress(name, Recipe.parse(FIXED.format(polarity=polarity)))
        print(f"keep the {polarity} MLP shift: KL {divergence(model, others):.4f} nats")

    model = compress(name, Recipe.parse(OPEN), calibration=for_calibration)
    chosen = ", ".join(model.plan.sites[0].metric.options.values())
    print(f"calibrated ({chosen}): KL {divergence(model, others):.4f} nats")


if __name__ == "__main__":
    main()
