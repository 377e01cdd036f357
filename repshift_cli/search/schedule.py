"""Schedules under a budget: how many tokens are left after each site, what that costs, and what it harms.

A schedule is a tuple `kept`: for each site in order, how many of the dense patch tokens are left behind it, never more
than behind the site before. Tokens go where the number falls. For feature maps it is the share of the positions that
counts, in units of the map at the first site.

Plain numbers only; what they are for a given model is measured elsewhere (`search.py`).
"""

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

__all__ = [
    "Front",
    "Solution",
    "fit",
    "layer_drops",
    "neighbours",
    "on_tiles",
    "paper_schedule",
    "solve",
    "to_recipe",
]


_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]


_BINS = 400
_HALVINGS = 40
_MOST_STRETCH = 16.0


# ---------------------------------------------------------------------------------------------------------------------
# The additive model


# ---------------------------------------------------------------------------------------------------------------------
# Dynamic programming


@dataclass(frozen=True)
class Solution:
    """A schedule with what the additive model says of it; `cost` is a fraction of the dense one."""

    kept: Kept
    cost: float
    damage: float


@dataclass(frozen=True)
class _Row:
    """The best ways to one state (a level, a number of sites used): one per bin of what is saved.

    Attributes:
        saved, damage: `[ways]`, what each saves and harms.
        level, used, way: `[ways]`, the state that each came from, and which of its ways.
    """

    saved: _Floats
    damage: _Floats
    level: _Ints
    used: _Ints
    way: _Ints


_State = tuple[int, int]
_Stage = dict[_State, _Row]


class Front:
    """All that dynamic programming found: for every cost the schedule with the least predicted damage."""

    def __init__(self, model: Additive, steps: Sequence[int], stages: Sequence[_Stage]) -> None:
        self._model = model
        self._levels = steps
        self._stages = stages

    def best(self, budget: float, max_sites: int | None = None) -> Solution | None:
        """The least harmful schedule that costs no more than `budget`; None where there is none."""
        need = 1.0 - budget - TINY
        found: tuple[float, float, _State, int] | None = None
        for state, row in self._last(max_sites):
            enough = np.flatnonzero(row.saved >= need)
            if not len(enough):
                continue
            way = int(enough[np.lexsort((-row.saved[enough], row.damage[enough]))[0]])
            entry = (float(row.damage[way]), -float(row.saved[way]), state, way)
            found = entry if found is None else min(found, entry)
        return None if found is None else self._solution(found[2], found[3])

    def cheapest(self) -> Solution:
        """The schedule that saves most, whatever it harms."""
        ends = ((float(row.saved.max()), state, int(row.saved.argmax())) for state, row in self._last(None))
        _, state, way = max(ends)
        return self._solution(state, way)

    def pareto(self) -> list[Solution]:
        """Schedules that no other beats in both cost and damage, the dearest first."""
        ends = [
            (float(row.saved[way]), float(row.damage[way]), state, way)
            for state, row in self._last(None)
            for way in range(len(row.saved))
        ]
        found: list[tuple[float, float, _State, int]] = []
        for end in sorted(ends, key=lambda end: (-end[0], end[1])):
            if not found or end[1] < found[-1][1]:
                found.append(end)
        return [self._solution(state, way) for _, _, state, way in reversed(found)]

    def _last(self, max_sites: int | None) -> Iterator[tuple[_State, _Row]]:
        for state, row in self._stages[-1].items():
            if max_sites is None or state[1] <= max_sites:
                yield state, row

    def _solution(self, state: _State, way: int) -> Solution:
        row = self._stages[-1][state]
        saved, damage = float(row.saved[way]), float(row.damage[way])
        kept: list[int] = []
        for stage in reversed(self._stages[1:]):
            kept.append(self._levels[state[0]])
            row = stage[state]
            state, way = (int(row.level[way]), int(row.used[way])), int(row.way[way])
        return Solution(tuple(reversed(kept)), 1.0 - saved, damage)


def solve(
    model: Additive, steps: Sequence[int] | None = None, max_sites: int | None = None, width: float | None = None
) -> Front:
    """Find the best schedule for every cost.

    Ways to one state whose savings lie within `width` of each other are one: the least harmful stays, with its exact
    savings. So costs are exact, and the damage is the least up to `width` of budget per site.

    Args:
        steps: numbers of tokens to choose from, falling, all tokens first; None for `levels`.
        max_sites: how many sites may drop tokens; with it `Front.best` can be asked for any number up to it.
        width: as a fraction of the dense cost; None for a 400th of the most that can be saved.
    """
    chosen = tuple(steps) if steps is not None else levels(model.tokens)
    if width is None:
        width = max(math.fsum(model.gain(site, chosen[-1]) for site in range(model.sites)) / _BINS, TINY)
    zero, none = np.zeros(1), np.zeros(1, dtype=np.int64)
    stages: list[_Stage] = [{(0, 0): _Row(zero, zero, none, none, none)}]
    for site in range(model.sites):
        stages.append(_advance(model, chosen, site, stages[-1], width=width, max_sites=max_sites))
    return Front(model, chosen, stages)


