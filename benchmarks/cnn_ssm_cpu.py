"""ResNet-34, ResNet-50 and Vim-Ti at the paper's cost (arXiv 2508.00367, tables of CNNs and SSMs) on this CPU.

Dense and compressed run in turn on the same weights; CNNs in both memory formats. Weights are random, which does not
change the speed.

    python benchmarks/cnn_ssm_cpu.py --threads 2 --seconds 15
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import dataclass

import torch
from _results import provenance, table, write_section

from repshift_cli.benchmark import BenchReport, BenchSettings, MemoryFormat, Ratio, Run, contenders_of, run_bench
from repshift_cli.compression import compress_dense
from repshift_cli.measure import Speedup, Spread
from repshift_cli.progress import Progress
from repshift_cli.ui import Screen


@dataclass(frozen=True)
class Published:
    """A row of the paper, measured on a data-centre GPU; GFLOPs there are multiply-accumulates."""

    title: str
    model: str
    recipe: str
    gmacs: tuple[float, float]
    images_s: tuple[int, int]
    formats: tuple[MemoryFormat, ...]


BOTH: tuple[MemoryFormat, ...] = ("contiguous", "channels_last")
PUBLISHED = {
    "resnet34": Published("ResNet-34", "resnet34", "resnet34_paper", (3.7, 2.5), (5811, 7112), BOTH),
    "resnet50": Published("ResNet-50", "resnet50", "resnet50_paper", (4.1, 2.7), (2927, 3553), BOTH),
    "vim": Published("Vim-Ti", "vim_tiny_patch16_224", "vim_tiny_paper", (1.5, 1.3), (1603, 1754), ("contiguous",)),
}

NOTE = (
    "Milliseconds per batch: median [p10-p90] of runs in turn. Efficiency is the speed-up divided by the ratio of the "
    "multiply-accumulates (with the products of the scan, for Vim)."
)


def main() -> None:
    options = parse_options()
    sections, machine = [], ""
    for key in options.models:
        published = PUBLISHED[key]
        reports = {layout: measure(published, layout, options, Screen()) for layout in published.formats}
        machine = next(iter(reports.values())).machine
        sections.append(render(published, reports))
    command = shlex.join(["python", "benchmarks/cnn_ssm_cpu.py", *sys.argv[1:]])
    text = "\n\n".join(["## CNNs and Vision Mamba on a CPU", provenance(command, machine), *sections, NOTE])
    print(text)
    if not options.dry_run:
        write_section("cnn_ssm_cpu", text)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=sorted(PUBLISHED), default=list(PUBLISHED))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each side at each batch size")
    parser.add_argument("--min-runs", type=int, default=10)
    parser.add_argument("--dry-run", action="store_true", help="print the tables, leave docs/results.md as it is")
    return parser.parse_args()


def measure(published: Published, layout: MemoryFormat, options: argparse.Namespace, progress: Progress) -> BenchReport:
    opened = compress_dense(published.model, recipe_name=published.recipe)
    settings = BenchSettings(
        device=torch.device("cpu"),
        dtype=torch.float32,
        seconds=options.seconds,
        min_runs=options.min_runs,
        threads=options.threads,
        memory_format=layout,
    )
    return run_bench(contenders_of({published.model: opened}), options.batch_sizes, settings, progress)


def render(published: Published, reports: dict[MemoryFormat, BenchReport]) -> str:
    rows = [
        row(layout, ratio, {(run.batch, run.name): run for run in report.runs})
        for layout, report in reports.items()
        for ratio in report.ratios
    ]
    before, after = published.images_s
    rows.append(["paper, GPU", f"{before}/s", f"{after}/s", f"{after / before:.2f}x", "-"])
    report = next(iter(reports.values()))
    dense, compressed = report.runs[:2]
    gmacs = (
        f"{dense.macs / 1e9:.2f} to {compressed.macs / 1e9:.2f} GMACs, {report.ratios[0].macs:.2f}x less "
        f"(paper: {published.gmacs[0]} to {published.gmacs[1]})"
    )
    columns = ["", "dense", "compressed", "speed-up", "efficiency"]
    return f"### {published.title}, recipe `{published.recipe}`\n\n{gmacs}.\n\n{table(columns, rows)}"


def row(layout: MemoryFormat, ratio: Ratio, runs: dict[tuple[int, str], Run]) -> list[str]:
    dense, compressed = (runs[ratio.batch, name] for name in (ratio.against, ratio.name))
    return [
        f"batch {ratio.batch}, {layout}",
        cell(dense.latency),
        cell(compressed.latency),
        words(ratio.speedup),
        f"{ratio.efficiency:.2f}",
    ]


def cell(spread: Spread) -> str:
    return f"{spread.median:.1f} [{spread.p10:.1f}-{spread.p90:.1f}]"


def words(gain: Speedup) -> str:
    """The ratio, marked where it may be noise."""
    return f"{gain.ratio:.2f}x" if gain.clear or gain.clearly_slower else f"{gain.ratio:.2f}x (within noise)"


if __name__ == "__main__":
    main()
