"""Networks of feature maps besides ResNet, ConvNeXt and RegNet: one small model of each class. See `test_resnet.py`."""

from __future__ import annotations

import copy
import importlib
from functools import partial
from typing import Any

import pytest
import torch
from timm.layers import GroupNormAct
from tiny_cnn import drawn, line_plan, photos, shrink
from torch import Tensor, nn

from repshift_cli.checkpoints.create import quickly_on_meta
from repshift_cli.errors import ModelError, RecipeError
from repshift_cli.measure.macs import count_macs
from repshift_cli.reduction.compressed_model import CompressedModel, attach
from repshift_cli.reduction.families import cnn
from repshift_cli.reduction.families.base import Site, match
from repshift_cli.reduction.permute import TOLERANCE
from repshift_cli.reduction.shift import shift_difference

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

each_model = pytest.mark.parametrize("name", [name for name in MODELS if name not in ("SENet", "Xception")])


def tiny(name: str) -> Any:
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


def dropping(model: nn.Module) -> CompressedModel:
    """One row and two columns less after the first and the middle site."""
    count = len(match(model).layout(model).sites)
    return attach(model, shrink(model, {0: (1, 2), **({count // 2: (1, 1)} if count > 2 else {})}))


@each_model
def test_each_class(name: str) -> None:
    model = tiny(name)
    check_shift(model)
    check_sizes_and_macs(model)
    check_cut_by_hand(model)


def check_shift(model: nn.Module) -> None:
    """Nothing behind a site depends on the place of a line."""
    sites = match(model).sites(model)
    for site in (sites[0], sites[len(sites) // 2]):
        assert shift_difference(model, site) < TOLERANCE


def check_sizes_and_macs(model: nn.Module) -> None:
    """They are those of the plan."""
    layout = match(model).layout(model)
    assert match(model).macs(model, None) == count_macs(model, (3, *SIZE))
    seen: dict[str, tuple[int, int]] = {}
    wrapped = dropping(model)

    def note(module: nn.Module, args: Any, output: Tensor, *, at: str) -> None:
        seen[at] = (output.shape[2], output.shape[3])

    handles = [
        model.get_submodule(site.name).register_forward_hook(partial(note, at=site.name), prepend=True)
        for site in layout.sites
    ]
    trace = wrapped.trace(photos(2, SIZE))
    for handle in handles:
        handle.remove()
    wrapped.detach()
    assert seen == {site.name: grid for site, grid in layout.grids(wrapped.plan.grids_kept)}
    assert trace.output.isfinite().all()
    wrapped = dropping(model)
    for planned in wrapped.plan.sites:
        assert trace.kept[planned.layer].shape == (2, planned.tokens_out)
    assert count_macs(wrapped, (3, *SIZE)) == wrapped.macs() < wrapped.dense_macs()
    wrapped.detach()


def check_cut_by_hand(model: nn.Module) -> None:
    """A plan equals the same map in the place of that of the block, and one that keeps all changes no bit."""
    batch = photos(2, SIZE)
    dense = model(batch)
    layout = match(model).layout(model)
    wrapped = attach(model, shrink(model, {0: (0, 0)}))
    assert torch.equal(wrapped(batch), dense)
    wrapped.detach()
    site = layout.sites[len(layout.sites) // 2]
    wrapped = attach(model, shrink(model, {len(layout.sites) // 2: (1, 2)}))
    output = wrapped(batch)
    seen: list[Tensor] = []
    block = model.get_submodule(site.name)
    handles = [block.register_forward_hook(lambda module, args, out: seen.append(out))]
    wrapped(batch)
    wrapped.detach()
    handles[0].remove()
    block.register_forward_hook(lambda module, args, out: seen[0])
    assert torch.equal(model(batch), output)


def test_every_class_has_a_model_here() -> None:
    classes = {name for names in cnn._BLOCKS.values() for name in names.split()}
    assert {kind for _, kind, _ in MODELS.values()} == classes


def test_positions_bar_the_blocks_before_them() -> None:
    model = tiny("EdgeNeXt")
    layout = match(model).layout(model)
    name = "stages.0.blocks.0"
    assert "stages.1.blocks.1 (SplitTransposeBlock) adds or multiplies a value for each position" in layout.barred[name]
    site = Site(name, 0, model.get_submodule(name), {}, {})
    assert shift_difference(model, site) > TOLERANCE
    with pytest.raises(RecipeError, match=r"nothing can be dropped after stages\.0\.blocks\.0: behind it"):
        line_plan(model, f"[{{layer: {name}, drop_ratio: 0.3}}]")


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("efficientnet_cc_b0_4e", {}, "(CondConv2d) has a kernel that depends on the image"),
        ("mobilevitv2_050", {}, "stages.2.1 (MobileVitV2Block) takes maps apart"),
        ("vovnet39a", {}, "its output differs in size or width"),
        ("efficientnet_b0", {"num_classes": 0, "global_pool": ""}, "it was built without global pooling"),
    ],
)
def test_refusals(name: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError) as caught:
        match(quickly_on_meta(name, options))
    assert reason in caught.value.message
