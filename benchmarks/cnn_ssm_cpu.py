"""ResNet-34, ResNet-50 and Vim-Ti at the paper's cost (arXiv 2508.00367, tables of CNNs and SSMs) on this CPU.

Dense and compressed run in turn on the same weights; CNNs in both memory formats. For CNNs a third model crops the maps
to the same sizes without a score. Its loss of efficiency is due to convolutions on smaller maps, not to scoring and
gathering. Weights are random, which does not change the speed.

    python benchmarks/cnn_ssm_cpu.py --threads 2 --seconds 15
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from _results import latency, publish, table, words
from _timing import cpu_settings
from torch import Tensor

from repshift_cli.benchmark.report import BenchReport, MemoryFormat, Ratio, Run
from repshift_cli.benchmark.run import Contender, contenders_of, run_bench
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.cli.ui import Screen
from repshift_cli.compression.api import compress_dense
from repshift_cli.planning.plan import Plan
from repshift_cli.utils.progress import Progress


@dataclass(frozen=True)
class Published:
    """A row of the paper, measured on a data-centre GPU; its GFLOPs are MACs."""

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

CROP = "plain crop"
NOTE = (
    "Milliseconds per batch: median [p10-p90] of interleaved runs. Efficiency is the speed-up divided by the ratio of "
    "the MACs (for Vim including the products of the scan). `of a plain crop` is the efficiency of the "
    "same network that crops its maps to the same sizes without a score, which is an upper bound for these sizes."
)


def main() -> None:
    options = parse_options()
    sections, machine = [], ""
    for key in options.models:
        published = PUBLISHED[key]
        reports = {layout: measure(published, layout, options, Screen()) for layout in published.formats}
        machine = next(iter(reports.values())).machine
        sections.append(render(published, reports))
    publish("cnn_ssm_cpu", "CNNs and Vision Mamba on a CPU", machine, [*sections, NOTE], dry_run=options.dry_run)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=sorted(PUBLISHED), default=list(PUBLISHED))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each model at each batch size")
    parser.add_argument("--min-runs", type=int, default=10)
    parser.add_argument("--dry-run", action="store_true", help="print the page, write no file")
    return parser.parse_args()


def measure(published: Published, layout: MemoryFormat, options: argparse.Namespace, progress: Progress) -> BenchReport:
    opened = compress_dense(published.model, recipe_name=published.recipe)
    settings = cpu_settings(options, memory_format=layout)
    contenders = contenders_of({published.model: opened})
    if opened.compressed is not None and opened.compressed.plan.grids_kept:
        contenders.append(cropped(published.model, contenders[-1], opened.compressed.plan))
    return run_bench(contenders, options.batch_sizes, settings, progress)


def cropped(name: str, compressed: Contender, plan: Plan) -> Contender:
    """The dense model with its maps cropped to the sizes of the plan."""
    model = load_checkpoint(name).model
    for site in plan.sites:
        assert site.grid_out is not None
        model.get_submodule(site.site).register_forward_hook(partial(crop, grid=site.grid_out))
    return replace(compressed, name=CROP, module=model)


def crop(module: torch.nn.Module, args: Any, output: Tensor, *, grid: tuple[int, int]) -> Tensor:
    dense = torch.channels_last if output.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    return output[:, :, : grid[0], : grid[1]].contiguous(memory_format=dense)


def render(published: Published, reports: dict[MemoryFormat, BenchReport]) -> str:
    rows = []
    for layout, report in reports.items():
        runs = {(run.batch, run.name): run for run in report.runs}
        limits = {ratio.batch: f"{ratio.efficiency:.2f}" for ratio in report.ratios if ratio.name == CROP}
        kept = [ratio for ratio in report.ratios if ratio.name != CROP]
        rows += [[*row(layout, ratio, runs), limits.get(ratio.batch, "-")] for ratio in kept]
    before, after = published.images_s
    rows.append(["paper, GPU", f"{before}/s", f"{after}/s", f"{after / before:.2f}x", "-", "-"])
    report = next(iter(reports.values()))
    dense, compressed = report.runs[:2]
    gmacs = (
        f"{dense.macs / 1e9:.2f} to {compressed.macs / 1e9:.2f} GMACs, {report.ratios[0].macs:.2f}x less "
        f"(paper: {published.gmacs[0]} to {published.gmacs[1]})"
    )
    columns = ["", "dense", "compressed", "speed-up", "efficiency", "of a plain crop"]
    return f"## {published.title}, recipe `{published.recipe}`\n\n{gmacs}.\n\n{table(columns, rows)}"


def row(layout: MemoryFormat, ratio: Ratio, runs: dict[tuple[int, str], Run]) -> list[str]:
    dense, compressed = (runs[ratio.batch, name] for name in (ratio.against, ratio.name))
    return [
        f"batch {ratio.batch}, {layout}",
        latency(dense.latency),
        latency(compressed.latency),
        words(ratio.speedup),
        f"{ratio.efficiency:.2f}",
    ]


if __name__ == "__main__":
    main()
