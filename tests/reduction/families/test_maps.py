"""Networks of feature maps besides ResNet, ConvNeXt and RegNet: one small model of each class. See `test_resnet.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_cnn import line_plan, photos, shrink, traced_grids
from tiny_maps import MODELS, SIZE, tiny_map
from torch import Tensor, nn

from repshift_cli.checkpoints.create import quickly_on_meta
from repshift_cli.errors import ModelError, RecipeError
from repshift_cli.measure.macs import count_macs
from repshift_cli.reduction.compressed_model import CompressedModel, attach
from repshift_cli.reduction.families import maps
from repshift_cli.reduction.families.base import Site, match
from repshift_cli.reduction.permute import TOLERANCE
from repshift_cli.reduction.shift import shift_difference

each_model = pytest.mark.parametrize("name", [name for name in MODELS if name not in ("SENet", "Xception")])


def dropping(model: nn.Module) -> CompressedModel:
    """One row and two columns less after the first and the middle site."""
    count = len(match(model).layout(model).sites)
    return attach(model, shrink(model, {0: (1, 2), **({count // 2: (1, 1)} if count > 2 else {})}))


@each_model
def test_each_class(name: str) -> None:
    model = tiny_map(name)
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
    wrapped = dropping(model)
    trace, seen = traced_grids(wrapped, photos(2, SIZE))
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
    classes = {name for names in maps._BLOCKS.values() for name in names.split()}
    assert {kind for _, kind, _ in MODELS.values()} == classes


def test_positions_bar_the_blocks_before_them() -> None:
    model = tiny_map("EdgeNeXt")
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
