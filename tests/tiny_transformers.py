"""Small models of the transformers library with random weights, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from repshift_cli.models.tensor_model import TensorModel
from repshift_cli.reduction.families.transformer import tower_of

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 7,
}
CLIP: dict[str, Any] = {**SMALL, "projection_dim": 24}
TEXT: dict[str, Any] = {
    **{key: SMALL[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")},
    "vocab_size": 64,
    "max_position_embeddings": 8,
    "eos_token_id": 1,
    "bos_token_id": 0,
    "pad_token_id": 0,
}
LANGUAGE: dict[str, Any] = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2},
    **{"intermediate_size": 48, "vocab_size": 64, "max_position_embeddings": 64},
}
DINO: dict[str, Any] = {**SMALL, "layerscale_value": 0.4, "drop_path_rate": 0.1}
VIDEO: dict[str, Any] = {**SMALL, "num_frames": 4, "image_size": 16}
AUDIO: dict[str, Any] = {**SMALL, "num_mel_bins": 16, "max_length": 40, "frequency_stride": 4, "time_stride": 6}
YOLOS: dict[str, Any] = {**SMALL, "image_size": [32, 32], "num_detection_tokens": 5}
BEIT: dict[str, Any] = {**SMALL, "layer_scale_init_value": 0.3}


def _two_towers(config: Any, kind: Any, vision: Any, text: Any, **options: Any) -> nn.Module:
    built: nn.Module = kind(config(vision_config=vision.to_dict(), text_config=text.to_dict(), **options))
    return built


def _trocr() -> nn.Module:
    decoder = hf.TrOCRConfig(vocab_size=40, d_model=32, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32)
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(hf.ViTConfig(**SMALL), decoder)
    return hf.VisionEncoderDecoderModel(config)


def _siglip(**options: Any) -> Any:
    return hf.SiglipVisionConfig(**{**SMALL, **options})


def _internvl() -> Any:
    sides = {"image_size": [32, 32], "patch_size": [8, 8], "layer_scale_init_value": 0.4}
    return hf.InternVLVisionConfig(**{**SMALL, **sides, "use_qk_norm": True})


def _depth() -> nn.Module:
    backbone = hf.Dinov2Config(**DINO, out_indices=[1, 2, 3], reshape_hidden_states=False)
    sizes = {"reassemble_hidden_size": 32, "neck_hidden_sizes": [8, 8, 8], "reassemble_factors": [2, 1, 0.5]}
    small = {"patch_size": 8, "fusion_hidden_size": 8, "head_hidden_size": 8}
    return hf.DepthAnythingForDepthEstimation(hf.DepthAnythingConfig(backbone_config=backbone, **sizes, **small))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "ViTModel": lambda: hf.ViTModel(hf.ViTConfig(**SMALL)),
    "ViTForImageClassification": lambda: hf.ViTForImageClassification(hf.ViTConfig(**SMALL)),
    "DeiTModel": lambda: hf.DeiTModel(hf.DeiTConfig(**SMALL)),
    "DeiTForImageClassification": lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**SMALL)),
    "DeiTForImageClassificationWithTeacher": lambda: hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**SMALL)),
    "ViTMSNModel": lambda: hf.ViTMSNModel(hf.ViTMSNConfig(**SMALL)),
    "ViTMSNForImageClassification": lambda: hf.ViTMSNForImageClassification(hf.ViTMSNConfig(**SMALL)),
    "IJepaModel": lambda: hf.IJepaModel(hf.IJepaConfig(**SMALL)),
    "IJepaForImageClassification": lambda: hf.IJepaForImageClassification(hf.IJepaConfig(**SMALL)),
    "ViTMAEModel": lambda: hf.ViTMAEModel(hf.ViTMAEConfig(**SMALL, mask_ratio=0.0)),
    "ViTMAEForPreTraining": lambda: hf.ViTMAEForPreTraining(
        hf.ViTMAEConfig(**SMALL, mask_ratio=0.0, decoder_hidden_size=16, decoder_num_hidden_layers=1)
    ),
    "Dinov2Model": lambda: hf.Dinov2Model(hf.Dinov2Config(**DINO)),
    "Dinov2ForImageClassification": lambda: hf.Dinov2ForImageClassification(
        hf.Dinov2Config(**DINO, use_swiglu_ffn=True)
    ),
    "Dinov2WithRegistersModel": lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**DINO)),
    "Dinov2WithRegistersForImageClassification": lambda: hf.Dinov2WithRegistersForImageClassification(
        hf.Dinov2WithRegistersConfig(**DINO)
    ),
    "DINOv3ViTModel": lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**DINO, num_register_tokens=4)),
    "CLIPVisionModel": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**CLIP)),
    "CLIPVisionModelWithProjection": lambda: hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**CLIP)),
    "CLIPModel": lambda: _two_towers(
        hf.CLIPConfig, hf.CLIPModel, hf.CLIPVisionConfig(**CLIP), hf.CLIPTextConfig(**TEXT), projection_dim=24
    ),
    "CLIPForImageClassification": lambda: _two_towers(
        hf.CLIPConfig, hf.CLIPForImageClassification, hf.CLIPVisionConfig(**CLIP), hf.CLIPTextConfig(**TEXT)
    ),
    "SiglipVisionModel": lambda: hf.SiglipVisionModel(_siglip()),
    "SiglipModel": lambda: _two_towers(hf.SiglipConfig, hf.SiglipModel, _siglip(), hf.SiglipTextConfig(**TEXT)),
    "SiglipForImageClassification": lambda: _two_towers(
        hf.SiglipConfig,
        hf.SiglipForImageClassification,
        _siglip(vision_use_head=False),
        hf.SiglipTextConfig(**TEXT),
    ),
    "VideoMAEModel": lambda: hf.VideoMAEModel(hf.VideoMAEConfig(**VIDEO)),
    "VideoMAEForVideoClassification": lambda: hf.VideoMAEForVideoClassification(hf.VideoMAEConfig(**VIDEO)),
    "VivitModel": lambda: hf.VivitModel(hf.VivitConfig(**VIDEO, tubelet_size=[2, 8, 8])),
    "VivitForVideoClassification": lambda: hf.VivitForVideoClassification(
        hf.VivitConfig(**VIDEO, tubelet_size=[2, 8, 8])
    ),
    "ASTModel": lambda: hf.ASTModel(hf.ASTConfig(**AUDIO)),
    "ASTForAudioClassification": lambda: hf.ASTForAudioClassification(hf.ASTConfig(**AUDIO)),
    "BeitModel": lambda: hf.BeitModel(hf.BeitConfig(**BEIT, use_relative_position_bias=True)),
    "BeitForImageClassification": lambda: hf.BeitForImageClassification(
        hf.BeitConfig(**BEIT, use_shared_relative_position_bias=True)
    ),
    "VisionEncoderDecoderModel": _trocr,
    "Dinov2Backbone": lambda: hf.Dinov2Backbone(hf.Dinov2Config(**DINO, out_indices=[1, 3])),
    "DepthAnythingForDepthEstimation": _depth,
    "DINOv3ViTBackbone": lambda: hf.DINOv3ViTBackbone(
        hf.DINOv3ViTConfig(**DINO, num_register_tokens=4, out_indices=[1, 3])
    ),
    "BeitBackbone": lambda: hf.BeitBackbone(
        hf.BeitConfig(**BEIT, use_relative_position_bias=True, out_indices=[1, 3], add_fpn=False)
    ),
    "YolosModel": lambda: hf.YolosModel(hf.YolosConfig(**YOLOS, use_mid_position_embeddings=False)),
    "YolosForObjectDetection": lambda: hf.YolosForObjectDetection(hf.YolosConfig(**YOLOS)),
    "InternVLVisionModel": lambda: hf.InternVLVisionModel(_internvl()),
    "InternVLForConditionalGeneration": lambda: hf.InternVLForConditionalGeneration(
        hf.InternVLConfig(vision_config=_internvl(), text_config=hf.Qwen2Config(**LANGUAGE), image_token_id=63)
    ),
    "LlavaForConditionalGeneration": lambda: hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**CLIP), text_config=hf.LlamaConfig(**LANGUAGE), image_token_id=63
        )
    ),
    "Gemma3ForConditionalGeneration": lambda: hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(
            vision_config=_siglip(vision_use_head=False),
            text_config=hf.Gemma3TextConfig(**LANGUAGE, head_dim=16),
            mm_tokens_per_image=4,
            image_token_id=63,
        )
    ),
}
"""One of every class that a spec lists."""

WITHOUT_PIXELS = (
    *("CLIPModel", "SiglipModel", "VisionEncoderDecoderModel", "ViTMAEModel", "ViTMAEForPreTraining"),
    *("LlavaForConditionalGeneration", "Gemma3ForConditionalGeneration", "InternVLForConditionalGeneration"),
    "DepthAnythingForDepthEstimation",
)
"""The classes that do not run on images alone, or not twice the same, or of which a part is reduced and counted."""


def tiny_transformer(name: str, build: Callable[[], nn.Module] | None = None) -> nn.Module:
    """A model in eval mode, with weights large enough that its tokens differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = (build or MODELS[name])()
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
            elif "lambda" not in key:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def as_function(model: nn.Module) -> TensorModel:
    """The model as a function from inputs to one tensor."""
    tower = tower_of(model)
    assert tower is not None and tower.output is not None
    output = tower.output
    return TensorModel(
        model, output.tensor, output.call, output.arguments, tower.prefix, 7 if output.logits else 0
    ).eval()


def tiny_inputs(model: nn.Module, count: int = 3) -> Tensor:
    """Random inputs of the size of the model."""
    tower = tower_of(model)
    assert tower is not None
    return torch.randn(count, *tower.input_size, generator=torch.Generator().manual_seed(1))
