"""Name the kind of weights that belong to no supported model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from repshift_cli.checkpoints.identify.identity import supported
from repshift_cli.errors import CheckpointError

_KINDS = {
    "layers.0.blocks.0.attn.relative_position_bias_table": "a Swin Transformer, whose windows need the whole grid",
    "layers.0.blocks.0.attn.logit_scale": "a Swin Transformer V2, whose windows need the whole grid",
    "rope_embed.periods": "a DINOv3 model, whose rotary positions need the whole grid",
    "conv_stem.weight": "an EfficientNet, a MobileNet or a similar network of a shape that timm does not have",
    "resnet.embedder.embedder.convolution.weight": "a ResNet of the transformers library",
    "features.1.0.block.0.weight": "a ConvNeXt or another model of torchvision",
    "trunk_output.block1.block1-0.f.a.0.weight": "a RegNet of torchvision",
    "backbone.layers.0.mixer.A_log": "a Mamba language model",
    "vision_encoder.patch_embed.proj.weight": "a video-text model (UMT)",
    "visual.transformer.resblocks.0.ln_1.weight": "a CLIP without a text tower of open_clip",
    "visual.attnpool.positional_embedding": "a CLIP with a ResNet, whose attention pooling needs the whole grid",
}
"""By the name of a tensor that no supported model has."""


def is_unsupported(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the name of one tensor shows a kind that is not supported."""
    return not _KINDS.keys().isdisjoint(tensors)


def known_kind(tensors: Mapping[str, Tensor], where: str) -> CheckpointError | None:
    """The error for weights of a kind that is known by the name of one tensor."""
    for key, kind in _KINDS.items():
        if key in tensors:
            return CheckpointError(f"{where} looks like {kind}, which is not supported", supported())
    return None
