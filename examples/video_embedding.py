"""Embed clips with a video model that merges tokens, and find the clip of each caption.

    python examples/video_embedding.py

Runs in seconds on the built-in model and its scenes. Needs the extra `video`: pip install -e '.[video]'
"""

from __future__ import annotations

import torch

from repshift_cli import Recipe, compress
from repshift_cli.data.builtin import moving_shapes
from repshift_cli.data.builtin.moving_shapes import scene_tensor
from repshift_cli.data.video.annotations import clean_text
from repshift_cli.data.video.tokenizer import Tokenizer

# merge tokens into their most similar ones as vid-TLDR does, by a score that needs no attention map
RECIPE = """
version: 1
metric: {kind: representation_shift, operation: attention, distance: l2, reading: update, polarity: largest}
reducer: {kind: vid_tldr}
layers:
  - {layer: 0, drop_ratio: 0.25}
  - {layer: 2, drop_ratio: 0.25}
"""


@torch.inference_mode()
def main() -> None:
    model = compress("builtin:umt-shapes", Recipe.parse(RECIPE))  # or a UMT checkpoint
    frames, size = model.preprocessing.frames, model.preprocessing.input_size[1]
    print(f"multiply-accumulates: {model.dense_macs() / 1e6:.0f} -> {model.macs() / 1e6:.0f} million per clip")

    # clips [B, T, 3, H, W]; for files: repshift_cli.data.video.decode.read_clip(path, frames, convert=transform)
    transform = model.preprocessing.transform()
    scenes = moving_shapes.scenes(32, moving_shapes.TEST_SEED)
    clips = torch.stack([scene_tensor(moving_shapes.render(scene, frames, size), transform) for scene in scenes])
    videos = model(clips)  # [B, E], normalized
    with model.dense() as dense_model:
        before = dense_model(clips)
    print(f"cosine to the dense embedding: {torch.nn.functional.cosine_similarity(before, videos).mean():.3f}")

    captions = [clean_text(moving_shapes.caption(scene)) for scene in scenes]
    with moving_shapes.vocabulary_file() as path:  # for the released checkpoints: vocab.txt of bert-base-uncased
        ids, mask = Tokenizer(path).texts(captions, 32)
    texts = model.model.project_text(model.model.encode_text(ids, mask))
    best = (texts @ videos.T).argmax(dim=1)
    found = int((best == torch.arange(len(scenes))).sum())
    print(f"captions: {found} of {len(scenes)} find their clip; the first, {captions[0]!r}, finds clip {int(best[0])}")


if __name__ == "__main__":
    main()
