"""DeiT-S and DeiT-B with the schedule of the paper (arXiv 2508.00367, table of image classification) on this CPU.

All models run in turn in one process, on the same weights: the dense model with fused and with explicit attention (the
paper compares with the latter), the compressed model, a similar schedule with multiples of 16 tokens, and, at equal
MACs, pruning by class attention and ToMe's merging. Weights are random, which does not change the speed.

    python benchmarks/vit_cpu.py --threads 2 --seconds 10
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import get_args

from _results import latency, page_name, publish, table, words
from _timing import cpu_settings

from repshift_cli.benchmark.baselines import contenders_against
from repshift_cli.benchmark.report import BenchReport, Ratio, Run
from repshift_cli.benchmark.run import Contender, run_bench
from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.cli.ui import Screen
from repshift_cli.compression.api import compress_dense
from repshift_cli.measure.compiled import CompileMode
from repshift_cli.measure.device import DTYPES
from repshift_cli.measure.latency import compute_speedup
from repshift_cli.planning.plan import Plan
from repshift_cli.reduction.baselines import dense_copy
from repshift_cli.reduction.compressed_model import attach
from repshift_cli.utils.progress import Progress

BASELINES = ("explicit", "class-attention", "class-attention-row", "bipartite", "tome")
TILES = "on tiles"


@dataclass(frozen=True)
class Published:
    """Rows of the paper, measured on a data-centre GPU with its own batch size; its GFLOPs are MACs."""

    title: str
    model: str
    recipe: str
    tiles: str
    dense_gmacs: float
    gmacs: float
    explicit_images_s: int
    images_s: int


PUBLISHED = {
    "small": Published(
        "DeiT-S", "deit_small_patch16_224", "deit_small_paper", "deit_small_tiles", 4.6, 3.0, 3002, 5948
    ),
    "base": Published("DeiT-B", "deit_base_patch16_224", "deit_base_paper", "deit_base_tiles", 17.6, 11.5, 1037, 2428),
}


def main() -> None:
    options = parse_options()
    sections = []
    machine = ""
    for key in options.models:
        report = measure(PUBLISHED[key], options, Screen())
        machine = report.machine
        sections.append(render(PUBLISHED[key], report, as_published=options.img_size is None))
    size = f", {options.img_size} pixels" if options.img_size else ""
    compiled = "" if options.compile == "off" else f", compiled ({options.compile})"
    title = f"DeiT on a CPU, {options.dtype}{compiled}{size}"
    page = page_name("vit_cpu", (options.dtype, "float32"), (options.compile, "off"), (options.img_size, None))
    publish(page, title, machine, [*sections, NOTE], dry_run=options.dry_run)


NOTE = (
    "Milliseconds per batch: median [p10-p90] of interleaved runs. `over dense` is the speed-up over the dense model "
    "with fused attention; efficiency is that divided by the ratio of the MACs; `speed-up over it` is the "
    "speed-up of the compressed model over that row. `explicit` is dense with explicit attention, the paper's "
    "baseline. `class-attention` prunes with the full attention map, as its authors do, `class-attention-row` with "
    "one row of it. `bipartite` merges at the same sites, `tome` the same number of tokens in every block. `on tiles` "
    "has multiples of 16 tokens."
)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=sorted(PUBLISHED), default=["small", "base"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--compile", choices=get_args(CompileMode), default="off")
    parser.add_argument("--img-size", type=int, default=None, help="default: 224, as in the paper")
    parser.add_argument("--baselines", nargs="*", choices=BASELINES, default=BASELINES)
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each model at each batch size")
    parser.add_argument("--min-runs", type=int, default=10)
    parser.add_argument("--dry-run", action="store_true", help="print the page, write no file")
    return parser.parse_args()


def measure(published: Published, options: argparse.Namespace, progress: Progress) -> BenchReport:
    opened = compress_dense(published.model, published.recipe, LoadOptions(img_size=options.img_size))
    sides = contenders_against({published.model: opened}, options.baselines)
    assert opened.compressed is not None
    # shares the weights, like the baselines
    tiled = attach(dense_copy(opened.compressed), planned(published, options.img_size))
    size, dense = sides[0].input_size, sides[0].name
    sides.append(Contender(TILES, tiled, tiled.macs(), size, against=dense, is_baseline=True))
    sides = [replace(side, baselines=(*side.baselines, TILES)) if side.role == "compressed" else side for side in sides]
    settings = replace(cpu_settings(options, DTYPES[options.dtype]), compile=options.compile)
    return run_bench(sides, options.batch_sizes, settings, progress)


def planned(published: Published, img_size: int | None) -> Plan:
    """The plan with multiples of 16 tokens."""
    compressed = compress_dense(published.model, published.tiles, LoadOptions(img_size=img_size)).compressed
    assert compressed is not None
    return compressed.plan


def render(published: Published, report: BenchReport, *, as_published: bool) -> str:
    columns = ["batch", "", "GMACs", "ms", "images/s", "over dense", "efficiency", "speed-up over it"]
    rows = [row(run, report) for run in report.runs]
    heading = f"## {published.title}, recipe `{published.recipe}`"
    if not as_published:
        return f"{heading}\n\n{table(columns, rows)}"
    gain = published.images_s / published.explicit_images_s
    rows.append(["paper, GPU", "dense, explicit", f"{published.dense_gmacs}", "-", f"{published.explicit_images_s}"])
    rows.append(["paper, GPU", "compressed", f"{published.gmacs}", "-", f"{published.images_s}"])
    rows = [[*cells, *["-"] * (len(columns) - len(cells))] for cells in rows]
    words_of_paper = f"The paper's is {gain:.2f}x over the dense model with explicit attention."
    return f"{heading}\n\n{words_of_paper}\n\n{table(columns, rows)}"


def row(run: Run, report: BenchReport) -> list[str]:
    ratios = {(ratio.name, ratio.against): ratio for ratio in report.ratios if ratio.batch == run.batch}
    over_dense = ratios.get((run.name, "dense"))
    compressed = next(each for each in report.runs if each.role == "compressed" and each.batch == run.batch)
    against = "-" if run is compressed else words(compute_speedup(run.timing, compressed.timing))
    cells = [str(run.batch), run.name, f"{run.macs / 1e9:.2f}", latency(run.latency), f"{run.throughput:.1f}"]
    return [*cells, *gain_of(over_dense), against]


def gain_of(ratio: Ratio | None) -> list[str]:
    return ["-", "-"] if ratio is None else [words(ratio.speedup), f"{ratio.efficiency:.2f}"]


if __name__ == "__main__":
    main()