def _advance(
    model: Additive, steps: Sequence[int], site: int, before: _Stage, *, width: float, max_sites: int | None
) -> _Stage:
    """The states behind a site, given those before it."""
    arriving: dict[_State, list[_Row]] = {}
    for (level, used), row in before.items():
        for after in range(level, len(steps)):
            dropped = steps[level] - steps[after]
            use = used if after == level or max_sites is None else used + 1
            if max_sites is not None and use > max_sites:
                continue
            if after != level and not model.least_drop <= dropped <= model.most(steps[level]):
                continue
            harm = model.step(site, steps[level], steps[after])
            if not math.isfinite(harm):
                continue
            saved = row.saved + (model.gain(site, steps[after]) - (model.site_cost if dropped else 0.0))
            origin = np.full(len(saved), level, dtype=np.int64), np.full(len(saved), used, dtype=np.int64)
            moved = _Row(saved, row.damage + harm, *origin, np.arange(len(saved), dtype=np.int64))
            arriving.setdefault((after, use), []).append(moved)
    return {state: _thin(rows, width) for state, rows in arriving.items()}


def _thin(rows: Sequence[_Row], width: float) -> _Row:
    """Of all ways to a state, the least harmful one in each bin of what is saved."""
    saved = np.concatenate([row.saved for row in rows])
    damage = np.concatenate([row.damage for row in rows])
    bins = np.floor(saved / width + TINY).astype(np.int64)
    order = np.lexsort((-saved, damage, bins))
    first = np.ones(len(order), dtype=bool)
    first[1:] = bins[order][1:] != bins[order][:-1]
    stay = order[first]
    origin = [np.concatenate([getattr(row, name) for row in rows])[stay] for name in ("level", "used", "way")]
    return _Row(saved[stay], damage[stay], *origin)


# ---------------------------------------------------------------------------------------------------------------------
# Back onto the budget, and steps to the side


def fit(kept: Kept, model: Additive, budget: float) -> Kept | None:
    """The schedule with all its drops stretched or shrunk by one factor, so that it just costs no more than `budget`.

    Sites that would drop next to nothing drop nothing.

    Returns:
        None where no factor is enough, or nothing is left to stretch.
    """
    while True:
        fitted = _stretched(kept, model, budget)
        if fitted is None:
            return None
        small = [site for site, gone in enumerate(drops(fitted, model.tokens)) if 0 < gone < model.least_drop]
        if not small:
            return fitted if fitted[-1] < model.tokens else None
        # one at a time: what it dropped then falls to the others, which may be enough for the next one
        without = min(small, key=lambda site: (drops(fitted, model.tokens)[site], -site))
        kept = _from_shares(
            [1.0 if site == without else share for site, share in enumerate(_shares(kept, model.tokens))], model
        )


def _stretched(kept: Kept, model: Additive, budget: float) -> Kept | None:
    shares = _shares(kept, model.tokens)

    def scaled(factor: float) -> Kept:
        return _from_shares([share**factor for share in shares], model)

    low, high = 0.0, _MOST_STRETCH
    if model.cost(scaled(high)) > budget + TINY:
        return None
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if model.cost(scaled(middle)) <= budget + TINY:
            high = middle
        else:
            low = middle
    return scaled(high)


def _shares(kept: Kept, tokens: int) -> list[float]:
    """Of what arrives at each site, the share that stays."""
    return [after / before for before, after in zip((tokens, *kept), kept, strict=False)]


def _from_shares(shares: Sequence[float], model: Additive) -> Kept:
    """As many tokens as the shares say, rounded, within what is possible."""
    exact, before, kept = float(model.tokens), model.tokens, []
    for share in shares:
        exact *= share
        # a site that keeps all must not drop one because of the rounding before it
        wanted = before if share == 1.0 else min(before, round(exact))
        before = max(wanted, model.least, before - model.most(before))
        kept.append(before)
    return tuple(kept)


