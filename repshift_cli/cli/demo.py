"""`repshift demo`: compress, evaluate, time, export and draw the built-in model, and print the command of each step.

At batch 1 the work per layer is small beside the overhead of torch, so that batch is timed in ONNX Runtime.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated, Any

import typer

from repshift_cli.cli import bench, options, ui, visualize
from repshift_cli.cli.show.compress import show_compression
from repshift_cli.cli.show.evaluate import evaluation_document, show_evaluation
from repshift_cli.cli.show.provenance import describe
from repshift_cli.errors import OutputError, UsageError
from repshift_cli.export.formats import FORMATS

if TYPE_CHECKING:
    from repshift_cli.benchmark.report import BenchReport
    from repshift_cli.checkpoints.artifact import Opened
    from repshift_cli.compression.measured import CompressReport
    from repshift_cli.evaluation.classification.result import Evaluation, Score
    from repshift_cli.utils.progress import Progress
    from repshift_cli.visualize.view import Visualization

_MODEL = "builtin:vit-digits"
_DATA = "builtin:digits"
_SCENES = 1000
_IMAGES = 6
_BATCH, _EXPORTED_BATCH = 32, 1
_GOALS = ("macs=0.4", "max-drop=1")
_COMPRESS_SECONDS = 1.0
_BENCH_SECONDS = 1.5
_EVAL_BATCH = 64
_INSTALL = "pip install 'repshift-cli[onnx]'"
_WIDTH = 79


def command(
    *,
    output_dir: Annotated[
        Path, typer.Option("--output-dir", "-o", metavar="DIR", help="Output folder; created if missing.")
    ] = Path("repshift_demo"),
    force: options.Overwrite = False,
    json: options.AsJson = False,
) -> None:
    """Run every step on the built-in model, in about a minute."""
    begin = time.monotonic()
    files = _Files(output_dir)
    files.check(force)

    from repshift_cli.checkpoints.artifact import open_model
    from repshift_cli.utils.files import write_text

    demo = _Demo(files, ui.Screen(), force, quiet=json)
    compressed = demo.compress()
    opened = open_model(files.model)
    evaluation, timings = demo.evaluate(opened), demo.bench(opened)
    view = demo.visualize(opened)
    demo.report(opened, view)
    macs = {"dense": opened.dense_macs, "compressed": opened.macs}
    seconds = round(time.monotonic() - begin, 1)
    document = {
        "seconds": seconds,
        "files": {
            "model": str(files.model),
            "picture": str(files.figure),
            "page": str(files.page),
            "report": str(files.report),
            "onnx": [str(path) for path in (files.onnx, files.dense_onnx) if "onnx" in timings],
        },
        "summary": _summary(evaluation, timings, macs),
        "compress": compressed.to_dict(),
        "eval": evaluation_document(evaluation, macs, str(files.model), opened.loaded.description.preprocessing),
        "bench": timings["torch"].to_dict(),
        "bench_onnx": timings["onnx"].to_dict() if "onnx" in timings else None,
        "visualize": visualize.document(view, str(files.model), files.figure, None),
    }
    write_text(files.report, ui.to_json(document), force)
    if json:
        ui.result.keep(document)
    else:
        _show_summary(evaluation, timings, macs, files, seconds)


class _Files:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "vit_digits_repshift.safetensors"
        self.figure = folder / "kept_tokens.png"
        self.page = folder / "report.html"
        self.report = folder / "report.json"
        self.onnx = folder / "vit_digits_repshift.onnx"
        self.dense_onnx = folder / "vit_digits_dense.onnx"

    def check(self, force: bool) -> None:
        """Create the folder, and check that the files can be written."""
        from repshift_cli.utils.files import check_output

        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"{self.folder} is a file, not a folder", "Choose a folder with --output-dir.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot create the folder {self.folder}: {error.strerror or error}") from error
        for path in (self.model, self.figure, self.page, self.report, self.onnx, self.dense_onnx):
            check_output(path, force)


class _Demo:
    """The steps. Each prints the command that does the same, runs it, and prints its result."""

    def __init__(self, files: _Files, progress: Progress, force: bool, quiet: bool) -> None:
        self.files = files
        self.progress = progress
        self.force = force
        self.quiet = quiet
        self.exports = all(find_spec(package) for package in FORMATS["onnx"].packages)
        self.step = 0

    def compress(self) -> CompressReport:
        from repshift_cli.compression.run import compress_checkpoint
        from repshift_cli.compression.settings import Settings
        from repshift_cli.search.target import split_goals

        goals = [part for goal in _GOALS for part in ("--target", goal)]
        self._announce(
            "Compress: find which tokens to drop at 0.4 of the cost, and check it",
            (
                *("compress", _MODEL, "--data", _DATA, *goals),
                *("--output", self.files.model, "--seconds", f"{_COMPRESS_SECONDS:g}"),
            ),
        )
        target, limit = split_goals(_GOALS)
        settings = Settings(
            target=target,
            limit=limit,
            data=_DATA,
            output=self.files.model,
            seconds=_COMPRESS_SECONDS,
            force=self.force,
        )
        report = compress_checkpoint(_MODEL, settings, self.progress)
        if not self.quiet:
            show_compression(report)
        return report

    def evaluate(self, opened: Opened) -> Evaluation:
        import torch

        from repshift_cli.data.catalog import open_dataset
        from repshift_cli.evaluation.classification.several import evaluate_passes
        from repshift_cli.evaluation.models import candidates_of, head_size

        self._announce(
            f"Evaluate: accuracy on {_SCENES} test scenes, dense and compressed",
            ("eval", self.files.model, "--dataset", _DATA, "--compare-dense"),
        )
        result = evaluate_passes(
            candidates_of({_MODEL: opened}, compare_dense=True),
            open_dataset(_DATA, None, _SCENES),
            batch_size=_EVAL_BATCH,
            device="cpu",
            dtype=torch.float32,
            workers=0,
            strict=True,
            num_classes=head_size(opened.loaded.model),
            progress=self.progress,
        )
        if not self.quiet:
            show_evaluation(result, {"compressed": opened.macs, "dense": opened.dense_macs})
        return result

    def bench(self, opened: Opened) -> dict[str, BenchReport]:
        """The timings by runtime: `torch`, and `onnx` if it is installed."""
        options = ("--batch-size", _BATCH, "--seconds", f"{_BENCH_SECONDS:g}")
        self._announce("Time: dense and compressed in turn, on the same weights", ("bench", self.files.model, *options))
        timings = {"torch": self._time({self.files.model.stem: opened}, _BATCH)}
        if self.exports:
            timings["onnx"] = self._bench_exported(opened)
        return timings

    def _bench_exported(self, opened: Opened) -> BenchReport:
        from repshift_cli.checkpoints.exported import open_any
        from repshift_cli.export.job import export
        from repshift_cli.export.request import Request

        files: dict[Path, tuple[str, ...]] = {self.files.dense_onnx: ("--dense", "--no-verify"), self.files.onnx: ()}
        steps = [
            ("export", self.files.model, "--to", "onnx", *given, "--output", path) for path, given in files.items()
        ]
        timing = ("bench", *files, "--batch-size", _EXPORTED_BATCH, "--seconds", f"{_BENCH_SECONDS:g}")
        self._announce("Export: both to ONNX Runtime, for batch 1", *steps, timing)
        for path, given in files.items():
            dense = "--dense" in given
            export(opened, Request("onnx", path, dense=dense, verify=not dense, force=self.force), self.progress)
        return self._time({path.stem: open_any(str(path)) for path in files}, _EXPORTED_BATCH)

    def _time(self, named: Mapping[str, Opened], batch: int) -> BenchReport:
        import torch

        from repshift_cli.benchmark.run import BenchSettings, contenders_of, run_bench

        settings = BenchSettings(torch.device("cpu"), torch.float32, seconds=_BENCH_SECONDS)
        report = run_bench(contenders_of(named), (batch,), settings, self.progress)
        if not self.quiet:
            bench.show(report, named)
        return report

    def visualize(self, opened: Opened) -> Visualization:
        from repshift_cli.visualize.view import visualize as visualize_model

        self._announce(
            "Visualize: which patches are kept", ("visualize", self.files.model, "--output", self.files.figure)
        )
        view = visualize_model(opened, _DATA, _IMAGES)
        visualize.write(view, self.files.figure, None, self.force)
        if not self.quiet:
            visualize.show(view, self.files.figure, None)
        return view

    def report(self, opened: Opened, view: Visualization) -> None:
        from repshift_cli.report.page import Added, render
        from repshift_cli.utils.files import write_text

        self._announce("Report: one page to send", ("report", self.files.model, "--output", self.files.page))
        origin = describe(opened.loaded.document or {})
        write_text(self.files.page, render(opened, str(self.files.model), origin, Added(view)), self.force)
        if not self.quiet:
            ui.print_text(f"wrote   {self.files.page} (open it in a browser)")

    def _announce(self, title: str, *commands: tuple[object, ...]) -> None:
        """Print the title of a step and its commands, which can be copied as they are."""
        self.step += 1
        if self.quiet:
            return
        first = "" if self.step == 1 else "\n"
        lines = [line for command in commands for line in _command_lines(["repshift", *map(str, command)])]
        title = f"[{self.step}/{5 + self.exports}] {title} "
        typer.echo("\n".join([f"{first}{title:-<{_WIDTH}}", *lines, ""]))


def _command_lines(words: list[str]) -> list[str]:
    """A command behind a prompt; long lines break before an option or a file, not behind an option."""
    parts = [" ".join(words[:2])]
    for word in map(shlex.quote, words[2:]):
        if word.startswith("-") or not parts[-1].startswith("-"):
            parts.append(word)
        else:
            parts[-1] += f" {word}"
    lines = ["$"]
    for part in parts:
        if len(lines[-1]) + len(part) + len("  \\") > _WIDTH and lines[-1] != "$":
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += f" {part}"
    return lines


def _summary(evaluation: Evaluation, timings: Mapping[str, BenchReport], macs: dict[str, int]) -> dict[str, Any]:
    return {
        "top1": {name: evaluation.scores[name].top1 for name in ("dense", "compressed")},
        "agreement": evaluation.agreement,
        "ratio_macs": float(f"{macs['dense'] / macs['compressed']:.4g}"),
        "speedup": [
            {
                "runtime": runtime,
                "batch": ratio.batch,
                "latency": ratio.to_dict()["latency"],
                "clear": ratio.speedup.clear,
            }
            for runtime, timing in timings.items()
            for ratio in timing.ratios
        ],
    }


def _show_summary(
    evaluation: Evaluation, timings: Mapping[str, BenchReport], macs: dict[str, int], files: _Files, seconds: float
) -> None:
    dense, compressed = (_percent(evaluation.scores[name]) for name in ("dense", "compressed"))
    before, after = macs["dense"] / 1e9, macs["compressed"] / 1e9
    lines = [
        f"\n{'Summary ':-<{_WIDTH}}",
        f"accuracy  {dense} dense -> {compressed} compressed",
        f"          on {evaluation.images} test scenes, without training ([95% interval])",
        f"cost      {before:.3f} -> {after:.3f} GMACs per image, {before / after:.2f}x less",
    ]
    names = {"torch": "", "onnx": ", ONNX Runtime"}
    speeds = [f"batch {ratio.batch}{names[key]}: {ratio.speedup}" for key in timings for ratio in timings[key].ratios]
    if "onnx" not in timings:
        speeds.append(f"batch {_EXPORTED_BATCH}: needs ONNX Runtime: {_INSTALL}")
    for index, text in enumerate(speeds):
        first = f"{'' if index else 'speed':10}"
        lines += wrap(text, _WIDTH, initial_indent=first, subsequent_indent=" " * 12, break_on_hyphens=False)
    lines += [
        f"files     {files.folder}/",
        f"{'':12}{files.model.name:34}the compressed model",
        *([f"{'':12}{files.onnx.name:34}the same for ONNX Runtime"] if "onnx" in timings else []),
        f"{'':12}{files.figure.name:34}the patches that it keeps",
        f"{'':12}{files.page.name:34}a page to open in a browser",
        f"{'':12}{files.report.name:34}all results as JSON",
        f"\nDone in {seconds:.0f} s. With your own model and images:",
        "$ repshift compress MODEL.safetensors --data FOLDER --speedup 1.5 --max-drop 1",
        "$ repshift export MODEL_repshift.safetensors --to onnx",
    ]
    typer.echo("\n".join(lines))


def _percent(score: Score) -> str:
    return "{:.1f}% [{:.1f}-{:.1f}]".format(score.top1, *score.top1_interval)
