"""Video-text models of UMT under the keys of their authors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from repshift_cli.checkpoints.create import UMT
from repshift_cli.checkpoints.identify.identity import Identity
from repshift_cli.checkpoints.identify.sizes import HEAD_SIZE, check_divides
from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import CheckpointError, UsageError
from repshift_cli.models.bert import TextShape
from repshift_cli.models.umt import MODELS, VisionShape, pretrained_cfg

_PATCHES = "vision_encoder.encoder.patch_embed.proj.weight"
_PATCH_DIMS = 5  # width, channels, frames, rows, columns
_TEACHING = ("clip_teacher.", "vision_encoder.clip_decoder.", "text_encoder.cls.")
"""Prefixes of tensors that only pretraining uses."""


def recognises(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of a model with a vision and a text encoder."""
    return any(key.startswith("vision_encoder.") for key in tensors)


def identify(tensors: Mapping[str, Tensor], where: str, options: LoadOptions, name: str | None = None) -> Identity:
    """The UMT model that the weights belong to; errors as `match.identify`.

    Args:
        options: heads of the vision encoder; image size and frames, of which the weights fit any.
        name: one of `MODELS`, if the user gives it.
    """
    native, notes = _native(tensors)
    vision = _vision(native, where, options.heads)
    text, embed_dim = _text(native, where, vision.width // vision.heads), _embed_dim(native)
    vision = replace(
        vision,
        img_size=options.size.square(where) if options.size else vision.img_size,
        frames=options.frames or vision.frames,
        checkpoint_frames=options.checkpoint_frames,
    )
    if vision.img_size % vision.patch_size:
        raise UsageError(
            f"invalid --img-size {vision.img_size}: must be a multiple of the patch size {vision.patch_size}"
        )
    found = _name(vision, text, embed_dim)
    if name is not None and name != found:
        raise CheckpointError(f"{where}: the weights are those of {found or 'another UMT'}, not of {name}")
    clip = f"{vision.frames} frames of {vision.img_size}x{vision.img_size}"
    if not (options.img_size and options.frames):
        notes.append(f"the checkpoint does not say which clips it takes: assumed {clip} (--frames, --img-size)")
    label = found or f"UMT of width {vision.width}, depth {vision.depth}"
    args = {"vision": asdict(vision), "text": asdict(text), "embed_dim": embed_dim}
    return Identity(label, UMT, args, Preprocessing.from_dict(pretrained_cfg(vision)), native, notes)


def _native(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The weights under the keys of the fine-tuned models, without those that only pretraining uses."""
    native = {
        key.replace("text_encoder.bert.", "text_encoder.", 1): value
        for key, value in tensors.items()
        if not key.startswith(_TEACHING)
    }
    left = len(tensors) - len(native)
    notes = [f"left out {left} tensors that only pretraining uses"] if left else []
    for encoder in ("text_encoder.", "text_decoder.bert."):
        # newer versions of transformers do not store them
        table = native.get(f"{encoder}embeddings.position_embeddings.weight")
        if table is not None:
            native.setdefault(f"{encoder}embeddings.position_ids", torch.arange(table.shape[0]).unsqueeze(0))
    return native, notes


def _vision(tensors: Mapping[str, Tensor], where: str, heads: int | None) -> VisionShape:
    patches, bias = tensors.get(_PATCHES), tensors.get("vision_encoder.encoder.blocks.0.attn.q_bias")
    hidden = tensors.get("vision_encoder.encoder.blocks.0.mlp.fc1.weight")
    if patches is None or bias is None or hidden is None or patches.ndim != _PATCH_DIMS:
        raise CheckpointError(
            f"{where}: it has a vision encoder, but not that of UMT",
            "Of video-text models, UMT's checkpoints for retrieval and question answering are supported.",
        )
    width, _, tubelet, height, breadth = patches.shape
    if tubelet != 1 or height != breadth:
        raise CheckpointError(f"{where}: patches of {tubelet} frames and {height}x{breadth} are not supported")
    if not heads and width % HEAD_SIZE:
        raise CheckpointError(f"{where}: unknown number of attention heads for width {width}", "Give --heads.")
    count = check_divides(heads or width // HEAD_SIZE, width, where)
    depth = _count(tensors, r"vision_encoder\.encoder\.blocks\.(\d{1,4})\.")
    return VisionShape(patch_size=height, width=width, depth=depth, heads=count, hidden=hidden.shape[0])


def _text(tensors: Mapping[str, Tensor], where: str, head_size: int) -> TextShape:
    """Sizes of the text encoder. Its heads have 64 channels, or else as many as those of the vision encoder."""
    start = "text_encoder.embeddings."
    tables = [tensors.get(f"{start}{name}_embeddings.weight") for name in ("word", "position", "token_type")]
    hidden = tensors.get("text_encoder.encoder.layer.0.intermediate.dense.weight")
    crossing = [
        int(match[1])
        for key in tensors
        if (match := re.match(r"text_encoder\.encoder\.layer\.(\d{1,4})\.crossattention\.", key))
    ]
    if hidden is None or not crossing or any(table is None for table in tables):
        raise CheckpointError(
            f"{where}: it has a vision encoder, but not the text encoder of UMT",
            "UMT's checkpoints for retrieval and question answering hold both.",
        )
    words, positions, types = (table.shape[0] for table in tables if table is not None)
    width = hidden.shape[1]
    return TextShape(
        vocabulary=words,
        width=width,
        depth=_count(tensors, r"text_encoder\.encoder\.layer\.(\d{1,4})\."),
        heads=width // (head_size if width % HEAD_SIZE else HEAD_SIZE),
        hidden=hidden.shape[0],
        positions=positions,
        fusion_layer=min(crossing),
        types=types,
    )


def _embed_dim(tensors: Mapping[str, Tensor]) -> int:
    """Channels of the embeddings, 0 for question answering."""
    projection = tensors.get("vision_proj.weight")
    return 0 if projection is None or any(key.startswith("text_decoder.") for key in tensors) else projection.shape[0]


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max((int(match[1]) for key in tensors if (match := re.match(pattern, key))), default=-1)


def _name(vision: VisionShape, text: TextShape, embed_dim: int) -> str | None:
    usual = replace(vision, img_size=224, frames=12, checkpoint_frames=None)
    shapes: tuple[Any, ...] = (usual, text, embed_dim)
    return next((name for name, known in MODELS.items() if known == shapes), None)
