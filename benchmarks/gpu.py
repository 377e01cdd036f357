"""All models of the paper (arXiv 2508.00367) on a GPU: batch sizes, half precision, backends, compiled, and baselines.

All models of a setting run in turn on the same weights. They are random, which does not change the speed. Without a
CUDA device the page says `Not measured`.

    python benchmarks/gpu.py --dtype float16
    python benchmarks/gpu.py --models deit_base --batch-sizes 256 --compile default --against explicit tome
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from _results import latency, publish, table, words

from repshift_cli.benchmark.baselines import contenders_against
from repshift_cli.benchmark.report import BenchReport, Run
from repshift_cli.benchmark.run import BenchSettings, run_sweep
from repshift_cli.cli.ui import Screen
from repshift_cli.compression.api import compress_dense
from repshift_cli.measure.device import DTYPES
from repshift_cli.measure.latency import compute_speedup


@dataclass(frozen=True)
class Published:
    """A model, its recipe, and inputs per second in the paper: its baseline and its method; None if not in the paper.

    Attributes:
        baselines: baselines that the model supports.
        most: largest batch size to measure.
    """

    title: str
    model: str
    recipe: str
    per_s: tuple[int, int] | None
    baselines: tuple[str, ...] = ()
    most: int = 256


VIT_BASELINES = ("explicit", "class-attention", "class-attention-row", "bipartite", "tome", "fuse")
PUBLISHED = {
    "deit_small": Published("DeiT-S", "deit_small_patch16_224", "deit_small_paper", (3002, 5948), VIT_BASELINES),
    "deit_base": Published("DeiT-B", "deit_base_patch16_224", "deit_base_paper", (1037, 2428), VIT_BASELINES),
    "vit_large": Published("ViT-L", "vit_large_patch16_224", "vit_large", None, VIT_BASELINES),
    "umt_base": Published("UMT-B, 12 frames", "umt_base", "umt_base_fast", (32, 175), ("explicit",), 16),
    "umt_large": Published("UMT-L, 12 frames", "umt_large", "umt_large_paper", (12, 66), ("explicit",), 16),
    "resnet50": Published("ResNet-50", "resnet50", "resnet50_paper", (2927, 3553)),
    "vim": Published("Vim-Ti", "vim_tiny_patch16_224", "vim_tiny_paper", (1603, 1754)),
}
TITLE = "On a GPU"


def main() -> None:
    options = parse_options()
    if not torch.cuda.is_available():
        publish("gpu", TITLE, "no CUDA device", ["**Not measured.**"], dry_run=options.dry_run)
        return
    sections, machine = [], ""
    for key in options.models:
        published = PUBLISHED[key]
        report = measure(published, options)
        machine = report.machine
        sections.append(render(published, report))
    note = (
        "Milliseconds per batch: median [p10-p90] of interleaved runs. `over explicit` is the comparison of the paper; "
        "efficiency is the speed-up over dense in the same setting divided by the ratio of the MACs."
    )
    publish("gpu", TITLE, machine, [*sections, note], dry_run=options.dry_run)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=sorted(PUBLISHED), default=list(PUBLISHED))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 64, 256])
    parser.add_argument("--dtype", nargs="+", choices=sorted(DTYPES), default=["float16"])
    parser.add_argument("--attention", nargs="+", default=["auto"], help="auto, flash, sdpa, sdpa:flash, ...")
    parser.add_argument(
        "--compile", nargs="+", default=["off"], help="off, default, reduce-overhead (CUDA graphs), ..."
    )
    parser.add_argument("--against", nargs="*", default=None, help="baselines (default: all that the model supports)")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each model at each batch size")
    parser.add_argument("--dry-run", action="store_true", help="print the page, write no file")
    return parser.parse_args()


def measure(published: Published, options: argparse.Namespace) -> BenchReport:
    opened = compress_dense(published.model, recipe_name=published.recipe)
    names = published.baselines if options.against is None else options.against
    sweep = [
        BenchSettings(
            device=torch.device("cuda"),
            dtype=DTYPES[dtype],
            seconds=options.seconds,
            attention=attention,
            compile=compile_mode,
        )
        for dtype in options.dtype
        for attention in options.attention
        for compile_mode in options.compile
    ]
    batches = [batch for batch in options.batch_sizes if batch <= published.most]
    return run_sweep(contenders_against({published.model: opened}, names), batches, sweep, Screen())


def render(published: Published, report: BenchReport) -> str:
    columns = ["setting", "", "GMACs", "ms", "per s", "over explicit", "over dense", "efficiency"]
    rows = [row(run, [other for other in report.runs if other.setting == run.setting]) for run in report.runs]
    if published.per_s is not None:
        before, after = published.per_s
        rows.append(["paper", "its baseline", "-", "-", f"{before}", "1.00x", "-", "-"])
        rows.append(["paper", "compressed", "-", "-", f"{after}", f"{after / before:.2f}x", "-", "-"])
    return f"## {published.title}, recipe `{published.recipe}`\n\n{table(columns, rows)}"


def row(run: Run, group: list[Run]) -> list[str]:
    known = {other.name: other for other in group}
    setting = f"batch {run.batch}, {run.setting.dtype}, {run.attention}, compile {run.setting.compile}"
    gains = [
        words(compute_speedup(known[name].timing, run.timing)) if name in known else "-"
        for name in ("explicit", "dense")
    ]
    dense = known["dense"]
    efficiency = (
        "-"
        if run.macs >= dense.macs
        else f"{compute_speedup(dense.timing, run.timing).ratio * run.macs / dense.macs:.2f}"
    )
    return [
        setting,
        run.name,
        f"{run.macs / 1e9:.2f}",
        latency(run.latency),
        f"{run.throughput:.0f}",
        *gains,
        efficiency,
    ]


if __name__ == "__main__":
    main()
