"""Schedules: the best ones of an additive model, their neighbours, and their recipes. Plain numbers, no torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from repshift_cli.errors import UsageError
from repshift_cli.planning.layout import Grid, Layout
from repshift_cli.planning.recipe import ComponentSpec, LayerDrop, Recipe
from repshift_cli.search.additive import TINY, Additive, Kept, drops, levels

__all__ = ["Front", "Solution", "fit", "layer_drops", "neighbours", "on_tiles", "paper_schedule", "solve", "to_recipe"]

_Floats = npt.NDArray[np.float64]

_BINS = 400
_HALVINGS = 40
_MOST_STRETCH = 16.0

# ---------------------------------------------------------------------------------------------------------------------
# Dynamic programming


@dataclass(frozen=True)
class Solution:
    """A schedule with its predicted cost, a fraction of the dense one, and damage."""

    kept: Kept
    cost: float
    damage: float


@dataclass(frozen=True)
class _Row:
    """The best ways to one state, a level and a number of used sites: one way per bin of saved cost.

    Attributes:
        saved, damage: `[ways]`.
        origin: `[ways, 3]`, level, used sites and way of the state before.
    """

    saved: _Floats
    damage: _Floats
    origin: npt.NDArray[np.int64]


_State = tuple[int, int]
_Stage = dict[_State, _Row]


class Front:
    """The schedules with the least predicted damage, for every cost."""

    def __init__(self, steps: Sequence[int], stages: Sequence[_Stage]) -> None:
        self._levels = steps
        self._stages = stages

    def best(self, budget: float, max_sites: int | None = None) -> Solution | None:
        """The least harmful schedule within a budget and a number of sites; None if there is none."""
        need = 1.0 - budget - TINY
        ways = [way for way in self._ways() if way[1] >= need and (max_sites is None or way[2][1] <= max_sites)]
        return self._solution(min(ways, key=lambda way: (way[0], -way[1], *way[2:]))) if ways else None

    def cheapest(self) -> Solution:
        """The schedule that saves most."""
        return self._solution(max(self._ways(), key=lambda way: (way[1], way[2], -way[3])))

    def pareto(self) -> list[Solution]:
        """The Pareto front of cost and damage, the most expensive first."""
        found: list[_Way] = []
        for way in sorted(self._ways(), key=lambda way: (-way[1], way[0])):
            if not found or way[0] < found[-1][0]:
                found.append(way)
        return [self._solution(way) for way in reversed(found)]

    def _ways(self) -> Iterator[_Way]:
        for state, row in self._stages[-1].items():
            for way, (damage, saved) in enumerate(zip(row.damage.tolist(), row.saved.tolist(), strict=True)):
                yield damage, saved, state, way

    def _solution(self, end: _Way) -> Solution:
        damage, saved, state, way = end
        kept: list[int] = []
        for stage in reversed(self._stages[1:]):
            kept.append(self._levels[state[0]])
            level, used, way = stage[state].origin[way].tolist()
            state = (level, used)
        return Solution(tuple(reversed(kept)), 1.0 - saved, damage)


_Way = tuple[float, float, _State, int]
"""A way to the last stage: damage, saved cost, state and the index of the way."""


def solve(
    model: Additive, steps: Sequence[int] | None = None, max_sites: int | None = None, width: float | None = None
) -> Front:
    """Find the best schedule for every cost by dynamic programming.

    Of the ways to a state whose savings are in the same bin only the least harmful one is kept, with its exact savings.
    So costs are exact, and the damage is minimal up to `width` of budget per site.

    Args:
        steps: the possible token counts, falling, all tokens first; None for `levels`.
        max_sites: the most sites that may drop tokens; `Front.best` can then be asked for any number up to it.
        width: of a bin, as a fraction of the dense cost; None for 1/400 of the largest saving.
    """
    chosen = tuple(steps) if steps is not None else levels(model.tokens)
    if width is None:
        width = max(math.fsum(model.gain(site, chosen[-1]) for site in range(model.sites)) / _BINS, TINY)
    stages: list[_Stage] = [{(0, 0): _Row(np.zeros(1), np.zeros(1), np.zeros((1, 3), dtype=np.int64))}]
    for site in range(model.sites):
        stages.append(_advance(model, chosen, site, stages[-1], width=width, max_sites=max_sites))
    return Front(chosen, stages)


def _advance(
    model: Additive, steps: Sequence[int], site: int, before: _Stage, *, width: float, max_sites: int | None
) -> _Stage:
    """The states after a site."""
    arriving: dict[_State, list[_Row]] = {}
    for (level, used), row in before.items():
        for after in range(level, len(steps)):
            dropped = steps[level] - steps[after]
            use = used if not dropped or max_sites is None else used + 1
            if max_sites is not None and use > max_sites:
                continue
            if dropped and not model.least_drop <= dropped <= model.most(steps[level]):
                continue
            harm = model.step(site, steps[level], steps[after])
            if not math.isfinite(harm):
                continue
            saved = row.saved + (model.gain(site, steps[after]) - (model.site_cost if dropped else 0.0))
            ways = np.arange(len(saved))
            origin = np.stack([np.full_like(ways, level), np.full_like(ways, used), ways], axis=1)
            arriving.setdefault((after, use), []).append(_Row(saved, row.damage + harm, origin))
    return {state: _thin(rows, width) for state, rows in arriving.items()}


def _thin(rows: Sequence[_Row], width: float) -> _Row:
    """The least harmful way in each bin of saved cost."""
    saved = np.concatenate([row.saved for row in rows])
    damage = np.concatenate([row.damage for row in rows])
    bins = np.floor(saved / width + TINY).astype(np.int64)
    order = np.lexsort((-saved, damage, bins))
    first = np.ones(len(order), dtype=bool)
    first[1:] = bins[order][1:] != bins[order][:-1]
    stay = order[first]
    return _Row(saved[stay], damage[stay], np.concatenate([row.origin for row in rows])[stay])


# ---------------------------------------------------------------------------------------------------------------------
# Scaling to a budget, and neighbours


def fit(kept: Kept, model: Additive, budget: float) -> Kept | None:
    """Scale all drops of a schedule by one factor, so that it costs just at most `budget`.

    Sites that would drop very few tokens drop none.

    Returns:
        None if no factor is enough, or if nothing is dropped.
    """
    shares = _shares(kept, model.tokens)
    while True:
        fitted = _scaled(shares, model, budget)
        if fitted is None:
            return None
        dropped = drops(fitted, model.tokens)
        small = [site for site, count in enumerate(dropped) if 0 < count < model.least_drop]
        if not small:
            return fitted if fitted[-1] < model.tokens else None
        # one site at a time: the others take over its tokens, which may be enough for the next small one
        without = min(small, key=lambda site: (dropped[site], -site))
        shares = [1.0 if site == without else share for site, share in enumerate(shares)]
        shares = _shares(_from_shares(shares, model), model.tokens)


def _scaled(shares: Sequence[float], model: Additive, budget: float) -> Kept | None:
    """The shares raised to the smallest power that is enough; None if there is none."""

    def scaled(power: float) -> Kept:
        return _from_shares([share**power for share in shares], model)

    low, high = 0.0, _MOST_STRETCH
    if model.cost(scaled(high)) > budget + TINY:
        return None
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if model.cost(scaled(middle)) <= budget + TINY else (middle, high)
    return scaled(high)


def _shares(kept: Kept, tokens: int) -> list[float]:
    """Kept share of the arriving tokens at each site."""
    return [after / before for before, after in zip((tokens, *kept), kept, strict=False)]


def _from_shares(shares: Sequence[float], model: Additive) -> Kept:
    """The rounded token counts of shares, within the limits of the model."""
    exact, before, kept = float(model.tokens), model.tokens, []
    for share in shares:
        exact *= share
        # a site that keeps all tokens must not drop one because of earlier rounding
        wanted = before if share == 1.0 else min(before, round(exact))
        before = max(wanted, model.least, before - model.most(before))
        kept.append(before)
    return tuple(kept)


def neighbours(kept: Kept, model: Additive, budget: float, step: int) -> list[Kept]:
    """Schedules that differ by one change and are scaled to the budget, by predicted damage.

    A change moves `step` tokens, or all tokens of a site, to another site, or removes or adds a site.
    """
    found: dict[Kept, float] = {}
    for dropped in _changes(drops(kept, model.tokens), step, model.least_drop, model.worthwhile):
        left, changed = model.tokens, []
        for count in dropped:
            left = max(left - count, model.least)
            changed.append(left)
        fitted = fit(tuple(changed), model, budget)
        if fitted is not None and fitted != kept and model.possible(fitted):
            found.setdefault(fitted, model.damage(fitted))
    return sorted(found, key=lambda schedule: (found[schedule], schedule))


def _changes(dropped: Sequence[int], step: int, least: int, targets: Sequence[int]) -> Iterator[list[int]]:
    used = [site for site, count in enumerate(dropped) if count]
    for source in used:
        part = step if dropped[source] - step >= least else dropped[source]
        for target in targets:
            for amount in sorted({part, dropped[source]} if abs(target - source) == 1 else {part}):
                changed = list(dropped)
                changed[source] -= amount
                changed[target] += amount
                if target != source and changed[target] >= least:
                    yield changed
        if len(used) > 1:
            yield [0 if site == source else count for site, count in enumerate(dropped)]
    for target in targets:
        yield [count + (max(step, least) if site == target else 0) for site, count in enumerate(dropped)]


def on_tiles(kept: Kept, tokens: int, prefix: int, multiple: int) -> Kept:
    """Round the tokens after each site, `prefix` tokens included, down to a multiple, so that the cost cannot rise.

    Sites that keep all tokens, or fewer than `multiple`, are unchanged.
    """
    return tuple(
        count
        if count >= tokens or count + prefix < multiple
        else max((count + prefix) // multiple * multiple - prefix, 1)
        for count in kept
    )


# ---------------------------------------------------------------------------------------------------------------------
# Recipes


def paper_schedule(sites: int, tokens: int, drop_ratios: Mapping[int, float]) -> Kept:
    """The schedule of a recipe that drops shares of the arriving tokens, by site; rounded as in `plan.resolve`."""
    left, kept = tokens, []
    for site in range(sites):
        left -= int(drop_ratios.get(site, 0.0) * left)
        kept.append(left)
    return tuple(kept)


def layer_drops(kept: Kept, layout: Layout, layers: Sequence[int]) -> dict[int, LayerDrop]:
    """The entry in a recipe of each of `layers`, in order, that drops tokens."""
    if layout.map_size is not None:
        return _grids(kept, layout, layers)
    dropped = drops(kept, layout.patch_tokens)
    return {
        layer: LayerDrop(layer=layer, keep_tokens=left)
        for layer, left, count in zip(layers, kept, dropped, strict=True)
        if count
    }


def _grids(kept: Kept, layout: Layout, layers: Sequence[int]) -> dict[int, LayerDrop]:
    """The smallest grids of whole lines that hold at least the shares of the map."""
    dense = {site.layer: grid for site, grid in layout.grids()}
    left: dict[int, Grid] = {}
    before = layout.patch_tokens
    for layer, count in zip(layers, kept, strict=True):
        if count == before:
            continue
        before = count
        rows, columns = dense[layer]
        share = count / layout.patch_tokens
        arriving = next(grid for site, grid in layout.grids(left) if site.layer == layer)
        tall = min(max(1, math.ceil(rows * math.sqrt(share) - TINY)), arriving[0])
        wide = min(max(1, math.ceil(share * rows * columns / tall - TINY)), arriving[1])
        if (tall, wide) != arriving:
            left[layer] = (tall, wide)
    return {layer: LayerDrop(layer=layer, keep_grid=grid) for layer, grid in left.items()}


def to_recipe(
    kept: Kept,
    layout: Layout,
    layers: Sequence[int],
    *,
    metrics: Mapping[int, ComponentSpec],
    reducer: ComponentSpec,
    model: str | None = None,
    description: str | None = None,
) -> Recipe:
    """The recipe of a schedule.

    Args:
        layers: the layers of the schedule, in order.
        metrics: by layer. The most common one becomes the metric of the recipe; other layers get their own.

    Raises:
        UsageError: the schedule drops no token.
    """
    chosen = layer_drops(kept, layout, layers)
    if not chosen:
        raise UsageError("the schedule drops no token")
    texts = Counter(metrics[layer].model_dump_json() for layer in chosen)
    common = ComponentSpec.model_validate_json(texts.most_common(1)[0][0])
    rows = [
        drop if metrics[layer] == common else drop.model_copy(update={"metric": metrics[layer]})
        for layer, drop in chosen.items()
    ]
    return Recipe(version=1, description=description, model=model, metric=common, reducer=reducer, layers=tuple(rows))
