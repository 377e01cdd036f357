"""Specs of the transformers library."""

from __future__ import annotations

from dataclasses import replace

from repshift_cli.reduction.specs.spec import LOGITS, BlockSpec, Output, PerToken, Spec

_POOLED = Output("pooler_output")
_CLASS = Output("class")

_VIT = BlockSpec(
    attention="attention",
    attention_update="attention",
    mlp_update="mlp",
    mlp_stream="layernorm_after",
    query="attention.q_proj",
    key="attention.k_proj",
    mask="attention_mask",
)
_DINO = replace(_VIT, attention_update="layer_scale1", mlp_update="layer_scale2", mlp_stream="norm2")

SPECS = (
    Spec(
        library="transformers",
        tower="ViTModel",
        blocks="layers",
        block=_VIT,
        patches="embeddings.patch_embeddings.projection",
        heads="config.num_attention_heads",
        size="config.image_size",
        outputs={"ViTModel": _CLASS, "ViTForImageClassification": LOGITS},
    ),
    Spec(
        library="transformers",
        tower="Dinov2Model",
        blocks="encoder.layer",
        block=_DINO,
        patches="embeddings.patch_embeddings.projection",
        heads="config.num_attention_heads",
        size="config.image_size",
        any_size=True,
        outputs={"Dinov2Model": _POOLED, "Dinov2ForImageClassification": LOGITS},
    ),
    Spec(
        library="transformers",
        tower="DINOv3ViTModel",
        blocks="model.layer",
        block=replace(_DINO, mask=""),
        patches="embeddings.patch_embeddings",
        heads="config.num_attention_heads",
        size="config.image_size",
        any_size=True,
        prefix=(1, "config.num_register_tokens"),
        follows=(PerToken("position_embeddings"),),
        outputs={"DINOv3ViTModel": _POOLED},
    ),
)
