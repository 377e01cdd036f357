"""Folders of small video models of transformers, and labelled videos for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from _shape_videos import write_clip
from tiny_transformers import VIDEO, tiny_transformer

from repshift_cli.data.builtin.moving_shapes import render, scene

CLASSES = ("ant", "bee", "cow")
FRAMES, SIDE = VIDEO["num_frames"], VIDEO["image_size"]

CONFIG: dict[str, Any] = {**VIDEO, "num_labels": len(CLASSES)}
BUILD = {
    "VideoMAEForVideoClassification": lambda: hf.VideoMAEForVideoClassification(hf.VideoMAEConfig(**CONFIG)),
    "VivitForVideoClassification": lambda: hf.VivitForVideoClassification(
        hf.VivitConfig(**CONFIG, tubelet_size=[2, 8, 8])
    ),
}
SIZES = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
PROCESSORS = {
    "VideoMAEForVideoClassification": ("VideoMAEImageProcessor", {**SIZES, "image_mean": [0.3, 0.4, 0.5]}),
    "VivitForVideoClassification": ("VivitImageProcessor", {**SIZES, "image_std": [0.4, 0.5, 0.6]}),
}


def save_model(name: str, folder: Path, **processor: Any) -> Path:
    """A folder as transformers writes it, with an image processor."""
    model: Any = tiny_transformer(name, BUILD[name])
    with torch.no_grad():  # so that it predicts several classes
        clips = torch.stack([torch.from_numpy(render(scene(number, 5), FRAMES, SIDE)) for number in range(8)])
        logits = model(clips.movedim(-1, 2) / 127.5 - 1).logits
        model.classifier.bias -= logits.mean(0)
    model.save_pretrained(folder)
    kind, values = PROCESSORS[name]
    document = {"image_processor_type": kind, **values, **processor}
    (folder / "preprocessor_config.json").write_text(json.dumps(document))
    return folder


def write_videos(folder: Path, per_class: int, frames: int = 9) -> Path:
    """Class folders with videos whose frames need no resizing for these models."""
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            picture = render(scene(10 * label + index, 5), frames, 2 * SIDE)
            write_clip(np.ascontiguousarray(picture[:, ::2, ::2]), folder / name / f"{index}.mp4")
    return folder
