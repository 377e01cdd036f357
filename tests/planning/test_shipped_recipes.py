"""Every shipped recipe fits the model that it names."""

from __future__ import annotations

import pytest
from torch import nn

from repshift_cli.checkpoints.create import create
from repshift_cli.checkpoints.create import on_meta as meta_device
from repshift_cli.measure.macs import count_macs
from repshift_cli.planning.plan import Plan
from repshift_cli.planning.recipe import Recipe, shipped_recipes
from repshift_cli.reduction.checks import check_feeds
from repshift_cli.reduction.compressed_model import attach
from repshift_cli.reduction.families.base import match
from repshift_cli.reduction.metrics.base import build_metric
from repshift_cli.reduction.plans import resolve_for
from repshift_cli.reduction.reducers.base import build_reducer


def on_meta(name: str) -> nn.Module:
    with meta_device():
        return create(name, {}, name).eval()


def planned(recipe: Recipe, model: nn.Module) -> Plan:
    plan = resolve_for(model, recipe)
    return plan.with_metric(build_metric(recipe.metric).with_defaults().spec())


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_it_fits_its_model(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.description
    assert recipe.model
    model = on_meta(recipe.model)
    metric, plan = build_metric(recipe.metric, recipe.place), planned(recipe, model)
    build_reducer(recipe.reducer, recipe.place)
    for site in match(model).sites(model):
        check_feeds(metric.with_defaults(), site, plan.sites[0].after, recipe.place)
    compressed = attach(model, plan)
    assert compressed.macs() < compressed.dense_macs()


@pytest.mark.parametrize(
    ("name", "dense", "after"),
    [
        ("deit_small_paper", "4.60", "2.99"),
        ("deit_base_paper", "17.56", "11.50"),
        ("deit_tiny_paper", "1.25", "0.80"),
        ("resnet34_paper", "3.66", "2.53"),
        ("resnet50_paper", "4.09", "2.70"),
        ("vim_tiny_paper", "1.54", "1.29"),
        ("vim_tiny_topvim", "1.54", "1.27"),
        ("vim_small_topvim", "5.34", "3.77"),
        ("umt_base_paper", "303.12", "156.27"),
        ("umt_large_paper", "984.03", "478.16"),
        ("umt_base_spread", "303.12", "151.26"),
        ("umt_large_spread", "984.03", "495.24"),
        ("umt_base_fast", "303.12", "87.42"),
        ("umt_base_vidtldr", "303.12", "108.00"),
        ("umt_large_vidtldr", "984.03", "543.05"),
        ("deit_small_merge", "4.60", "2.83"),
        ("deit_base_merge", "17.56", "10.90"),
        ("vit_base_merge", "17.56", "11.64"),
        ("vim_tiny_fitted", "1.54", "1.29"),
        ("resnet50_fitted", "4.09", "2.70"),
    ],
)
def test_the_papers_counts(name: str, dense: str, after: str) -> None:
    recipe = Recipe.load(name)
    model = on_meta(str(recipe.model))
    compressed = attach(model, planned(recipe, model))
    assert f"{compressed.dense_macs() / 1e9:.2f}" == dense
    assert f"{compressed.macs() / 1e9:.2f}" == after
    assert f"{dense} -> {after} GMACs" in str(recipe.description)


@pytest.mark.parametrize(("name", "paper"), [("resnet34_paper", 2.5), ("resnet50_paper", 2.7), ("vim_tiny_paper", 1.3)])
def test_the_cost_is_within_two_percent_of_the_papers(name: str, paper: float) -> None:
    recipe = Recipe.load(name)
    model = on_meta(str(recipe.model))
    compressed = attach(model, planned(recipe, model))
    assert compressed.macs() / 1e9 == pytest.approx(paper, rel=0.02)


def test_umt_large_has_the_published_cost_if_layernorm_counts() -> None:
    recipe = Recipe.load("umt_large_paper")
    model = on_meta("umt_large")
    compressed = attach(model, planned(recipe, model))
    assert [site.tokens_out for site in compressed.plan.sites] == [1882, 1506, 1205]
    tokens = [2352, 1882, 1506, *[1205] * 21]
    width, per_channel, norms = 1024, 5, 2  # LayerNorm as operation counters of the field count it
    dense = compressed.dense_macs() + norms * per_channel * width * 24 * tokens[0]
    after = compressed.macs() + norms * per_channel * width * sum(tokens)
    assert (compressed.dense_macs(), compressed.macs()) == (984_034_836_480, 478_163_806_208)
    assert (f"{dense / 1e9:.1f}", f"{after / 1e9:.1f}") == ("984.6", "478.5")


VIDTLDR = {
    "msrvtt": ([600, 200, 100], [550, 400], "177.84", "543.05"),
    "msvd": ([450, 250, 200], [600, 200, 100, 100], "181.11", "528.24"),
    "activitynet": ([500], [600, 300], "227.38", "562.70"),
    "didemo": ([250, 150, 150, 150], [800, 100], "212.65", "558.66"),
    "lsmdc": ([400, 150, 150], [250, 250, 200, 200], "206.02", "583.32"),
    "ssv2-label": ([200, 200, 200, 100], [450, 250, 100], "212.71", "610.52"),
    "ssv2-template": ([400, 300], [350, 300, 100, 50], "203.54", "615.30"),
    "msrvtt-qa": ([600, 200], [400, 400, 100], "188.37", "569.41"),
    "msvd-qa": ([600, 200], [400, 400, 100], "188.37", "569.41"),
}
"""Tokens that vid-TLDR merges in the first blocks of UMT-B and UMT-L, and the GMACs with our score and the matching."""


@pytest.mark.parametrize(("model", "side"), [("umt_base", 0), ("umt_large", 1)])
def test_the_schedules_of_vid_tldr(model: str, side: int) -> None:
    dense = on_meta(model)
    assert list(Recipe.load(f"{model}_vidtldr").schedules) == list(VIDTLDR)
    for name, columns in VIDTLDR.items():
        plan = planned(Recipe.load(f"{model}_vidtldr:{name}"), dense)
        assert [(site.layer, site.tokens_in - site.tokens_out) for site in plan.sites] == list(enumerate(columns[side]))
        compressed = attach(dense, plan)
        assert f"{compressed.macs() / 1e9:.2f}" == columns[2 + side]
        compressed.detach()


def test_umt_base_with_the_schedule_for_msrvtt_has_the_published_cost() -> None:
    """175.7 GMACs by the authors' count, which has neither the matching nor the score."""
    model = on_meta("umt_base")
    compressed = attach(model, planned(Recipe.load("umt_base_vidtldr:msrvtt"), model))
    matching = sum((site.tokens_in // 2) * -(-site.tokens_in // 2) * 768 for site in compressed.plan.sites)
    assert f"{(compressed.macs() - matching) / 1e9:.1f}" == "175.7"


def test_vit_base_with_137_96_67_tokens() -> None:
    layers = "[{layer: 3, keep_tokens: 137}, {layer: 6, keep_tokens: 96}, {layer: 9, keep_tokens: 67}]"
    model = on_meta("vit_base_patch16_224")
    compressed = attach(model, planned(Recipe.parse(f"version: 1\nlast_block: full\nlayers: {layers}"), model))
    assert compressed.dense_macs() == 17_563_828_224
    assert compressed.macs() == 12_030_011_904
    assert count_macs(model, (3, 224, 224)) == 12_030_011_904
