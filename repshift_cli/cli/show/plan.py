"""Print plans and metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from repshift_cli.cli import ui
from repshift_cli.utils.text import describe_metric, describe_tokens

if TYPE_CHECKING:
    from repshift_cli.planning.plan import Plan

EXACT = "last block: exact (prefix tokens only; outputs are those of the full block)"


def show_sites(plan: Plan, title: str) -> None:
    """Print the metric and the tokens of each site."""
    from repshift_cli.reduction.reducers.base import build_reducer

    scored = build_reducer(plan.reducer).scored
    rows = [
        [
            site.site,
            describe_metric(site.metric.model_dump()) if scored else "not used",
            describe_tokens(site.tokens_in, site.grid_in),
            describe_tokens(site.tokens_out, site.grid_out),
        ]
        for site in plan.sites
    ]
    ui.print_table(title, ["after", "metric", "tokens in", "tokens out"], rows, left=2)
    if plan.last_block == "exact":
        ui.print_text(EXACT)
