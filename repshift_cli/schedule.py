"""Schedules under a budget: how many tokens are left after each site, what that costs, and what it harms.

A schedule is a tuple `kept`: for each site in order, how many of the dense patch tokens are left behind it, never more
than behind the site before. Tokens go where the number falls. For feature maps it is the share of the positions that
counts, in units of the map at the first site.

Plain numbers only; what they are for a given model is measured elsewhere (`search.py`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from repshift_cli.errors import UsageError
from repshift_cli.plan import Grid, Layout
from repshift_cli.recipe import LayerDrop, Part, Recipe, nearest

__all__ = [
    "TARGETS",
    "Additive",
    "Curve",
    "Front",
    "Kept",
    "Solution",
    "Target",
    "drops",
    "fit",
    "layer_drops",
    "levels",
    "neighbours",
    "on_tiles",
    "paper_schedule",
    "solve",
    "to_recipe",
]

Kept = tuple[int, ...]
"""Patch tokens that are left after each site, never rising."""

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]

TARGETS: dict[str, str] = {
    "macs": "multiply-accumulates, as a fraction of the dense model's",
    "latency": "time of a batch, as a fraction of the dense model's, measured here",
    "agreement": "least share of unchanged predictions",
    "max-drop": "most points of top-1 that may be lost, where there are labels",
}
"""What can be asked for, in words for people."""

_LEVEL_STEP = 0.05
_LOWEST_SHARE = 0.1
"""Of the tokens, the steps that the first solution takes, and the least that is left: metrics know little below."""

_LEAST_DROP_SHARE = 50
"""A site that drops fewer than one of so many tokens costs more in scoring than it saves."""

_LEAST_GAIN = 0.002
"""Of a dense pass: what scoring and gathering at a site take (2% of a layer, and of 12 layers)."""

_BINS = 400
_MOST_POWER, _LEAST_POWER = 4.0, 0.5
_TINY = 1e-9
_HALVINGS = 40
_MOST_STRETCH = 16.0


@dataclass(frozen=True)
class Target:
    """What a search is to reach.

    Attributes:
        kind: one of `TARGETS`.
        value: fraction of the dense model, share of predictions, or points of top-1.
    """

    kind: str
    value: float

    def __post_init__(self) -> None:
        if self.kind not in TARGETS:
            raise UsageError(f"unknown target {self.kind!r}", nearest(self.kind, TARGETS) + _allowed())
        most = 100.0 if self.kind == "max-drop" else 1.0
        least_is_fine, most_is_fine = self.kind == "max-drop", self.kind == "agreement"
        inside = 0 < self.value < most or (self.value == 0 and least_is_fine) or (self.value == most and most_is_fine)
        if not inside:
            wanted = {"max-drop": "0 points or more, and less than 100", "agreement": "above 0, and at most 1"}.get(
                self.kind, "between 0 and 1, both excluded"
            )
            raise UsageError(f"the target {self.kind}={self.value:g} cannot be", f"It must be {wanted}.")

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read `macs=0.65` and the like.

        Raises:
            UsageError: it has another form, names no target, or a value out of range.
        """
        kind, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise UsageError(f"a target has the form kind=value, not {text!r}", _allowed())
        try:
            number = float(value)
        except ValueError:
            raise UsageError(f"the target {text!r} has no number after the =", _allowed()) from None
        return cls(kind, number)

    @property
    def limits_cost(self) -> bool:
        """Whether the cost is given and the quality sought, rather than the other way round."""
        return self.kind in ("macs", "latency")

    def __str__(self) -> str:
        return f"{self.kind}={self.value:.12g}"


def _allowed() -> str:
    return (
        "Possible are macs=0.65, latency=0.6, agreement=0.99 and max-drop=0.5 ("
        + "; ".join(f"{kind}: {words}" for kind, words in TARGETS.items())
        + ")."
    )


# ---------------------------------------------------------------------------------------------------------------------
# The additive model


