"""`restore: true`: blocks run on fewer tokens, and what is around them gets all of them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import export_to, open_family
from tiny import KEEP_ALL, PATCHES, VARIANTS, images, tiny_vit
from tiny_cnn import tiny_cnn
from tiny_timm import tiny_timm
from tiny_transformers import tiny_inputs, tiny_transformer
from tiny_umt import tiny_umt
from tiny_vim import tiny_vim
from torch import Tensor, nn

import repshift_cli
from repshift_cli.calibration.outputs import divergence
from repshift_cli.checkpoints import artifact
from repshift_cli.checkpoints.artifact import Opened
from repshift_cli.errors import RecipeError, UsageError
from repshift_cli.measure.macs import count_macs
from repshift_cli.planning.plan import Plan
from repshift_cli.planning.recipe import Recipe
from repshift_cli.reduction.compressed_model import CompressedModel, attach, branch
from repshift_cli.reduction.families.base import match
from repshift_cli.reduction.metrics.base import build_metric
from repshift_cli.reduction.permute import TOLERANCE, check_permutation, permute_difference
from repshift_cli.reduction.plans import resolve_for
from repshift_cli.reduction.reducers.base import build_reducer
from repshift_cli.search.schedule import to_recipe

LAYERS = "[{layer: 0, drop_ratio: 0.25}, {layer: 2, keep_tokens: 7}]"
REDUCERS = ("prune", "merge", "fuse", "bipartite")

pytestmark = pytest.mark.filterwarnings("ignore:.*not calibrated")


def recipe(layers: str = LAYERS, reducer: str = "prune", restore: bool = True) -> Recipe:
    flag = str(restore).lower()
    return Recipe.parse(
        f"version: 1\nmetric: {{kind: token_norm}}\nreducer: {{kind: {reducer}}}\nrestore: {flag}\nlayers: {layers}\n"
    )


def restored(model: nn.Module, layers: str = LAYERS, reducer: str = "prune", restore: bool = True) -> CompressedModel:
    wanted = recipe(layers, reducer, restore).model_copy(update={"last_block": "full"})
    return attach(model, resolve_for(model, wanted))


def worst(model: nn.Module, inputs: Tensor) -> float:
    family = match(model)
    return max(permute_difference(model, family, inputs, site, None, restore=True) for site in family.sites(model))


def reference(model: Any, inputs: Tensor) -> list[Tensor]:
    """The outputs of all blocks of a pruned ViT with a class token, written with loops over images and tokens."""
    plan = resolve_for(model, recipe())
    drops = {site.layer: site.tokens_out for site in plan.sites}
    found: list[list[Tensor]] = [[] for _ in model.blocks]
    for tokens in model.norm_pre(model._pos_embed(model.patch_embed(inputs))):
        full, left, followed = tokens.clone(), list(range(len(tokens))), {}
        for layer, block in enumerate(model.blocks):
            before = full[left]
            after = block(before[None])[0]
            for token, leader in followed.items():
                full[token] = full[token] + (after - before)[left.index(leader)]
            full[left] = after
            if layer in drops:
                scores = after[1:].norm(dim=1)
                order = scores.sort(descending=True, stable=True).indices + 1
                kept = sorted(order[: drops[layer] - 1].tolist())
                for place in sorted(order[drops[layer] - 1 :].tolist()):
                    alike = torch.nn.functional.cosine_similarity(after[place][None], after[kept], dim=1)
                    leader = left[kept[int(alike.argmax())]]
                    followed = {key: leader if value == left[place] else value for key, value in followed.items()}
                    followed[left[place]] = leader
                left = [0, *(left[place] for place in kept)]
            found[layer].append(full.clone())
    return [torch.stack(each) for each in found]


class TestMechanism:
    @pytest.fixture(autouse=True)
    def _without_gradients(self) -> Iterator[None]:
        with torch.no_grad():
            yield

    def test_as_written_with_loops(self) -> None:
        model = tiny_vit(global_pool="avg")
        wanted = reference(model, images())
        output = model.forward_head(model.norm(wanted[-1]))  # type: ignore[operator]
        compressed = restored(model)
        found = compressed.get_intermediate_layers(images(), n=4, reshape=False, return_prefix_tokens=True)
        for (patches, prefix), tokens in zip(found, wanted, strict=True):
            torch.testing.assert_close(torch.cat((prefix, patches), dim=1), tokens, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(compressed(images()), output, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("reducer", REDUCERS)
    def test_blocks_compute_the_same_as_without(self, reducer: str) -> None:
        model, inputs = tiny_vit(reg_tokens=2), images(3)
        plain = restored(model, reducer=reducer, restore=False)
        left = plain.forward_features(inputs)
        trace = plain.trace(inputs)
        kept = dict(plain.trace(inputs).kept)[2]
        plain.detach()
        compressed = restored(model, reducer=reducer)
        full = compressed.forward_features(inputs)
        assert full.shape == (3, 3 + PATCHES, 32)
        assert torch.equal(compressed.trace(inputs).kept[2], kept)
        assert torch.equal(compressed(inputs), trace.output)  # of the class token
        if reducer != "bipartite":  # which reorders tokens
            places = kept + 3
            assert torch.equal(full[:, 3:].gather(1, kept.unsqueeze(2).expand(-1, -1, 32)), left[:, 3:]), places

    def test_keeping_everything_changes_no_bit(self) -> None:
        for name, options in VARIANTS.items():
            model = tiny_vit(**options)
            wanted = model(images())
            assert torch.equal(restored(model, KEEP_ALL)(images()), wanted), name

    def test_permuted_and_put_back(self) -> None:
        for name in ("plain", "registers", "map_pooling", "mean_pooling", "parallel_things_block"):
            assert worst(tiny_vit(**VARIANTS[name]), images(3)) < TOLERANCE, name

    def test_permuted_with_positions(self) -> None:
        for name in ("dinov3", "rope_mixed", "beit", "beit_shared", "relpos_shared", "cait"):
            assert worst(tiny_timm(name), images(3)) < TOLERANCE, name

    @pytest.mark.parametrize("name", ["DINOv3ViTModel", "BeitModel"])
    def test_permuted_of_transformers(self, name: str) -> None:
        model = tiny_transformer(name)
        assert worst(model, tiny_inputs(model)) < TOLERANCE

    def test_tokens_first(self) -> None:
        from open_clip.transformer import VisionTransformer

        torch.manual_seed(0)
        model = VisionTransformer(
            image_size=32, patch_size=8, width=32, layers=3, heads=2, mlp_ratio=2, output_dim=16, output_tokens=True
        ).eval()
        for block in model.transformer.resblocks:
            block.attn.batch_first = False
        model.transformer.batch_first = False
        assert worst(model, images(3)) < TOLERANCE
        assert restored(model, "[{layer: 0, keep_tokens: 5}]")(images(3))[1].shape == (3, PATCHES, 32)

    def test_hidden_states_that_a_library_records(self) -> None:
        model = tiny_transformer("CLIPVisionModel")
        inputs = tiny_inputs(model)
        wanted = model(inputs, output_hidden_states=True).hidden_states
        found = restored(model, "[{layer: 1, keep_tokens: 5}]")(inputs, output_hidden_states=True).hidden_states
        assert [part.shape for part in found] == [part.shape for part in wanted]
        assert torch.equal(found[2], wanted[2])  # no token is reduced before the second block ends
        assert not torch.equal(found[3], wanted[3])

    @pytest.mark.parametrize("pooling", ["mean_pooling", "map_pooling"])
    def test_no_sizes_behind_the_blocks(self, pooling: str) -> None:
        model = tiny_vit(**VARIANTS[pooling])
        compressed = restored(model, reducer="merge")
        tokens = compressed.forward_features(images())
        with compressed.dense() as dense:
            wanted = dense.forward_head(tokens)  # type: ignore[operator]
        torch.testing.assert_close(compressed(images()), wanted)

    def test_a_model_that_reads_all_tokens_can_merge(self) -> None:
        model = tiny_transformer("SiglipForImageClassification")
        with pytest.raises(RecipeError, match="pools by a mean"):
            restored(model, reducer="merge", restore=False)
        restored(model, reducer="merge")(tiny_inputs(model))

    @pytest.mark.parametrize(
        ("name", "reducer"), [("plain", "prune"), ("mean_pooling", "merge"), ("map_pooling", "fuse")]
    )
    def test_macs(self, name: str, reducer: str) -> None:
        compressed = restored(tiny_vit(**VARIANTS[name]), reducer=reducer)
        assert compressed.macs(counted=True) == count_macs(compressed, (3, 32, 32))

    def test_several_metrics_at_one_site(self) -> None:
        model = tiny_vit(global_pool="avg")
        plan = resolve_for(model, recipe())
        metrics = [
            build_metric(plan.sites[0].metric.model_copy(update={"kind": kind})) for kind in ("token_norm", "random")
        ]
        found = branch(model, plan, metrics)(images()).chunk(2)
        model = repshift_cli.detach(model)
        for metric, part in zip(metrics, found, strict=True):
            sites = plan.with_metrics([plan.sites[0].metric, metric.spec()])
            torch.testing.assert_close(attach(model, sites)(images()), part)
            repshift_cli.detach(model)

    def test_dense_copies_and_detach(self) -> None:
        model = tiny_vit()
        wanted = model(images()), model.forward_intermediates(images())[1]  # type: ignore[operator]
        compressed = restored(model)
        output = compressed(images())
        for each in (copy.deepcopy(compressed), pickle.loads(pickle.dumps(compressed))):
            assert torch.equal(each(images()), output)
        with compressed.dense() as dense:
            assert torch.equal(dense(images()), wanted[0])
        compressed.detach()
        assert torch.equal(model(images()), wanted[0])
        assert all(map(torch.equal, model.forward_intermediates(images())[1], wanted[1]))  # type: ignore[operator]
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_gradients_with_checkpointed_blocks() -> None:
    found = []
    for checkpointed in (False, True):
        compressed = restored(tiny_vit(global_pool="avg").train(), reducer="merge")
        compressed.model.set_grad_checkpointing(checkpointed)  # type: ignore[operator]
        compressed(images()).sum().backward()
        found.append([parameter.grad for parameter in compressed.model.parameters()])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)


class TestFeatureMaps:
    def test_allowed(self) -> None:
        compressed = restored(tiny_vit())
        for maps in (
            compressed.forward_intermediates(images(), intermediates_only=True),
            compressed.model.forward_intermediates(images(), intermediates_only=True),  # type: ignore[operator]
        ):
            assert [part.shape for part in maps] == [(2, 32, 4, 4)] * 4

    def test_without_the_message_says_how(self) -> None:
        compressed = restored(tiny_vit(), restore=False)
        with pytest.raises(UsageError, match="no dense feature maps") as caught:
            compressed.get_intermediate_layers(images())
        assert "`restore: true`" in caught.value.hint


@pytest.mark.parametrize("make", [tiny_cnn, tiny_vim, tiny_umt])
def test_other_families_are_refused(make: Any) -> None:
    model = make()
    layers = "[{layer: layer1.1, drop_ratio: 0.2}]" if make is tiny_cnn else "[{layer: 0, drop_ratio: 0.2}]"
    with pytest.raises(RecipeError, match=r"recipe:4:1: restore: models of the family \w+ do not pass on a tensor"):
        resolve_for(model, recipe(layers))
    plan = resolve_for(model, recipe(layers, restore=False)).model_copy(update={"restore": True})
    with pytest.raises(RecipeError, match="restore: models of"):
        attach(model, plan)


class TestRecipeAndPlan:
    def test_text(self) -> None:
        assert recipe().restore
        assert "restore: true" in recipe().to_yaml()
        assert "restore" not in recipe(restore=False).to_yaml()
        with pytest.raises(RecipeError, match=r"r\.yaml:2:1: restore: should be a valid boolean"):
            Recipe.parse("version: 1\nrestore: 1\nlayers: [{layer: 0, drop_ratio: 0.2}]", "r.yaml")

    def test_older_plans_are_unchanged(self) -> None:
        model = tiny_vit()
        plan = resolve_for(model, recipe())
        assert plan.model_dump()["restore"] is True
        assert Plan.model_validate(plan.model_dump()) == plan
        assert "restore" not in resolve_for(model, recipe(restore=False)).model_dump()

    def test_what_a_search_finds_restores_too(self) -> None:
        layout, metric = match(tiny_vit()).layout(tiny_vit()), {0: recipe().metric}
        made = to_recipe((9,), layout, [0], metrics=metric, reducer=recipe().reducer, restore=True)
        assert made.restore

    def test_saved_and_loaded(self, tmp_path: Path) -> None:
        compressed = repshift_cli.compress(tiny_transformer("Dinov2Model"), recipe("[{layer: 0, keep_tokens: 5}]"))
        inputs = tiny_inputs(compressed.model)
        loaded = repshift_cli.load(compressed.save(tmp_path / "a.safetensors"))
        assert loaded.plan == compressed.plan
        assert loaded.plan.restore
        torch.testing.assert_close(loaded(inputs), compressed(inputs).pooler_output)
        document = artifact.open_model(tmp_path / "a.safetensors").loaded.document
        assert document is not None
        assert document["format_version"] == 6

    @pytest.mark.parametrize(("pooling", "text"), [("token", "class token and does not change"), ("avg", "gets all")])
    def test_a_note_says_what_it_is_for(self, pooling: str, text: str) -> None:
        notes: list[str] = []

        class Screen(repshift_cli.utils.progress.Silent):  # type: ignore[name-defined, misc]
            def note(self, text: str) -> None:
                notes.append(text)

        repshift_cli.compress(tiny_vit(global_pool=pooling), recipe(), progress=Screen())
        assert [note for note in notes if note.startswith("restore: ") and text in note]


@torch.no_grad()
def test_depth_from_permuted_tokens() -> None:
    model = tiny_transformer("DepthAnythingForDepthEstimation")
    assert worst(model, tiny_inputs(model)) < TOLERANCE
    family, inputs = match(model), tiny_inputs(model)
    check_permutation(model, family, inputs)  # with restored tokens, since it needs them
    site = family.sites(model)[0]
    assert permute_difference(model, family, inputs, site, None) > TOLERANCE  # what it needs to be restored for
    with pytest.raises(RecipeError, match="needs all of them") as caught:
        restored(model, "[{layer: 0, keep_tokens: 5}]", restore=False)
    assert "`restore: true`" in caught.value.hint
    assert restored(model, "[{layer: 0, keep_tokens: 5}]")(inputs).predicted_depth.shape == (3, 32, 32)


def test_mergers_say_where_each_token_went() -> None:
    tokens, sizes, scores = torch.randn(2, 11, 8), torch.ones(2, 11), torch.rand(2, 10)
    keys = torch.randn(2, 2, 11, 4)
    for kind in ("merge", "fuse", "bipartite"):
        part = recipe(reducer=kind).reducer
        merged = build_reducer(part).merge(tokens, sizes, scores, 4, 1, {"attention_key": keys})  # type: ignore[attr-defined]
        both = torch.cat((merged.places, merged.sources), dim=1)
        assert torch.equal(both.sort(dim=1).values, torch.arange(10).expand(2, -1))
        counts = torch.ones(2, 6).scatter_add(1, merged.targets, torch.ones(2, 4))
        assert torch.equal(counts, merged.sizes[:, 1:])


def test_divergence_of_features_with_tokens() -> None:
    wanted, given = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    each = 1 - torch.nn.functional.cosine_similarity(wanted, given, dim=-1)
    torch.testing.assert_close(divergence(wanted, given, has_head=False), each.mean(dim=1))


@pytest.mark.slow
def test_exports_of_a_feature_model(tmp_path: Path) -> None:
    opened = open_family("timm_vit")
    assert opened.compressed is not None
    model = opened.compressed.detach()
    model.reset_classifier(0, "")  # type: ignore[operator]
    compressed = attach(model, resolve_for(model, recipe("[{layer: 0, drop_ratio: 0.3}]")))
    opened = Opened(opened.loaded, compressed)
    assert compressed(torch.zeros(1, 3, 24, 24)).shape == (1, 10, 16)
    verdict = export_to(opened, "onnx", tmp_path / "model.onnx").document.verified  # traced by torch.export
    assert verdict is not None
    assert verdict.passed
    assert verdict.kept_equal == 1.0
