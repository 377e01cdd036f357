"""UMT-B and UMT-L on clips of 12 frames, on this CPU: the speed-up by fused attention, by dropping tokens, and by both.

The rows of the paper (arXiv 2508.00367, table of text-video retrieval) are beside them. All models run in turn in one
process. Weights are random, which does not change the speed.

    python benchmarks/video_cpu.py --threads 2 --seconds 40
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from _results import latency, publish, table, words
from _timing import cpu_settings

from repshift_cli.benchmark.report import BenchReport, Run
from repshift_cli.benchmark.run import Contender, run_bench
from repshift_cli.checkpoints.artifact import Opened
from repshift_cli.cli.ui import Screen
from repshift_cli.compression.api import compress_dense
from repshift_cli.measure.latency import compute_speedup
from repshift_cli.models.attention_mode import AttentionMode, attention_mode
from repshift_cli.planning.recipe import Recipe, shipped_recipes


@dataclass(frozen=True)
class Published:
    """Videos per second in the paper, on a data-centre GPU: dense with explicit attention, and compressed."""

    title: str
    model: str
    recipes: tuple[str, ...]
    videos_s: tuple[int, int]


PUBLISHED = {
    "base": Published("UMT-B", "umt_base", ("umt_base_paper", "umt_base_fast", "umt_base_vidtldr"), (32, 175)),
    "large": Published("UMT-L", "umt_large", ("umt_large_paper",), (12, 66)),
}
DENSE, EXPLICIT = "dense", "dense, explicit"
VIDTLDR = "umt_base_vidtldr, own score, explicit"
NOTE = (
    "Milliseconds per batch: median [p10-p90] of interleaved runs. Attention is torch's fused kernel unless `explicit` "
    "is given. Efficiency is the speed-up over dense divided by the ratio of the MACs, including score "
    "and merging. Peak is the peak memory without weights. `own score` is the score of vid-TLDR: it needs "
    "the attention map, so attention is not fused."
)


def main() -> None:
    options = parse_options()
    for key in options.models:
        published = PUBLISHED[key]
        report = measure(published, options)
        tables = [render(report, published, batch) for batch in options.batch_sizes]
        title = f"Video on a CPU: {published.title}, 12 frames of 224"
        publish(f"video_cpu_{key}", title, report.machine, [*tables, NOTE], dry_run=options.dry_run)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=sorted(PUBLISHED), default=list(PUBLISHED))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1])
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--seconds", type=float, default=40.0, help="for each model at each batch size")
    parser.add_argument("--min-runs", type=int, default=5)
    parser.add_argument("--dry-run", action="store_true", help="print the page, write no file")
    return parser.parse_args()


def measure(published: Published, options: argparse.Namespace) -> BenchReport:
    settings = cpu_settings(options)
    return run_bench(list(contenders(published)), options.batch_sizes, settings, Screen())


def contenders(published: Published) -> Iterator[Contender]:
    for index, recipe in enumerate(published.recipes):
        opened = compress_dense(published.model, recipe_name=recipe)
        if index == 0:
            yield side(opened, EXPLICIT, "explicit", dense=True)
            yield side(opened, DENSE, "sdpa", dense=True)
            yield side(opened, f"{recipe}, explicit", "explicit")
        yield side(opened, recipe, "sdpa")
    if VIDTLDR.startswith(published.recipes[-1]):
        text = shipped_recipes()[published.recipes[-1]]
        metric = next(line for line in text.splitlines() if line.startswith("metric:"))
        own = Recipe.parse(text.replace(metric, "metric: {kind: attention_entropy}"))
        yield side(compress_dense(published.model, own), VIDTLDR, "explicit")


def side(opened: Opened, name: str, attention: AttentionMode, dense: bool = False) -> Contender:
    module = opened.module
    assert opened.compressed is not None
    inner = opened.compressed.dense if dense else None
    return Contender(
        name,
        module,
        opened.dense_macs if dense else opened.macs,
        opened.loaded.description.preprocessing.shape,
        context=partial(both, partial(attention_mode, module, attention), inner),
    )


@contextmanager
def both(
    attention: Callable[[], AbstractContextManager[None]], inner: Callable[[], AbstractContextManager[object]] | None
) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(attention())
        if inner:
            stack.enter_context(inner())
        yield


def render(report: BenchReport, published: Published, batch: int) -> str:
    runs = {run.name: run for run in report.runs if run.batch == batch}
    rows = [row(run, runs) for run in runs.values()]
    before, after = published.videos_s
    rows.append(["paper, GPU: dense, explicit", "-", f"{before} videos/s", "1.00x", "-", "-", "-"])
    rows.append(["paper, GPU: compressed", "-", f"{after} videos/s", f"{after / before:.2f}x", "-", "-", "-"])
    columns = ["", "GMACs", "ms", "over explicit", "over dense", "efficiency", "peak MB"]
    return f"## Batch {batch}\n\n{table(columns, rows)}"


def row(run: Run, runs: dict[str, Run]) -> list[str]:
    over_explicit, over_dense = (compute_speedup(runs[name].timing, run.timing) for name in (EXPLICIT, DENSE))
    efficiency = "-"
    if run.macs < runs[DENSE].macs and not run.name.endswith("explicit"):
        efficiency = f"{over_dense.ratio * run.macs / runs[DENSE].macs:.2f}"
    return [
        run.name,
        f"{run.macs / 1e9:.1f}",
        latency(run.latency),
        "-" if run.name == EXPLICIT else words(over_explicit),
        "-" if run.name == DENSE else words(over_dense),
        efficiency,
        f"{run.peak_bytes / 1e6:.0f}",
    ]


if __name__ == "__main__":
    main()