@dataclass(frozen=True)
class Additive:
    """What a schedule costs and harms, as sums over its sites.

    Attributes:
        tokens: patch tokens of the dense model.
        sites: how many there are.
        gain: `(site, kept)`: what is saved between this site and the next one when so many tokens are left, as a
            fraction of the dense cost; 0 for all tokens, never falling as fewer are kept.
        harm: `(site, kept)`: distance from the dense model when all that go, go at this site; 0 for all tokens, never
            falling as fewer are kept.
        most: `(arriving)`: how many of so many patch tokens can go at one site.
        site_cost: what dropping at one site costs in itself, as a fraction of the dense cost.
    """

    tokens: int
    sites: int
    gain: Callable[[int, int], float]
    harm: Callable[[int, int], float]
    most: Callable[[int], int] = lambda arriving: arriving - 1
    site_cost: float = 0.0

    @property
    def least(self) -> int:
        """The fewest tokens that may be left."""
        return max(1, math.ceil(_LOWEST_SHARE * self.tokens))

    @property
    def least_drop(self) -> int:
        """The fewest tokens that are worth a site."""
        return max(1, -(-self.tokens // _LEAST_DROP_SHARE))

    @property
    def worthwhile(self) -> tuple[int, ...]:
        """The sites behind which fewer tokens save something."""
        return tuple(site for site in range(self.sites) if self.gain(site, self.least) > _LEAST_GAIN)

    def cost(self, kept: Kept) -> float:
        """Of the schedule, as a fraction of the dense cost."""
        used = sum(dropped > 0 for dropped in drops(kept, self.tokens))
        return 1.0 - math.fsum(self.gain(site, count) for site, count in enumerate(kept)) + used * self.site_cost

    def damage(self, kept: Kept) -> float:
        """Predicted distance of the schedule from the dense model."""
        pairs = zip((self.tokens, *kept), kept, strict=False)
        return math.fsum(self.step(site, before, after) for site, (before, after) in enumerate(pairs))

    def step(self, site: int, before: int, after: int) -> float:
        """What it harms that at this site so many tokens become so many."""
        if after >= before:
            return 0.0
        harm = self.harm(site, after)
        return max(0.0, harm - self.harm(site, before)) if math.isfinite(harm) else math.inf

    def possible(self, kept: Kept) -> bool:
        """Whether no site drops more than can go there, and enough is left in the end."""
        pairs = zip((self.tokens, *kept), kept, strict=False)
        return kept[-1] >= self.least and all(0 <= before - after <= self.most(before) for before, after in pairs)


@dataclass(frozen=True)
class Curve:
    """How the distance grows with the tokens that go at one site: through measured points, as powers between them.

    Attributes:
        tokens: patch tokens of the dense model.
        points: `(kept, distance)`; made monotone where chance has it fall as more go.
    """

    tokens: int
    points: tuple[tuple[int, float], ...]
    _steps: tuple[tuple[int, float], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        steps: list[tuple[int, float]] = []
        for kept, distance in sorted(self.points, reverse=True):
            if kept < self.tokens:
                steps.append((self.tokens - kept, max(distance, _TINY, steps[-1][1] if steps else 0.0)))
        object.__setattr__(self, "_steps", tuple(steps))

    def __call__(self, kept: int) -> float:
        """The distance when so many are kept; 0 for all, infinite where nothing was measured at all."""
        gone = self.tokens - kept
        if gone <= 0:
            return 0.0
        if not self._steps:
            return math.inf
        if len(self._steps) == 1:
            return self._steps[0][1] * gone / self._steps[0][0]
        # the last segment that begins before, so that both ends go on as the segment next to them does
        first = max(0, min(sum(known <= gone for known, _ in self._steps) - 1, len(self._steps) - 2))
        (low, near), (high, far) = self._steps[first], self._steps[first + 1]
        power = math.log(far / near) / math.log(high / low)
        if gone < low or gone > high:
            power = min(max(power, _LEAST_POWER), _MOST_POWER)
        anchor, value = (high, far) if gone > high else (low, near)
        return value * (gone / anchor) ** power


def drops(kept: Kept, tokens: int) -> tuple[int, ...]:
    """How many tokens go at each site."""
    return tuple(before - after for before, after in zip((tokens, *kept), kept, strict=False))


def levels(tokens: int) -> tuple[int, ...]:
    """Numbers of tokens among which the first solution chooses: all, then ever fewer in equal steps."""
    count = round((1 - _LOWEST_SHARE) / _LEVEL_STEP)
    least = max(1, math.ceil(_LOWEST_SHARE * tokens))
    shares = (1 - _LEVEL_STEP * index for index in range(count + 1))
    return tuple(dict.fromkeys(max(least, round(share * tokens)) for share in shares))


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
        need = 1.0 - budget - _TINY
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
        width = max(math.fsum(model.gain(site, chosen[-1]) for site in range(model.sites)) / _BINS, _TINY)
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
    bins = np.floor(saved / width + _TINY).astype(np.int64)
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
    if model.cost(scaled(high)) > budget + _TINY:
        return None
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if model.cost(scaled(middle)) <= budget + _TINY:
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
        tall = min(max(1, math.ceil(rows * math.sqrt(share) - _TINY)), there[0])
        wide = min(max(1, math.ceil(share * rows * columns / tall - _TINY)), there[1])
        if (tall, wide) != there:
            left[layer] = (tall, wide)
    return {layer: LayerDrop(layer=layer, keep_grid=grid) for layer, grid in left.items()}


def to_recipe(
    kept: Kept,
    layout: Layout,
    layers: Sequence[int],
    *,
    metrics: Mapping[int, Part],
    reducer: Part,
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
    common = Part.model_validate_json(texts.most_common(1)[0][0])
    rows = [
        drop if metrics[layer] == common else drop.model_copy(update={"metric": metrics[layer]})
        for layer, drop in chosen.items()
    ]
    return Recipe(version=1, description=description, model=model, metric=common, reducer=reducer, layers=tuple(rows))
