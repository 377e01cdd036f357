"""Small models of timm's transformers with specs."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.deepseek_vit import DeepseekVitClassifier, DeepseekVitEncoder
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.qwen3_vit import Qwen3VitClassifier, Qwen3VitEncoder
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos
from torch import nn

_SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 10}
_FLEX = {**{key: value for key, value in _SMALL.items() if key != "img_size"}, "img_size": 32}
_FLEX |= {"pos_embed_grid_size": None}
_ROPE = {"use_rot_pos_emb": True, "rope_grid_indexing": "xy", "ref_feat_shape": (4, 4)}

TIMM: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "eva": (Eva, {"init_values": 0.3}),
    "eva_token": (Eva, {"global_pool": "token"}),
    "eva_post_norm": (Eva, {"use_post_norm": True, "global_pool": "token"}),
    "eva02": (
        Eva,
        {**_ROPE, "qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True},
    ),
    "eva02_token": (Eva, {**_ROPE, "global_pool": "token", "swiglu_mlp": True}),
    "dinov3": (
        Eva,
        {
            **{"use_rot_pos_emb": True, "rope_type": "dinov3", "rope_rotate_half": True, "init_values": 0.3},
            **{"use_abs_pos_emb": False, "num_reg_tokens": 4, "global_pool": "token", "dynamic_img_size": True},
        },
    ),
    "pe": (
        Eva,
        {
            **_ROPE,
            **{"attn_type": "rope", "use_pre_transformer_norm": True, "global_pool": "map", "attn_pool_num_heads": 4},
        },
    ),
    "rope_mixed": (Eva, {**_ROPE, "rope_type": "mixed", "attn_type": "rope", "global_pool": "token", "qk_norm": True}),
    "rope_registers": (
        Eva,
        {**_ROPE, "attn_type": "rope", "class_token": False, "num_reg_tokens": 1, "no_embed_class": True},
    ),
    "grouped": (Eva, {**_ROPE, "attn_type": "rope", "qkv_fused": False, "num_kv_heads": (2, 1, 1)}),
    "beit": (Beit, {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 0.3}),
    "beit_shared": (Beit, {"use_shared_rel_pos_bias": True, "global_pool": "token", "swiglu_mlp": True}),
    "relpos": (VisionTransformerRelPos, {"rel_pos_type": "bias", "init_values": 0.3}),
    "relpos_mlp": (VisionTransformerRelPos, {"class_token": True, "global_pool": "token", "init_values": 0.3}),
    "relpos_shared": (VisionTransformerRelPos, {"shared_rel_pos": True, "class_token": True, "fc_norm": True}),
    "relpos_post_norm": (VisionTransformerRelPos, {"block_fn": ResPostRelPosBlock, "rel_pos_dim": 16}),
    "cait": (Cait, {"init_values": 0.3}),
    "cait_mean": (Cait, {"init_values": 0.3, "global_pool": "avg", "depth_token_only": 1}),
    "naflex": (NaFlexVit, {"reg_tokens": 2, "global_pool": "avg"}),
    "naflex_token": (NaFlexVit, {"class_token": True, "global_pool": "token", "embed_proj_type": "conv"}),
    "naflex_map": (NaFlexVit, {"reg_tokens": 1, "global_pool": "map", "init_values": 0.3}),
    "naflex_rope": (NaFlexVit, {"rope_type": "axial", "class_token": True, "global_pool": "token"}),
    "naflex_mixed": (NaFlexVit, {"rope_type": "mixed", "class_token": True, "global_pool": "map"}),
}
"""By name: the class, and what differs from the small model."""

_TOWER = {key: value for key, value in _SMALL.items() if key != "num_classes"}
_QWEN = {"pos_embed_grid_size": 4}

TOWERS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "qwen": (Qwen3VitEncoder, {**_TOWER, **_QWEN, "out_features": 24}),
    "qwen_classes": (Qwen3VitClassifier, {**_SMALL, **_QWEN}),
    "qwen_merged": (Qwen3VitClassifier, {**_SMALL, **_QWEN, "encoder_pool": "merge"}),
    "deepseek": (DeepseekVitEncoder, {**_TOWER, "out_features": 24}),
    "deepseek_classes": (DeepseekVitClassifier, _SMALL),
}
"""Towers of language models, which need all tokens: the class and its arguments."""


def tiny_timm(name: str, **options: Any) -> nn.Module:
    """A model of 3 blocks and 16 patches in eval mode, with weights large enough that its tokens differ."""
    kind, differs = TOWERS.get(name) or TIMM[name]
    small = {} if name in TOWERS else _FLEX if kind is NaFlexVit else _SMALL
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(**{**small, **differs, **options})
        for key, parameter in model.named_parameters():
            if "freqs" not in key:
                nn.init.normal_(parameter, mean=float(parameter.ndim == 1 and "weight" in key), std=0.2)
    return model.eval()