def neighbours(kept: Kept, model: Additive, budget: float, step: int) -> list[Kept]:
    """Schedules one change away, back on the budget, the least harmful by prediction first.

    A change moves `step` tokens, or all that a site drops, from one site to another (also to one that drops none), or
    takes a site out, or adds one.
    """
    found: dict[Kept, float] = {}
    for gone in _changes(drops(kept, model.tokens), step, model.least_drop, model.worthwhile):
        left, changed = model.tokens, []
        for count in gone:
            left = max(left - count, model.least)
            changed.append(left)
        fitted = fit(tuple(changed), model, budget)
        if fitted is not None and fitted != kept and model.possible(fitted):
            found.setdefault(fitted, model.damage(fitted))
    return sorted(found, key=lambda schedule: (found[schedule], schedule))


def _changes(gone: Sequence[int], step: int, least: int, targets: Sequence[int]) -> Iterator[list[int]]:
    used = [site for site, count in enumerate(gone) if count]
    for source in used:
        part = step if gone[source] - step >= least else gone[source]
        for target in targets:
            for amount in sorted({part, gone[source]} if abs(target - source) == 1 else {part}):
                changed = list(gone)
                changed[source] -= amount
                changed[target] += amount
                if target != source and changed[target] >= least:
                    yield changed
        if len(used) > 1:
            yield [0 if site == source else count for site, count in enumerate(gone)]
    for target in targets:
        yield [count + (max(step, least) if site == target else 0) for site, count in enumerate(gone)]


def on_tiles(kept: Kept, tokens: int, prefix: int, multiple: int) -> Kept:
    """The schedule with all tokens behind each site, `prefix` among them, brought down to a multiple of `multiple`.

    Down, so that it costs no more than before. A site behind which all tokens are left, or fewer than one multiple,
    stays as it is.
    """
    return tuple(
        count if count >= tokens or count + prefix < multiple else _tile_below(count, prefix, multiple)
        for count in kept
    )


def _tile_below(count: int, prefix: int, multiple: int) -> int:
    return max((count + prefix) // multiple * multiple - prefix, 1)


def paper_schedule(sites: int, tokens: int, drop_ratios: Mapping[int, float]) -> Kept:
    """The schedule of a recipe that drops shares of what arrives, by site: as `plan.resolve`, rounded down."""
    left, kept = tokens, []
    for site in range(sites):
        left -= int(drop_ratios.get(site, 0.0) * left)
        kept.append(left)
    return tuple(kept)


# ---------------------------------------------------------------------------------------------------------------------
# Recipes


def layer_drops(kept: Kept, layout: Layout, layers: Sequence[int]) -> dict[int, LayerDrop]:
    """What a recipe says of each layer at which a schedule lets tokens go.

    Args:
        kept: for each of `layers`.
        layers: of the sites that the schedule speaks of, in order.
    """
    if layout.map_size is not None:
        return _grids(kept, layout, layers)
    gone = drops(kept, layout.patch_tokens)
    return {
        layer: LayerDrop(layer=layer, keep_tokens=left)
        for layer, left, dropped in zip(layers, kept, gone, strict=True)
        if dropped
    }


def _grids(kept: Kept, layout: Layout, layers: Sequence[int]) -> dict[int, LayerDrop]:
    """Rows and columns that hold at least the share of the map, as near to it as whole lines allow."""
    dense = {site.layer: grid for site, grid in layout.grids()}
    left: dict[int, Grid] = {}
    before = layout.patch_tokens
    for layer, count in zip(layers, kept, strict=True):
        if count == before:
            continue
        before = count
        rows, columns = dense[layer]
        share = count / layout.patch_tokens
        there = next(grid for site, grid in layout.grids(left) if site.layer == layer)
        tall = min(max(1, math.ceil(rows * math.sqrt(share) - TINY)), there[0])
        wide = min(max(1, math.ceil(share * rows * columns / tall - TINY)), there[1])
        if (tall, wide) != there:
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
    """The recipe that carries out a schedule.

    Args:
        layers: of the sites that the schedule speaks of, in order.
        metrics: by layer, for all that drop tokens; what most of them have becomes the recipe's, the others their own.

    Raises:
        UsageError: the schedule lets nothing go.
    """
    chosen = layer_drops(kept, layout, layers)
    if not chosen:
        raise UsageError("the schedule lets no token go")
    texts = Counter(metrics[layer].model_dump_json() for layer in chosen)
    common = ComponentSpec.model_validate_json(texts.most_common(1)[0][0])
    rows = [
        drop if metrics[layer] == common else drop.model_copy(update={"metric": metrics[layer]})
        for layer, drop in chosen.items()
    ]
    return Recipe(version=1, description=description, model=model, metric=common, reducer=reducer, layers=tuple(rows))
