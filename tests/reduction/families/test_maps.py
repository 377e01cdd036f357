"""Networks of feature maps besides ResNet, ConvNeXt and RegNet: one small model of each class. See `test_resnet.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_cnn import photos, shrink, tiny_cnn
from torch import Tensor, nn

from repshift_cli.errors import ModelError, RecipeError
from repshift_cli.measure.macs import count_macs
from repshift_cli.reduction.compressed_model import CompressedModel, attach
from repshift_cli.reduction.families import cnn
from repshift_cli.reduction.families.base import Site, match
from repshift_cli.reduction.permute import TOLERANCE
from repshift_cli.reduction.shift import shift_difference

_THIN: dict[str, Any] = {"channel_multiplier": 0.15}
_STAGES: dict[str, Any] = {"depths": (2, 1, 2, 2), "dims": (8, 8, 16, 16)}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "EfficientNet": ("efficientnet_b0", {**_THIN, "depth_multiplier": 0.5}),
    "EfficientNet SAME": ("tf_efficientnet_b0", _THIN),
    "EfficientNet mixed kernels": ("mixnet_s", _THIN),
    "MobileNetV3": ("mobilenetv3_large_100", _THIN),
    "MobileNetV3 attention": ("mobilenetv4_hybrid_medium", _THIN),
    "GhostNet": ("ghostnet_050", {"width": 0.2}),
    "RepGhostNet": ("repghostnet_050", {"width": 0.2}),
    "ConvMixer": ("convmixer_768_32", {"dim": 16, "depth": 3}),
    "ByobNet": ("repvgg_a0", {}),
    "NormFreeNet": ("nf_resnet26", {"width_factor": 0.1}),
    "StarNet": ("starnet_s050", {"base_dim": 8}),
    "LCNetV2": ("lcnetv2_base", {"scale": 0.1}),
    "EdgeNeXt": ("edgenext_xx_small", {"dims": (8, 16, 24, 32), "depths": (2, 2, 3, 2)}),
    "EfficientVit": (
        "efficientvit_b0",
        {"widths": (8, 8, 16, 16, 32), "depths": (1, 1, 1, 1, 1), "head_widths": (32, 32)},
    ),
    "FasterNet": ("fasternet_t0", {"embed_dim": 16, "depths": (1, 1, 2, 1), "feature_dim": 32}),
    "FastVit": ("fastvit_sa12", {"layers": (1, 1, 2, 2), "embed_dims": (8, 16, 24, 32)}),
    "HighPerfGpuNet": ("hgnet_tiny", {}),
    "IFormer": ("iformer_t", {}),
    "MetaFormer pooling": ("poolformer_s12", _STAGES),
    "MetaFormer attention": ("caformer_s18", {**_STAGES, "dims": (8, 8, 32, 32)}),
    "MetaNeXt": ("inception_next_atto", {**_STAGES, "dims": (16, 16, 24, 24)}),
    "RepVit": ("repvit_m0_9", {"embed_dim": (8, 16, 16, 24), "depth": (2, 2, 3, 2)}),
    "ResNetV2": ("resnetv2_50x1_bit", {"layers": (2, 2, 2, 2), "channels": (32, 32, 64, 64), "stem_chs": 8}),
    "SHViT": ("shvit_s1", {"embed_dim": (16, 32, 48), "partial_dim": (8, 8, 16)}),
    "SwiftFormer": ("swiftformer_xs", {"embed_dims": (8, 16, 24, 32), "layers": (2, 2, 2, 2)}),
    "VovNet": ("eca_vovnet39b", {"stage_out_chs": (16, 16, 32, 32), "stage_conv_chs": (8, 8, 8, 8)}),
    "FocalNet": ("focalnet_tiny_srf", {"embed_dim": 8, "depths": (2, 1, 2, 2)}),
    "SENet": ("legacy_seresnet18", {"layers": (2, 2, 2, 2)}),
}
"""By class: timm's name and smaller sizes."""

SIZE = (101, 132)

each_model = pytest.mark.parametrize("name", MODELS)


def tiny(name: str, **options: Any) -> Any:
    kind, smaller = MODELS[name]
    return tiny_cnn(kind, SIZE, **smaller, **options)


def dropping(model: nn.Module) -> CompressedModel:
    """One row and two columns less after the first and the middle site."""
    count = len(match(model).layout(model).sites)
    return attach(model, shrink(model, {0: (1, 2), **({count // 2: (1, 1)} if count > 2 else {})}))


@each_model
def test_nothing_behind_a_site_depends_on_the_place_of_a_line(name: str) -> None:
    model = tiny(name)
    sites = match(model).sites(model)
    for site in (sites[0], sites[len(sites) // 2]):
        assert shift_difference(model, site) < TOLERANCE


@each_model
def test_sizes_and_macs_equal_the_plan(name: str) -> None:
    model = tiny(name)
    layout = match(model).layout(model)
    assert match(model).macs(model, None) == count_macs(model, (3, *SIZE))
    seen: dict[str, tuple[int, int]] = {}
    wrapped = dropping(model)

    def note(module: nn.Module, args: Any, output: Tensor, *, at: str) -> None:
        seen[at] = (output.shape[2], output.shape[3])

    from functools import partial

    for site in layout.sites:
        model.get_submodule(site.name).register_forward_hook(partial(note, at=site.name), prepend=True)
    trace = wrapped.trace(photos(2, SIZE))
    assert seen == {site.name: grid for site, grid in layout.grids(wrapped.plan.grids_kept)}
    assert trace.output.isfinite().all()
    for planned in wrapped.plan.sites:
        assert trace.kept[planned.layer].shape == (2, planned.tokens_out)
    assert count_macs(wrapped, (3, *SIZE)) == wrapped.macs() < wrapped.dense_macs()


@each_model
def test_a_plan_equals_the_map_cut_by_hand(name: str) -> None:
    model, batch = tiny(name), photos(2, SIZE)
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
    assert {type(tiny(name)).__name__ for name in MODELS} | {"Xception"} == classes


def test_positions_bar_the_blocks_before_them() -> None:
    model = tiny("EdgeNeXt")
    layout = match(model).layout(model)
    name = "stages.0.blocks.0"
    assert "stages.1.blocks.1 (SplitTransposeBlock) adds or multiplies a value for each position" in layout.barred[name]
    site = Site(name, 0, model.get_submodule(name), {}, {})
    assert shift_difference(model, site) > TOLERANCE
    with pytest.raises(RecipeError, match="nothing can be dropped after stages.0.blocks.0: behind it"):
        shrink_named(model, name)


def shrink_named(model: nn.Module, name: str) -> None:
    from tiny_cnn import line_plan

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
    from repshift_cli.checkpoints.create import quickly_on_meta

    with pytest.raises(ModelError) as caught:
        match(quickly_on_meta(name, options))
    assert reason in caught.value.message
