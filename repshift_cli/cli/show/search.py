"""Print the result of `repshift search`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from repshift_cli.cli.show.plan import show_sites

if TYPE_CHECKING:
    from repshift_cli.search.job import Found
    from repshift_cli.search.result import Point


__all__ = [
    "show_found",
    "show_search",
]


_FRONT_ROWS = 8


def show_search(found: Found) -> None:
    """Print the result for people, in 80 columns."""
    from repshift_cli.cli import ui

    loaded = found.loaded
    ui.print_text(f"model   {loaded.description.name} ({found.family.name})")
    ui.print_text(f"data    {found.inputs.description}")
    ui.print_text("")
    show_found(found)
    ui.print_text(f"reducer {found.result.plan.reducer.kind}")
    show_sites(found.result.plan, "Tokens through each site")


def show_found(found: Found) -> None:
    """Print what the search found beside the dense model and the paper's schedule."""
    from repshift_cli.cli import ui

    result = found.result
    points = {
        "dense": result.dense,
        "the paper's schedule": result.paper,
        "found": result.found,
        "found, dropped at random": result.random,
    }
    quality = ["unchanged", "KL"] if result.dense.agreement is not None else ["1 - cosine"]
    columns = ["", "MACs", "latency", *quality, *(["top-1 %"] if result.dense.top1 is not None else [])]
    rows = [_cells(name, point) for name, point in points.items() if point is not None]
    title = f"Search for {result.target} (schedules tried: {result.evaluations}; {result.seconds:.0f} s)"
    ui.print_table(title, columns, rows)
    unit = found.loaded.description.preprocessing.unit
    on = found.measured_on
    ui.print_text("MACs and latency as fractions of the dense model's;")
    ui.print_text(f"quality on {result.found.images} {unit}s that took no part, but to decide between found and paper")
    intervals = [
        "{} {:.1f}-{:.1f}".format(name, *point.top1_interval)
        for name, point in points.items()
        if point is not None and point.top1_interval is not None
    ]
    if intervals:
        ui.print_text(f"95% intervals of top-1: {'; '.join(intervals)}")
    if result.found.latency is not None:
        told = f"{on['device']}, {on['dtype']}, batch {on['batch']}, {on['threads']} threads"
        ui.print_text(f"latency on {told}")
    if result.paper_is_found:
        why = "the paper's schedule was better on these"
        why = why if result.held_back_decided else "nothing better than the paper's schedule was found"
        ui.print_text(f"{why}, so it is what was found")
    ui.print_text("")
    front = _thinned(result.front)
    if len(front) > 1:
        title = f"The best of what was tried, by cost (on {front[0].images} {unit}s that chose)"
        ui.print_table(title, columns, [_cells("", point) for point in front])
        ui.print_text("")


def _thinned(front: Sequence[Point]) -> list[Point]:
    """Some of the points, the first and the last among them: neighbours on a front tell the same."""
    last = len(front) - 1
    places = sorted({round(step * last / (_FRONT_ROWS - 1)) for step in range(_FRONT_ROWS)}) if last > 0 else [0]
    return [front[place] for place in places] if front else []


def _cells(name: str, point: Point) -> list[str]:
    latency = "-" if point.latency is None else f"{point.latency:.3f}"
    same = [] if point.agreement is None else [f"{point.agreement:.2%}"]
    top1 = [] if point.top1 is None else [f"{point.top1:.2f}"]
    return [name, f"{point.macs:.3f}", latency, *same, f"{point.kl:.4f}", *top1]
