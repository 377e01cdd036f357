"""DeiT-S and DeiT-B with the schedule of the paper (arXiv 2508.00367, table of image classification) on this CPU.

Three sides run in turn: the dense model with explicit attention, which is what the paper compares with; the dense model
with fused attention; the compressed model with fused attention. Weights are random, which does not change the speed.

    python benchmarks/vit_cpu.py --threads 2 --seconds 20
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from _results import latency, provenance, table, words, write_section

from repshift_cli.benchmark import (
    BenchReport,
    BenchSettings,
    Contender,
    Run,
    attention_mode,
    contenders_of,
    run_bench,
)
from repshift_cli.compression import compress_dense
from repshift_cli.measure import speedup
from repshift_cli.progress import Progress
from repshift_cli.ui import Screen

EXPLICIT = "dense, explicit"


@dataclass(frozen=True)
class Published:
    """Rows of the paper: a data-centre GPU, its own batch size; GFLOPs there are multiply-accumulates."""

    title: str
    model: str
    recipe: str
    dense_gmacs: float
    gmacs: float
    explicit_images_s: int
    images_s: int


PUBLISHED = {
    "small": Published("DeiT-S", "deit_small_patch16_224", "deit_small_paper", 4.6, 3.0, 3002, 5948),
    "base": Published("DeiT-B", "deit_base_patch16_224", "deit_base_paper", 17.6, 11.5, 1037, 2428),
}


def main() -> None:
    options = parse_options()
    sections = []
    machine = ""
    for key in options.models:
        report = measure(PUBLISHED[key], options, Screen())
        machine = report.machine
        sections.append(render(PUBLISHED[key], report))
    command = shlex.join(["python", "benchmarks/vit_cpu.py", *sys.argv[1:]])
    text = "\n\n".join(["## DeiT on a CPU", provenance(command, machine), *sections, NOTE])
    print(text)
    if not options.dry_run:
        write_section("vit_cpu", text)


NOTE = (
    "Latency per batch in ms: median [p10-p90] of runs in turn. The paper's speed-up is against the dense model with "
    "explicit attention on a GPU, so it holds what fused attention alone brings there (1.5x on DeiT-S); the column "
    "`over explicit` is the same comparison here, `over fused` is what letting tokens go brings by itself. "
    "Efficiency is `over fused` divided by the ratio of the multiply-accumulates."
)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=sorted(PUBLISHED), default=["small", "base"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each side at each batch size")
    parser.add_argument("--min-runs", type=int, default=10)
    parser.add_argument("--dry-run", action="store_true", help="print the tables, leave docs/results.md as it is")
    return parser.parse_args()


def measure(published: Published, options: argparse.Namespace, progress: Progress) -> BenchReport:
    opened = compress_dense(published.model, recipe_name=published.recipe)
    dense, compressed = contenders_of({published.model: opened})
    settings = BenchSettings(
        device=torch.device("cpu"),
        dtype=torch.float32,
        seconds=options.seconds,
        min_runs=options.min_runs,
        threads=options.threads,
    )
    return run_bench([explicit(dense), dense, compressed], options.batch_sizes, settings, progress)


def explicit(dense: Contender) -> Contender:
    """The same contender with explicit attention."""

    @contextmanager
    def context() -> Iterator[None]:
        with dense.context(), attention_mode(dense.module, "explicit"):
            yield

    return replace(dense, name=EXPLICIT, context=context)


def render(published: Published, report: BenchReport) -> str:
    measured = {(run.batch, run.name): run for run in report.runs}
    columns = ["", "dense, explicit", "dense, fused", "compressed, fused", "over explicit", "over fused", "efficiency"]
    rows = []
    for ratio in report.ratios:
        slow, dense, compressed = (measured[ratio.batch, name] for name in (EXPLICIT, ratio.against, ratio.name))
        gains = [words(speedup(slow.timing, compressed.timing)), words(ratio.speedup), f"{ratio.efficiency:.2f}"]
        rows.append([f"batch {ratio.batch}", *(cell(run) for run in (slow, dense, compressed)), *gains])
    gain = published.images_s / published.explicit_images_s
    paper = [f"{published.explicit_images_s}/s", "-", f"{published.images_s}/s", f"{gain:.2f}x", "-", "-"]
    rows.append(["paper, GPU", *paper])
    ratio = report.ratios[0]
    dense, compressed = measured[ratio.batch, ratio.against], measured[ratio.batch, ratio.name]
    gmacs = (
        f"{dense.macs / 1e9:.2f} to {compressed.macs / 1e9:.2f} GMACs, {ratio.macs:.2f}x less "
        f"(paper: {published.dense_gmacs} to {published.gmacs})"
    )
    return f"### {published.title}, recipe `{published.recipe}`\n\n{gmacs}.\n\n{table(columns, rows)}"


def cell(run: Run) -> str:
    return f"{latency(run.latency)}, {run.throughput:.1f}/s"


if __name__ == "__main__":
    main()
