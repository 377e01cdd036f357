"""A plan: the number of tokens before and after each site of a model, and the metrics that score them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, SerializerFunctionWrapHandler, model_serializer, model_validator

from repshift_cli.planning.layout import After, Grid
from repshift_cli.planning.recipe import ComponentSpec, LastBlock, StrictModel
from repshift_cli.utils.documents import Count, Name


class PlanSite(StrictModel):
    """The tokens before and after one site, prefix tokens included, and the metric that scores them.

    A feature map has `grid_in` and `grid_out`, rows and columns, whose positions are its tokens; None for sequences.
    """

    site: Name
    layer: NonNegativeInt
    tokens_in: Count
    tokens_out: Count
    grid_in: tuple[Count, Count] | None = None
    grid_out: tuple[Count, Count] | None = None
    after: After = "block"
    metric: ComponentSpec

    @property
    def shape_in(self) -> tuple[int, ...]:
        """Rows and columns of a map, or the length of a sequence."""
        return self.grid_in or (self.tokens_in,)

    @model_validator(mode="after")
    def _check_shapes(self) -> PlanSite:
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
        # earlier versions do not have these keys
        usual = {"grid_in": None, "grid_out": None, "after": "block"}
        return {key: value for key, value in handler(self).items() if key not in usual or value != usual[key]}


class Plan(StrictModel):
    """A resolved recipe: `attach` carries it out, and an artifact stores it.

    With `restore` the output of each block is put back to full length, see `reduction/restore.py`. With an `exact` last
    block it is computed for the prefix tokens only, see `reduction/last_block.py`.
    """

    family: Name
    prefix_tokens: NonNegativeInt
    patch_tokens: Count
    sites: Annotated[tuple[PlanSite, ...], Field(min_length=1)]
    reducer: ComponentSpec
    restore: bool = False
    last_block: LastBlock = "full"

    @model_validator(mode="after")
    def _check_counts(self) -> Plan:
        tokens, layer = self.prefix_tokens + self.patch_tokens, -1
        for site in self.sites:
            if site.layer <= layer:
                raise ValueError(f"{site.site}: layer {site.layer} comes after layer {layer}")
            # the change of a map between two sites depends on the model's layout
            if site.grid_in is None and site.tokens_in != tokens:
                raise ValueError(f"{site.site}: {site.tokens_in} tokens in, but {tokens} arrive")
            if site.tokens_out <= self.prefix_tokens:
                raise ValueError(f"{site.site}: no patch token is left")
            tokens, layer = site.tokens_out, site.layer
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # earlier versions do not have these keys
        usual = {"restore": False, "last_block": "full"}
        return {key: value for key, value in handler(self).items() if key not in usual or value != usual[key]}

    @property
    def grids_kept(self) -> dict[int, Grid]:
        """Rows and columns after each layer with a site of the plan; empty for sequences."""
        return {site.layer: site.grid_out for site in self.sites if site.grid_out is not None}

    def tokens_at(self, blocks: int) -> tuple[int, ...]:
        """Tokens of a sequence that enter each of `blocks` blocks and the head: `blocks + 1` numbers."""
        drops = {site.layer: site.tokens_out for site in self.sites}
        counts = [self.prefix_tokens + self.patch_tokens]
        for layer in range(blocks):
            counts.append(drops.get(layer, counts[-1]))
        if self.last_block == "exact":
            return (*counts[:-1], self.prefix_tokens)
        return (*counts[:-1], counts[0] if self.restore else counts[-1])

    def with_metric(self, metric: ComponentSpec) -> Plan:
        """The plan with this metric at every site."""
        return self.with_metrics([metric] * len(self.sites))

    def with_metrics(self, metrics: Sequence[ComponentSpec]) -> Plan:
        """The plan with one metric for each site; with fewer metrics than sites, it ends earlier."""
        sites = (site.model_copy(update={"metric": metric}) for site, metric in zip(self.sites, metrics, strict=False))
        return self.model_copy(update={"sites": tuple(sites)})

    def summary(self) -> list[dict[str, Any]]:
        """The sites as dicts: site, layer, tokens_in, tokens_out and the metric."""
        return [site.model_dump() for site in self.sites]
