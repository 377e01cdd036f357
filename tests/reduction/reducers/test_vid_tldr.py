"""Merging as vid-TLDR does it, against reference vectors and its own rules.

`data/vidtldr_unit.safetensors` was made with the authors' code on seeded random weights. `unit/*1` and `unit/*2` are
two merges in a row, of `in/x` with the attention `in/attn1` and `in/attn2`. `flow_a` and `flow_b` are layers 0 and 1 of
a video encoder; the two differ only in how much layer 1 merges.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paths import VECTORS
from safetensors.torch import load_file
from torch import Tensor

from repshift_cli.ops.merging import pair
from repshift_cli.reduction.metrics.attention_entropy import AttentionEntropy, mean_attention, sharpness
from repshift_cli.reduction.metrics.base import SiteContext
from repshift_cli.reduction.reducers.vid_tldr import VidTLDR, merge, merge_weighted, saliency

UNIT = load_file(VECTORS / "vidtldr_unit.safetensors")
SITE = SiteContext(layer=0, prefix=0, class_token=False)

UNIT_STEPS = [("in/x", None, "unit/{}1", "unit/x1"), ("unit/x1", "unit/size1", "unit/{}2", "unit/x2")]
FLOW = [
    ("flow_a/pre_merge.0", None, "flow_a/{}.0", "flow_a/post_merge.0"),
    ("flow_a/pre_merge.1", "flow_a/size.0", "flow_a/{}.1", "flow_a/post_merge.1"),
    ("flow_a/pre_merge.1", "flow_a/size.0", "flow_b/{}.1", "flow_b/post_merge.1"),
]
STEPS = [pytest.param(*step, id=step[3]) for step in UNIT_STEPS + FLOW]
"""Tokens and sizes before the merge, the names of its results, tokens after it."""

ATTENTION = [("in/attn1", "unit/score1"), ("in/attn2", "unit/score2"), ("flow_a/attn.1", "flow_a/score.1")]


def sizes_before(name: str | None, tokens: Tensor) -> Tensor:
    return torch.ones(tokens.shape[:2]) if name is None else UNIT[name].squeeze(2)


def score_name(names: str) -> str:
    return names.format("score").replace("flow_b", "flow_a")  # the same tokens enter


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int]:
    """Tokens, sizes, scores and count."""
    batch, total = draw(st.integers(1, 3)), draw(st.integers(1, 17))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tokens = torch.randn(batch, total, 5, generator=generator)
    sizes = torch.rand(batch, total, generator=generator) * 3 + 0.1
    scores = torch.randn(batch, total, generator=generator)
    return tokens, sizes, scores, draw(st.integers(0, total // 2))


class TestParity:
    @pytest.mark.parametrize(("before", "sizes", "names", "after"), STEPS)
    def test_pairs_equal_the_reference(self, before: str, sizes: str, names: str, after: str) -> None:
        sources, targets, kept = (UNIT[names.format(f"{part}_idx")].squeeze(2) for part in ("src", "dst", "unm"))
        tokens = UNIT[before]
        found = pair(tokens[:, ::2], tokens[:, 1::2], sources.shape[1])
        assert torch.equal(found.sources, sources)
        assert torch.equal(found.targets, targets)
        assert torch.equal(found.kept.sort(dim=1).values, kept)

    @pytest.mark.parametrize(("before", "sizes", "names", "after"), STEPS)
    def test_tokens_and_sizes(self, before: str, sizes: str | None, names: str, after: str) -> None:
        tokens, expected = UNIT[before], UNIT[after]
        found = merge_weighted(
            tokens,
            sizes_before(sizes, tokens),
            UNIT[score_name(names)].squeeze(2),
            tokens.shape[1] - expected.shape[1],
        )
        torch.testing.assert_close(found.tokens, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.sizes, UNIT[names.format("size")].squeeze(2), rtol=0, atol=1e-6)
        kept = 2 * UNIT[names.format("unm_idx")].squeeze(2)
        assert torch.equal(found.places[:, : kept.shape[1]], kept)
        assert found.places[:, kept.shape[1] :].tolist() == [list(range(1, tokens.shape[1], 2))] * 2

    @pytest.mark.parametrize("call", ["1", "2"])
    def test_the_sources_of_each_token(self, call: str) -> None:
        """Rows of the trace: 1 for the token itself, the weight of a source, 0 for other tokens."""
        # the trace of two calls keeps the maximum, so start from that of the first
        before = torch.eye(32).expand(2, -1, -1) if call == "1" else UNIT["unit/source1"]
        expected = UNIT[f"unit/source{call}"]
        tokens = UNIT["in/x" if call == "1" else "unit/x1"]
        pairs = pair(tokens[:, ::2], tokens[:, 1::2], before.shape[1] - expected.shape[1])
        weights = UNIT[f"unit/score{call}"].squeeze(2)
        kept = pairs.kept.sort(dim=1).values
        found = torch.cat((gathered(before, 2 * kept), before[:, 1::2]), dim=1)
        shares = weights.gather(1, 2 * pairs.sources).unsqueeze(2)
        places = (pairs.targets + kept.shape[1]).unsqueeze(2).expand(-1, -1, 32)
        found = found.scatter_reduce(1, places, gathered(before, 2 * pairs.sources) * shares, "amax")
        assert torch.equal(found, expected)

    @pytest.mark.parametrize(("attention", "score"), ATTENTION)
    def test_saliency_of_an_attention_map(self, attention: str, score: str) -> None:
        found = saliency(sharpness(UNIT[attention].mean(dim=1)))
        # the raw scores are nearly equal, so scaling them to 0..1 magnifies the last bit: the reference itself is
        # up to 5e-6 away from the same in float64
        torch.testing.assert_close(found, UNIT[score].squeeze(2), rtol=0, atol=1e-5)

    def test_two_merges_in_a_row_from_attention_maps(self) -> None:
        tokens, sizes = UNIT["in/x"], torch.ones(2, 32)
        for call, count in (("1", 10), ("2", 6)):
            scores = sharpness(UNIT[f"in/attn{call}"].mean(dim=1))
            tokens, sizes, *_ = VidTLDR().merge(tokens, sizes, scores, count, 0, {})
            torch.testing.assert_close(tokens, UNIT[f"unit/x{call}"], rtol=0, atol=1e-5)
            torch.testing.assert_close(sizes, UNIT[f"unit/size{call}"].squeeze(2), rtol=0, atol=1e-5)


def gathered(tokens: Tensor, index: Tensor) -> Tensor:
    return torch.stack([image[places] for image, places in zip(tokens, index, strict=True)])


class TestAttentionEntropy:
    @pytest.mark.parametrize("prefix", [0, 1, 3])
    def test_is_the_negative_entropy_of_the_mean_map(self, prefix: int) -> None:
        queries, keys = (torch.randn(2, 3, 11, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
        site = SiteContext(layer=0, prefix=prefix, class_token=prefix > 0)
        found = AttentionEntropy().score({"attention_query": queries, "attention_key": keys}, site)
        maps = torch.einsum("bhid,bhjd->bhij", queries.double(), keys.double()).div(2).softmax(-1).mean(1)
        expected = (maps * maps.log()).sum(-1)[:, prefix:]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize(("attention", "score"), ATTENTION)
    def test_equals_the_reference_score(self, attention: str, score: str) -> None:
        """Logits that lead to the reference maps: the logarithm of a map as query, the unit matrix as key."""
        maps = UNIT[attention]
        eye = torch.eye(maps.shape[-1]).expand_as(maps)
        seen = {"attention_query": maps.log() * maps.shape[-1] ** 0.5, "attention_key": eye}
        found = saliency(AttentionEntropy().score(seen, SITE))
        torch.testing.assert_close(found, UNIT[score].squeeze(2), rtol=0, atol=1e-5)

    def test_rows_of_the_mean_map_sum_to_one(self) -> None:
        found = mean_attention(torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8))
        torch.testing.assert_close(found.sum(-1), torch.ones(2, 7))

    def test_is_finite_for_zero_attention(self) -> None:
        """A token that attends to one position is the most salient, one that attends to all the least."""
        queries = torch.tensor([1e4, 0.0]).view(1, 1, 2, 1)
        keys = torch.tensor([1.0, -1.0]).view(1, 1, 2, 1)
        found = AttentionEntropy().score({"attention_query": queries, "attention_key": keys}, SITE)
        torch.testing.assert_close(found, torch.tensor([[0.0, 0.5]]).log().nan_to_num(neginf=0.0))
        assert AttentionEntropy().keeps_largest

    def test_costs_the_whole_map(self) -> None:
        assert (
            AttentionEntropy().macs(197, SiteContext(0, 1, True, width=384, head=64, attention_channels=384))
            == 197 * 197 * 384
        )


class TestSaliency:
    @given(cases())
    def test_only_scores_above_the_mean_have_weight(self, case: tuple[Tensor, Tensor, Tensor, int]) -> None:
        scores = case[2].double()
        above = (scores - scores.mean(1, keepdim=True)).clamp(min=0)
        expected = above / above.amax(1, keepdim=True) if scores.shape[1] > 1 else torch.zeros_like(scores)
        torch.testing.assert_close(saliency(scores), expected, rtol=0, atol=1e-9)

    @given(cases(), st.floats(0.1, 100), st.floats(-100, 100))
    def test_ignores_the_scale(self, case: tuple[Tensor, Tensor, Tensor, int], stretch: float, rise: float) -> None:
        """So norms, which are not negative, can be used as well as negative entropies."""
        scores = case[2].double()
        torch.testing.assert_close(saliency(scores * stretch + rise), saliency(scores), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("value", [0.0, 3.0, -1e30, 1e-42])
    def test_equal_scores_have_weight_zero(self, value: float) -> None:
        assert torch.equal(saliency(torch.full((2, 5), value)), torch.zeros(2, 5))


class TestMerge:
    @given(cases())
    def test_counts_places_and_sizes(self, case: tuple[Tensor, Tensor, Tensor, int]) -> None:
        tokens, sizes, _, count = case
        found = merge(*case)
        batch, total, channels = tokens.shape
        assert found.tokens.shape == (batch, total - count, channels)
        assert found.sizes.shape == found.places.shape == (batch, total - count)
        assert found.places.dtype == torch.int64
        assert found.tokens.isfinite().all()
        assert (found.sizes >= sizes.gather(1, found.places)).all()
        assert (found.sizes > 0).all()
        for row in found.places.tolist():
            assert len(set(row)) == total - count
            assert set(row) <= set(range(total))
            assert set(range(1, total, 2)) <= set(row)

    @given(cases())
    def test_the_sums_shrink_by_the_weights(self, case: tuple[Tensor, Tensor, Tensor, int]) -> None:
        """The sums of sizes and of tokens by size shrink, because sources count by their weight."""
        tokens, sizes, scores, _ = case
        weights = saliency(scores)
        found = merge(*case)
        dropped = torch.ones_like(scores).scatter(1, found.places, 0.0)
        mass = sizes * torch.where(dropped > 0, weights, 1.0)
        torch.testing.assert_close(found.sizes.sum(1), mass.sum(1), rtol=1e-5, atol=1e-5)
        by_size = (found.tokens * found.sizes.unsqueeze(2)).sum(1)
        torch.testing.assert_close(by_size, (tokens * mass.unsqueeze(2)).sum(1), rtol=1e-4, atol=1e-4)

    @given(cases())
    def test_with_full_weights_nothing_is_lost(self, case: tuple[Tensor, Tensor, Tensor, int]) -> None:
        tokens, sizes, scores, count = case
        found = merge_weighted(tokens, sizes, torch.ones_like(scores), count)
        torch.testing.assert_close(found.sizes.sum(1), sizes.sum(1), rtol=1e-5, atol=1e-5)

    @given(cases())
    def test_rows_of_a_batch_are_independent(self, case: tuple[Tensor, Tensor, Tensor, int]) -> None:
        tokens, sizes, scores, count = case
        found = merge(*case)
        for place in range(tokens.shape[0]):
            one = slice(place, place + 1)
            alone = merge(tokens[one], sizes[one], scores[one], count)
            assert torch.equal(alone.places, found.places[one])
            torch.testing.assert_close(alone.tokens, found.tokens[one])
            torch.testing.assert_close(alone.sizes, found.sizes[one])

    @given(cases())
    def test_is_the_same_each_time(self, case: tuple[Tensor, Tensor, Tensor, int]) -> None:
        assert all(map(torch.equal, merge(*case), merge(*case)))

    @given(cases())
    def test_nothing_to_merge_changes_nothing(self, case: tuple[Tensor, Tensor, Tensor, int]) -> None:
        tokens, sizes, scores, _ = case
        found = merge(tokens, sizes, scores, 0)
        assert torch.equal(found.tokens, tokens)
        assert torch.equal(found.sizes, sizes)
        assert found.places.tolist() == [list(range(tokens.shape[1]))] * tokens.shape[0]

    @pytest.mark.parametrize("total", [7, 8])
    def test_at_most_half_can_merge(self, total: int) -> None:
        tokens, sizes, scores = torch.randn(1, total, 4), torch.ones(1, total), torch.rand(1, total)
        most = VidTLDR().most(total)
        assert merge(tokens, sizes, scores, most).tokens.shape[1] == total - most
        for count in (most + 1, -1):
            with pytest.raises(ValueError, match=f"of {total} tokens 0 to {most} can merge, not {count}"):
                merge(tokens, sizes, scores, count)

    def test_by_hand(self) -> None:
        """Token 0 is similar to token 3 and has weight 0.5, token 2 to token 1 with weight 0; token 4 is kept."""
        tokens = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [0.0, 1.0], [4.0, 0.0], [1.0, -1.0]]])
        sizes = torch.tensor([[4.0, 1.0, 1.0, 1.0, 1.0]])
        weights = torch.tensor([[0.5, 0.0, 0.0, 1.0, 0.0]])
        found = merge_weighted(tokens, sizes, weights, 2)
        assert found.places.tolist() == [[4, 1, 3]]
        assert found.sizes.tolist() == [[1.0, 1.0, 3.0]]
        torch.testing.assert_close(found.tokens, torch.tensor([[[1.0, -1.0], [0.0, 3.0], [8 / 3, 0.0]]]))

    def test_equal_tokens_merge_from_the_front(self) -> None:
        found = pair(torch.ones(1, 4, 4), torch.ones(1, 4, 4), 2)
        assert found.sources.tolist() == [[0, 1]]
        assert found.targets.tolist() == [[0, 0]]
        assert found.kept.tolist() == [[2, 3]]

    def test_zero_tokens_have_no_similarity(self) -> None:
        found = merge(torch.zeros(1, 6, 4), torch.ones(1, 6), torch.rand(1, 6), 3)
        assert torch.equal(found.tokens, torch.zeros(1, 3, 4))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_sums_in_float32(self, dtype: torch.dtype) -> None:
        """200 large tokens merge into one: their sum does not fit float16, their mean does."""
        tokens = torch.full((1, 400, 8), 1000.0, dtype=dtype)
        found = merge_weighted(tokens, torch.ones(1, 400), torch.ones(1, 400), 200)
        assert found.tokens.dtype == dtype
        assert found.sizes.dtype == torch.float32
        assert found.sizes[0, 0] == 201
        assert torch.equal(found.tokens, tokens[:, :200])

    def test_channel_major_memory(self) -> None:
        tokens = torch.randn(2, 4, 9).mT
        arguments = (torch.ones(2, 9), torch.rand(2, 9), 3)
        torch.testing.assert_close(merge(tokens, *arguments), merge(tokens.contiguous(), *arguments))

    def test_can_be_exported(self) -> None:
        class Module(torch.nn.Module):
            def forward(self, tokens: Tensor, sizes: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
                return tuple(merge(tokens, sizes, scores, 3))

        arguments = (torch.randn(2, 9, 4), torch.ones(2, 9), torch.rand(2, 9))
        program = torch.export.export(Module(), arguments).module()
        torch.testing.assert_close(program(*arguments), Module()(*arguments))


def test_vid_tldr_acts_after_the_attention() -> None:
    assert VidTLDR.kind == "vid_tldr"
    assert VidTLDR.after == "attention"
    assert str(VidTLDR().model_dump()) == "{}"
