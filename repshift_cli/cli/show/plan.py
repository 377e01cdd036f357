"""Print plans and metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from repshift_cli.cli import ui

if TYPE_CHECKING:
    from repshift_cli.planning.plan import Plan

EXACT = "last block: exact (prefix tokens only; outputs are those of the full block)"

_LONGEST_OPTION = 24
"""Longer options are fitted weights and are not printed."""


def show_sites(plan: Plan, title: str) -> None:
    """Print the metric and the tokens of each site."""
    rows = [
        [
            site.site,
            describe_metric(site.metric.model_dump()),
            describe_tokens(site.tokens_in, site.grid_in),
            describe_tokens(site.tokens_out, site.grid_out),
        ]
        for site in plan.sites
    ]
    ui.print_table(title, ["after", "metric", "tokens in", "tokens out"], rows, left=2)
    if plan.last_block == "exact":
        ui.print_text(EXACT)


def describe_tokens(tokens: int, grid: Sequence[int] | None) -> str:
    """The number of tokens, and the size of a feature map: `3136 (56x56)`."""
    return f"{tokens} ({grid[0]}x{grid[1]})" if grid else str(tokens)


def describe_metric(metric: dict[str, object]) -> str:
    """`mlp, l2, update, largest` for representation shift, kind and options for others."""
    options = [str(value) for key, value in metric.items() if key != "kind"]
    values = ", ".join(option for option in options if len(option) <= _LONGEST_OPTION)
    return values if metric["kind"] == "representation_shift" else f"{metric['kind']} ({values})"
