"""Scores against their formulas, computed in float64 with the model's own modules."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from typing import Any, get_args

import pytest
import torch
from tiny import PATCHES, VARIANTS, compressed, images, make_recipe, tiny_vit
from tiny_umt import tiny_umt
from torch import Tensor, nn

from repshift_cli.calibration.calibrate import unfitted, with_weights
from repshift_cli.errors import RecipeError
from repshift_cli.planning.recipe import ComponentSpec
from repshift_cli.reduction.compressed_model import CompressedModel
from repshift_cli.reduction.metrics import coverage, redundancy
from repshift_cli.reduction.metrics.base import SiteContext, Tap, build_metric
from repshift_cli.reduction.metrics.fitted import Fitted
from repshift_cli.reduction.metrics.representation_shift import Distance, Operation, Reading, RepresentationShift

LAYER = 2
WITH_PARTS = sorted(set(VARIANTS) - {"parallel_things_block"})
"""Models whose blocks have separate attention and MLP updates."""

OPERATIONS = [operation for operation in get_args(Operation) if operation != "mixer"]
SHIFTS = [
    pytest.param(*shift, marks=() if "plain" in shift or "l2" in shift else pytest.mark.slow)
    for shift in product(WITH_PARTS, OPERATIONS, get_args(Distance), get_args(Reading))
]
"""Models and options. A distance does not depend on the model: quick tests run all of them on one model."""


def parts_of(block: Any, stream: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The stream that each branch reads, and the update of the branch."""
    kind = type(block).__name__
    if kind == "ParallelScalingBlock":
        projected = block.in_proj(block.in_norm(stream))
        mlp, query, key, value = projected.split(block.in_split, dim=-1)
        heads = [part.unflatten(-1, (block.num_heads, -1)).transpose(1, 2) for part in (query, key, value)]
        logits = block.q_norm(heads[0]) @ block.k_norm(heads[1]).transpose(-1, -2) * block.scale
        attention = (logits.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2)
        mlp = mlp if block.mlp_bias is None else mlp + block.mlp_bias
        attention_update = block.ls(block.attn_out_proj(attention))
        return {
            "attention": (stream, attention_update),
            "mlp": (stream, block.ls(block.mlp_out_proj(block.mlp_act(mlp)))),
        }
    if kind == "ResPostBlock":
        attention_update = block.norm1(block.attn(stream))
        between = stream + attention_update
        return {"attention": (stream, attention_update), "mlp": (between, block.norm2(block.mlp(between)))}
    attention_update = block.ls1(block.attn(block.norm1(stream)))
    between = stream + attention_update
    return {"attention": (stream, attention_update), "mlp": (between, block.ls2(block.mlp(block.norm2(between))))}


def naive_shift(block: nn.Module, stream: Tensor, operation: str, distance: str, reading: str) -> Tensor:
    """`D(F(x), x)` for each token of the stream."""
    if operation == "block":
        before, after = stream, block(stream)
    else:
        before, update = parts_of(block, stream)[operation]
        after = update if reading == "literal" else before + update
    if distance == "l1":
        return (after - before).abs().sum(-1)
    if distance == "l2":
        return ((after - before) ** 2).sum(-1).sqrt()
    return 1 - (after * before).sum(-1) / ((after**2).sum(-1).sqrt() * (before**2).sum(-1).sqrt())


