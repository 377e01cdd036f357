"""What `repshift bench` prints for people, in 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from repshift_cli.benchmark.limits import LimitCheck
    from repshift_cli.benchmark.report import BenchReport, BreakEven, EndToEnd, Ratio, Run
    from repshift_cli.checkpoints.artifact import Opened
    from repshift_cli.measure.latency import Speedup, Spread

__all__ = ["show", "why_nothing"]

_ENOUGH_RUNS = 5
_DECIMALS = ((0.1, 4), (1, 3), (10, 2), (100, 1))  # below this limit, so many places after the point


def show(report: BenchReport, opened: Mapping[str, Opened], checks: Sequence[LimitCheck] = ()) -> None:
    """Print the report: a table for each setting, then what it says in words."""
    from repshift_cli.cli import ui

    _show_head(report, opened)
    units = {model.loaded.description.preprocessing.unit for model in opened.values()}
    unit = units.pop() if len(units) == 1 else "input"
    panels = list(dict.fromkeys(run.setting.apart_from_batch for run in report.runs))
    for panel in panels:
        if len(panels) > 1:
            ui.print_text(f"--- {panel}\n")
        _show_panel(report, panel, unit)
    if (fewest := min(run.latency.count for run in report.runs)) < _ENOUGH_RUNS:
        ui.print_text(f"Only {fewest} run{'s' if fewest > 1 else ''} of each: too few for the intervals to mean much.")
    if not report.ratios:
        ui.print_text("Nothing to compare: {}. {}".format(*why_nothing([opened])))
    for each in checks:
        ui.print_text(f"budget, {each}")


def why_nothing(opened: Iterable[Mapping[str, Opened]]) -> tuple[str, str]:
    """Why nothing is compared with its dense self, and what to do."""
    from repshift_cli.checkpoints.exported import OpenedExport

    if any(isinstance(model, OpenedExport) for each in opened for model in each.values()):
        return (
            "an exported file is compared with one of the same format and weights, dense with compressed",
            "Export the other one too, the dense one with --dense, and name both.",
        )
    return "no model is compressed", "Add --recipe to compress it for the run."


def _show_head(report: BenchReport, opened: Mapping[str, Opened]) -> None:
    import torch

    from repshift_cli.cli import ui

    ui.print_text(", ".join(opened))
    if random := [label for label, model in opened.items() if model.loaded.source.origin == "random"]:
        ui.print_text(f"random weights, which do not change the speed: {', '.join(random)}")
    ui.print_text(report.machine)
    layout = "" if report.memory_format == "contiguous" else f", {report.memory_format} in memory"
    attention = "no attention" if report.attention == "none" else f"attention {report.attention}"
    baselines = any(run.role == "peer" for run in report.runs)
    sides = "" if baselines or len({run.attention for run in report.runs}) > 1 else " on both sides"
    ui.print_text(f"{attention}{layout}{sides}, torch {torch.__version__}\n")


def _show_panel(report: BenchReport, panel: str, unit: str) -> None:
    """All that was measured in one setting, at every batch size."""
    from repshift_cli.cli import ui

    runs = [run for run in report.runs if run.setting.apart_from_batch == panel]
    ratios = [ratio for ratio in report.ratios if ratio.setting.apart_from_batch == panel]
    _show_runs(runs, unit)
    dense = {run.name for run in runs if run.role == "dense"}
    if any(run.role == "peer" for run in runs):
        _show_baselines(runs, ratios, dense)
    ours = [ratio for ratio in ratios if ratio.role == "compressed" and ratio.against in dense]
    several = len({ratio.name for ratio in ours}) > 1
    for ratio in ours:
        ui.print_text(f"batch {ratio.batch}{f', {ratio.name}' if several else ''}: {ratio}")
    found = [each for each in report.break_even if each.setting.apart_from_batch == panel and each.against in dense]
    for each in found:
        _show_break_even(each, several)
    for line in _compile_words(runs):
        ui.print_text(line)
    for read in report.end_to_end:
        if read.setting.apart_from_batch == panel:
            _show_end_to_end(read, unit, {ratio.name for ratio in ours})
    ui.print_text("")


def _show_runs(runs: Sequence[Run], unit: str) -> None:
    from repshift_cli.cli import ui

    with_memory = any(run.peak_bytes is not None for run in runs)
    columns = ["batch", "model", "GMACs", "ms [p10-p90]", f"{unit}s/s", *["peak MB"] * with_memory]
    rows = []
    for run in runs:
        row = [str(run.batch), run.name, _number(run.macs / 1e9), _latency(run.latency), _number(run.throughput)]
        row += [_or_dash(run.peak_bytes, 1e-6)] * with_memory
        rows.append(row)
    ui.print_table(None, columns, rows, left=2)


def _show_baselines(runs: Sequence[Run], ratios: Sequence[Ratio], dense: set[str]) -> None:
    """Speed-up and efficiency of each model over dense, and of the compressed model over each baseline."""
    from repshift_cli.cli import ui

    over_dense = {(ratio.batch, ratio.name): ratio for ratio in ratios if ratio.against in dense}
    ours = {(ratio.batch, ratio.against): ratio for ratio in ratios if ratio.against not in dense}
    macs = {run.name: run.macs for run in runs}
    own_macs = {ratio.against: macs[ratio.name] for ratio in ours.values()}
    rows = []
    for run in runs:
        gain, own = over_dense.get((run.batch, run.name)), ours.get((run.batch, run.name))
        beside = f"{run.macs / own_macs[run.name] - 1:+.1%}" if run.name in own_macs else ""
        efficiency = f"{gain.efficiency:.2f}" if gain else ""
        row = [str(run.batch), run.name, beside, _gain(gain), efficiency, _gain(own)]
        rows.append(row)
    columns = ["batch", "model", "MACs diff", "over dense", "efficiency", "speed-up over it"]
    ui.print_table(None, columns, rows, left=2)
    if any("?" in cell for row in rows for cell in row):
        ui.print_text("?: the intervals do not separate the two, so it is no speed-up.\n")


def _show_break_even(found: BreakEven, several: bool) -> None:
    from repshift_cli.cli import ui

    if len(found.tried) > 1:
        ui.print_text(f"{f'{found.name}: ' if several else ''}{found}")


def _compile_words(runs: Sequence[Run]) -> Iterator[str]:
    """How long compiling took, batch by batch, and whether a graph had to be compiled again."""
    for batch in dict.fromkeys(run.batch for run in runs):
        compiled = [run for run in runs if run.batch == batch and run.compilation]
        if not compiled:
            continue
        took = ", ".join(f"{run.name} {run.compilation.seconds:.1f} s" for run in compiled if run.compilation)
        again = sum(run.compilation.recompiles for run in compiled if run.compilation)
        yield f"batch {batch} compiled: {took}; recompiled while it was timed: {again or 'never'}"


def _show_end_to_end(found: EndToEnd, unit: str, ours: set[str]) -> None:
    from repshift_cli.cli import ui

    how = f"{found.workers} worker{'s' if found.workers > 1 else ''}" if found.workers else "the same process"
    size, count, passes = found.setting.batch, found.reading.images, len(found.reading.seconds)
    ui.print_text(f"\nFrom files, batch {size}: {count} images of {found.data}, read by {how}, {passes} passes\n")
    gains = found.speedups
    rows = [
        [
            name,
            _latency(each.throughput),
            f"{each.waiting:.0%}",
            each.bottleneck,
            _words(gains[name]) if name in gains else "",
        ]
        for name, each in found.sides.items()
    ]
    rows.append(["reading alone", _latency(found.reading.throughput), "", "", ""])
    ui.print_table(None, ["model", f"{unit}s/s [p10-p90]", "waiting", "bound by", "over dense"], rows)
    for name in sorted(ours & gains.keys()):
        ui.print_text(f"batch {size}, {name}, from files: {gains[name]}")


def _gain(ratio: Ratio | None) -> str:
    return _words(ratio.speedup) if ratio else ""


def _words(gain: Speedup) -> str:
    """The ratio, marked where it may be chance."""
    return f"{gain.ratio:.2f}x" if gain.clear or gain.clearly_slower else f"{gain.ratio:.2f}x ?"


def _latency(spread: Spread) -> str:
    return f"{_number(spread.median)} [{_number(spread.p10)}-{_number(spread.p90)}]"


def _or_dash(value: float | None, scale: float = 1.0) -> str:
    return "-" if value is None else _number(value * scale)


def _number(value: float) -> str:
    """Three significant digits, and all digits before the point."""
    return next((f"{value:.{places}f}" for limit, places in _DECIMALS if abs(value) < limit), f"{value:.0f}")
