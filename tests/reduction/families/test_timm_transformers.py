"""timm's transformers with specs: EVA, DINOv3, PE, BEiT, relative positions, CaiT and NaFlexVit."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import timm
import torch
from tiny import images, tiny_vit
from tiny_timm import TIMM, TOWERS, tiny_timm
from torch import Tensor, nn

from repshift_cli.checkpoints.build import configure
from repshift_cli.data.preprocessing import Preprocessing, fixed_size
from repshift_cli.errors import ModelError, RecipeError, UsageError
from repshift_cli.measure.macs import count_macs
from repshift_cli.models.attention_mode import attention_mode
from repshift_cli.planning.recipe import Recipe
from repshift_cli.reduction.compressed_model import CompressedModel, attach, detach
from repshift_cli.reduction.families.base import match
from repshift_cli.reduction.families.transformer import tower_of
from repshift_cli.reduction.hooks import register_edit
from repshift_cli.reduction.permute import TOLERANCE, permute_difference
from repshift_cli.reduction.plans import resolve_for
from repshift_cli.reduction.token_stream import Tokens

every_model = pytest.mark.parametrize("name", TIMM)
MERGING = ["eva_token", "eva_post_norm", "eva02_token", "dinov3", "rope_mixed", "naflex_token", "naflex_rope"]
BLOCK = "{kind: representation_shift, operation: block, distance: l2, polarity: largest}"


def plan_for(
    model: nn.Module,
    drops: str = "0: 12, 1: 5",
    metric: str = BLOCK,
    reducer: str = "prune",
    restore: bool = False,
) -> Any:
    layers = ", ".join(
        f"{{layer: {drop.split(':')[0]}, keep_tokens: {drop.split(':')[1]}}}" for drop in drops.split(",")
    )
    text = f"version: 1\nmetric: {metric}\nreducer: {{kind: {reducer}}}\nlayers: [{layers}]\n"
    text += "restore: true\n" if restore else ""
    return resolve_for(model, Recipe.parse(text))


def compressed(name: str, **options: Any) -> CompressedModel:
    model = tiny_timm(name)
    return attach(model, plan_for(model, **options))


@torch.no_grad()
def run(model: nn.Module, count: int = 3) -> Tensor:
    output: Tensor = model(images(count))
    return output


@every_model
def test_permutation_after_every_block(name: str) -> None:
    model = tiny_timm(name)
    family = match(model)
    assert family.name == "transformer"
    for site in family.sites(model):
        assert permute_difference(model, family, images(3), site, None) < TOLERANCE


@pytest.mark.parametrize("name", ["eva02", "rope_mixed", "beit", "beit_shared", "relpos", "relpos_shared"])
def test_the_permute_test_needs_what_follows_the_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_timm(name)
    family = match(model)
    site = family.sites(model)[0]
    monkeypatch.setattr(type(family), "edits", lambda *_: ([], lambda: None))
    assert permute_difference(model, family, images(3), site, None) > 10 * TOLERANCE


@every_model
def test_macs_and_token_counts(name: str) -> None:
    model = compressed(name)
    assert model.dense_macs() == count_macs(tiny_timm(name), (3, 32, 32))
    assert model.macs() == count_macs(model, (3, 32, 32)) < model.dense_macs()
    assert {layer: kept.shape[1] for layer, kept in model.trace(images(3)).kept.items()} == {0: 12, 1: 5}


@every_model
def test_keep_all_is_bit_identical_to_dense(name: str) -> None:
    assert torch.equal(run(compressed(name, drops="0: 16, 1: 16")), run(tiny_timm(name)))


@every_model
def test_copies_and_detach(name: str) -> None:
    model, dense = compressed(name), run(tiny_timm(name))
    reduced = run(model)
    assert not torch.allclose(reduced, dense, atol=1e-3)
    assert torch.equal(run(copy.deepcopy(model)), reduced)
    assert torch.equal(run(pickle.loads(pickle.dumps(model))), reduced)
    with model.dense() as plain:
        assert torch.equal(run(plain), dense)
    assert torch.equal(run(detach(model)), dense)
    assert not any("get_bias" in vars(part) or "_get_rel_pos_bias" in vars(part) for part in model.model.modules())


@every_model
def test_attention_mode(name: str) -> None:
    model = compressed(name)
    expected = run(model)
    with attention_mode(model, "explicit"):
        torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)


def _doubled(stream: Any, output: Tensor, merged: bool) -> Tensor:
    """The first patch token twice, or once with size 2; then seven others."""
    value, prefix = stream.enter(output), stream.prefix
    places = torch.tensor([0] * (1 + (not merged)) + list(range(1, 8)))
    index = torch.cat((torch.arange(prefix), places + prefix))
    sizes = torch.ones(len(output), len(index))
    sizes[:, prefix] = 1 + merged
    return stream.leave(Tokens(value.tokens[:, index], sizes, places.expand(len(output), -1)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", MERGING)
@pytest.mark.parametrize("mode", ["explicit", "sdpa:math"])
def test_a_token_of_size_two_equals_two_equal_tokens(name: str, mode: Any) -> None:
    model = tiny_timm(name)
    family = match(model)
    assert family.merge_refusal(model) is None
    first, outputs = family.sites(model)[0].block, []
    for merged in (False, True):
        stream = family.stream(model)
        edits, undo = family.edits(model, stream)
        sized, _ = family.use_proportional_attention(model, stream)
        handles = [first.register_forward_pre_hook(stream.begin), *map(register_edit, [*edits, *sized])]
        double = partial(_doubled, merged=merged)
        handles.append(first.register_forward_hook(lambda _, __, output, s=stream, d=double: d(s, output)))
        with attention_mode(model, mode):
            outputs.append(run(model))
        undo()
        for handle in handles:
            handle.remove()
    assert float((outputs[0] - outputs[1]).abs().max()) < 2e-6 * float(outputs[0].abs().max())


@pytest.mark.parametrize("name", ["eva_token", "eva02_token", "dinov3", "rope_mixed", "naflex_token"])
@pytest.mark.parametrize("reducer", ["merge", "bipartite", "fuse"])
def test_merging(name: str, reducer: str) -> None:
    model = compressed(name, drops="0: 12, 1: 8", reducer=reducer)
    assert model.macs() == count_macs(model, (3, 32, 32))
    assert run(model).isfinite().all()
    kept = compressed(name, drops="0: 16, 1: 16", reducer=reducer)
    assert torch.equal(run(kept), run(tiny_timm(name)))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("eva", "Eva pools by a mean over tokens, which is not weighted by size"),
        ("pe", "Eva pools by attention, whose keys are not weighted by size"),
        ("naflex_map", "NaFlexVit pools by attention, whose keys are not weighted by size"),
        ("beit", "the attention of Beit reads positions"),
        ("relpos", "the attention of VisionTransformerRelPos reads positions"),
        ("cait", "the attention of Cait cannot weight tokens by size"),
    ],
)
def test_merging_is_refused(name: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        plan_for(tiny_timm(name), reducer="merge")


def test_metrics_of_queries() -> None:
    """Class attention is that of the model without rotary positions, and refused with them."""
    compressed("eva_token", metric="{kind: class_attention}").trace(images(3))
    with pytest.raises(RecipeError, match="positions turn its queries and keys inside the attention"):
        compressed("eva02_token", metric="{kind: class_attention}")
    with pytest.raises(RecipeError, match="the blocks of Beit have no module that returns it"):
        compressed("beit", metric="{kind: class_attention}")


@pytest.mark.parametrize("name", TIMM)
def test_updates_are_those_of_the_blocks(name: str) -> None:
    """Attention and MLP update add up to what a block changes."""
    model = tiny_timm(name)
    site = match(model).sites(model)[1]
    seen: dict[str, Tensor] = {}
    for key in ("attention_update", "mlp_update") if "attention_update" in site.probes else ("mlp_update",):
        probe = site.probes[key]
        probe.module.register_forward_hook(lambda _, __, output, key=key: seen.update({key: output}))
    stream = site.probes["mlp_stream"].module
    stream.register_forward_pre_hook(lambda _, args: seen.update(stream=args[0]))
    site.block.register_forward_hook(lambda _, args, output: seen.update(before=args[0], after=output))
    run(model)
    torch.testing.assert_close(seen["stream"] + seen["mlp_update"], seen["after"])
    if "attention_update" in seen:
        torch.testing.assert_close(seen["before"] + seen["attention_update"], seen["stream"])


@pytest.mark.parametrize("name", TOWERS)
def test_towers_of_language_models(name: str) -> None:
    model = tiny_timm(name)
    family, dense = match(model), run(model)
    for site in family.sites(model):
        assert permute_difference(model, family, images(3), site, None, restore=True) < TOLERANCE
    with pytest.raises(RecipeError, match="needs all of them"):
        plan_for(model)
    kept = attach(model, plan_for(model, "0: 16, 1: 16", restore=True))
    assert torch.equal(run(kept), dense)
    detach(model)
    reduced = attach(model, plan_for(model, restore=True))
    assert run(reduced).shape == dense.shape
    assert not torch.allclose(run(reduced), dense, atol=1e-3)
    assert reduced.macs() == count_macs(reduced, (3, 32, 32))
    assert reduced.dense_macs() == count_macs(tiny_timm(name), (3, 32, 32))
    detach(model)
    merged = attach(model, plan_for(model, "0: 12, 1: 8", reducer="merge", restore=True))
    assert merged.macs() == count_macs(merged, (3, 32, 32))
    assert run(merged).isfinite().all()


def test_a_class_of_timm_is_refused_by_name() -> None:
    with torch.device("meta"):
        model = timm.create_model("gemma4_vit_167m")
    with pytest.raises(ModelError, match="Gemma4VitClassifier makes rotary positions for each image"):
        match(model)


def test_an_unknown_block_is_refused() -> None:
    model: Any = tiny_timm("eva")
    model.blocks[1] = nn.Identity()
    with pytest.raises(ModelError, match=r"Eva cannot be reduced: blocks\.1 is a Identity, which is not supported"):
        match(model)


def test_the_image_size_of_a_naflexvit_must_be_known() -> None:
    with pytest.raises(ModelError, match="the image size of this NaFlexVit is unknown"):
        plan_for(tiny_timm("naflex", img_size=None, pos_embed_grid_size=(4, 4)))
    model: Any = tiny_timm("naflex", img_size=None, pos_embed_grid_size=(4, 4))
    model.pretrained_cfg = {"input_size": (3, 32, 24)}
    assert match(model).layout(model).patch_tokens == 12
    tower = tower_of(model)
    assert tower is not None
    assert tower.input_size == (3, 32, 24)


class TestAnySize:
    """Models with `dynamic_img_size`: a plan holds for one size."""

    @pytest.mark.parametrize(
        "build",
        [lambda: tiny_vit(dynamic_img_size=True), lambda: tiny_timm("dinov3"), lambda: tiny_timm("qwen_classes")],
    )
    def test_of_the_preprocessing(self, build: Any) -> None:
        model = build()
        assert fixed_size(model) is None
        values = {**Preprocessing.of_model(model).to_dict(), "input_size": (3, 48, 24)}
        configure(model, Preprocessing.from_dict(values))
        assert Preprocessing.of_model(model).input_size == (3, 48, 24)
        grid = match(model).patch_grid(model)
        assert (grid.rows, grid.columns) == (6, 3)
        wrapped = attach(model, plan_for(model, restore=match(model).needs_restore(model) is not None))
        assert wrapped.macs() == count_macs(wrapped, (3, 48, 24))
        assert wrapped(torch.randn(2, 3, 48, 24)).isfinite().all()
        with pytest.raises(UsageError, match="compress the model again for this one"):
            wrapped(images(2))
