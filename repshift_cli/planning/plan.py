"""From a recipe and the layout of a model to a plan: at each site, how many tokens come in and go out.

Integers only; nothing here needs torch. Counts depend on the recipe and the input size alone, never on the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from repshift_cli.errors import RecipeError
from repshift_cli.planning.layout import After, Grid, Layout, SiteInfo
from repshift_cli.planning.recipe import ComponentSpec, LayerDrop, Place, Recipe
from repshift_cli.utils.suggest import nearest

__all__ = [
    "Plan",
    "PlanSite",
    "lines_kept",
    "resolve",
    "rounded",
    "tokens_dropped",
]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PlanSite(_Frozen):
    """Tokens that pass one site, prefix tokens included, and the score that chooses among them.

    Attributes:
        grid_in, grid_out: rows and columns of a feature map, whose positions are its tokens; None for sequences.
        after: where in the block they go.
    """

    site: str
    layer: NonNegativeInt
    tokens_in: PositiveInt
    tokens_out: PositiveInt
    grid_in: tuple[PositiveInt, PositiveInt] | None = None
    grid_out: tuple[PositiveInt, PositiveInt] | None = None
    after: After = "block"
    metric: ComponentSpec

    @property
    def shape_in(self) -> tuple[int, ...]:
        """Rows and columns of a map, or the length of a sequence."""
        return self.grid_in or (self.tokens_in,)

    @model_validator(mode="after")
    def _shrinks(self) -> PlanSite:
        if self.tokens_out > self.tokens_in:
            raise ValueError(f"{self.site}: more tokens out ({self.tokens_out}) than in ({self.tokens_in})")
        if self.grid_in is None and self.grid_out is None:
            return self
        if self.grid_in is None or self.grid_out is None:
            raise ValueError(f"{self.site}: a map on one side only")
        if (math.prod(self.grid_in), math.prod(self.grid_out)) != (self.tokens_in, self.tokens_out):
            raise ValueError(f"{self.site}: the tokens are not those of the map")
        if any(out > side for out, side in zip(self.grid_out, self.grid_in, strict=True)):
            raise ValueError(f"{self.site}: more rows or columns out than in")
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # a sequence has no grid, and readers of earlier versions know no such keys
        usual = {"grid_in": None, "grid_out": None, "after": "block"}
        return {key: value for key, value in handler(self).items() if key not in usual or value != usual[key]}


class Plan(_Frozen):
    """A resolved recipe: what `attach` carries out and what the artifact stores."""

    family: str
    prefix_tokens: NonNegativeInt
    patch_tokens: PositiveInt
    sites: Annotated[tuple[PlanSite, ...], Field(min_length=1)]
    reducer: ComponentSpec

    @model_validator(mode="after")
    def _counts_follow(self) -> Plan:
        tokens, layer = self.prefix_tokens + self.patch_tokens, -1
        for site in self.sites:
            if site.layer <= layer:
                raise ValueError(f"{site.site}: layer {site.layer} comes after layer {layer}")
            # what happens to a map between two sites is known to the model's layout alone
            if site.grid_in is None and site.tokens_in != tokens:
                raise ValueError(f"{site.site}: {site.tokens_in} tokens in, but {tokens} arrive")
            if site.tokens_out <= self.prefix_tokens:
                raise ValueError(f"{site.site}: no patch token is left")
            tokens, layer = site.tokens_out, site.layer
        return self

    @property
    def grids_kept(self) -> dict[int, Grid]:
        """Rows and columns that are left after each layer where some go; empty for sequences."""
        return {site.layer: site.grid_out for site in self.sites if site.grid_out is not None}

    def tokens_at(self, blocks: int) -> tuple[int, ...]:
        """How many tokens of a sequence enter each of `blocks` blocks, and then the head: `blocks + 1` numbers."""
        drops = {site.layer: site.tokens_out for site in self.sites}
        counts = [self.prefix_tokens + self.patch_tokens]
        for layer in range(blocks):
            counts.append(drops.get(layer, counts[-1]))
        return tuple(counts)

    def with_metric(self, metric: ComponentSpec) -> Plan:
        """The same counts with another score, the same at every site."""
        return self.with_metrics([metric] * len(self.sites))

    def with_metrics(self, metrics: Sequence[ComponentSpec]) -> Plan:
        """The same counts with another score for each site; for fewer scores than sites, the plan ends earlier."""
        sites = (site.model_copy(update={"metric": metric}) for site, metric in zip(self.sites, metrics, strict=False))
        return self.model_copy(update={"sites": tuple(sites)})

    def summary(self) -> list[dict[str, Any]]:
        """The rows that `compress` prints: site, layer, tokens_in, tokens_out and the metric."""
        return [site.model_dump() for site in self.sites]


def tokens_dropped(drop: LayerDrop, patch_tokens: int) -> int:
    """How many of `patch_tokens` go: `floor(drop_ratio * patch_tokens)`, exactly as the decimal number is written.

    (0.29 * 100 is 28.999... in binary floating point; here it is 29.)
    """
    if drop.drop_ratio is not None:
        return int(Fraction(str(drop.drop_ratio)) * patch_tokens)
    if drop.keep_tokens is not None:
        return patch_tokens - drop.keep_tokens
    return 0


def rounded(kept: int, multiple: int, least: int, most: int) -> int:
    """The multiple of `multiple` that is nearest to `kept` tokens, of two the larger one.

    Args:
        least, most: what it may be; where no multiple lies between them, `kept` stays as it is.
    """
    below = kept // multiple * multiple
    possible = [count for count in (below, below + multiple) if least <= count <= most]
    return min(possible, key=lambda count: (abs(count - kept), -count), default=kept)


def lines_kept(drop: LayerDrop, grid: Grid) -> Grid:
    """Rows and columns of a map of `grid` that stay.

    With `drop_ratio` at most that share of the positions goes, as evenly from both axes as whole lines allow: as few
    rows as hold their part, the root of the share that stays, then as few columns as hold the rest.
    """
    if drop.keep_grid is not None:
        return drop.keep_grid
    if drop.drop_ratio is None:
        return grid
    rows, columns = grid
    share = 1 - Fraction(str(drop.drop_ratio))
    # the smallest h with h >= rows * sqrt(share), in whole numbers: h^2 * denominator >= rows^2 * numerator
    kept_rows = _root_up(-(-(rows * rows * share.numerator) // share.denominator))
    kept_columns = math.ceil(share * rows * columns / kept_rows)
    return kept_rows, min(kept_columns, columns)


def _root_up(number: int) -> int:
    """The smallest whole number whose square is at least `number`."""
    root = math.isqrt(number)
    return root if root * root == number else root + 1


def resolve(recipe: Recipe, layout: Layout, after: After = "block", most: Callable[[int], int] | None = None) -> Plan:
    """Lay a recipe over a model.

    Args:
        after: where in a block the recipe's reducer acts.
        most: how many of so many patch tokens it can take at one site; None for all.

    Raises:
        RecipeError: a layer that the model lacks, a layer twice, more tokens kept than there are, or none left; or more
            dropped than the reducer can.
    """
    chosen: dict[int, tuple[int, SiteInfo]] = {}
    for index, drop in enumerate(recipe.layers):
        site = _find_site(drop, layout, recipe.place, index)
        if site.layer in chosen:
            raise RecipeError(f"{_where(recipe.place, index)}: layer {drop.layer} stands twice")
        chosen[site.layer] = (index, site)
    count = _count if layout.map_size is None else _count_lines
    sites = count(recipe, layout, [chosen[layer] for layer in sorted(chosen)])
    if most is not None:
        for planned in sites:
            _check_most(recipe, chosen[planned.layer][0], planned, layout.prefix_tokens, most)
    return Plan(
        family=layout.family,
        prefix_tokens=layout.prefix_tokens,
        patch_tokens=layout.patch_tokens,
        sites=tuple(planned.model_copy(update={"after": after}) for planned in sites),
        reducer=recipe.reducer,
    )


def _check_most(recipe: Recipe, index: int, planned: PlanSite, prefix: int, most: Callable[[int], int]) -> None:
    patches = planned.tokens_in - prefix
    dropped, limit = planned.tokens_in - planned.tokens_out, most(patches)
    if dropped > limit:
        raise RecipeError(
            f"{_where(recipe.place, index)}: {dropped} of {patches} tokens would go at {planned.site}, but "
            f"{recipe.reducer.kind} can let {limit} go there",
            f"Keep {patches - limit} or more.",
        )


def _count(recipe: Recipe, layout: Layout, chosen: list[tuple[int, SiteInfo]]) -> tuple[PlanSite, ...]:
    """Follow the tokens of a sequence through the chosen sites, first to last."""
    sites, patches = [], layout.patch_tokens
    for index, site in chosen:
        drop, where = recipe.layers[index], _where(recipe.place, index)
        if drop.keep_grid is not None:
            raise RecipeError(
                f"{where}: keep_grid is for feature maps, and the tokens of this model form a sequence",
                "Give keep_tokens or drop_ratio.",
            )
        dropped = tokens_dropped(drop, patches)
        if drop.drop_ratio is not None and recipe.round_tokens is not None and dropped:
            total = layout.prefix_tokens + patches
            # fewer than all: a site that lets nothing go would score for nothing
            dropped = total - rounded(total - dropped, recipe.round_tokens, layout.prefix_tokens + 1, total - 1)
        if dropped < 0:
            raise RecipeError(
                f"{where}: keep_tokens is {drop.keep_tokens}, but only {patches} patch tokens reach {site.name}"
            )
        if dropped >= patches:
            raise RecipeError(f"{where}: nothing is left after {site.name}: all {patches} patch tokens would go")
        sites.append(
            PlanSite(
                site=site.name,
                layer=site.layer,
                tokens_in=layout.prefix_tokens + patches,
                tokens_out=layout.prefix_tokens + patches - dropped,
                metric=drop.metric or recipe.metric,
            )
        )
        patches -= dropped
    return tuple(sites)


def _count_lines(recipe: Recipe, layout: Layout, chosen: list[tuple[int, SiteInfo]]) -> tuple[PlanSite, ...]:
    """Follow a feature map through the chosen sites: rows and columns go there, strides shrink it in between."""
    if recipe.round_tokens is not None:
        raise RecipeError(
            f"{recipe.place.at(('round_tokens',))}: round_tokens is for sequences; of a feature map whole rows and "
            "columns stay",
            "Leave it out, and give keep_grid where a size suits better.",
        )
    sites: list[PlanSite] = []
    kept: dict[int, Grid] = {}
    for index, site in chosen:
        drop, where = recipe.layers[index], _where(recipe.place, index)
        grid = next(grid for found, grid in layout.grids(kept) if found.layer == site.layer)
        if drop.keep_tokens is not None:
            raise RecipeError(
                f"{where}: keep_tokens is for sequences; from a feature map whole rows and columns go",
                f"Give drop_ratio, or keep_grid: [rows, columns] of the {grid[0]}x{grid[1]} that reach {site.name}.",
            )
        left = lines_kept(drop, grid)
        if left[0] > grid[0] or left[1] > grid[1]:
            raise RecipeError(
                f"{where}: keep_grid is {left[0]}x{left[1]}, but only {grid[0]}x{grid[1]} reach {site.name}"
            )
        kept[site.layer] = left
        _check_windows(layout, kept, site, where)
        sites.append(
            PlanSite(
                site=site.name,
                layer=site.layer,
                tokens_in=math.prod(grid),
                tokens_out=math.prod(left),
                grid_in=grid,
                grid_out=left,
                metric=drop.metric or recipe.metric,
            )
        )
    return tuple(sites)


def _check_windows(layout: Layout, kept: Mapping[int, Grid], site: SiteInfo, where: str) -> None:
    """Refuse a map that is too small for what comes after `site`, if the dense map is not.

    Raises:
        RecipeError: naming the map and the module whose kernel it is too small for.
    """
    grid = dense = layout.map_size or (1, 1)
    passages = [(found.layer, found.windows) for found in layout.sites] + [(-1, layout.tail)]
    for layer, windows in passages:
        for window in windows:
            least = tuple(min(pair) for pair in zip(window.least(), dense, strict=True))
            if any(side < need for side, need in zip(grid, least, strict=True)):
                raise RecipeError(
                    f"{where}: of the map, {kept[site.layer][0]}x{kept[site.layer][1]} would be left after "
                    f"{site.name}, and {grid[0]}x{grid[1]} at {window.name}, smaller than its "
                    f"{window.kernel[0]}x{window.kernel[1]} kernel can use",
                    f"There it must be at least {least[0]}x{least[1]}: drop fewer, or after a later layer.",
                )
            grid, dense = window.output(grid), window.output(dense)
        grid = kept.get(layer, grid)


def _find_site(drop: LayerDrop, layout: Layout, place: Place, index: int) -> SiteInfo:
    for site in layout.sites:
        if drop.layer in (site.layer, site.name):
            return site
    where = f"{_where(place, index)}:"
    if (reason := layout.barred.get(str(drop.layer))) is not None:
        names = ", ".join(site.name for site in layout.sites)
        raise RecipeError(f"{where} nothing can go after {drop.layer}: {reason}", f"Possible are {names}.")
    first, last = layout.sites[0], layout.sites[-1]
    allowed = f"It has the layers {first.layer} ({first.name}) to {last.layer} ({last.name})."
    hint = nearest(str(drop.layer), [site.name for site in layout.sites]) + allowed
    raise RecipeError(f"{where} the model has no layer {drop.layer}", hint)


def _where(place: Place, index: int) -> str:
    return f"{place.at(('layers', index))}: layers[{index}]"
