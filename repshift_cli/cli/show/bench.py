"""Print the report of `repshift bench`, in 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from repshift_cli.cli import ui

if TYPE_CHECKING:
    from repshift_cli.benchmark.limits import LimitCheck
    from repshift_cli.benchmark.report import BenchReport, EndToEnd, Ratio, Run
    from repshift_cli.checkpoints.artifact import Opened
    from repshift_cli.measure.latency import Speedup, Spread

_ENOUGH_RUNS = 5
_DECIMALS = ((0.1, 4), (1, 3), (10, 2), (100, 1))
"""Values below the limit are printed with this number of decimals."""


def show(report: BenchReport, opened: Mapping[str, Opened], verdicts: Sequence[LimitCheck] = ()) -> None:
    """Print a table for each setting, then the speed-ups and the budget checks."""
    _show_head(report, opened)
    units = {model.loaded.description.preprocessing.unit for model in opened.values()}
    unit = units.pop() if len(units) == 1 else "input"
    panels = list(dict.fromkeys(run.setting.without_batch for run in report.runs))
    for panel in panels:
        if len(panels) > 1:
            ui.print_text(f"--- {panel}", "")
        _show_panel(report, panel, unit)
    if (fewest := min(run.latency.count for run in report.runs)) < _ENOUGH_RUNS:
        ui.print_text(f"Only {fewest} run{'s' if fewest > 1 else ''} of each: too few for reliable intervals.")
    for name, reason in report.missing.items():
        ui.print_text(f"left out: {name}: {reason}")
    if any(run.bytes for run in report.runs):
        ui.print_text("Outputs were not compared: repshift advise does that.")
    if not report.ratios:
        ui.print_text("Nothing to compare: {}. {}".format(*why_nothing([opened])))
    for verdict in verdicts:
        ui.print_text(f"budget, {verdict}")


def why_nothing(opened: Iterable[Mapping[str, Opened]]) -> tuple[str, str]:
    """Why no model is compared with a dense model, and what to do."""
    from repshift_cli.checkpoints.exported import OpenedExport

    if any(isinstance(model, OpenedExport) for each in opened for model in each.values()):
        return (
            "an exported file is compared with a dense one of the same format and weights",
            "Export the dense model too, with --dense, and give both.",
        )
    return "no model is compressed", "Add --recipe to compress it for the run."


def _show_head(report: BenchReport, opened: Mapping[str, Opened]) -> None:
    import torch

    ui.print_text(", ".join(opened))
    if random := [label for label, model in opened.items() if model.loaded.source.origin == "random"]:
        ui.print_text(f"random weights (they do not change the speed): {', '.join(random)}")
    ui.print_text(report.machine)
    layout = "" if report.memory_format == "contiguous" else f", memory format {report.memory_format}"
    attention = "no attention" if report.attention == "none" else f"attention {report.attention}"
    ui.print_text(f"{attention}{layout}, torch {torch.__version__}", "")


def _show_panel(report: BenchReport, panel: str, unit: str) -> None:
    runs = [run for run in report.runs if run.setting.without_batch == panel]
    ratios = [ratio for ratio in report.ratios if ratio.setting.without_batch == panel]
    _show_runs(runs, unit)
    dense = {run.name for run in runs if run.role == "dense"}
    if any(run.role == "peer" for run in runs):
        _show_baselines(runs, ratios, dense)
    ours = [ratio for ratio in ratios if ratio.role == "compressed" and ratio.against in dense]
    several = len({ratio.name for ratio in ours}) > 1
    for ratio in ours:
        ui.print_text(f"batch {ratio.batch}{f', {ratio.name}' if several else ''}: {ratio}")
    for ratio in ratios:
        if ratio.role == "peer" and ratio.against not in dense:
            ui.print_text(f"batch {ratio.batch}, {ratio.name} against {ratio.against}: {ratio}")
    for found in report.break_even:
        if found.setting.without_batch == panel and found.against in dense and len(found.tried) > 1:
            ui.print_text(f"{f'{found.name}: ' if several else ''}{found}")
    for batch in dict.fromkeys(run.batch for run in runs if run.compilation):
        compiled = [(run.name, run.compilation) for run in runs if run.batch == batch and run.compilation]
        seconds = ", ".join(f"{name} {each.seconds:.1f} s" for name, each in compiled)
        again = sum(each.recompiles for _, each in compiled)
        ui.print_text(f"batch {batch} compiled in: {seconds}; recompiled while timed: {again or 'never'}")
    for read in report.end_to_end:
        if read.setting.without_batch == panel:
            _show_end_to_end(read, unit, {ratio.name for ratio in ours})
    ui.print_text("")


def _show_runs(runs: Sequence[Run], unit: str) -> None:
    with_memory = any(run.peak_bytes is not None for run in runs)
    with_bytes = any(run.bytes for run in runs)
    columns = ["batch", "model", "GMACs", "ms [p10-p90]", f"{unit}s/s", *["peak MB"] * with_memory]
    columns += ["file MB"] * with_bytes
    rows = []
    for run in runs:
        row = [str(run.batch), run.name, _number(run.macs / 1e9), _spread(run.latency), _number(run.throughput)]
        row += ["-" if run.peak_bytes is None else _number(run.peak_bytes * 1e-6)] * with_memory
        row += ["-" if run.bytes is None else _number(run.bytes * 1e-6)] * with_bytes
        rows.append(row)
    ui.print_table(None, columns, rows, left=2)


def _show_baselines(runs: Sequence[Run], ratios: Sequence[Ratio], dense: set[str]) -> None:
    over_dense = {(ratio.batch, ratio.name): ratio for ratio in ratios if ratio.against in dense}
    own_ratios = (ratio for ratio in ratios if ratio.role == "compressed")
    ours = {(ratio.batch, ratio.against): ratio for ratio in own_ratios if ratio.against not in dense}
    macs = {run.name: run.macs for run in runs}
    own_macs = {ratio.against: macs[ratio.name] for ratio in ours.values()}
    rows = []
    for run in runs:
        gain, own = over_dense.get((run.batch, run.name)), ours.get((run.batch, run.name))
        extra = f"{run.macs / own_macs[run.name] - 1:+.1%}" if run.name in own_macs else ""
        efficiency = f"{gain.efficiency:.2f}" if gain else ""
        versus_dense, versus_baseline = (_ratio(each.speedup) if each else "" for each in (gain, own))
        if own and own.speedup.clear:
            versus_baseline += " faster"
        elif own and own.speedup.clearly_slower:
            versus_baseline = f"{1 / own.speedup.ratio:.2f}x slower"
        rows.append([str(run.batch), run.name, extra, versus_dense, efficiency, versus_baseline])
    columns = ["batch", "model", "extra MACs", "vs dense", "efficiency", "compressed is"]
    ui.print_table(None, columns, rows, left=2)
    if any("?" in cell for row in rows for cell in row):
        ui.print_text("?: not a clear difference, the intervals overlap.", "")


def _show_end_to_end(found: EndToEnd, unit: str, ours: set[str]) -> None:
    how = f"{found.workers} worker process{'es' if found.workers > 1 else ''}" if found.workers else "the main process"
    size, count, passes = found.setting.batch, found.reading.images, len(found.reading.seconds)
    ui.print_text("", f"From files, batch {size}: {count} images of {found.data}, read by {how}, {passes} passes", "")
    gains = {name: _ratio(gain) for name, gain in found.speedups.items()}
    rows = [
        [name, _spread(side.throughput), f"{side.waiting:.0%}", side.bottleneck, gains.get(name, "")]
        for name, side in found.sides.items()
    ]
    rows.append(["reading alone", _spread(found.reading.throughput), "", "", ""])
    ui.print_table(None, ["model", f"{unit}s/s [p10-p90]", "waiting", "bound by", "vs dense"], rows)
    for name in sorted(ours & gains.keys()):
        ui.print_text(f"batch {size}, {name}, from files: {found.speedups[name]}")


def _ratio(gain: Speedup) -> str:
    """The ratio, with a question mark if it could be chance."""
    return f"{gain.ratio:.2f}x" if gain.clear or gain.clearly_slower else f"{gain.ratio:.2f}x ?"


def _spread(spread: Spread) -> str:
    return f"{_number(spread.median)} [{_number(spread.p10)}-{_number(spread.p90)}]"


def _number(value: float) -> str:
    """Three significant digits, and all digits before the decimal point."""
    return next((f"{value:.{places}f}" for limit, places in _DECIMALS if abs(value) < limit), f"{value:.0f}")
