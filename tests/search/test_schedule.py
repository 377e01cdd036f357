"""Schedules of the additive model, compared with brute force, and their recipes."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repshift_cli.errors import UsageError
from repshift_cli.planning.layout import Layout, SiteInfo, Window
from repshift_cli.planning.recipe import ComponentSpec, scaled_recipe
from repshift_cli.planning.resolve import resolve
from repshift_cli.search.additive import Additive, Kept, drops
from repshift_cli.search.schedule import fit, layer_drops, neighbours, on_tiles, paper_schedule, solve, to_recipe

UNIT = 1 / 64
"""Savings are multiples of this, so that their sums are exact and no two share a bin."""

SHIFT = ComponentSpec.model_validate({"kind": "representation_shift", "operation": "mlp", "polarity": "largest"})
NORM = ComponentSpec(kind="token_norm")
PRUNE = ComponentSpec(kind="prune")
METRICS = dict.fromkeys(range(12), SHIFT)


def rising(draw: st.DrawFn, count: int, most: int) -> list[int]:
    """Zero, then `count - 1` numbers in rising order."""
    return [0, *itertools.accumulate(draw(st.lists(st.integers(0, most), min_size=count - 1, max_size=count - 1)))]


@st.composite
def small_models(draw: st.DrawFn) -> tuple[Additive, tuple[int, ...]]:
    """An additive model small enough for brute force, and its levels."""
    steps = (8, 6, 3, 2)[: draw(st.integers(2, 4))]
    sites = draw(st.integers(1, 4))
    gains = [dict(zip(steps, rising(draw, len(steps), 3), strict=True)) for _ in range(sites)]
    harms = [dict(zip(steps, rising(draw, len(steps), 9), strict=True)) for _ in range(sites)]
    share = draw(st.sampled_from((4, 6, 7)))
    model = Additive(
        tokens=8,
        sites=sites,
        gain=lambda site, kept: UNIT * gains[site][kept],
        harm=lambda site, kept: float(harms[site][kept]),
        most=lambda arriving: arriving * share // 8,
        site_cost=UNIT * draw(st.integers(0, 1)),
    )
    return model, steps


def everything(model: Additive, steps: tuple[int, ...], max_sites: int | None = None) -> list[Kept]:
    """All possible schedules."""
    falling = (kept for kept in itertools.product(steps, repeat=model.sites) if list(kept) == sorted(kept)[::-1])
    most = model.sites if max_sites is None else max_sites
    return [kept for kept in falling if model.possible(kept) and sum(map(bool, drops(kept, 8))) <= most]


def vit(tokens: int = 196, sites: int = 12) -> Additive:
    """Like a ViT: each site saves a part of one block, slightly less than in proportion. The last one saves nothing."""

    def gain(site: int, kept: int) -> float:
        dropped = 1 - kept / tokens
        return 0.0 if site == sites - 1 else (0.9 * dropped + 0.1 * (1 - (kept / tokens) ** 2)) / sites

    return Additive(tokens, sites, gain, lambda site, kept: (1 + site) * ((tokens - kept) / tokens) ** 2)


@st.composite
def schedules(draw: st.DrawFn, model: Additive) -> Kept:
    """Any schedule that drops tokens."""
    counts = st.lists(st.integers(model.least, model.tokens), min_size=model.sites, max_size=model.sites)
    kept = sorted(draw(counts.filter(lambda found: min(found) < model.tokens)), reverse=True)
    return tuple(kept)


class TestSolve:
    @given(small_models(), st.integers(0, 40))
    def test_is_as_good_as_brute_force(self, drawn: tuple[Additive, tuple[int, ...]], units: int) -> None:
        model, steps = drawn
        budget = 1 - UNIT * units
        fitting = [kept for kept in everything(model, steps) if model.cost(kept) <= budget]
        found = solve(model, steps, width=UNIT).best(budget)
        assert (found is None) == (not fitting)
        if found is not None:
            assert found.damage == model.damage(found.kept) == min(map(model.damage, fitting))
            assert found.cost == model.cost(found.kept) <= budget

    @given(small_models(), st.integers(0, 20), st.integers(0, 3))
    def test_keeps_to_the_number_of_sites(
        self, drawn: tuple[Additive, tuple[int, ...]], units: int, limit: int
    ) -> None:
        model, steps = drawn
        budget = 1 - UNIT * units
        fitting = [kept for kept in everything(model, steps, limit) if model.cost(kept) <= budget]
        found = solve(model, steps, max_sites=3, width=UNIT).best(budget, limit)
        assert (found is None) == (not fitting)
        if found is not None:
            assert sum(map(bool, drops(found.kept, 8))) <= limit
            assert found.damage == min(map(model.damage, fitting))

    @given(small_models())
    def test_front_is_that_of_brute_force(self, drawn: tuple[Additive, tuple[int, ...]]) -> None:
        model, steps = drawn
        points = {(model.cost(kept), model.damage(kept)) for kept in everything(model, steps)}
        beaten = {(c, d) for c, d in points for e, f in points - {(c, d)} if e <= c and f <= d}
        solved = solve(model, steps, width=UNIT)
        assert [(found.cost, found.damage) for found in solved.pareto()] == sorted(points - beaten, reverse=True)
        assert solved.pareto()[-1].cost == min(cost for cost, _ in points)

    @pytest.mark.slow
    @settings(max_examples=12)
    @given(st.floats(0.3, 0.95))
    def test_never_exceeds_the_budget_on_a_coarse_grid(self, budget: float) -> None:
        model = vit()
        found = solve(model).best(budget)
        assert found is not None
        assert math.isclose(found.cost, model.cost(found.kept), abs_tol=1e-9)
        assert found.cost <= budget + 1e-9
        assert model.possible(found.kept)

    def test_leaves_out_infinite_harm(self) -> None:
        model = Additive(8, 2, lambda site, kept: UNIT * (8 - kept), lambda site, kept: math.inf if not site else 1.0)
        found = solve(model, (8, 4), width=UNIT).best(0.99)
        assert found is not None
        assert found.kept == (8, 4)


class TestFit:
    @given(st.data(), st.floats(0.3, 0.97))
    def test_lands_just_below_the_budget(self, data: st.DataObject, budget: float) -> None:
        model = vit()
        fitted = fit(data.draw(schedules(model)), model, budget)
        if fitted is None:
            return
        dropped = [count for count in drops(fitted, model.tokens) if count]
        assert model.possible(fitted)
        assert min(dropped) >= model.least_drop
        assert budget - 0.05 < model.cost(fitted) <= budget + 1e-9

    def test_gives_up_where_no_factor_is_enough(self) -> None:
        model = vit()
        late = (196,) * 10 + (100, 100)
        assert fit(late, model, 0.5) is None
        assert fit((196,) * 12, model, 0.9) is None

    def test_removes_sites_that_drop_very_few(self) -> None:
        fitted = fit((195,) * 6 + (100,) * 6, vit(), 0.8)
        assert fitted is not None
        assert fitted[:6] == (196,) * 6

    def test_respects_the_limit_of_a_site(self) -> None:
        full = vit()
        half = Additive(196, 12, full.gain, full.harm, most=lambda arriving: arriving // 2)
        fitted = fit((60,) * 12, half, 0.6)
        assert fitted is not None
        assert half.possible(fitted)
        assert fit((60,) * 12, half, 0.4) is None


class TestNeighbours:
    @pytest.mark.slow
    @settings(max_examples=20)
    @given(st.data(), st.sampled_from((1, 4, 24)))
    def test_are_other_schedules_on_the_budget(self, data: st.DataObject, step: int) -> None:
        model = vit()
        fitted = fit(data.draw(schedules(model)), model, 0.65)
        if fitted is None:
            return
        found = neighbours(fitted, model, 0.65, step)
        assert len(set(found)) == len(found)
        assert fitted not in found
        assert all(model.possible(kept) and model.cost(kept) <= 0.65 + 1e-9 for kept in found)
        assert [model.damage(kept) for kept in found] == sorted(model.damage(kept) for kept in found)
        # the last site saves nothing, so it gets no new drops
        if fitted[-1] == fitted[-2]:
            assert all(kept[-1] == kept[-2] for kept in found)

    def test_move_add_and_remove(self) -> None:
        model = vit()
        kept = fit((140,) * 3 + (90,) * 9, model, 0.65)
        assert kept is not None
        used = {
            tuple(site for site, dropped in enumerate(drops(found, 196)) if dropped)
            for found in neighbours(kept, model, 0.65, 24)
        }
        assert {(1, 3), (0, 2), (0, 3), (0, 4), (0,), (3,), (0, 3, 7)} <= used


class TestTiles:
    @given(schedules(vit()), st.integers(0, 5), st.integers(1, 64))
    def test_all_tokens_come_in_multiples_and_cost_no_more(self, kept: Kept, prefix: int, multiple: int) -> None:
        found = on_tiles(kept, 196, prefix, multiple)
        assert all(after <= before for before, after in zip(kept, found, strict=True))
        assert list(found) == sorted(found, reverse=True)
        for before, after in zip(kept, found, strict=True):
            assert after >= 1
            if before == 196 or before + prefix < multiple:
                assert after == before
            elif after > 1:
                assert (after + prefix) % multiple == 0
                assert before - after < multiple

    def test_a_multiple_of_one_changes_nothing(self) -> None:
        assert on_tiles((190, 101, 33), 196, 1, 1) == (190, 101, 33)

    def test_known_numbers(self) -> None:
        assert on_tiles((196, 157, 126, 101, 5), 196, 1, 8) == (196, 151, 119, 95, 5)


class TestRecipes:
    @pytest.mark.parametrize("tokens", [16, 49, 196])
    def test_the_papers_schedule_matches_its_recipe(self, tokens: int) -> None:
        layout = sequence(tokens)
        plan = resolve(scaled_recipe("paper", 12), layout)
        kept = paper_schedule(12, tokens, {0: 0.2, 3: 0.2, 6: 0.2})
        assert tuple(count - 1 for count in plan.tokens_at(12)[1:]) == kept

    @given(schedules(vit()))
    def test_the_recipe_has_the_exact_counts(self, kept: Kept) -> None:
        recipe = to_recipe(kept, sequence(196), range(12), metrics=METRICS, reducer=PRUNE)
        plan = resolve(recipe, sequence(196))
        assert plan.tokens_at(12)[1:] == tuple(1 + count for count in kept)

    def test_layers_have_their_own_metrics(self) -> None:
        kept = (100, 100, 80, 60)
        metrics = {0: SHIFT, 1: NORM, 2: NORM, 3: SHIFT}
        recipe = to_recipe(kept, sequence(196, 4), range(4), metrics=metrics, reducer=PRUNE, model="deit")
        assert recipe.metric == SHIFT
        assert [(drop.layer, drop.metric) for drop in recipe.layers] == [(0, None), (2, NORM), (3, None)]
        assert recipe.model == "deit"

    def test_a_schedule_without_drops_is_refused(self) -> None:
        with pytest.raises(UsageError):
            to_recipe((196,) * 12, sequence(196), range(12), metrics=METRICS, reducer=PRUNE)

    @given(st.lists(st.integers(200, 3136), min_size=3, max_size=3))
    def test_a_map_keeps_at_least_the_share_in_whole_lines(self, counts: list[int]) -> None:
        kept = tuple(sorted(counts, reverse=True))
        layout = pyramid()
        found = layer_drops(kept, layout, [0, 1, 2])
        grids = {layer: drop.keep_grid for layer, drop in found.items() if drop.keep_grid}
        dense = {site.layer: grid for site, grid in layout.grids()}
        arriving = {site.layer: grid for site, grid in layout.grids(grids)}
        for layer, grid in grids.items():
            assert all(left <= there for left, there in zip(grid, arriving[layer], strict=True))
            assert grid != arriving[layer]
            share, lines = kept[layer] / 3136, sum(dense[layer])
            # at least the requested share, if so much arrives, and at most one line of each kind more
            assert math.prod(grid) >= min(share * math.prod(dense[layer]) - 1e-6, math.prod(arriving[layer]) * 0.5)
            assert math.prod(grid) <= share * math.prod(dense[layer]) + lines


def sequence(tokens: int, blocks: int = 12) -> Layout:
    return Layout("timm_vit", 1, tokens, True, tuple(SiteInfo(f"blocks.{layer}", layer) for layer in range(blocks)))


def pyramid() -> Layout:
    """A map of 56x56, 28x28 behind the first site."""
    halving = Window("down", (2, 2), (2, 2))
    sites = (SiteInfo("a", 0), SiteInfo("b", 1, (halving,)), SiteInfo("c", 2))
    return Layout("resnet", 0, 3136, False, sites, map_size=(56, 56))
