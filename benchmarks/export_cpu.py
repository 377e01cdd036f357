"""DeiT, dense and compressed, in each format of `repshift export` that runs on its own, on this CPU.

Each model is exported first (without the check of `repshift export`): dense, with the schedule of the paper, and with a
similar one with multiples of 16 tokens. Then for each format these three run in turn. The formats run one after the
other, because threads of a runtime spin for a while after its turn. Random weights do not change the speed. On a shared
machine, export first and measure when it is idle:

    python benchmarks/export_cpu.py --exports FOLDER --no-measure
    GOMP_SPINCOUNT=10000 python benchmarks/export_cpu.py --exports FOLDER --threads 2 --seconds 20

Without that variable, idle threads of torch spin for long and occupy the cores of the next runtime.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from _results import latency, page_name, publish, table, words
from _timing import cpu_settings

from repshift_cli.benchmark.report import BenchReport
from repshift_cli.benchmark.run import Contender, contenders_of, run_bench
from repshift_cli.checkpoints.artifact import Opened
from repshift_cli.checkpoints.exported import open_exported
from repshift_cli.cli.ui import Screen
from repshift_cli.compression.api import compress_dense
from repshift_cli.export.job import export
from repshift_cli.export.request import Request
from repshift_cli.measure.device import DTYPES
from repshift_cli.utils.progress import Progress

TITLES = {"small": "DeiT-S", "base": "DeiT-B"}
EAGER = "torch, eager"
SUFFIXES = {"onnx": ".onnx", "openvino": ""}
"""Endings of the outputs by format; others end with `.pt2`."""


@dataclass(frozen=True)
class Way:
    """An export format; its name is the name of a folder."""

    name: str
    target: str
    opset: int | None = None
    tune: bool = False


IR = Way("OpenVINO", "openvino")
PROGRAMS = (Way("torch.export", "pt2"), Way("AOTInductor", "aoti"), Way("AOTInductor, tuned", "aoti", tune=True))


def main() -> None:
    options = parse_options()
    progress = Screen()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.exports or Path(temporary)
        name = f"deit_{options.model}"
        models = {
            "compressed": compress_dense(f"{name}_patch16_224", f"{name}_paper"),
            "on tiles": compress_dense(f"{name}_patch16_224", f"{name}_tiles"),
        }
        ways = [EAGER, *write_all(models, options, folder, progress)]
        if options.no_measure:
            return
        reports = {way: measure(models, way, folder, options, progress) for way in ways}
    machine = f"{reports[EAGER].machine}; onnxruntime {version('onnxruntime')}, openvino {version('openvino')}"
    title = f"Exported files on a CPU, {TITLES[options.model]}, {options.dtype}"
    page = page_name("export_cpu", (options.model, "small"), (options.dtype, "float32"))
    publish(page, title, machine, [render(reports, options.batch_sizes), NOTE], dry_run=options.dry_run)


NOTE = (
    "`compressed` uses the paper's recipe with 158, 127 and 102 tokens, `on tiles` 160, 128 and 112; `tuned` means "
    "`--tune`. The files accept any batch size. Latency per batch in ms: median [p10-p90]; the models of one line are "
    "interleaved. In brackets: speed-up over dense, and efficiency (speed-up divided by the ratio of the "
    "MACs). GELU is one ONNX operator from opset 20, attention from opset 23."
)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=sorted(TITLES), default="small")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="bfloat16 is unsupported for ONNX")
    parser.add_argument(
        "--opsets", type=int, nargs="*", default=None, help="default: 18 20 23, if ONNX supports the dtype"
    )
    parser.add_argument(
        "--skip", nargs="*", default=[], choices=["openvino", "pt2", "aoti"], help="formats to leave out"
    )
    parser.add_argument("--exports", type=Path, help="folder for exports; existing ones are used again")
    parser.add_argument("--no-measure", action="store_true", help="only export")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each model at each batch size")
    parser.add_argument("--min-runs", type=int, default=10)
    parser.add_argument("--dry-run", action="store_true", help="print the page, write no file")
    return parser.parse_args()


def write_all(models: Mapping[str, Opened], options: argparse.Namespace, folder: Path, progress: Progress) -> list[str]:
    """Export all models in each format; returns the names of the formats."""
    opsets = options.opsets
    if opsets is None:
        opsets = [] if options.dtype == "bfloat16" else [18, 20, 23]
    wanted = [Way(f"ONNX, opset {each}", "onnx", each) for each in opsets]
    ways = PROGRAMS if options.dtype == "bfloat16" else (IR, *PROGRAMS)
    wanted += [way for way in ways if way.target not in options.skip]
    for way in wanted:
        (folder / way.name).mkdir(parents=True, exist_ok=True)
        for side, opened in {"dense": models["compressed"], **models}.items():
            output = folder / way.name / f"{side}{SUFFIXES.get(way.target, '.pt2')}"
            if not output.exists():
                request = Request(way.target, output, dense=side == "dense", opset=way.opset, tune=way.tune)
                export(opened, replace(request, dtype=DTYPES[options.dtype], verify=False), progress)
    return [way.name for way in wanted]


def measure(
    models: Mapping[str, Opened], way: str, folder: Path, options: argparse.Namespace, progress: Progress
) -> BenchReport:
    sides = eager(models) if way == EAGER else exported(way, models, folder)
    return run_bench(list(sides), options.batch_sizes, cpu_settings(options, DTYPES[options.dtype]), progress)


def eager(models: Mapping[str, Opened]) -> Iterator[Contender]:
    dense, compressed = contenders_of({"model": models["compressed"]})
    yield replace(dense, name=f"{EAGER}, dense")
    yield replace(compressed, name=f"{EAGER}, compressed", against=f"{EAGER}, dense")
    (tiled,) = (each for each in contenders_of({"model": models["on tiles"]}) if each.role == "compressed")
    yield replace(tiled, name=f"{EAGER}, on tiles", against=f"{EAGER}, dense")


def exported(way: str, sides: Iterable[str], folder: Path) -> Iterator[Contender]:
    for side in ("dense", *sides):
        (path,) = (folder / way).glob(f"{side}*")
        opened = open_exported(path)
        size = opened.loaded.description.preprocessing.shape
        against = None if side == "dense" else f"{way}, dense"
        yield Contender(f"{way}, {side}", opened.module, opened.macs, size, against)


def render(reports: Mapping[str, BenchReport], batches: Sequence[int]) -> str:
    columns = ["", "dense", "compressed", "on tiles"]
    parts = []
    for batch in batches:
        rows = [row(way, batch, report) for way, report in reports.items()]
        parts.append(f"Batch {batch}:\n\n{table(columns, rows)}")
    return "\n\n".join(parts)


def row(way: str, batch: int, report: BenchReport) -> list[str]:
    runs = {run.name: run for run in report.runs if run.batch == batch}
    gains = {ratio.name: ratio for ratio in report.ratios if ratio.batch == batch}
    cells = [way, latency(runs[f"{way}, dense"].latency)]
    for side in ("compressed", "on tiles"):
        name = f"{way}, {side}"
        cells.append(f"{latency(runs[name].latency)} ({words(gains[name].speedup)}, {gains[name].efficiency:.2f})")
    return cells


if __name__ == "__main__":
    main()
