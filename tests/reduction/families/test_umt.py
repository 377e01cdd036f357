"""UMT with fewer tokens, against a naive implementation. The contract of all families is in `test_contract.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from tiny import make_recipe, save_weights, tiny_vit
from tiny_umt import (
    DEPTH,
    VARIANTS,
    Naive,
    compressed_umt,
    naive_vision,
    texts_for,
    tiny_umt,
    umt_clips,
    umt_plan,
    umt_recipe,
)
from tiny_vim import tiny_vim
from torch import Tensor

from repshift_cli.calibration.calibrate import calibrate
from repshift_cli.checkpoints import artifact
from repshift_cli.checkpoints.create import on_meta
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.errors import ModelError, RecipeError, UsageError
from repshift_cli.measure.attention_kernel import observed_attention
from repshift_cli.measure.macs import count_macs
from repshift_cli.models import umt
from repshift_cli.models.umt import UmtModel
from repshift_cli.planning.recipe import Recipe
from repshift_cli.planning.resolve import resolve
from repshift_cli.reduction.checks import check_reducer
from repshift_cli.reduction.compressed_model import CompressedModel, attach, branch
from repshift_cli.reduction.families.base import match
from repshift_cli.reduction.metrics.base import build_metric
from repshift_cli.reduction.plans import has_open_fields, with_defaults
from repshift_cli.reduction.reducers.base import build_reducer
from repshift_cli.utils.progress import Silent

MLP = "{kind: representation_shift, operation: mlp, distance: l2, reading: update, polarity: largest}"
ATTENTION = "{kind: representation_shift, operation: attention, distance: l2, reading: update, polarity: largest}"
COSINE = "{kind: representation_shift, operation: attention, distance: cosine, reading: literal, polarity: smallest}"
BLOCK = "{kind: representation_shift, operation: block, distance: l1, polarity: smallest}"
ENTROPY = "{kind: attention_entropy}"

EARLY = {
    "attention": ATTENTION,
    "cosine": COSINE,
    "block": BLOCK,
    "entropy": ENTROPY,
    "class_attention": "{kind: class_attention}",
    "token_norm": "{kind: token_norm, polarity: smallest}",
    "random": "{kind: random, seed: 3}",
}
"""Metrics that are available after the attention of a block."""

METRICS = {"mlp": MLP, "literal": MLP.replace("update", "literal"), **EARLY}

DROPS = "[{layer: 0, drop_ratio: 0.25}, {layer: 1, keep_tokens: 20}, {layer: 3, drop_ratio: 0.5}]"
COUNTS = [48, 36, 20, 20, 10]
KEEP_ALL = "[{layer: 0, keep_tokens: 48}, {layer: 3, keep_tokens: 48}]"

LATE = ("merge", "fuse", "bipartite")
"""Reducers that merge after the block."""

WAYS = [
    *(("prune", metric) for metric in METRICS),
    *(("vid_tldr", metric) for metric in EARLY),
    *((reducer, "mlp") for reducer in LATE),
]


@pytest.mark.parametrize("embed_dim", [24, 0])
@pytest.mark.parametrize("reducer", ["merge", "fuse", "bipartite"])
def test_the_mean_over_tokens_is_weighted_by_size(reducer: str, embed_dim: int) -> None:
    """The pooled mean is that of the tokens, each repeated by its size."""
    model = tiny_umt(embed_dim=embed_dim)
    compressed = compressed_umt(model, umt_recipe("[{layer: 1, drop_ratio: 0.4}]", reducer=reducer))
    merged: list[Tensor] = []
    sizes: list[Tensor] = []
    pooled: list[Tensor] = []
    encoder = model.vision_encoder.encoder
    encoder.norm.register_forward_hook(lambda _, args, output: merged.append(output))
    encoder.blocks[2].register_forward_hook(lambda _, args, output: sizes.append(output.sizes))
    model.averaged.register_forward_hook(lambda _, args, output: pooled.append(output))
    with torch.no_grad():
        compressed(umt_clips(model, 2))
    times = sizes[0]
    assert times.max() > 1
    wanted = (merged[0] * times.unsqueeze(2)).sum(1) / times.sum(1, keepdim=True)
    torch.testing.assert_close(pooled[0][:, 0], wanted)
    assert not torch.allclose(wanted, merged[0].mean(1), atol=1e-4)


each_way = pytest.mark.parametrize(("reducer", "metric"), WAYS)
some_ways = pytest.mark.parametrize(("reducer", "metric"), [("prune", "mlp"), ("vid_tldr", "entropy")])
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def recipe(reducer: str = "prune", metric: str = "mlp", layers: str = DROPS) -> Recipe:
    return umt_recipe(layers, METRICS[metric], reducer)


def build(reducer: str = "prune", metric: str = "mlp", layers: str = DROPS, **options: Any) -> CompressedModel:
    return compressed_umt(tiny_umt(**options), recipe(reducer, metric, layers))


def naive_kept(model: CompressedModel, clips: Tensor, kept: dict[int, Tensor]) -> list[Naive]:
    """Each clip through the naive encoder, which drops the same tokens."""
    dense: Any = model.model
    places = dense.vision_encoder.encoder.positions[0]
    return [
        naive_vision(
            model.state_dict(),
            clip,
            heads=dense.vision.heads,
            places=places,
            kept={layer: index[row] for layer, index in kept.items()},
        )
        for row, clip in enumerate(clips)
    ]


def counts_at(model: UmtModel, clips: Tensor) -> tuple[list[int], list[int], int]:
    """Tokens that enter each block, tokens that enter each MLP, and tokens after the encoder."""
    entering: list[int] = []
    inner: list[int] = []
    handles = []
    for block in model.blocks:
        handles.append(block.norm1.register_forward_pre_hook(lambda _, args: entering.append(args[0].shape[1])))
        handles.append(block.norm2.register_forward_pre_hook(lambda _, args: inner.append(args[0].shape[1])))
    with torch.no_grad():
        tokens = model.encode_video(clips)
    for handle in handles:
        handle.remove()
    return entering, inner, tokens.shape[1]


def naive_score(before: Tensor, after: Tensor, distance: str, literal: bool) -> Tensor:
    """The score of each token: `[N, C]` twice to `[N]`."""
    if literal:
        after = after - before
    if distance == "cosine":
        return 1 - (before * after).sum(1) / before.norm(dim=1) / after.norm(dim=1)
    return (after - before).norm(p=1 if distance == "l1" else 2, dim=1)


class TestWrittenOut:
    @pytest.mark.parametrize("metric", METRICS)
    @each_variant
    def test_pruning_equals_the_model_on_the_kept_tokens(self, variant: str, metric: str) -> None:
        layers = "[{layer: 0, drop_ratio: 0.3}, {layer: 1, drop_ratio: 0.5}, {layer: 3, keep_tokens: 3}]"
        model = build("prune", metric, layers, **VARIANTS[variant])
        model.model.double()
        clips = umt_clips(model)
        kept = model.trace(clips).kept
        with torch.no_grad():
            tokens = model.model.encode_video(clips)  # type: ignore[operator]
        for row, one in enumerate(naive_kept(model, clips, kept)):
            torch.testing.assert_close(tokens[row], one.tokens, rtol=0, atol=1e-11)

    @pytest.mark.parametrize("operation", ["mlp", "attention", "block"])
    @pytest.mark.parametrize("distance", ["l2", "l1", "cosine"])
    @pytest.mark.parametrize("reading", ["update", "literal"])
    @pytest.mark.parametrize("polarity", ["largest", "smallest"])
    def test_kept_tokens_are_those_of_the_formula(
        self, operation: str, distance: str, reading: str, polarity: str
    ) -> None:
        options = f"operation: {operation}, distance: {distance}, reading: {reading}, polarity: {polarity}"
        layers = "[{layer: 0, keep_tokens: 30}, {layer: 2, keep_tokens: 11}, {layer: 3, keep_tokens: 5}]"
        model = compressed_umt(tiny_umt().double(), umt_recipe(layers, f"{{kind: representation_shift, {options}}}"))
        clips = umt_clips(model)
        kept = model.trace(clips).kept
        for row, one in enumerate(naive_kept(model, clips, kept)):
            left = torch.arange(48)
            for layer, index in kept.items():
                before = one.entered[layer]
                streams = {
                    "mlp": (one.attended[layer], one.blocks[layer]),
                    "attention": (before, one.attended[layer]),
                    "block": (before, one.blocks[layer]),
                }
                scores = naive_score(*streams[operation], distance, reading == "literal" and operation != "block")
                best = scores.argsort(descending=polarity == "largest")[: index.shape[1]].sort().values
                assert index[row].tolist() == left[best].tolist()
                left = index[row]

    def test_random_keeps_the_same_positions_in_every_clip(self) -> None:
        model = build(metric="random")
        kept = model.trace(umt_clips(model, 3)).kept
        assert all(len(index.unique(dim=0)) == 1 for index in kept.values())


class TestCounts:
    @each_way
    def test_token_counts_follow_the_recipe(self, reducer: str, metric: str) -> None:
        model = build(reducer, metric)
        entering, inner, last = counts_at(model.model, umt_clips(model, 3))  # type: ignore[arg-type]
        assert [*entering, last] == COUNTS == list(model.plan.tokens_at(DEPTH))
        assert inner == (COUNTS[1:] if reducer == "vid_tldr" else COUNTS[:-1])

    @pytest.mark.parametrize("reducer", ["prune", "vid_tldr"])
    @pytest.mark.parametrize(
        ("options", "layers", "expected"),
        [
            ({"img_size": 24}, "[{layer: 1, drop_ratio: 0.29}]", [27, 27, 20, 20, 20]),
            ({"img_size": 24}, "[{layer: 0, keep_tokens: 14}, {layer: 2, keep_tokens: 7}]", [27, 14, 14, 7, 7]),
            ({"frames": 1}, "[{layer: 0, drop_ratio: 0.5}, {layer: 1, drop_ratio: 0.5}]", [16, 8, 4, 4, 4]),
            ({"frames": 5}, "[{layer: blocks.2, keep_tokens: 41}]", [80, 80, 80, 41, 41]),
            ({"embed_dim": 0}, DROPS, COUNTS),
        ],
    )
    def test_of_other_models(self, options: dict[str, int], layers: str, expected: list[int], reducer: str) -> None:
        model = build(reducer, "attention", layers, **options)
        entering, _, last = counts_at(model.model, umt_clips(model))  # type: ignore[arg-type]
        assert [*entering, last] == expected

    def test_merging_keeps_every_other_token(self) -> None:
        model = build("vid_tldr", "entropy", "[{layer: 0, keep_tokens: 30}]")
        for row in model.trace(umt_clips(model)).kept[0].tolist():
            assert set(range(1, 48, 2)) <= set(row)

    @pytest.mark.parametrize(
        ("reducer", "operation"),
        [("prune", "mlp"), ("prune", "attention"), ("vid_tldr", "attention"), ("vid_tldr", "block")],
    )
    @each_variant
    def test_a_plan_that_keeps_all_is_bit_identical(self, variant: str, reducer: str, operation: str) -> None:
        dense = tiny_umt(**VARIANTS[variant])
        tokens = dense.vision.tokens
        layers = f"[{{layer: 0, keep_tokens: {tokens}}}, {{layer: 3, keep_tokens: {tokens}}}]"
        metric = f"{{kind: representation_shift, operation: {operation}}}"
        model: Any = compressed_umt(tiny_umt(**VARIANTS[variant]), umt_recipe(layers, metric, reducer))
        clips = umt_clips(dense)
        dense.pooling = "all"
        with torch.no_grad():
            assert torch.equal(model.model.encode_video(clips), dense.encode_video(clips))
            assert torch.equal(model(clips), dense(clips))


class TestMacs:
    @each_variant
    def test_of_the_model_itself(self, variant: str) -> None:
        model = tiny_umt(**VARIANTS[variant])
        assert match(model).macs(model, None) == count_macs(model, tuple(umt_clips(model).shape[1:]))

    @pytest.mark.parametrize(("reducer", "early"), [("prune", False), ("vid_tldr", True)])
    @pytest.mark.parametrize("embed_dim", [24, 0])
    def test_term_by_term(self, reducer: str, early: bool, embed_dim: int) -> None:
        model = build(reducer, "attention", embed_dim=embed_dim)
        total = 48 * 3 * 8 * 8 * 64 + embed_dim * 64
        merging = 0
        for layer, tokens in enumerate(COUNTS[:-1]):
            left = COUNTS[layer + 1]
            total += tokens * 4 * 64 * 64 + 2 * tokens * tokens * 64
            total += (left if early else tokens) * 2 * 64 * 96
            merging += (tokens - tokens // 2) * (tokens // 2) * 64 if early and left < tokens else 0
        assert model.macs() == total + merging
        with model.dense():
            dense = 48 * 3 * 8 * 8 * 64 + DEPTH * (48 * (4 * 64 * 64 + 2 * 64 * 96) + 2 * 48 * 48 * 64) + embed_dim * 64
            assert model.dense_macs() == dense

    @pytest.mark.parametrize("fused", [True, False])
    @some_ways
    def test_explicit_attention_costs_the_same(self, reducer: str, metric: str, fused: bool) -> None:
        model = build(reducer, metric)
        for block in model.model.blocks:  # type: ignore[union-attr]
            block.attn.fused_attn = fused  # type: ignore[union-attr]
        assert count_macs(model, tuple(umt_clips(model).shape[1:])) == model.macs()

    @pytest.mark.parametrize("name", ["umt_base", "umt_base_qa"])
    def test_the_authors_model(self, name: str) -> None:
        with on_meta():
            model = umt.create(name)
        tokens = 12 * 14 * 14
        blocks = 12 * (tokens * (4 * 768**2 + 2 * 768 * 3072) + 2 * tokens**2 * 768)
        head = 0 if name.endswith("_qa") else 12 * 768 * 512
        assert match(model).macs(model, None) == tokens * 3 * 256 * 768 + blocks + head
        assert count_macs(model, (12, 3, 224, 224)) == match(model).macs(model, None)


class TestMetrics:
    @pytest.mark.parametrize("metric", METRICS)
    def test_prune_takes_every_metric(self, metric: str) -> None:
        model = build("prune", metric)
        assert model(umt_clips(model)).isfinite().all()

    def test_metrics_choose_differently(self) -> None:
        clips = umt_clips(tiny_umt())
        for reducer, metrics in (("prune", METRICS), ("vid_tldr", EARLY)):
            outputs = {build(reducer, metric).trace(clips).output.sum().item() for metric in metrics}
            assert len(outputs) == len(metrics)

    @pytest.mark.parametrize(
        "metric",
        [
            MLP,
            "{kind: representation_shift, operation: mlp}",
            "{kind: representation_shift, operation: mlp, distance: cosine}",
        ],
    )
    def test_after_attention_there_is_no_mlp_update(self, metric: str) -> None:
        with pytest.raises(
            RecipeError, match=r"representation_shift needs mlp_(update|stream), which does not exist yet"
        ):
            compressed_umt(tiny_umt(), umt_recipe(DROPS, metric, "vid_tldr"))
        with pytest.raises(RecipeError) as caught:
            compressed_umt(tiny_umt(), umt_recipe(DROPS, metric, "vid_tldr"))
        assert "after the attention of blocks.0, where tokens are merged" in caught.value.message
        assert "representation_shift with operation: attention" in caught.value.hint

    @pytest.mark.parametrize("reducer", ["prune", "vid_tldr"])
    def test_there_is_no_mixer(self, reducer: str) -> None:
        with pytest.raises(RecipeError, match=r"representation_shift needs mixer_update, which .* does not provide"):
            compressed_umt(tiny_umt(), umt_recipe(DROPS, "{kind: representation_shift, operation: mixer}", reducer))

    @pytest.mark.parametrize(("reducer", "operation"), [("prune", "mlp"), ("vid_tldr", "attention")])
    @pytest.mark.parametrize("metric", ["{kind: representation_shift}", "{kind: representation_shift, distance: l1}"])
    def test_open_fields_are_filled_with_supported_values(self, metric: str, reducer: str, operation: str) -> None:
        model = tiny_umt()
        sites = {site.name: site for site in match(model).sites(model)}
        plan = with_defaults(umt_plan(model, umt_recipe(DROPS, metric, reducer)), sites)
        assert not has_open_fields(plan)
        assert {site.metric.model_dump()["operation"] for site in plan.sites} == {operation}
        assert attach(model, plan)(umt_clips(model)).isfinite().all()


class TestRefused:
    def test_merging_in_a_family_without_sizes(self) -> None:
        model = tiny_vim()
        merging = make_recipe("[{layer: 0, keep_tokens: 10}]", ENTROPY, "vid_tldr")
        plan = resolve(merging, match(model).layout(model), "attention")
        with pytest.raises(RecipeError) as caught:
            attach(model, plan)
        assert "vid_tldr merges tokens, and models of the family vim do not carry" in caught.value.message
        assert caught.value.hint == "Use reducer: {kind: prune}."
        with pytest.raises(RecipeError, match="recipe:3:1: vid_tldr merges tokens"):
            check_reducer(build_reducer(merging.reducer), match(model), model, merging.place)

    def test_merging_after_attention_is_for_umt_only(self) -> None:
        model = tiny_vit()
        merging = make_recipe("[{layer: 0, keep_tokens: 10}]", ENTROPY, "vid_tldr")
        plan = resolve(merging, match(model).layout(model), "attention")
        message = "vid_tldr acts after attention, where timm_vit models cannot be reduced"
        with pytest.raises(RecipeError, match=f"^{message}"):
            attach(model, plan)
        with pytest.raises(RecipeError, match=f"^recipe:3:1: {message}"):
            check_reducer(build_reducer(merging.reducer), match(model), model, merging.place)

    @pytest.mark.parametrize(
        ("layers", "message"),
        [
            ("[{layer: 0, keep_tokens: 23}]", "25 of 48 tokens would be removed at blocks.0, but"),
            ("[{layer: 0, keep_tokens: 30}, {layer: 2, drop_ratio: 0.6}]", "18 of 30 tokens would be removed"),
        ],
    )
    def test_more_than_half_cannot_merge(self, layers: str, message: str) -> None:
        with pytest.raises(RecipeError) as caught:
            build("vid_tldr", "entropy", layers)
        assert message in caught.value.message
        assert "vid_tldr can remove " in caught.value.message
        assert caught.value.hint in ("Keep 24 or more.", "Keep 15 or more.")
        assert build("prune", "entropy", layers).plan.sites

    def test_a_plan_for_other_clips(self) -> None:
        with pytest.raises(RecipeError, match=r"with 0 \+ 48 tokens, the model is umt with 0 \+ 64"):
            attach(tiny_umt(frames=4), umt_plan(tiny_umt(), recipe()))

    def test_a_plan_that_reduces_elsewhere_in_the_block(self) -> None:
        model = tiny_umt()
        early = resolve(recipe("prune", "attention"), match(model).layout(model), "attention")
        with pytest.raises(RecipeError, match="the plan reduces after the attention, which prune does not do"):
            attach(model, early)
        late = resolve(recipe("vid_tldr", "attention"), match(model).layout(model))
        with pytest.raises(RecipeError, match="the plan reduces after the block, which vid_tldr does not do"):
            attach(model, late)

    @some_ways
    def test_a_model_that_is_compressed_already(self, reducer: str, metric: str) -> None:
        model: Any = build(reducer, metric)
        with pytest.raises(ModelError, match="the model is compressed already"):
            attach(model.model, model.plan)

    @pytest.mark.parametrize("shape", [(2, 3, 32, 32), (5, 3, 32, 32), (3, 3, 40, 40), (3, 3, 32, 24)])
    @some_ways
    def test_other_clips(self, reducer: str, metric: str, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="invalid clip shape"):
            build(reducer, metric)(torch.zeros(2, *shape))

    @some_ways
    def test_a_single_image(self, reducer: str, metric: str) -> None:
        """The dense model takes a single frame, but a plan is for one number of tokens."""
        model = build(reducer, metric)
        image = umt_clips(model, frames=1)
        with pytest.raises(UsageError, match=r"blocks\.0.* got 16 tokens, but the plan is for 48"):
            model(image)
        with model.dense() as dense, torch.no_grad():
            assert dense(image).shape == (2, 24)


class TestModule:
    @pytest.mark.parametrize(("embed_dim", "before"), [(24, "frames"), (0, "all")])
    @some_ways
    def test_pooling_is_over_all_tokens_while_attached(
        self, reducer: str, metric: str, embed_dim: int, before: str
    ) -> None:
        dense = tiny_umt(embed_dim=embed_dim)
        assert dense.pooling == before
        model = compressed_umt(dense, recipe(reducer, metric))
        assert dense.pooling == "all"
        with model.dense() as inside:
            assert inside.pooling == "all"
        model.detach()
        assert dense.pooling == before
        assert not any(module._forward_hooks for module in dense.modules())

    @some_ways
    def test_gradients_reach_every_weight_of_the_encoder(self, reducer: str, metric: str) -> None:
        model: Any = build(reducer, metric, "[{layer: 0, keep_tokens: 30}, {layer: 2, keep_tokens: 16}]")
        # the embedding has length one, so its square would be the same for all weights
        tokens = model.model.encode_video(umt_clips(model))
        (tokens * torch.arange(64)).sum().backward()
        for name, parameter in model.model.vision_encoder.encoder.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name

    @each_way
    def test_explicit_attention_is_the_same(self, reducer: str, metric: str) -> None:
        model: Any = build(reducer, metric)
        clips = umt_clips(model)
        with torch.no_grad():
            wanted, kept = model.model.encode_video(clips), model.trace(clips).kept
            # these two metrics compute their own softmax
            assert ("explicit" in observed_attention(model, clips)) == (metric in ("entropy", "class_attention"))
            for block in model.model.blocks:
                block.attn.fused_attn = False
            torch.testing.assert_close(model.model.encode_video(clips), wanted, rtol=0, atol=1e-5)
            assert "explicit" in observed_attention(model, clips)
        assert all(torch.equal(index, kept[layer]) for layer, index in model.trace(clips).kept.items())

    @some_ways
    def test_text_attends_to_the_remaining_tokens(self, reducer: str, metric: str) -> None:
        ids, mask = texts_for()
        model: Any = build(reducer, metric).model
        with torch.no_grad():
            tokens = model.encode_video(umt_clips(model))
            assert tokens.shape == (2, 10, 64)
            assert model.project_video(tokens).shape == (2, 1, 24)
            assert model.match(model.encode_text(ids, mask), mask, tokens).isfinite().all()
        model = build(reducer, metric, embed_dim=0).model
        with torch.no_grad():
            states = model.encode_question(ids, mask, model.encode_video(umt_clips(model)))
            assert model.first_token_probabilities(states, mask, 2).shape == (2, 40)


class TestCalibration:
    @pytest.mark.parametrize(("reducer", "operations"), [("prune", 3), ("vid_tldr", 2)])
    def test_open_fields_are_filled(self, reducer: str, operations: int) -> None:
        model = tiny_umt()
        layers = "[{layer: 0, keep_tokens: 30}, {layer: 2, keep_tokens: 16}]"
        plan = umt_plan(model, umt_recipe(layers, "{kind: representation_shift}", reducer))
        clips = umt_clips(model, 8)
        found = calibrate(model, match(model), plan, images=clips, identity={}, batch_size=4, progress=Silent())
        for choice in found.sites:
            tried = {candidate.metric.operation for candidate in choice.candidates}  # type: ignore[attr-defined]
            assert len(tried) == operations
            assert ("mlp" in tried) == (reducer == "prune")
        assert model.pooling == "frames"
        chosen = attach(model, plan.with_metrics(found.specs))
        assert chosen(clips).isfinite().all()

    @some_ways
    def test_a_branch_equals_its_metric_alone(self, reducer: str, metric: str) -> None:
        model = tiny_umt()
        clips = umt_clips(model)
        plan = umt_plan(model, recipe(reducer, metric, "[{layer: 0, keep_tokens: 30}, {layer: 2, keep_tokens: 16}]"))
        texts = (EARLY if reducer == "vid_tldr" else METRICS).values()
        candidates = [build_metric(umt_recipe(DROPS, text).metric) for text in texts]
        branched = branch(model, plan, candidates)
        with torch.no_grad():
            outputs = branched(clips).chunk(len(candidates))
        branched.detach()
        for candidate, output in zip(candidates, outputs, strict=True):
            alone = attach(model, plan.with_metrics([plan.sites[0].metric, candidate.spec()]))
            with torch.no_grad():
                torch.testing.assert_close(output, alone(clips), rtol=1e-5, atol=1e-5)
            alone.detach()
        assert len({output.sum().item() for output in outputs}) > len(candidates) // 2


class TestArtifact:
    @some_ways
    @pytest.mark.parametrize("variant", ["plain"])
    def test_a_loaded_model_is_bit_identical(self, variant: str, reducer: str, metric: str, tmp_path: Path) -> None:
        path, wanted = self.written(variant, reducer, metric, tmp_path)
        opened: Any = artifact.load(path)
        assert opened.preprocessing.shape == tuple(umt_clips(opened).shape[1:])
        assert opened.model.pooling == "all"
        with torch.no_grad():
            assert torch.equal(opened.model.encode_video(umt_clips(opened)), wanted)

    @pytest.mark.slow
    def test_in_another_process(self, tmp_path: Path) -> None:
        written = {}
        for reducer, metric in (("prune", "mlp"), ("vid_tldr", "entropy")):
            (tmp_path / reducer).mkdir()
            path, written[reducer] = self.written("plain", reducer, metric, tmp_path / reducer)
            torch.save(umt_clips(tiny_umt()), path.with_name("clips.pt"))
        code = (
            "import sys, torch; from pathlib import Path; from repshift_cli.checkpoints import artifact\n"
            "torch.set_num_threads(1)\n"
            "for folder in map(Path, sys.argv[1:]):\n"
            "    model, clips = artifact.load(folder / 'small.safetensors'), torch.load(folder / 'clips.pt')\n"
            "    torch.save(model.model.encode_video(clips).detach(), folder / 'tokens.pt')\n"
        )
        folders = [tmp_path / reducer for reducer in written]
        root = str(ROOT)
        subprocess.run([sys.executable, "-c", code, *folders], check=True, env=os.environ | {"PYTHONPATH": root})
        for reducer, wanted in written.items():
            assert torch.equal(torch.load(tmp_path / reducer / "tokens.pt"), wanted), reducer

    @some_ways
    def test_the_document(self, reducer: str, metric: str, tmp_path: Path) -> None:
        path, _ = self.written("plain", reducer, metric, tmp_path)
        loaded = load_checkpoint(path)
        assert loaded.document is not None
        assert loaded.document["format_version"] == 3
        assert loaded.document["model"]["preprocessing"]["frames"] == 3
        sites = loaded.document["plan"]["sites"]
        assert [site.get("after") for site in sites] == [None if reducer == "prune" else "attention"] * 2
        plan = loaded.plan
        assert plan is not None
        assert [(site.layer, site.tokens_in, site.tokens_out) for site in plan.sites] == [(0, 48, 36), (2, 36, 18)]

    @staticmethod
    def written(variant: str, reducer: str, metric: str, folder: Path) -> tuple[Path, Tensor]:
        """The file of a compressed model, and its tokens."""
        options = VARIANTS[variant]
        shape = tiny_umt(**options).vision
        dense = save_weights(tiny_umt(**options), folder / "dense.safetensors")
        known = LoadOptions(None, 4, shape.img_size, shape.frames, shape.checkpoint_frames)
        loaded = load_checkpoint(dense, known)
        written = recipe(reducer, metric, "[{layer: 0, drop_ratio: 0.25}, {layer: 2, drop_ratio: 0.5}]")
        plan = umt_plan(loaded.model, written)  # type: ignore[arg-type]
        path = folder / "small.safetensors"
        artifact.save(path, loaded, artifact.make_document(loaded, plan, written, None, {}))
        model = compressed_umt(tiny_umt(**options), written)
        with torch.no_grad():
            return path, model.model.encode_video(umt_clips(model))  # type: ignore[operator]