def scores_at(model: CompressedModel, batch: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The scores of the metric at each site."""
    found: list[Tensor] = []
    kind = type(model._hooks[0].metrics[0])
    score: Callable[..., Tensor] = kind.score

    def watch(self: Any, *arguments: Any) -> Tensor:
        found.append(score(self, *arguments))
        return found[-1]

    monkeypatch.setattr(kind, "score", watch)
    with torch.no_grad():
        model(batch)
    return found


def stream_before(model: nn.Module, layer: int, batch: Tensor) -> Tensor:
    """The tokens that enter a block of the dense model."""
    seen: list[Tensor] = []
    handle = model.blocks[layer].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(batch)
    handle.remove()
    return seen[0]


def one_site(metric: str) -> Any:
    return make_recipe(f"[{{layer: {LAYER}, drop_ratio: 0.5}}]", metric)


@pytest.mark.parametrize(("variant", "operation", "distance", "reading"), SHIFTS)
def test_representation_shift_is_its_formula(
    variant: str, operation: str, distance: str, reading: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_vit(**VARIANTS[variant])
    metric = f"{{kind: representation_shift, operation: {operation}, distance: {distance}, reading: {reading}}}"
    (found,) = scores_at(compressed(model, one_site(metric)), images(3), monkeypatch)
    exact = tiny_vit(**VARIANTS[variant]).double()
    with torch.no_grad():
        stream = stream_before(exact, LAYER, images(3).double())
        wanted = naive_shift(exact.blocks[LAYER], stream, operation, distance, reading)[:, -PATCHES:]
    assert found.dtype == torch.float32
    assert found.shape == (3, PATCHES)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_the_cosine_distance_of_small_changes_is_not_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(2, 16, 384, generator=generator)
    after = before + 1e-4 * torch.randn(2, 16, 384, generator=generator)
    seen: dict[Tap, Tensor] = {"block_input": before, "block_output": after}
    metric = RepresentationShift(operation="block", distance="cosine", reading="update")
    found = metric.score(seen, SiteContext(layer=0, prefix=0, class_token=False))
    wanted = 1 - torch.nn.functional.cosine_similarity(after.double(), before.double(), dim=-1)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=0)


@pytest.mark.parametrize("fused", [True, False])
def test_parallel_things_have_a_shift_of_the_whole_block(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_vit(**VARIANTS["parallel_things_block"])
    for part in model.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = fused
    metric = "{kind: representation_shift, operation: block, distance: l1}"
    (found,) = scores_at(compressed(model, one_site(metric)), images(2), monkeypatch)
    with torch.no_grad():
        exact = tiny_vit(**VARIANTS["parallel_things_block"]).double()
        stream = stream_before(exact, LAYER, images(2).double())
        wanted = naive_shift(exact.blocks[LAYER], stream, "block", "l1", "update")[:, -PATCHES:]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", sorted(set(WITH_PARTS) - {"differential_attention", "parallel_scaling_block"}))
def test_class_attention_is_a_row_of_the_attention_map(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_vit(**VARIANTS[variant])
    (found,) = scores_at(compressed(model, one_site("{kind: class_attention}")), images(2), monkeypatch)
    exact = tiny_vit(**VARIANTS[variant]).double()
    block: Any = exact.blocks[LAYER]
    attention = block.attn
    with torch.no_grad():
        stream = stream_before(exact, LAYER, images(2).double())
        read = stream if "post_norm" in variant else block.norm1(stream)
        query, key, _ = attention.qkv(read).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = attention.q_norm(query), attention.k_norm(key)
        if not exact.has_class_token:
            query = query[:, :, -PATCHES:].mean(dim=2, keepdim=True)
        attention_map = (query @ key.transpose(-1, -2) * attention.scale).softmax(-1)
    wanted = attention_map[:, :, 0, -PATCHES:].mean(dim=1)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_class_attention_of_a_parallel_block(qk_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**VARIANTS["parallel_scaling_block"], "qk_norm": qk_norm}
    (found,) = scores_at(compressed(tiny_vit(**options), one_site("{kind: class_attention}")), images(2), monkeypatch)
    exact = tiny_vit(**options).double()
    block: Any = exact.blocks[LAYER]
    with torch.no_grad():
        projected = block.in_proj(block.in_norm(stream_before(exact, LAYER, images(2).double())))
        _, query, key, _ = projected.split(block.in_split, dim=-1)
        query, key = (part.unflatten(-1, (block.num_heads, -1)).transpose(1, 2) for part in (query, key))
        attention_map = (block.q_norm(query) @ block.k_norm(key).transpose(-1, -2) * block.scale).softmax(-1)
    torch.testing.assert_close(found.double(), attention_map[:, :, 0, 1:].mean(dim=1), rtol=1e-4, atol=1e-6)


def test_token_norm_is_the_norm_after_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_vit(reg_tokens=2)
    (found,) = scores_at(compressed(model, one_site("{kind: token_norm}")), images(2), monkeypatch)
    exact = tiny_vit(reg_tokens=2).double()
    with torch.no_grad():
        after = exact.blocks[LAYER](stream_before(exact, LAYER, images(2).double()))
    torch.testing.assert_close(found.double(), (after[:, 3:] ** 2).sum(-1).sqrt(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("similarity", ["hidden", "keys"])
def test_redundancy_is_the_mean_of_clipped_similarities(similarity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    metric = f"{{kind: redundancy, similarity: {similarity}, margin: 0.2}}"
    model = compressed(tiny_vit(reg_tokens=2), one_site(metric))
    (found,) = scores_at(model, images(2), monkeypatch)
    monkeypatch.setattr(redundancy, "_ROWS", 5)
    (in_parts,) = scores_at(model, images(2), monkeypatch)
    exact = tiny_vit(reg_tokens=2).double()
    block: Any = exact.blocks[LAYER]
    with torch.no_grad():
        stream = stream_before(exact, LAYER, images(2).double())
        keys = block.attn.qkv(block.norm1(stream)).unflatten(-1, (3, block.attn.num_heads, -1))[:, :, 1].mean(dim=2)
        features = (block(stream) if similarity == "hidden" else keys)[:, 3:]
        above = torch.nn.functional.cosine_similarity(features[:, :, None], features[:, None], dim=-1) - 0.2
    wanted = torch.where(above > 0, above, above.exp() - 1).mean(dim=2)
    assert (above < 0).any() and (above > 0).any()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(in_parts, found)


@pytest.mark.parametrize("rows", [512, 5])
def test_coverage_is_the_distance_to_a_more_important_token(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "_ROWS", rows)
    metric = "{kind: coverage, of: {kind: token_norm, polarity: smallest}, weight: 2.0}"
    (found,) = scores_at(compressed(tiny_vit(reg_tokens=2), one_site(metric)), images(2), monkeypatch)
    exact = tiny_vit(reg_tokens=2).double()
    with torch.no_grad():
        tokens = exact.blocks[LAYER](stream_before(exact, LAYER, images(2).double()))[:, 3:]
    for row in range(2):
        score = -tokens[row].norm(dim=-1)
        alike = torch.nn.functional.cosine_similarity(tokens[row][:, None], tokens[row][None], dim=-1)
        for index in range(PATCHES):
            above = alike[index][score > score[index]]
            far = 1 - (above.max() if len(above) else torch.tensor(-1.0))
            standard = (score[index] - score.mean()) / score.std(correction=0)
            torch.testing.assert_close(
                found[row, index].double(), far.double().log() + 2 * standard, rtol=1e-3, atol=1e-3
            )


class TestCoverage:
    LAYERS = "[{layer: 0, keep_tokens: 11}, {layer: 2, keep_tokens: 6}]"

    @staticmethod
    def windows(places: Tensor) -> Tensor:
        """The index of the 2x2 window of positions in a 4x4 grid."""
        return places // 8 * 2 + places % 4 // 2

    @pytest.mark.parametrize("reducer", ["prune", "merge"])
    def test_grid_keeps_the_first_of_one_order_at_every_site(self, reducer: str) -> None:
        recipe = make_recipe(self.LAYERS, "{kind: grid}", reducer)
        kept = compressed(tiny_vit(reg_tokens=2), recipe).trace(images(2)).kept
        places = torch.arange(PATCHES, dtype=torch.float64)
        order = ((places % 4) * 0.7548776662 + (places // 4) * 0.5698402910).frac().argsort(descending=True)
        for layer, count in ((0, 11), (2, 6)):
            assert kept[layer].tolist() == [sorted(order[:count].tolist())] * 2
            assert torch.bincount(self.windows(order[:count])).min() >= count // 4

    def test_a_family_without_positions_refuses(self) -> None:
        model = tiny_umt()
        with pytest.raises(RecipeError, match=r"grid needs patch_place, which blocks\.0 does not provide"):
            compressed(model, make_recipe("[{layer: 0, drop_ratio: 0.2}]", "{kind: grid}"))


class TestScoreInside:
    def test_weights_are_fitted_inside(self) -> None:
        spec = ComponentSpec(kind="coverage")
        assert unfitted(build_metric(spec))
        found = build_metric(with_weights(spec, Fitted.of([0.5] * 32).spec()))
        assert not unfitted(found)
        assert (found.channels, found.open) == (32, False)
        assert build_metric(found.spec()) == found
        assert not unfitted(build_metric(ComponentSpec(kind="coverage", of={"kind": "token_norm"})))

    def test_its_open_fields_are_tried(self) -> None:
        spec = ComponentSpec(
            kind="coverage", of={"kind": "representation_shift", "operation": "block", "distance": "l2"}
        )
        assert len(build_metric(spec).variants()) == 2
        assert str(build_metric(spec).with_defaults()).startswith("coverage (representation_shift (block, l2, update")

    @pytest.mark.parametrize(
        ("of", "message"),
        [
            ("{kind: fited}", "metric.of: metric.kind: unknown metric 'fited' Did you mean fitted?"),
            ("{kind: token_norm, colour: red}", "metric.of: unknown key metric.colour"),
            ("{kind: coverage}", "metric.of: should be another score"),
        ],
    )
    def test_a_wrong_inner_score_is_named(self, of: str, message: str) -> None:
        with pytest.raises(RecipeError, match=re.escape(message)):
            build_metric(make_recipe(metric=f"{{kind: coverage, of: {of}}}").metric)


class TestRandom:
    def scores(self, seed: int, monkeypatch: pytest.MonkeyPatch, batch: Tensor) -> list[Tensor]:
        recipe = make_recipe(
            "[{layer: 0, drop_ratio: 0.25}, {layer: 2, drop_ratio: 0.25}]", f"{{kind: random, seed: {seed}}}"
        )
        with monkeypatch.context() as patch:
            return scores_at(compressed(tiny_vit(), recipe), batch, patch)

    def test_does_not_depend_on_the_image(self, monkeypatch: pytest.MonkeyPatch) -> None:
        first = self.scores(0, monkeypatch, images(3, seed=1))
        other = self.scores(0, monkeypatch, images(3, seed=2))
        assert all(torch.equal(one, two) for one, two in zip(first, other, strict=True))
        assert torch.equal(first[0][0], first[0][2])

    def test_differs_between_seeds_and_layers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        first, other = (self.scores(seed, monkeypatch, images(1)) for seed in (0, 1))
        assert not torch.equal(first[0], other[0])
        assert not torch.equal(first[0][:, :12], first[1])

    def test_is_uniform_without_ties(self) -> None:
        from repshift_cli.reduction.metrics.random import _hash

        draws = _hash(torch.arange(4096), 7)
        assert draws.min() >= 0 and draws.max() < 1
        assert len(draws.unique()) > 4090
        assert abs(float(draws.mean()) - 0.5) < 0.02
        assert abs(float(draws.std()) - 12**-0.5) < 0.02


@pytest.mark.parametrize("polarity", ["largest", "smallest"])
def test_polarity_decides_which_tokens_are_kept(polarity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = one_site(f"{{kind: token_norm, polarity: {polarity}}}")
    model = compressed(tiny_vit(), recipe)
    kept = model.trace(images(2)).kept[LAYER]
    (scores,) = scores_at(model, images(2), monkeypatch)
    best = scores.topk(PATCHES // 2, largest=polarity == "largest").indices.sort().values
    assert torch.equal(kept, best)
