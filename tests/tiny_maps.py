"""One small network of maps of each class besides ResNet, ConvNeXt and RegNet."""

from __future__ import annotations

import copy
import importlib
from functools import partial
from typing import Any

from timm.layers import GroupNormAct
from tiny_cnn import drawn

__all__ = ["MODELS", "SIZE", "tiny_map"]

_MODULES = "timm.models."

_DEPTHS: dict[str, Any] = {"depths": (2, 1, 2, 2), "dims": (8, 8, 16, 16)}
_ROWS = [[[3, 8, 8, 0, 1]], [[3, 16, 12, 0, 2]], [[3, 24, 12, 0.25, 1]], [[5, 24, 16, 0.25, 2]], [[5, 24, 16, 0, 1]]]
_HGNET = {
    "stem_type": "v2",
    "stem_chs": (8, 8),
    "stage1": [8, 8, 16, 2, False, False, 3, 2],
    "stage2": [16, 8, 16, 2, True, False, 3, 2],
    "stage3": [16, 8, 24, 2, True, True, 5, 2],
    "stage4": [24, 8, 24, 2, True, True, 5, 2],
}
_VOVNET = {
    "stem_chs": [8, 8, 8],
    "stage_conv_chs": [8, 8, 8, 8],
    "stage_out_chs": [16, 16, 24, 24],
    "layer_per_block": 2,
    "block_per_stage": [1, 2, 2, 2],
    "residual": True,
    "depthwise": False,
    "attn": "ese",
}


def _mobile(module: str, kind: str, *stages: str, **options: Any) -> tuple[str, str, dict[str, Any]]:
    from timm.models._efficientnet_builder import decode_arch_def

    arguments = {"block_args": decode_arch_def([stage.split() for stage in stages]), "stem_size": 8, "num_features": 16}
    return module, kind, arguments | options


MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "EfficientNet": _mobile("efficientnet", "EfficientNet", "ds_r2_k3_s1_c8_se0.25", "ir_r2_k5_s2_e2_c8_se0.25"),
    "EfficientNet V2": _mobile("efficientnet", "EfficientNet", "cn_r2_k3_s1_c8_skip", "er_r2_k3_s2_e2_c12"),
    "EfficientNet SAME": _mobile(
        "efficientnet", "EfficientNet", "ds_r2_k3_s1_c8", "ir_r2_k5_s2_e2_c8", "ir_r2_k3_s2_e2_c8", pad_type="same"
    ),
    "EfficientNet mixed kernels": _mobile("efficientnet", "EfficientNet", "ds_r2_k3_s1_c8", "ir_r2_k3.5_s2_e2_c12"),
    "MobileNetV3": _mobile("mobilenetv3", "MobileNetV3", "ds_r2_k3_s1_c8", "ir_r2_k5_s2_e2_c8_se0.25_nre"),
    "MobileNetV3 universal blocks": _mobile(
        "mobilenetv3",
        "MobileNetV3",
        "uir_r2_a3_k5_s2_e2_c16 mqa_r1_k3_h2_s1_v2_d8_c16 mha_r1_k3_h2_s1_d8_c16 cn_r1_k1_s1_c24",
    ),
    "GhostNet": ("ghostnet", "GhostNet", {"cfgs": _ROWS}),
    "RepGhostNet": ("repghost", "RepGhostNet", {"cfgs": _ROWS}),
    "ConvMixer": ("convmixer", "ConvMixer", {"dim": 16, "depth": 3, "kernel_size": 5}),
    "NormFreeNet": ("nfnet", "NormFreeNet", {}),
    "ByobNet": ("byobnet", "ByobNet", {}),
    "StarNet": ("starnet", "StarNet", {"base_dim": 8, "depths": [2, 2, 2, 2]}),
    "LCNetV2": ("lcnetv2", "LCNetV2", {"scale": 0.125, "depths": (2, 2, 2, 3), "head_hidden_size": 16}),
    "EdgeNeXt": ("edgenext", "EdgeNeXt", {"dims": (8, 16, 24, 32), "depths": (2, 2, 3, 2), "heads": (4, 4, 4, 4)}),
    "EfficientVit": (
        "efficientvit_mit",
        "EfficientVit",
        {"widths": (8, 8, 16, 16, 32), "depths": (1, 2, 2, 2, 2), "head_dim": 8, "head_widths": (32, 32)},
    ),
    "FasterNet": ("fasternet", "FasterNet", {"embed_dim": 16, "depths": (1, 1, 2, 1), "feature_dim": 32}),
    "FastVit": (
        "fastvit",
        "FastVit",
        {"layers": (1, 1, 2, 2), "embed_dims": (8, 16, 32, 32), "token_mixers": (*("repmixer",) * 3, "attention")},
    ),
    "HighPerfGpuNet": ("hgnet", "HighPerfGpuNet", {"cfg": _HGNET, "head_hidden_size": 16, "use_lab": True}),
    "IFormer": ("iformer", "IFormer", {"dims": (8, 16, 24, 32), "depths": (1, 1, 4, 4), "attn_groups": (0, 0, 1, 1)}),
    "MetaFormer pooling": ("metaformer", "MetaFormer", _DEPTHS),
    "MetaFormer attention": ("metaformer", "MetaFormer", {**_DEPTHS, "dims": (8, 8, 32, 32)}),
    "MetaNeXt": ("inception_next", "MetaNeXt", {**_DEPTHS, "dims": (16, 16, 24, 24)}),
    "RepVit": ("repvit", "RepVit", {"embed_dim": (8, 16, 16, 24), "depth": (2, 2, 3, 2)}),
    "ResNetV2": ("resnetv2", "ResNetV2", {"layers": (2, 2, 2, 2), "channels": (32, 32, 64, 64), "stem_chs": 8}),
    "SHViT": ("shvit", "SHViT", {"embed_dim": (16, 32, 48), "partial_dim": (8, 8, 16), "types": ("i", "s", "s")}),
    "SwiftFormer": ("swiftformer", "SwiftFormer", {"embed_dims": (8, 16, 24, 32), "layers": (2, 2, 2, 2)}),
    "VovNet": ("vovnet", "VovNet", {"cfg": _VOVNET}),
    "FocalNet": ("focalnet", "FocalNet", {"embed_dim": 8, "depths": (2, 1, 2, 2)}),
    "SENet": ("senet", "SENet", {}),
    "Xception": ("xception", "Xception", {}),
}
"""By class: the module of timm, the class and its arguments."""

SIZE = (261, 324)


def tiny_map(name: str) -> Any:
    module, kind, arguments = MODELS[name]
    found = importlib.import_module(_MODULES + module)
    arguments = copy.deepcopy(arguments)
    if kind == "NormFreeNet":
        channels = (16, 16, 32, 32)
        arguments["cfg"] = found.NfCfg(
            (2, 1, 2, 2),
            channels,
            stem_chs=8,
            group_size=8,
            attn_layer="se",
            attn_kwargs={"rd_ratio": 0.5},
            same_padding=True,
        )
    elif kind == "ByobNet":
        blocks = [
            found.ByoBlockCfg(type=each, d=2, c=16, s=2, gs=groups, br=0.5)
            for each, groups in (("basic", 0), ("bottle", 8), ("dark", 0), ("edge", 0), ("rep", 0))
        ]
        arguments["cfg"] = found.ByoModelCfg(tuple(blocks), stem_chs=8, attn_layer="eca", downsample="conv1x1")
    elif name == "MetaFormer attention":
        arguments["token_mixers"] = [found.SepConv, found.SepConv, found.Attention, found.Attention]
        arguments["norm_layers"] = [found.LayerNorm2dNoBias] * 2 + [found.LayerNormNoBias] * 2
    elif kind == "ResNetV2":
        arguments["norm_layer"] = partial(GroupNormAct, num_groups=4)
    elif kind == "SENet":
        arguments |= {"block": found.SEResNetBlock, "layers": (2, 2, 2, 2), "groups": 1, "reduction": 16}
        arguments |= {"inplanes": 64, "downsample_kernel_size": 1, "downsample_padding": 0}
    return drawn(getattr(found, kind)(**arguments, num_classes=10), SIZE)
