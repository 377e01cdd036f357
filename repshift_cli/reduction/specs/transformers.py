"""Specs of the transformers library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from repshift_cli.reduction.specs.maps import MAPS
from repshift_cli.reduction.specs.spec import LOGITS, TOWER, BlockSpec, Output, PerToken, Spec

_POOLED = Output("pooler_output")
_CLASS = Output("class")
_MEAN = Output("mean")
_MEAN_LOGITS = replace(LOGITS, pooling="mean")
_IMAGE_FEATURES = replace(_POOLED, call="get_image_features", unused=("text_model", "text_projection"))
_ENCODER = {
    "VisionEncoderDecoderModel": replace(_MEAN, call="encoder", unused=("decoder", "enc_to_dec_proj"), pooling="tokens")
}

_MAPS = Output("feature_maps", pooling="tokens", needs_all=True)
_LANGUAGE = replace(
    TOWER,
    call="model.vision_tower",
    unused=("model.language_model", "model.multi_modal_projector", "lm_head"),
)
"""A model of images and texts, of which only the vision tower is run and counted."""

_MASK = PerToken("attention_mask", position=1, pairs=True, prefix=True)

_VIT_BLOCK = BlockSpec(
    attention="attention",
    attention_update="attention",
    mlp_update="mlp",
    mlp_stream="layernorm_after",
    query="attention.q_proj",
    key="attention.k_proj",
    mask="attention_mask",
)
_DINO_BLOCK = replace(_VIT_BLOCK, attention_update="layer_scale1", mlp_update="layer_scale2", mlp_stream="norm2")
_CLIP_BLOCK = replace(
    _VIT_BLOCK,
    attention="self_attn",
    attention_update="self_attn",
    mlp_stream="layer_norm2",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
)
_VIDEOMAE_BLOCK = replace(
    _VIT_BLOCK,
    mlp_update="output.dense",
    query="attention.attention.query",
    key="attention.attention.key",
    mask="",
)

_VIT = Spec(
    library="transformers",
    tower="ViTModel",
    blocks="layers",
    block=_VIT_BLOCK,
    patches="embeddings.patch_embeddings.projection",
    heads="config.num_attention_heads",
    size="config.image_size",
    follows=(_MASK,),
    outputs={"ViTModel": _CLASS, "ViTForImageClassification": LOGITS, **_ENCODER},
)
_DINO = replace(
    _VIT,
    tower="Dinov2Model",
    blocks="encoder.layer",
    block=_DINO_BLOCK,
    any_size=True,
    outputs={"Dinov2Model": _POOLED, "Dinov2ForImageClassification": _MEAN_LOGITS, **_ENCODER},
)
_DINOV3 = replace(
    _DINO,
    tower="DINOv3ViTModel",
    blocks="model.layer",
    patches="embeddings.patch_embeddings",
    prefix=(1, "config.num_register_tokens"),
    follows=(_MASK, PerToken("position_embeddings")),
    outputs={"DINOv3ViTModel": _POOLED},
)
_CLIP = replace(
    _VIT,
    tower="CLIPVisionModel",
    blocks="encoder.layers",
    block=_CLIP_BLOCK,
    patches="embeddings.patch_embedding",
    outputs={
        "CLIPVisionModel": _POOLED,
        "CLIPVisionModelWithProjection": Output("image_embeds"),
        "CLIPModel": _IMAGE_FEATURES,
        "CLIPForImageClassification": _MEAN_LOGITS,
        "LlavaForConditionalGeneration": _LANGUAGE,
    },
)

_PROBE = (("config.vision_use_head", True, "it has no pooling head: vision_use_head is off"),)


def _in_order(model: Any, images: Tensor) -> Tensor:
    """Noise with which a ViTMAE keeps the order of the patches, `[B, N]`."""
    encoder = getattr(model, "vit", model)
    return torch.arange(encoder.embeddings.patch_embeddings.num_patches, device=images.device).expand(len(images), -1)


_ORDERED = replace(
    _MEAN,
    arguments={"noise": _in_order},
    unused=("decoder",),
    wrapped="it puts the patches into a random order on each call. A model that `repshift_cli.load` returns does not",
)

SPECS = (
    _VIT,
    replace(
        _VIT,
        tower="DeiTModel",
        prefix=(2,),
        outputs={
            "DeiTModel": _CLASS,
            "DeiTForImageClassification": LOGITS,
            "DeiTForImageClassificationWithTeacher": LOGITS,
            **_ENCODER,
        },
    ),
    replace(_VIT, tower="ViTMSNModel", outputs={"ViTMSNModel": _CLASS, "ViTMSNForImageClassification": LOGITS}),
    replace(
        _VIT,
        tower="IJepaModel",
        prefix=(),
        pooling="mean",
        outputs={"IJepaModel": _MEAN, "IJepaForImageClassification": LOGITS},
        requires=(("pooler", None, "its pooler reads the first patch, which can be dropped"),),
    ),
    replace(
        _VIT,
        tower="ViTMAEModel",
        pooling="mean",
        outputs={"ViTMAEModel": _ORDERED, "ViTMAEForPreTraining": replace(_ORDERED, call="vit")},
        requires=(("config.mask_ratio", 0, "it drops patches at random by itself: set `config.mask_ratio` to 0"),),
    ),
    _DINO,
    replace(
        _DINO,
        tower="Dinov2WithRegistersModel",
        prefix=(1, "config.num_register_tokens"),
        outputs={
            "Dinov2WithRegistersModel": _POOLED,
            "Dinov2WithRegistersForImageClassification": _MEAN_LOGITS,
            **_ENCODER,
        },
    ),
    _DINOV3,
    replace(_DINOV3, tower="DINOv3ViTBackbone", pooling="tokens", outputs={"DINOv3ViTBackbone": _MAPS}),
    replace(
        _DINO,
        tower="Dinov2Backbone",
        pooling="tokens",
        outputs={
            "Dinov2Backbone": _MAPS,
            "DepthAnythingForDepthEstimation": replace(_MAPS, call="backbone", unused=("neck", "head")),
        },
    ),
    replace(
        _VIT,
        tower="InternVLVisionModel",
        blocks="encoder.layer",
        block=replace(
            _VIT_BLOCK,
            attention_scale="lambda_1",
            mlp_scale="lambda_2",
            query="attention.q_norm",
            key="attention.k_norm",
        ),
        follows=(),
        pooling="tokens",
        outputs={"InternVLVisionModel": TOWER, "InternVLForConditionalGeneration": _LANGUAGE},
    ),
    _CLIP,
    replace(
        _CLIP,
        tower="SiglipVisionModel",
        prefix=(),
        pooling="probe",
        probe="head.attention",
        outputs={
            "SiglipVisionModel": replace(_POOLED, requires=_PROBE),
            "SiglipModel": replace(_IMAGE_FEATURES, requires=_PROBE),
            "SiglipForImageClassification": _MEAN_LOGITS,
            "Gemma3ForConditionalGeneration": _LANGUAGE,
        },
    ),
    replace(
        _VIT,
        tower="VideoMAEModel",
        blocks="encoder.layer",
        block=_VIDEOMAE_BLOCK,
        size=("config.num_frames", "config.image_size"),
        axes="TCHW",
        follows=(),
        prefix=(),
        pooling="mean",
        outputs={
            "VideoMAEModel": _MEAN,
            "VideoMAEForVideoClassification": replace(
                LOGITS,
                requires=(("config.use_mean_pooling", True, "it classifies by the first patch, which can be dropped"),),
            ),
        },
    ),
    replace(
        _VIT,
        tower="YolosModel",
        blocks="encoder.layer",
        block=_VIDEOMAE_BLOCK,
        any_size=True,
        suffix=("config.num_detection_tokens",),
        follows=(),
        pooling="tokens",
        outputs={
            "YolosModel": TOWER,
            "YolosForObjectDetection": replace(
                TOWER, tensor="logits", repeated={"class_labels_classifier": "", "bbox_predictor": ""}
            ),
        },
    ),
    replace(
        _VIT,
        tower="VivitModel",
        size=("config.num_frames", "config.image_size"),
        axes="TCHW",
        outputs={"VivitModel": _CLASS, "VivitForVideoClassification": LOGITS},
    ),
    replace(
        _VIT,
        tower="ASTModel",
        size=("config.num_mel_bins", "config.max_length"),
        axes="WH",
        prefix=(2,),
        outputs={"ASTModel": _POOLED, "ASTForAudioClassification": LOGITS},
    ),
    replace(
        _VIT,
        tower="BeitModel",
        block=replace(_VIT_BLOCK, attention_scale="lambda_1", mlp_scale="lambda_2"),
        follows=(
            _MASK,  # with the bias that the blocks share
            PerToken("relative_position_bias", pairs=True, prefix=True, source="output"),
        ),
        pooling="mean",
        outputs={
            "BeitModel": _POOLED,
            "BeitForImageClassification": LOGITS,
            "BeitBackbone": replace(
                _MAPS, requires=(("config.add_fpn", False, "the cost of its feature pyramid (add_fpn) is not known"),)
            ),
            **_ENCODER,
        },
    ),
)

REFUSED: Mapping[str, str] = {
    "Siglip2VisionModel": "takes patches and a mask for each image. The SigLIP 2 of one resolution is a SiglipModel",
    "Data2VecVisionModel": "passes its tokens on in tuples",
    "SwinModel": "attends in windows, which need all tokens",
    "Swinv2Model": "attends in windows, which need all tokens",
    "HieraModel": "merges tokens by position, which needs all of them",
    "TimesformerModel": "attends over time and space in turn, which needs all tokens",
    "Qwen2_5_VisionTransformerPretrainedModel": "attends in windows and merges 2x2 tokens, which need all of them",
    **{name.replace("ForImageClassification", "Model"): f"is supported with its head: {name}" for name in MAPS},
}
"""Why modules of these classes are not supported."""
