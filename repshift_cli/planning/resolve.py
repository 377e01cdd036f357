"""Resolve a recipe for the layout of a model: a plan with the number of tokens before and after each site.

Integers only, without torch. Counts depend on the recipe and the input size, never on the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple, cast

from repshift_cli.errors import RecipeError
from repshift_cli.planning.layout import After, Grid, Layout, SiteInfo, shape_text
from repshift_cli.planning.plan import Plan, PlanSite
from repshift_cli.planning.recipe import LayerDrop, Recipe
from repshift_cli.utils.suggest import nearest


class _Step(NamedTuple):
    """One entry of `layers` with its place in the recipe, for messages, and its site."""

    where: str
    drop: LayerDrop
    site: SiteInfo


def resolve(recipe: Recipe, layout: Layout, after: After = "block", most: Callable[[int], int] | None = None) -> Plan:
    """Resolve a recipe for a model: compute the tokens at each site.

    Args:
        after: where in a block the recipe's reducer acts.
        most: how many of `n` patch tokens the reducer can remove at one site; None for all.

    Raises a RecipeError if a layer is missing in the model or given twice, more tokens are kept than there are, none is
    left, or more are removed than the reducer can.
    """
    if recipe.drop_ratios is not None and len(recipe.drop_ratios) != layout.blocks:
        where, given = recipe.place.at(("drop_ratios",)), len(recipe.drop_ratios)
        raise RecipeError(
            f"{where}: drop_ratios has {given} numbers, and the model has {layout.blocks} blocks",
            "Give one number per block, 0 for none.",
        )
    steps: dict[int, _Step] = {}
    for index, drop in enumerate(recipe.layers):
        where = f"{recipe.place.at(('layers', index))}: layers[{index}]"
        site = _find_site(drop, layout, where)
        if site.layer in steps:
            raise RecipeError(f"{where}: layer {drop.layer} is given twice")
        steps[site.layer] = _Step(where, drop, site)
    ordered = [steps[layer] for layer in sorted(steps)]
    sites = (_sequence_sites if layout.map_size is None else _map_sites)(recipe, layout, ordered)
    for planned in sites:
        patches, dropped = planned.tokens_in - layout.prefix_tokens, planned.tokens_in - planned.tokens_out
        limit = patches if most is None else most(patches)
        if dropped > limit:
            raise RecipeError(
                f"{steps[planned.layer].where}: {dropped} of {patches} tokens would be removed at {planned.site}, but "
                f"{recipe.reducer.kind} can remove {limit} there",
                f"Keep {patches - limit} or more.",
            )
    return Plan(
        family=layout.family,
        prefix_tokens=layout.prefix_tokens,
        patch_tokens=layout.patch_tokens,
        sites=tuple(planned.model_copy(update={"after": after}) for planned in sites),
        reducer=recipe.reducer,
        restore=recipe.restore,
        last_block=recipe.last_block or "full",
    )


def _find_site(drop: LayerDrop, layout: Layout, where: str) -> SiteInfo:
    for site in layout.sites:
        if drop.layer in (site.layer, site.name):
            return site
    if (reason := layout.barred.get(str(drop.layer))) is not None:
        names = ", ".join(site.name for site in layout.sites)
        raise RecipeError(f"{where}: nothing can be dropped after {drop.layer}: {reason}", f"Possible are {names}.")
    first, last = layout.sites[0], layout.sites[-1]
    allowed = f"It has the layers {first.layer} ({first.name}) to {last.layer} ({last.name})."
    hint = nearest(str(drop.layer), [site.name for site in layout.sites]) + allowed
    raise RecipeError(f"{where}: the model has no layer {drop.layer}", hint)


def _sequence_sites(recipe: Recipe, layout: Layout, steps: Sequence[_Step]) -> list[PlanSite]:
    """The token counts of a sequence at its sites, first to last."""
    sites, patches, prefix = [], layout.patch_tokens, layout.prefix_tokens
    for where, drop, site in steps:
        if drop.keep_grid is not None:
            raise RecipeError(
                f"{where}: keep_grid is for feature maps, and the tokens of this model form a sequence",
                "Give keep_tokens or drop_ratio.",
            )
        dropped = tokens_dropped(drop, patches)
        if drop.drop_ratio is not None and recipe.round_tokens is not None and dropped:
            total = prefix + patches
            # fewer than all: at a site that drops nothing the score would be computed for nothing
            dropped = total - rounded(total - dropped, recipe.round_tokens, prefix + 1, total - 1)
        if dropped < 0:
            raise RecipeError(
                f"{where}: keep_tokens is {drop.keep_tokens}, but only {patches} patch tokens reach {site.name}"
            )
        if dropped >= patches:
            raise RecipeError(
                f"{where}: nothing is left after {site.name}: all {patches} patch tokens would be dropped"
            )
        tokens, patches = prefix + patches, patches - dropped
        sites.append(
            PlanSite(
                site=site.name,
                layer=site.layer,
                tokens_in=tokens,
                tokens_out=prefix + patches,
                metric=drop.metric or recipe.metric,
            )
        )
    return sites


def tokens_dropped(drop: LayerDrop, patch_tokens: int) -> int:
    """How many of `patch_tokens` are dropped: `floor(drop_ratio * patch_tokens)`, with the ratio as decimal number.

    (0.29 * 100 is 28.999... in binary floating point; here it is 29.)
    """
    if drop.drop_ratio is not None:
        return int(Fraction(str(drop.drop_ratio)) * patch_tokens)
    if drop.keep_tokens is not None:
        return patch_tokens - drop.keep_tokens
    return drop.drop_tokens or 0


def rounded(kept: int, multiple: int, least: int, most: int) -> int:
    """The multiple of `multiple` in `least..most` that is nearest to `kept`, of two the larger; `kept` if none is."""
    below = kept // multiple * multiple
    possible = [count for count in (below, below + multiple) if least <= count <= most]
    return min(possible, key=lambda count: (abs(count - kept), -count), default=kept)


def _map_sites(recipe: Recipe, layout: Layout, steps: Sequence[_Step]) -> list[PlanSite]:
    """The sizes of a feature map at its sites: rows and columns are dropped there, strides shrink it in between."""
    if recipe.round_tokens is not None:
        raise RecipeError(
            f"{recipe.place.at(('round_tokens',))}: round_tokens is for sequences; of a feature map whole rows and "
            "columns are kept",
            "Leave it out, and give keep_grid where a size suits better.",
        )
    sites: list[PlanSite] = []
    kept: dict[int, Grid] = {}
    for where, drop, site in steps:
        grid = next(grid for found, grid in layout.grids(kept) if found.layer == site.layer)
        if drop.keep_tokens is not None or drop.drop_tokens is not None:
            given = "keep_tokens" if drop.keep_tokens is not None else "drop_tokens"
            raise RecipeError(
                f"{where}: {given} is for sequences; of a feature map whole rows and columns are dropped",
                f"Give drop_ratio, or keep_grid: [rows, columns] of the {shape_text(grid)} that reach {site.name}.",
            )
        left = lines_kept(drop, grid)
        if left[0] > grid[0] or left[1] > grid[1]:
            raise RecipeError(
                f"{where}: keep_grid is {shape_text(left)}, but only {shape_text(grid)} reach {site.name}"
            )
        kept[site.layer] = left
        check_windows(layout, kept, site, where)
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
    return sites


def lines_kept(drop: LayerDrop, grid: Grid) -> Grid:
    """Rows and columns of a map of `grid` that are kept.

    With `drop_ratio` at most that share of the positions is dropped, as evenly from both axes as whole lines allow:
    rows are rounded up from `rows * sqrt(1 - drop_ratio)`, then columns from what is left for them.
    """
    if drop.keep_grid is not None:
        return drop.keep_grid
    if drop.drop_ratio is None:
        return grid
    rows, columns = grid
    share = 1 - Fraction(str(drop.drop_ratio))
    # the smallest h with h >= rows * sqrt(share), in integers: h^2 * denominator >= rows^2 * numerator
    square = -(-(rows * rows * share.numerator) // share.denominator)
    root = math.isqrt(square)
    kept_rows = root if root * root == square else root + 1
    return kept_rows, min(math.ceil(share * rows * columns / kept_rows), columns)


def check_windows(layout: Layout, kept: Mapping[int, Grid], site: SiteInfo, where: str) -> None:
    """Raise `RecipeError` if the map becomes too small for a later kernel, and the dense map does not."""
    grid = dense = layout.map_size or (1, 1)
    for layer, windows in [*((found.layer, found.windows) for found in layout.sites), (-1, layout.tail)]:
        for window in windows:
            need = cast(Grid, tuple(min(pair) for pair in zip(window.least(), dense, strict=True)))
            if grid[0] < need[0] or grid[1] < need[1]:
                raise RecipeError(
                    f"{where}: of the map, {shape_text(kept[site.layer])} would be left after {site.name}, and "
                    f"{shape_text(grid)} at {window.name}, smaller than its {shape_text(window.kernel)} kernel can use",
                    f"There it must be at least {shape_text(need)}: drop fewer, or after a later layer.",
                )
            grid, dense = window.output(grid), window.output(dense)
        grid = kept.get(layer, grid)
