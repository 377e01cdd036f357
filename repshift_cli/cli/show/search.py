"""Print the result of `repshift search`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from repshift_cli.cli import ui
from repshift_cli.cli.show.plan import show_sites

if TYPE_CHECKING:
    from repshift_cli.search.job import FinishedSearch
    from repshift_cli.search.result import MeasuredSchedule

_FRONT_ROWS = 8


def show_search(found: FinishedSearch) -> None:
    """Print the result in 80 columns."""
    loaded = found.loaded
    ui.print_text(f"model   {loaded.description.name} ({found.family.name})")
    ui.print_text(f"data    {found.inputs.description}")
    ui.print_text("")
    show_found(found)
    ui.print_text(f"reducer {found.result.plan.reducer.kind}")
    show_sites(found.result.plan, "Tokens through each site")


def show_found(found: FinishedSearch) -> None:
    """Print the found schedule with the dense model and the paper's schedule."""
    result, unit, on = found.result, found.loaded.description.preprocessing.unit, found.measured_on
    labels = {"paper": "the paper's schedule", "random": "found, dropped at random"}
    points = {labels.get(name, name): point for name, point in result.points.items() if name != "given"}
    quality = ["unchanged", "KL"] if result.dense.agreement is not None else ["1 - cosine"]
    if result.dense.recall is not None:
        quality.append(f"recall@{result.target.neighbours}")
    columns = ["", "MACs", "latency", *quality, *(["top-1 %"] if result.dense.top1 is not None else [])]
    title = f"Search for {result.target} (schedules tried: {result.evaluations}; {result.seconds:.0f} s)"
    ui.print_table(title, columns, [_cells(name, point) for name, point in points.items()])
    ui.print_text("MACs and latency as fractions of the dense model's;")
    ui.print_text(f"quality on {result.found.images} held-out {unit}s")
    if found.limit is not None and (quality_found := result.heldout_quality(found.limit)) is not None:
        ui.print_text(f"limit   {found.limit}: reached {found.limit.reached(quality_found)}")
    intervals = [
        "{} {:.1f}-{:.1f}".format(name, *interval)
        for name, point in points.items()
        if (interval := point.top1_interval) is not None
    ]
    if intervals:
        ui.print_text(f"95% intervals of top-1: {'; '.join(intervals)}")
    if result.found.latency is not None:
        ui.print_text(f"latency on {on['device']}, {on['dtype']}, batch {on['batch']}, {on['threads']} threads")
    if result.paper_is_found:
        images = "held-out" if result.held_back_decided else "selection"
        sites = ", ".join(f"{site.site} {site.tokens_in} -> {site.tokens_out}" for site in result.plan.sites)
        ui.print_text(f"the paper's schedule at this cost ({sites} tokens)")
        ui.print_text(f"was at least as good on the {images} {unit}s, so it is the result")
    ui.print_text("")
    front = _thinned(result.front)
    if len(front) > 1:
        title = f"Pareto front of the tried schedules (on {front[0].images} selection {unit}s)"
        ui.print_table(title, columns, [_cells("", point) for point in front])
        ui.print_text("")


def _thinned(front: Sequence[MeasuredSchedule]) -> list[MeasuredSchedule]:
    """At most `_FRONT_ROWS` of the points, among them the first and the last."""
    last = len(front) - 1
    places = {round(step * last / (_FRONT_ROWS - 1)) for step in range(_FRONT_ROWS)}
    return [front[place] for place in sorted(places)] if front else []


def _cells(name: str, point: MeasuredSchedule) -> list[str]:
    latency = "-" if point.latency is None else f"{point.latency:.3f}"
    same = [] if point.agreement is None else [f"{point.agreement:.2%}"]
    top1 = [] if point.top1 is None else [f"{point.top1:.2f}"]
    recall = [] if point.recall is None else [f"{point.recall:.2%}"]
    return [name, f"{point.macs:.3f}", latency, *same, f"{point.kl:.4f}", *recall, *top1]
