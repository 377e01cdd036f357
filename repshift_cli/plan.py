"""From a recipe and the layout of a model to a plan: at each site, how many tokens come in and go out.

Integers only; nothing here needs torch. Counts depend on the recipe and the input size alone, never on the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from repshift_cli.errors import RecipeError
from repshift_cli.recipe import LayerDrop, Part, Place, Recipe, nearest

__all__ = ["Layout", "Plan", "PlanSite", "SiteInfo", "resolve", "tokens_dropped"]


@dataclass(frozen=True)
class SiteInfo:
    """A place where tokens can go: after the block `name`, which is the `layer`-th from 0."""

    name: str
    layer: int


@dataclass(frozen=True)
class Layout:
    """What a family tells of a model for one input size.

    Attributes:
        family: the family's name.
        prefix_tokens: class, distillation and register tokens, which never go.
        patch_tokens: tokens that stand for a place in the input.
        class_token: whether the first prefix token is a class token.
        sites: in the order of the forward pass.
    """

    family: str
    prefix_tokens: int
    patch_tokens: int
    class_token: bool
    sites: tuple[SiteInfo, ...]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PlanSite(_Frozen):
    """Tokens that pass one site, prefix tokens included, and the score that chooses among them."""

    site: str
    layer: NonNegativeInt
    tokens_in: PositiveInt
    tokens_out: PositiveInt
    metric: Part

    @model_validator(mode="after")
    def _shrinks(self) -> PlanSite:
        if self.tokens_out > self.tokens_in:
            raise ValueError(f"{self.site}: more tokens out ({self.tokens_out}) than in ({self.tokens_in})")
        return self


class Plan(_Frozen):
    """A resolved recipe: what `attach` carries out and what the artifact stores."""

    family: str
    prefix_tokens: NonNegativeInt
    patch_tokens: PositiveInt
    sites: Annotated[tuple[PlanSite, ...], Field(min_length=1)]
    reducer: Part

    @model_validator(mode="after")
    def _counts_follow(self) -> Plan:
        tokens, layer = self.prefix_tokens + self.patch_tokens, -1
        for site in self.sites:
            if site.tokens_in != tokens or site.layer <= layer:
                raise ValueError(f"{site.site}: {site.tokens_in} tokens in, but {tokens} arrive")
            if site.tokens_out <= self.prefix_tokens:
                raise ValueError(f"{site.site}: no patch token is left")
            tokens, layer = site.tokens_out, site.layer
        return self

    def tokens_at(self, blocks: int) -> tuple[int, ...]:
        """How many tokens enter each of `blocks` blocks, and after them the head: `blocks + 1` numbers."""
        drops = {site.layer: site.tokens_out for site in self.sites}
        counts = [self.prefix_tokens + self.patch_tokens]
        for layer in range(blocks):
            counts.append(drops.get(layer, counts[-1]))
        return tuple(counts)

    def with_metric(self, metric: Part) -> Plan:
        """The same counts with another score, the same at every site."""
        return self.with_metrics([metric] * len(self.sites))

    def with_metrics(self, metrics: Sequence[Part]) -> Plan:
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


def resolve(recipe: Recipe, layout: Layout) -> Plan:
    """Lay a recipe over a model.

    Raises:
        RecipeError: a layer that the model lacks, a layer twice, more tokens kept than there are, or none left.
    """
    chosen: dict[int, tuple[int, SiteInfo]] = {}
    for index, drop in enumerate(recipe.layers):
        site = _find_site(drop, layout, recipe.place, index)
        if site.layer in chosen:
            raise RecipeError(f"{_where(recipe.place, index)}: layer {drop.layer} stands twice")
        chosen[site.layer] = (index, site)
    return Plan(
        family=layout.family,
        prefix_tokens=layout.prefix_tokens,
        patch_tokens=layout.patch_tokens,
        sites=_count(recipe, layout, [chosen[layer] for layer in sorted(chosen)]),
        reducer=recipe.reducer,
    )


def _count(recipe: Recipe, layout: Layout, chosen: list[tuple[int, SiteInfo]]) -> tuple[PlanSite, ...]:
    """Follow the tokens through the chosen sites, first to last."""
    sites, patches = [], layout.patch_tokens
    for index, site in chosen:
        dropped = tokens_dropped(recipe.layers[index], patches)
        where = _where(recipe.place, index)
        if dropped < 0:
            kept = recipe.layers[index].keep_tokens
            raise RecipeError(f"{where}: keep_tokens is {kept}, but only {patches} patch tokens reach {site.name}")
        if dropped >= patches:
            raise RecipeError(f"{where}: nothing is left after {site.name}: all {patches} patch tokens would go")
        sites.append(
            PlanSite(
                site=site.name,
                layer=site.layer,
                tokens_in=layout.prefix_tokens + patches,
                tokens_out=layout.prefix_tokens + patches - dropped,
                metric=recipe.layers[index].metric or recipe.metric,
            )
        )
        patches -= dropped
    return tuple(sites)


def _find_site(drop: LayerDrop, layout: Layout, place: Place, index: int) -> SiteInfo:
    for site in layout.sites:
        if drop.layer in (site.layer, site.name):
            return site
    first, last = layout.sites[0], layout.sites[-1]
    allowed = f"It has the layers {first.layer} ({first.name}) to {last.layer} ({last.name})."
    hint = nearest(str(drop.layer), [site.name for site in layout.sites]) + allowed
    raise RecipeError(f"{_where(place, index)}: the model has no layer {drop.layer}", hint)


def _where(place: Place, index: int) -> str:
    return f"{place.at(('layers', index))}: layers[{index}]"
