"""DeiT-S, dense and compressed, in ONNX Runtime, as a program of torch.export and compiled by AOTInductor, on this CPU.

Each model is exported first (without the check, which `repshift export` makes); then all of one batch size run in turn,
the model in torch among them. Weights are random, which does not change the speed. On a machine that others use,
export before it is quiet:

    python benchmarks/export_cpu.py --exports FOLDER --no-measure
    GOMP_SPINCOUNT=10000 python benchmarks/export_cpu.py --exports FOLDER --threads 2 --seconds 20

Without that variable torch's idle threads, which spin for long, take the cores of the runtime whose turn is next.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from _results import latency, provenance, publish, table, words
from _timing import cpu_settings

from repshift_cli.artifact import Opened
from repshift_cli.benchmark import BenchReport, Contender, Run, contenders_of, run_bench
from repshift_cli.compression import compress_dense
from repshift_cli.exporting import Request, Target, export
from repshift_cli.measure import speedup
from repshift_cli.progress import Progress
from repshift_cli.runtimes import open_exported
from repshift_cli.ui import Screen

MODEL, RECIPE = "deit_small_patch16_224", "deit_small_paper"
EAGER = "torch, eager"


def main() -> None:
    options = parse_options()
    progress = Screen()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.exports or Path(temporary)
        opened = compress_dense(options.model, options.recipe)
        ways = [EAGER, *write_all(opened, options, folder, progress)]
        if options.no_measure:
            return
        contenders = [*eager(opened), *exported(ways[1:], folder)]
        report = measure(contenders, options, progress)
    command = shlex.join(["python", "benchmarks/export_cpu.py", *sys.argv[1:]])
    runtime = f"onnxruntime {version('onnxruntime')}."
    text = "\n\n".join(
        ["## Exported files on a CPU", f"{provenance(command, report.machine)} {runtime}", render(ways, report), NOTE]
    )
    publish("export_cpu", text, options.dry_run)


NOTE = (
    "DeiT-S, recipe `deit_small_paper`. Latency per batch in ms: median [p10-p90] of runs in turn, all of one batch "
    "size together. Efficiency is the speed-up divided by the ratio of the multiply-accumulates. The opset is that of "
    "the ONNX file: from 20 on GELU is one operator, from 23 on attention is."
)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--opsets", type=int, nargs="*", default=[18, 20, 23])
    parser.add_argument("--skip", nargs="*", default=[], choices=["pt2", "aoti"], help="formats to leave out")
    parser.add_argument("--exports", type=Path, help="keep exports in this folder, and take those that lie there")
    parser.add_argument("--no-measure", action="store_true", help="only export")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each side at each batch size")
    parser.add_argument("--min-runs", type=int, default=10)
    parser.add_argument("--dry-run", action="store_true", help="print the tables, leave docs/results.md as it is")
    return parser.parse_args()


def write_all(opened: Opened, options: argparse.Namespace, folder: Path, progress: Progress) -> list[str]:
    """Export both sides in each way; returns the names of the ways, which are those of folders."""
    wanted: list[tuple[str, Target, int | None]] = [(f"ONNX, opset {each}", "onnx", each) for each in options.opsets]
    wanted += [(name, target, None) for name, target in PROGRAMS if target not in options.skip]
    for name, target, opset in wanted:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for side in ("dense", "compressed"):
            output = folder / name / f"{side}{'.onnx' if target == 'onnx' else '.pt2'}"
            if not output.exists():
                export(opened, Request(target, output, dense=side == "dense", opset=opset, verify=False), progress)
    return [name for name, _, _ in wanted]


PROGRAMS: tuple[tuple[str, Target], ...] = (("torch.export", "pt2"), ("AOTInductor", "aoti"))


def eager(opened: Opened) -> Iterator[Contender]:
    dense, compressed = contenders_of({MODEL: opened})
    yield renamed(dense, f"{EAGER}, dense", None)
    yield renamed(compressed, f"{EAGER}, compressed", f"{EAGER}, dense")


def renamed(contender: Contender, name: str, against: str | None) -> Contender:
    return Contender(name, contender.module, contender.macs, contender.input_size, against, contender.context)


def exported(ways: Sequence[str], folder: Path) -> Iterator[Contender]:
    for way in ways:
        for side, against in (("dense", None), ("compressed", f"{way}, dense")):
            (path,) = (folder / way).glob(f"{side}.*")
            opened = open_exported(path)
            size = opened.loaded.description.preprocessing.shape
            yield Contender(f"{way}, {side}", opened.module, opened.macs, size, against)


def measure(contenders: Sequence[Contender], options: argparse.Namespace, progress: Progress) -> BenchReport:
    settings = cpu_settings(options)
    return run_bench(contenders, options.batch_sizes, settings, progress)


def render(ways: Sequence[str], report: BenchReport) -> str:
    measured = {(run.batch, run.name): run for run in report.runs}
    columns = ["", "dense", "compressed", "speed-up", "efficiency", "compressed, over eager"]
    parts = []
    for batch in dict.fromkeys(run.batch for run in report.runs):
        rows = [row(way, batch, measured, report) for way in ways]
        parts.append(f"Batch {batch}:\n\n{table(columns, rows)}")
    return "\n\n".join(parts)


def row(way: str, batch: int, measured: dict[tuple[int, str], Run], report: BenchReport) -> list[str]:
    dense, compressed, own = (
        measured[batch, name] for name in (f"{way}, dense", f"{way}, compressed", f"{EAGER}, compressed")
    )
    ratio = next(each for each in report.ratios if (each.batch, each.name) == (batch, compressed.name))
    over = "-" if way == EAGER else words(speedup(own.timing, compressed.timing))
    return [
        way,
        latency(dense.latency),
        latency(compressed.latency),
        words(ratio.speedup),
        f"{ratio.efficiency:.2f}",
        over,
    ]


if __name__ == "__main__":
    main()
