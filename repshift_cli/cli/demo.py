"""`repshift demo`: the whole tool in a minute, on the built-in model and data, with the commands that do each step."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from repshift_cli.cli import bench, options, visualize
from repshift_cli.cli.evaluate import head_size, models_of
from repshift_cli.cli.show.compress import show_compression
from repshift_cli.cli.show.evaluate import evaluation_document, show_evaluation

if TYPE_CHECKING:
    from repshift_cli.benchmark.report import BenchReport
    from repshift_cli.checkpoints.artifact import Opened
    from repshift_cli.compression.measured import CompressReport
    from repshift_cli.evaluation.classification.result import Evaluation, Score
    from repshift_cli.utils.progress import Progress
    from repshift_cli.visualize.view import Visualization

__all__ = ["command"]

_MODEL = "builtin:vit-digits"
_DATA = "builtin:digits"
_SCENES = 1000
_PICTURES = 6
_BATCHES = (1, 32)
_COMPRESS_SECONDS = 2.0
_BENCH_SECONDS = 3.0
_EVAL_BATCH = 64
_STEPS = 4
_WIDTH = 79


def command(
    *,
    output_dir: Annotated[
        Path, typer.Option("--output-dir", "-o", metavar="DIR", help="Where the files go; made if it is missing.")
    ] = Path("repshift_demo"),
    force: options.Force = False,
    json: options.AsJson = False,
) -> None:
    """Compress the built-in model, check its accuracy, time it and show what it keeps, in about a minute."""
    begin = time.monotonic()
    files = _Files(output_dir)
    files.check(force)

    from repshift_cli.checkpoints.artifact import open_model
    from repshift_cli.cli import ui

    run = _Run(files, ui.Screen(), force, quiet=json)
    compressed = run.compress()
    opened = open_model(files.model)
    results = _Results(compressed, run.evaluate(opened), run.bench(opened), run.visualize(opened))
    document = _document(results, opened, files, time.monotonic() - begin)
    _write_report(files.report, document, force)
    if json:
        ui.print_json(document)
    else:
        _show_summary(results, files, document["seconds"])


@dataclass(frozen=True)
class _Files:
    """What the demo writes, all in one folder."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "vit_digits_repshift.safetensors"

    @property
    def picture(self) -> Path:
        return self.folder / "kept_tokens.png"

    @property
    def report(self) -> Path:
        return self.folder / "report.json"

    def to_dict(self) -> dict[str, str]:
        return {"model": str(self.model), "picture": str(self.picture), "report": str(self.report)}

    def check(self, force: bool) -> None:
        """Make the folder, and refuse to start where something stands in the way.

        Raises:
            UsageError: files of an earlier run are there and `force` is off, or the folder is a file.
            OutputError: the folder cannot be made or written to.
        """
        from repshift_cli.errors import OutputError, UsageError
        from repshift_cli.utils.files import check_output

        every = (self.model, self.picture, self.report)
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"{self.folder} is a file, not a folder", "Choose a folder with --output-dir.")
        there = [path.name for path in every if path.exists()]
        if there and not force:
            raise UsageError(
                f"the folder {self.folder} has {', '.join(there)} already",
                "Add --force to replace them, or choose another folder with --output-dir.",
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make the folder {self.folder}: {error.strerror or error}") from error
        for path in every:
            check_output(path, force)


@dataclass(frozen=True)
class _Results:
    """What the four steps found."""

    compressed: CompressReport
    evaluation: Evaluation
    timing: BenchReport
    view: Visualization


class _Run:
    """The steps; each tells the command that does the same, does it, and shows what came out."""

    def __init__(self, files: _Files, progress: Progress, force: bool, quiet: bool) -> None:
        self.files = files
        self.progress = progress
        self.force = force
        self.quiet = quiet

    def compress(self) -> CompressReport:
        from repshift_cli.compression.run import compress_checkpoint
        from repshift_cli.compression.settings import Settings

        self._announce(
            1,
            "Compress: choose the score on unlabelled scenes, then let tokens go",
            ("compress", _MODEL, "--output", self.files.model, "--seconds", f"{_COMPRESS_SECONDS:g}"),
        )
        settings = Settings(output=self.files.model, seconds=_COMPRESS_SECONDS, force=self.force)
        report = compress_checkpoint(_MODEL, settings, self.progress)
        if not self.quiet:
            show_compression(report)
        return report

    def evaluate(self, opened: Opened) -> Evaluation:
        import torch

        from repshift_cli.data.catalog import open_dataset
        from repshift_cli.evaluation.classification.evaluate import evaluate as measure_accuracy

        self._announce(
            2,
            f"Evaluate: accuracy on {_SCENES} test scenes, dense and compressed",
            ("eval", self.files.model, "--dataset", _DATA, "--compare-dense"),
        )
        result = measure_accuracy(
            models_of(opened, True, str(self.files.model)),
            open_dataset(_DATA, None, _SCENES),
            opened.loaded.description.preprocessing,
            batch_size=_EVAL_BATCH,
            device="cpu",
            dtype=torch.float32,
            workers=0,
            strict=True,
            num_classes=head_size(opened.loaded.model),
            progress=self.progress,
        )
        if not self.quiet:
            show_evaluation(result, _macs(opened))
        return result

    def bench(self, opened: Opened) -> BenchReport:
        import torch

        from repshift_cli.benchmark.run import BenchSettings, contenders_of, run_bench

        batches = ",".join(str(batch) for batch in _BATCHES)
        self._announce(
            3,
            "Time: both in turn, on the same weights",
            ("bench", self.files.model, "--batch-size", batches, "--seconds", f"{_BENCH_SECONDS:g}"),
        )
        named = {self.files.model.stem: opened}
        settings = BenchSettings(torch.device("cpu"), torch.float32, seconds=_BENCH_SECONDS)
        report = run_bench(contenders_of(named), _BATCHES, settings, self.progress)
        if not self.quiet:
            bench.show(report, named)
        return report

    def visualize(self, opened: Opened) -> Visualization:
        from repshift_cli.visualize.view import visualize as visualize_model

        self._announce(
            4,
            "Look: which patches are kept",
            ("visualize", self.files.model, "--output", self.files.picture),
        )
        view = visualize_model(opened, _DATA, _PICTURES)
        visualize.write(view, self.files.picture, None, self.force)
        if not self.quiet:
            visualize.show(view, self.files.picture, None)
        return view

    def _announce(self, number: int, title: str, arguments: tuple[object, ...]) -> None:
        """The title of a step and the command that does it by hand, which must be whole when it is copied."""
        if self.quiet:
            return
        first = "" if number == 1 else "\n"
        typer.echo(f"{first}{f'[{number}/{_STEPS}] {title} ':-<{_WIDTH}}")
        for line in _command_lines(["repshift", *map(str, arguments)]):
            typer.echo(line)
        typer.echo()


def _command_lines(words: list[str]) -> list[str]:
    """A command behind a prompt, broken before an option where the line would be too long."""
    parts: list[str] = []
    for word in map(shlex.quote, words):
        if word.startswith("-") or not parts:
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


def _macs(opened: Opened) -> dict[str, int]:
    return {"compressed": opened.macs, "dense": opened.dense_macs}


def _document(results: _Results, opened: Opened, files: _Files, seconds: float) -> dict[str, Any]:
    """The JSON document: a summary, and what each of the commands would print."""
    name = str(files.model)
    scores, timing = results.evaluation.scores, results.timing
    speedup = [
        {"batch": ratio.batch, "latency": ratio.to_dict()["latency"], "clear": ratio.speedup.clear}
        for ratio in timing.ratios
    ]
    return {
        "seconds": round(seconds, 1),
        "files": files.to_dict(),
        "summary": {
            "top1": {"dense": scores["dense"].top1, "compressed": scores["compressed"].top1},
            "agreement": results.evaluation.agreement,
            "ratio_macs": float(f"{opened.dense_macs / opened.macs:.4g}"),
            "speedup": speedup,
        },
        "compress": results.compressed.to_dict(),
        "eval": evaluation_document(results.evaluation, _macs(opened), name, opened.loaded.description.preprocessing),
        "bench": timing.to_dict(),
        "visualize": visualize.document(results.view, name, files.picture, None),
    }


def _write_report(path: Path, document: dict[str, Any], force: bool) -> None:
    import json

    from repshift_cli.utils.files import write_text

    write_text(path, json.dumps(document, indent=2, allow_nan=False) + "\n", force)


def _show_summary(results: _Results, files: _Files, seconds: float) -> None:
    compressed, scores = results.compressed, results.evaluation.scores
    dense_macs, macs = compressed.dense_macs, compressed.macs
    lines = [
        f"\n{'Summary ':-<{_WIDTH}}",
        f"accuracy  {_percent(scores['dense'])} dense -> {_percent(scores['compressed'])} compressed",
        f"          on {results.evaluation.images} test scenes, without training (in brackets: 95% intervals)",
        f"work      {dense_macs / 1e9:.3f} -> {macs / 1e9:.3f} GMACs per image, {dense_macs / macs:.2f}x less",
    ]
    for index, ratio in enumerate(results.timing.ratios):
        lines.append(f"{'' if index else 'speed':10}batch {ratio.batch}: {ratio.speedup}")
    lines += [
        f"files     {files.folder}/",
        *(f"{'':12}{path.name:34}{told}" for path, told in _contents(files)),
        f"\nThat took {seconds:.0f} s. Now with a model and pictures of your own:",
        "$ repshift compress MODEL.safetensors --calibration FOLDER",
    ]
    for line in lines:
        typer.echo(line)


def _percent(score: Score) -> str:
    return "{:.1f}% [{:.1f}-{:.1f}]".format(score.top1, *score.top1_interval)


def _contents(files: _Files) -> tuple[tuple[Path, str], ...]:
    return (
        (files.model, "the compressed model"),
        (files.picture, "which patches it keeps"),
        (files.report, "all numbers from above"),
    )
