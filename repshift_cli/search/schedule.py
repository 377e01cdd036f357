"""Schedules: the best ones of an additive model, their neighbours, and their recipes. Plain numbers, no torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from repshift_cli.errors import UsageError
from repshift_cli.planning.layout import Grid, Layout
from repshift_cli.planning.recipe import ComponentSpec, LastBlock, LayerDrop, Recipe
from repshift_cli.search.additive import TINY, Additive, Kept, drops, levels

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]
_State = tuple[int, int]

_BINS = 400
_HALVINGS = 40
_MOST_STRETCH = 16.0


@dataclass(frozen=True)
class Solution:
    """A schedule with its predicted cost, a fraction of the dense one, and damage."""

    kept: Kept
    cost: float
    damage: float


@dataclass(frozen=True)
class Front:
    """Schedules with the least predicted damage for their cost.

    Attributes:
        saved, damage: `[n]`; saved cost as a fraction of the dense cost.
        kept: `[n, sites]`.
        used: `[n]`, number of sites that drop tokens, if `solve` counts them.
    """

    saved: _Floats
    damage: _Floats
    kept: _Ints
    used: _Ints

    def best(self, budget: float, max_sites: int | None = None) -> Solution | None:
        """The least harmful schedule within a budget and a number of sites; None if there is none."""
        fits = self.saved >= 1.0 - budget - TINY
        if max_sites is not None:
            fits &= self.used <= max_sites
        order = np.lexsort((-self.saved, self.damage))
        fitting = order[fits[order]]
        return self._solution(fitting[0]) if len(fitting) else None

    def pareto(self) -> list[Solution]:
        """The Pareto front of cost and damage, the most expensive first."""
        chosen: list[np.intp] = []
        for index in np.lexsort((self.damage, -self.saved)):
            if not chosen or self.damage[index] < self.damage[chosen[-1]]:
                chosen.append(index)
        return [self._solution(index) for index in reversed(chosen)]

    def _solution(self, index: np.intp) -> Solution:
        return Solution(tuple(self.kept[index].tolist()), 1.0 - float(self.saved[index]), float(self.damage[index]))


def solve(
    model: Additive, steps: Sequence[int] | None = None, max_sites: int | None = None, width: float | None = None
) -> Front:
    """Find the best schedule for every cost by dynamic programming.

    A state is a token count and the number of used sites. Of the schedules that lead to a state and whose savings are
    in the same bin only the least harmful one is kept, with its exact savings. So costs are exact, and the damage is
    minimal up to `width` of budget per site.

    Args:
        steps: the possible token counts, falling, all tokens first; None for `levels`.
        max_sites: the most sites that may drop tokens; `Front.best` then takes any number up to it.
        width: of a bin, as a fraction of the dense cost; None for 1/400 of the largest saving.
    """
    counts = tuple(steps) if steps is not None else levels(model.tokens)
    if width is None:
        width = max(math.fsum(model.gain(site, counts[-1]) for site in range(model.sites)) / _BINS, TINY)
    nothing = Front(np.zeros(1), np.zeros(1), np.zeros((1, 0), dtype=np.int64), np.zeros(1, dtype=np.int64))
    states = {(0, 0): nothing}
    for site in range(model.sites):
        states = _advance(model, counts, site, states, max_sites)
        states = {state: _least_harmful(front, width) for state, front in states.items()}
    return _joined([states[state] for state in sorted(states)])


def _advance(
    model: Additive, counts: Sequence[int], site: int, states: Mapping[_State, Front], max_sites: int | None
) -> dict[_State, Front]:
    arriving: dict[_State, list[Front]] = {}
    for (level, used), front in states.items():
        for after in range(level, len(counts)):
            dropped = counts[level] - counts[after]
            now_used = used + 1 if dropped and max_sites is not None else used
            if max_sites is not None and now_used > max_sites:
                continue
            if dropped and not model.least_drop <= dropped <= model.most(counts[level]):
                continue
            harm = model.step(site, counts[level], counts[after])
            if not math.isfinite(harm):
                continue
            saved = front.saved + (model.gain(site, counts[after]) - (model.site_cost if dropped else 0.0))
            kept = np.pad(front.kept, ((0, 0), (0, 1)), constant_values=counts[after])
            extended = Front(saved, front.damage + harm, kept, np.full_like(front.used, now_used))
            arriving.setdefault((after, now_used), []).append(extended)
    return {state: _joined(fronts) for state, fronts in arriving.items()}


def _joined(fronts: Sequence[Front]) -> Front:
    return Front(*(np.concatenate([getattr(front, field.name) for front in fronts]) for field in fields(Front)))


def _least_harmful(front: Front, width: float) -> Front:
    bins = np.floor(front.saved / width + TINY).astype(np.int64)
    order = np.lexsort((-front.saved, front.damage, bins))
    best = order[np.unique(bins[order], return_index=True)[1]]
    return Front(front.saved[best], front.damage[best], front.kept[best], front.used[best])


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


def paper_schedule(sites: int, tokens: int, drop_ratios: Mapping[int, float]) -> Kept:
    """The schedule of a recipe that drops shares of the arriving tokens, by site; rounded as in `planning.resolve`."""
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
    restore: bool = False,
    last_block: LastBlock | None = None,
) -> Recipe:
    """The recipe of a schedule; raises UsageError if it drops no token.

    Args:
        metrics: by layer. The most common one becomes the metric of the recipe; other layers get their own.
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
    return Recipe(
        version=1,
        description=description,
        model=model,
        metric=common,
        reducer=reducer,
        restore=restore,
        last_block=last_block,
        layers=tuple(rows),
    )
