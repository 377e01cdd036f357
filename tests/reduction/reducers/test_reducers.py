"""Properties of all merging reducers, `bipartite` against reference vectors, `merge` and `fuse` against naive loops.

`data/tome.safetensors` was made with the authors' code on seeded random tokens `in/x`: two merges of 5 tokens in a row,
by `in/metric1` and `in/metric2`, with a class token (`cls/`) and without (`nocls/`), and one (`cap/`, with a class
token) with the largest count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paths import VECTORS
from safetensors.torch import load_file
from torch import Tensor

from repshift_cli.errors import RecipeError
from repshift_cli.ops.merging import key_features, merge_into, nearest, pair
from repshift_cli.ops.tokens import keep_top_behind
from repshift_cli.planning.recipe import ComponentSpec
from repshift_cli.reduction.reducers.base import Dims, Merged, Merger, Pruner, build_reducer, reducer_kinds
from repshift_cli.reduction.reducers.bipartite import Bipartite, match
from repshift_cli.reduction.reducers.fuse import Fuse
from repshift_cli.reduction.reducers.merge import Merge
from repshift_cli.reduction.reducers.prune import Prune
from repshift_cli.reduction.reducers.vid_tldr import VidTLDR, saliency

TOME = load_file(VECTORS / "tome.safetensors")

MERGERS: dict[str, Merger] = {
    "merge": Merge(),
    "merge_by_keys": Merge(similarity="keys"),
    "fuse": Fuse(),
    "fuse_carry": Fuse(carry=True),
    "bipartite": Bipartite(),
    "vid_tldr": VidTLDR(),
}
BY_SCORE = ("merge", "merge_by_keys", "fuse", "fuse_carry")
"""Reducers in which the score selects the dropped tokens."""

HEADS, CHANNELS = 2, 6

each = pytest.mark.parametrize("name", MERGERS)
each_that_keeps_all_mass = pytest.mark.parametrize("name", [name for name in MERGERS if name != "vid_tldr"])
each_by_score = pytest.mark.parametrize("name", BY_SCORE)


class Case:
    """Tokens, sizes, scores, count, prefix tokens and keys, in float32 as in a model."""

    def __init__(self, batch: int, patches: int, prefix: int, seed: int, share: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.batch, self.patches, self.prefix, self.share = batch, patches, prefix, share
        total = prefix + patches
        self.tokens = torch.randn(batch, total, CHANNELS, generator=generator)
        self.sizes = torch.randint(1, 5, (batch, total), generator=generator).float()
        self.sizes[:, :prefix] = 1
        self.scores = torch.randn(batch, patches, generator=generator)
        self.keys = torch.randn(batch, HEADS, total, 4, generator=generator)

    def count(self, merger: Merger) -> int:
        """From 1 to the largest count."""
        return 1 + int(self.share * (merger.most(self.patches) - 1))

    def run(self, merger: Merger, rows: slice = slice(None), dtype: torch.dtype = torch.float32) -> Merged:
        return merger.merge(
            self.tokens[rows].to(dtype),
            self.sizes[rows],
            self.scores[rows],
            self.count(merger),
            self.prefix,
            {"attention_key": self.keys[rows].to(dtype)},
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    prefix = draw(st.sampled_from([0, 1, 2, 5]))
    seed, share = draw(st.integers(0, 2**31)), draw(st.floats(0, 1))
    return Case(draw(st.integers(1, 3)), draw(st.integers(2, 18)), prefix, seed, share)


def left(case: Case, found: Merged) -> list[list[int]]:
    """For each image the positions of the remaining tokens, in the order of `found`."""
    front = list(range(case.prefix))
    return [front + [case.prefix + place for place in row] for row in found.places.tolist()]


def naive_means(tokens: Tensor, sizes: Tensor, targets: Mapping[int, int], kept: list[int]) -> tuple[Tensor, Tensor]:
    """One image in float64: the size-weighted mean of each kept token and its sources; `targets` has their targets."""
    tokens, sizes = tokens.double(), sizes.double()
    groups = [[place, *(source for source, target in targets.items() if target == place)] for place in kept]
    mass = torch.stack([sum((sizes[index] for index in group), sizes.new_zeros(())) for group in groups])
    sums = [sum((tokens[index] * sizes[index] for index in group), tokens.new_zeros(())) for group in groups]
    return torch.stack(sums) / mass.unsqueeze(1), mass


def cosine(one: Tensor, other: Tensor) -> float:
    return float(one.double() @ other.double() / one.double().norm() / other.double().norm())


def naive_merge(case: Case, row: int, kept: list[int], features: Tensor) -> dict[int, int]:
    """The target of each dropped token: the kept patch token with the largest cosine."""
    candidates = [place for place in kept if place >= case.prefix]
    targets = {}
    for source in range(case.prefix, case.prefix + case.patches):
        if source not in kept:
            targets[source] = max(candidates, key=lambda place: cosine(features[row, source], features[row, place]))
    return targets


def naive_pairs(case: Case, row: int, features: Tensor, count: int) -> dict[int, int]:
    """The `count` patch tokens at even positions that are most similar to one at an odd position, with targets."""
    places = range(case.prefix, case.prefix + case.patches)
    evens, odds = ([place for place in places if place % 2 == rest] for rest in (0, 1))
    best = {one: max(odds, key=lambda other: cosine(features[row, one], features[row, other])) for one in evens}
    alike = sorted(best, key=lambda one: -cosine(features[row, one], features[row, best[one]]))
    return {one: best[one] for one in alike[:count]}


def test_every_merging_reducer_is_tested() -> None:
    assert {type(merger) for merger in MERGERS.values()} == {
        kind for kind in reducer_kinds().values() if not issubclass(kind, Pruner)
    }


class TestParity:
    @pytest.mark.parametrize(("kind", "prefix"), [("cls", 1), ("nocls", 0)])
    def test_two_merges_in_a_row(self, kind: str, prefix: int) -> None:
        tokens, sizes = TOME["in/x"], torch.ones(2, 17)
        for call in "12":
            expected, total = TOME[f"{kind}/x{call}"], tokens.shape[1]
            count = total - expected.shape[1]
            tokens, sizes, places, *_ = match(tokens, sizes, TOME[f"in/metric{call}"], count, prefix)
            torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-6)
            torch.testing.assert_close(sizes, TOME[f"{kind}/size{call}"].squeeze(2), rtol=0, atol=0)
            # the authors count among all even tokens, a class token included
            unmerged = 2 * TOME[f"{kind}/unm_idx{call}"].squeeze(2)[:, prefix:] - prefix
            assert torch.equal(places[:, : unmerged.shape[1]], unmerged)
            assert places[:, unmerged.shape[1] :].tolist() == [[place - prefix for place in range(1, total, 2)]] * 2

    @pytest.mark.parametrize("call", ["1", "2"])
    @pytest.mark.parametrize(("kind", "prefix"), [("cls", 1), ("nocls", 0)])
    def test_matched_pairs(self, kind: str, prefix: int, call: str) -> None:
        metric = TOME[f"in/metric{call}"]
        sources, targets = (TOME[f"{kind}/{part}_idx{call}"].squeeze(2) for part in ("src", "dst"))
        # with a class token in front, which is neither, the first source is at place 2
        found = pair(metric[:, 2 * prefix :: 2], metric[:, 1::2], sources.shape[1])
        assert torch.equal(found.sources + prefix, sources)
        assert torch.equal(found.targets, targets)

    def test_the_largest_count(self) -> None:
        count = Bipartite().most(16)
        tokens, sizes, *_ = match(TOME["in/x"], torch.ones(2, 17), TOME["in/metric1"], count, 1)
        torch.testing.assert_close(tokens, TOME["cap/x1"], rtol=0, atol=1e-6)
        assert torch.equal(sizes, TOME["cap/size1"].squeeze(2))
        with pytest.raises(ValueError, match="of 16 patch tokens 0 to 8 can merge, not 9"):
            match(TOME["in/x"], torch.ones(2, 17), TOME["in/metric1"], count + 1, 1)

    def test_the_reducer_reads_the_mean_of_the_keys(self) -> None:
        metric = TOME["in/metric1"]
        keys = torch.stack((metric - 1, metric + 3, metric - 2), dim=1)
        seen = {"attention_key": keys}
        found = Bipartite().merge(TOME["in/x"], torch.ones(2, 17), torch.zeros(2, 16), 5, 1, seen)
        torch.testing.assert_close(found.tokens, TOME["cls/x1"], rtol=0, atol=1e-6)
        assert Bipartite().taps() == {"attention_key"}


class TestAll:
    @each
    @given(cases())
    def test_shapes_places_and_prefix(self, name: str, case: Case) -> None:
        merger = MERGERS[name]
        found, count = case.run(merger), case.count(merger)
        remain = case.patches - count
        assert found.tokens.shape == (case.batch, case.prefix + remain, CHANNELS)
        assert found.sizes.shape == (case.batch, case.prefix + remain)
        assert found.sizes.dtype == torch.float32
        assert found.places.shape == (case.batch, remain)
        assert found.places.dtype == torch.int64
        for row in found.places.tolist():
            assert len(set(row)) == remain
            assert set(row) <= set(range(case.patches))
            if name in BY_SCORE:
                assert row == sorted(row)
        assert torch.equal(found.tokens[:, : case.prefix], case.tokens[:, : case.prefix])
        assert torch.equal(found.sizes[:, : case.prefix], case.sizes[:, : case.prefix])

    @each
    @given(cases())
    def test_tokens_without_sources_are_bit_identical(self, name: str, case: Case) -> None:
        found = case.run(MERGERS[name])
        touched = 0
        for row, places in enumerate(left(case, found)):
            same = found.sizes[row] == case.sizes[row, places]
            assert torch.equal(found.tokens[row, same], case.tokens[row, places][same])
            touched += int((~same).sum())
        # a source of vid-TLDR may have weight 0
        assert touched >= (0 if name == "vid_tldr" else case.batch)
        if name.startswith("fuse"):
            assert touched == case.batch

    @each_that_keeps_all_mass
    @given(cases())
    def test_the_sum_of_sizes_is_unchanged(self, name: str, case: Case) -> None:
        assert torch.equal(case.run(MERGERS[name]).sizes.sum(1), case.sizes.sum(1))  # whole numbers

    @pytest.mark.parametrize("name", ["merge", "merge_by_keys", "bipartite"])
    @given(cases())
    def test_the_mean_by_size_is_unchanged(self, name: str, case: Case) -> None:
        def mean(tokens: Tensor, sizes: Tensor) -> Tensor:
            return (tokens.double() * sizes.double().unsqueeze(2)).sum(1) / sizes.double().sum(1, keepdim=True)

        found = case.run(MERGERS[name])
        wanted = mean(case.tokens, case.sizes)
        torch.testing.assert_close(mean(found.tokens, found.sizes), wanted, rtol=1e-5, atol=1e-5)

    @each
    @given(cases())
    def test_rows_of_a_batch_are_independent(self, name: str, case: Case) -> None:
        together = case.run(MERGERS[name])
        for row in range(case.batch):
            alone = case.run(MERGERS[name], slice(row, row + 1))
            assert all(torch.equal(one[0], all_of[row]) for one, all_of in zip(alone, together, strict=True))

    @each
    @pytest.mark.parametrize(("dtype", "within"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
    def test_half_precision_is_near_float32(self, name: str, dtype: torch.dtype, within: float) -> None:
        compared = 0
        for seed in range(5):
            case = Case(2, 18, 1, seed, 0.7)
            # numbers that half precision holds, so that only the arithmetic differs
            case.tokens, case.keys = case.tokens.to(dtype).float(), case.keys.to(dtype).float()
            full, half = case.run(MERGERS[name]), case.run(MERGERS[name], dtype=dtype)
            assert half.tokens.dtype == dtype
            assert half.sizes.dtype == torch.float32
            # if two pairs are equally similar, rounding may decide which one merges
            if torch.equal(half.places, full.places) and torch.allclose(half.sizes, full.sizes):
                compared += 1
                torch.testing.assert_close(half.tokens.float(), full.tokens, rtol=within, atol=within)
            assert half.tokens.isfinite().all()
            assert (half.sizes > 0).all()
            mass = case.sizes.sum(1) if name != "vid_tldr" else half.sizes.sum(1)
            assert torch.equal(half.sizes.sum(1), mass)
        assert compared >= 3

    @each
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_of_large_equal_tokens(self, name: str, dtype: torch.dtype) -> None:
        """Large equal tokens: their sum does not fit float16, their mean does and equals them."""
        case = Case(2, 400, 1, 0, 1.0)
        case.tokens, case.keys = torch.full_like(case.tokens, 1000.0), torch.full_like(case.keys, 1000.0)
        found = case.run(MERGERS[name], dtype=dtype)
        assert torch.equal(found.tokens, torch.full_like(found.tokens, 1000.0))

    @each
    def test_gradients_are_right(self, name: str) -> None:
        case = Case(2, 9, 1, 3, 1.0)
        merger = MERGERS[name]
        # numeric gradients take small steps, and a size of 1 plus a step would mark a fused token
        case.sizes = torch.where(case.sizes == 1, 0.5, case.sizes)

        def run(tokens: Tensor, sizes: Tensor, scores: Tensor) -> Tensor:
            seen = {"attention_key": case.keys.double()}
            return merger.merge(tokens, sizes, scores, case.count(merger), 1, seen).tokens

        leaves = [tensor.double().requires_grad_() for tensor in (case.tokens, case.sizes, case.scores)]
        with_scores = name not in ("merge", "merge_by_keys", "bipartite")
        assert torch.autograd.gradcheck(run, leaves, check_undefined_grad=False)
        output = run(*leaves)
        (to_tokens,) = torch.autograd.grad(output.square().sum(), leaves[:1], retain_graph=True)
        assert to_tokens.isfinite().all()
        # all tokens affect the result, except sources of vid-TLDR with weight 0
        reached = to_tokens.abs().amax(-1) > 0
        assert reached.all() or name == "vid_tldr"
        (to_scores,) = torch.autograd.grad(output.square().sum(), leaves[2:], allow_unused=True)
        assert (to_scores is not None and bool(to_scores.abs().max() > 0)) == with_scores

    @pytest.mark.parametrize("kind", reducer_kinds())
    def test_every_kind_has_gradients(self, kind: str) -> None:
        case = Case(2, 8, 1, 5, 0.5)
        reducer, tokens = build_reducer(ComponentSpec(kind=kind)), case.tokens.clone().requires_grad_()
        if isinstance(reducer, Pruner):
            output = reducer.reduce(tokens, keep_top_behind(case.scores, 5, 1))
        else:
            assert isinstance(reducer, Merger)
            output = reducer.merge(tokens, case.sizes, case.scores, 3, 1, {"attention_key": case.keys}).tokens
        output.square().sum().backward()
        assert tokens.grad is not None
        assert tokens.grad.isfinite().all()
        assert (tokens.grad.abs().amax(-1) > 0).sum() >= 2 * 6

    @each
    def test_channel_major_memory(self, name: str) -> None:
        case = Case(2, 12, 1, 1, 0.5)
        wanted = case.run(MERGERS[name])
        before = case.tokens.clone()
        case.tokens = case.tokens.mT.contiguous().mT
        found = case.run(MERGERS[name])
        torch.testing.assert_close(found.tokens, wanted.tokens)
        assert torch.equal(found.places, wanted.places)
        assert torch.equal(case.tokens, before)

    @each
    def test_inputs_are_not_changed(self, name: str) -> None:
        case = Case(2, 12, 2, 1, 0.5)
        before = [tensor.clone() for tensor in (case.tokens, case.sizes, case.scores, case.keys)]
        case.run(MERGERS[name])
        assert all(map(torch.equal, before, (case.tokens, case.sizes, case.scores, case.keys)))

    @each
    def test_equal_tokens_equal_scores_and_zeros(self, name: str) -> None:
        for value in (0.0, 2.0):
            case = Case(2, 9, 1, 0, 1.0)
            case.tokens, case.keys = torch.full_like(case.tokens, value), torch.full_like(case.keys, value)
            case.scores = torch.full_like(case.scores, 3.0)
            found = case.run(MERGERS[name])
            torch.testing.assert_close(found.tokens, torch.full_like(found.tokens, value), rtol=1e-6, atol=0)
            assert found.sizes.isfinite().all()


class TestByScore:
    @each_by_score
    @given(cases())
    def test_the_score_selects_the_tokens_of_pruning(self, name: str, case: Case) -> None:
        merger = MERGERS[name]
        if name == "fuse_carry":
            case.sizes = torch.ones_like(case.sizes)
        found = case.run(merger)
        keep = keep_top_behind(case.scores, case.patches - case.count(merger), case.prefix)
        assert torch.equal(found.places, keep[:, case.prefix :] - case.prefix)
        pruned = Prune().reduce(case.tokens, keep)
        same = found.sizes == Prune().reduce(case.sizes.unsqueeze(2), keep).squeeze(2)
        assert torch.equal(found.tokens[same], pruned[same])

    @pytest.mark.parametrize("name", ["bipartite", "vid_tldr"])
    @given(cases())
    def test_the_score_is_not_used_by_matching(self, name: str, case: Case) -> None:
        before = case.run(MERGERS[name])
        case.scores = case.scores.flip(1)
        after = case.run(MERGERS[name])
        assert torch.equal(before.places, after.places)
        if name == "bipartite":
            assert torch.equal(before.tokens, after.tokens)

    @each_by_score
    def test_all_but_one_can_be_merged(self, name: str) -> None:
        assert MERGERS[name].most(16) == 15
        case = Case(2, 16, 1, 0, 1.0)
        found = case.run(MERGERS[name])
        assert torch.equal(found.sizes[:, 1], case.sizes[:, 1:].sum(1))


class TestAgainstLoops:
    @pytest.mark.parametrize("name", ["merge", "merge_by_keys", "bipartite"])
    @given(cases())
    def test_targets_of_merged_tokens(self, name: str, case: Case) -> None:
        merger = MERGERS[name]
        found, count = case.run(merger), case.count(merger)
        features = case.tokens if name == "merge" else case.keys.mean(1)
        for row, kept in enumerate(left(case, found)):
            if name == "bipartite":
                targets = naive_pairs(case, row, features, count)
                assert sorted(kept) == [place for place in range(case.prefix + case.patches) if place not in targets]
            else:
                targets = naive_merge(case, row, kept, features)
            tokens, sizes = naive_means(case.tokens[row], case.sizes[row], targets, kept)
            torch.testing.assert_close(found.sizes[row].double(), sizes, rtol=0, atol=0)
            torch.testing.assert_close(found.tokens[row].double(), tokens, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("carry", [False, True])
    @given(cases())
    def test_fuse(self, carry: bool, case: Case) -> None:
        merger = Fuse(carry=carry)
        found, count = case.run(merger), case.count(merger)
        for row in range(case.batch):
            tokens, sizes = case.tokens[row, case.prefix :].double(), case.sizes[row, case.prefix :].double()
            scores = case.scores[row].double()
            fused_before = [place for place in range(case.patches) if carry and sizes[place] > 1]
            order = sorted(range(case.patches), key=lambda place: (place in fused_before, -scores[place], place))
            kept = sorted(order[: case.patches - count])
            if any(place in fused_before for place in kept):
                continue  # impossible if `carry` is on from the first site
            together = order[case.patches - count - 1 :]
            spread = (scores.max() - scores.min()).clamp(min=1e-30)
            weights = {
                place: sizes[place] * (0.001 + 0.999 * (scores[place] - scores.min()) / spread) for place in together
            }
            mean = sum(weights[place] * tokens[place] for place in together) / sum(weights.values())
            at = kept.index(together[0])
            assert found.places[row].tolist() == kept
            torch.testing.assert_close(found.tokens[row, case.prefix + at].double(), mean, rtol=1e-5, atol=1e-5)
            assert found.sizes[row, case.prefix + at] == sum(sizes[place] for place in together)
            others = [place for place in range(len(kept)) if place != at]
            assert torch.equal(
                found.tokens[row, case.prefix :][others], case.tokens[row, case.prefix :][[kept[o] for o in others]]
            )

    @pytest.mark.parametrize("prefix", [0, 1, 2, 5])
    @pytest.mark.parametrize("seed", range(3))
    def test_carry_leaves_one_fused_token_over_several_sites(self, prefix: int, seed: int) -> None:
        """It stands for all dropped tokens; without `carry`, a fused token may remain in addition to the next one."""
        generator = torch.Generator().manual_seed(seed)
        fused: dict[bool, list[int]] = {}
        for carry in (False, True):
            tokens, sizes = torch.randn(3, prefix + 30, 4, generator=generator), torch.ones(3, prefix + 30)
            fused[carry] = []
            for site, count in enumerate((5, 7, 1, 10)):
                scores = torch.randn(3, tokens.shape[1] - prefix, generator=generator)
                tokens, sizes, *_ = Fuse(carry=carry).merge(tokens, sizes, scores, count, prefix, {})
                assert torch.equal(sizes.sum(1), torch.full((3,), prefix + 30.0))
                fused[carry].append(int((sizes > 1).sum(1).max()))
                if carry:
                    dropped = (5, 12, 13, 23)[site]
                    # at each later site the fused token and one other token are fused
                    assert torch.equal(sizes.amax(1), torch.full((3,), 1.0 + dropped))
        assert fused[True] == [1, 1, 1, 1]
        assert max(fused[False]) > 1

    def test_fuse_by_hand(self) -> None:
        """Scores 4, 2, 0, 1: token 1 is the last kept; 2 and 3 merge into it, by weights .5005, .001 and .25075."""
        tokens = torch.tensor([[[9.0], [1.0], [2.0], [3.0]]])
        found = Fuse().merge(tokens, torch.ones(1, 4), torch.tensor([[4.0, 2.0, 0.0, 1.0]]), 2, 0, {})
        assert found.places.tolist() == [[0, 1]]
        assert found.sizes.tolist() == [[1.0, 3.0]]
        mean = (0.5005 * 1 + 0.001 * 2 + 0.25075 * 3) / (0.5005 + 0.001 + 0.25075)
        torch.testing.assert_close(found.tokens, torch.tensor([[[9.0], [mean]]]))

    def test_merge_by_hand(self) -> None:
        """Token 1 has the direction of token 3 and size 3; token 0 is a prefix token and no target."""
        tokens = torch.tensor([[[5.0, 0.0], [4.0, 0.0], [0.0, 2.0], [8.0, 1.0]]])
        sizes = torch.tensor([[1.0, 3.0, 1.0, 1.0]])
        found = Merge().merge(tokens, sizes, torch.tensor([[0.0, 1.0, 2.0]]), 1, 1, {})
        assert found.places.tolist() == [[1, 2]]
        assert found.sizes.tolist() == [[1.0, 1.0, 4.0]]
        torch.testing.assert_close(found.tokens, torch.tensor([[[5.0, 0.0], [0.0, 2.0], [5.0, 0.25]]]))

    @given(cases())
    def test_vid_tldr_does_not_merge_the_prefix(self, case: Case) -> None:
        found = case.run(VidTLDR())
        case.tokens, case.sizes = case.tokens[:, case.prefix :], case.sizes[:, case.prefix :]
        prefix, case.prefix = case.prefix, 0
        alone = case.run(VidTLDR())
        assert torch.equal(found.tokens[:, prefix:], alone.tokens)
        assert torch.equal(found.sizes[:, prefix:], alone.sizes)
        assert torch.equal(found.places, alone.places)

    @given(cases())
    def test_vid_tldr_weights_the_sources(self, case: Case) -> None:
        found, count = case.run(VidTLDR()), case.count(VidTLDR())
        weights = saliency(case.scores)
        shifted = Case(case.batch, case.patches, 0, 0, 0)
        shifted.tokens = case.tokens[:, case.prefix :]
        for row, kept in enumerate(found.places.tolist()):
            targets = naive_pairs(shifted, row, shifted.tokens, count)
            own = case.sizes[row, case.prefix :].double()
            shares = own.clone()
            shares[list(targets)] *= weights[row, list(targets)].double()
            tokens, sizes = naive_means(shifted.tokens[row], shares, targets, kept)
            torch.testing.assert_close(found.sizes[row, case.prefix :].double(), sizes, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(found.tokens[row, case.prefix :].double(), tokens, rtol=1e-5, atol=1e-5)


class TestPieces:
    def test_nearest_ignores_the_length(self) -> None:
        sources = torch.tensor([[[1.0, 1.0], [-3.0, 0.1]]])
        targets = torch.tensor([[[100.0, 0.0], [0.2, 0.3], [-0.01, 0.0]]])
        assert nearest(sources, targets).tolist() == [[1, 2]]
        assert nearest(1e3 * sources, targets).tolist() == [[1, 2]]

    def test_nearest_prefers_the_first_of_equals(self) -> None:
        assert nearest(torch.ones(2, 3, 4), torch.ones(2, 5, 4)).tolist() == [[0] * 3] * 2

    def test_lengths_that_half_precision_cannot_square(self) -> None:
        sources = torch.tensor([[[300.0, 300.0]]], dtype=torch.float16)
        targets = torch.tensor([[[300.0, -300.0], [400.0, 500.0]]], dtype=torch.float16)
        assert nearest(sources, targets).tolist() == [[1]]
        assert pair(sources, targets, 1).targets.tolist() == [[1]]

    def test_key_features_are_the_mean_over_heads(self) -> None:
        keys = torch.randn(2, 3, 5, 4)
        torch.testing.assert_close(key_features(keys), (keys[:, 0] + keys[:, 1] + keys[:, 2]) / 3)

    def test_several_sources_with_one_target(self) -> None:
        tokens = torch.tensor([[[0.0], [6.0], [3.0], [7.0]]])
        found, sizes = merge_into(
            tokens[:, [0, 3]],
            torch.tensor([[1.0, 4.0]]),
            tokens[:, [1, 2]],
            torch.tensor([[1.0, 2.0]]),
            torch.tensor([[0, 0]]),
        )
        assert sizes.tolist() == [[4.0, 4.0]]
        torch.testing.assert_close(found, torch.tensor([[[3.0], [7.0]]]))

    @pytest.mark.parametrize("tokens", [1, 197, 785])
    def test_macs_equal_the_counter(self, tokens: int) -> None:
        dims = Dims(width=384, head=64)
        for patches, dropped in ((tokens, tokens // 3), (tokens, 0)):
            assert Merge().macs(patches, dropped, dims) == dropped * (patches - dropped) * 384
            assert Merge(similarity="keys").macs(patches, dropped, dims) == dropped * (patches - dropped) * 64
            assert Bipartite().macs(patches, dropped, dims) == (patches // 2) * ((patches + 1) // 2) * 64
            assert Fuse().macs(patches, dropped, dims) == Prune().macs(patches, dropped, dims) == 0

    def test_options_are_checked(self) -> None:
        options: list[dict[str, Any]] = [
            {"kind": "merge", "similarity": "colour"},
            {"kind": "fuse", "carry": "maybe"},
            {"kind": "bipartite", "similarity": "keys"},
        ]
        for part in options:
            with pytest.raises(RecipeError, match="reducer"):
                build_reducer(ComponentSpec(**part))
        assert build_reducer(ComponentSpec(kind="merge", similarity="keys")) == Merge(similarity="keys")
        assert build_reducer(ComponentSpec(kind="fuse", carry=True)) == Fuse(carry=True)
