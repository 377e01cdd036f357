"""Print plans and metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from repshift_cli.planning.plan import Plan


__all__ = [
    "describe_metric",
    "describe_tokens",
    "show_sites",
]


_LONGEST_OPTION = 24
"""Longer ones are weights, which only a machine reads."""


def show_sites(plan: Plan, title: str) -> None:
    """Print what goes where, and by which score."""
    from repshift_cli.cli import ui

    rows = [
        [
            site.site,
            describe_metric(site.metric.model_dump()),
            describe_tokens(site.tokens_in, site.grid_in),
            describe_tokens(site.tokens_out, site.grid_out),
        ]
        for site in plan.sites
    ]
    ui.print_table(title, ["after", "kept by", "tokens in", "tokens out"], rows, left=2)


def describe_tokens(tokens: int, grid: Sequence[int] | None) -> str:
    """How many tokens there are, and for a feature map how they lie: `3136 (56x56)`."""
    return f"{tokens} ({grid[0]}x{grid[1]})" if grid else str(tokens)


def describe_metric(metric: dict[str, object]) -> str:
    """`mlp, l2, update, largest` for a shift, the kind and its options for other scores."""
    options = [str(value) for key, value in metric.items() if key != "kind"]
    values = ", ".join(option for option in options if len(option) <= _LONGEST_OPTION)
    return values if metric["kind"] == "representation_shift" else f"{metric['kind']} ({values})"
