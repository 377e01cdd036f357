"""DeiT on this CPU with fewer tokens, in int8, both, with smaller images, and a smaller model; and what int8 changes.

    GOMP_SPINCOUNT=10000 python benchmarks/int8.py --threads 2 --seconds 20

All graphs of a model run in turn. Weights of DeiT are random, which does not change the speed; agreement and top-1
are those of the built-in models, compressed with the default recipe. Time and memory are those of one command.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from _results import latency, publish, table, words
from _timing import cpu_settings
from PIL import Image
from torch import Tensor, nn

from repshift_cli.benchmark.report import BenchReport
from repshift_cli.benchmark.run import Contender, run_bench
from repshift_cli.checkpoints.exported import open_exported
from repshift_cli.cli.ui import Screen
from repshift_cli.measure.cpu import int8_note
from repshift_cli.planning.recipe import shipped_recipes
from repshift_cli.utils.files import size_of

TITLES = {"tiny": "DeiT-Ti", "small": "DeiT-S", "base": "DeiT-B"}
SMALLER = {"tiny": "tiny", "small": "tiny", "base": "small"}
KINDS = ("int8", "int8-dynamic")
EXACT = "tokens, exact last block"
SIDES = ("dense", "tokens", EXACT, "smaller images", "smaller model")
SIDE, IMAGE = 224, 176
"""Sides of images and smaller images: the largest multiple of the patch at which a DeiT costs at most `tokens`."""

BUILT_IN = ("vit-digits", "vit-digits-small", "cnn-digits", "vim-digits")
MIB = 1024
"""KiB, the unit of Linux."""

NOTE = (
    "`tokens` uses the paper's recipe with 158, 127 and 102 tokens; with the exact last block, which computes the "
    f"class token only, outputs are equal; `smaller images` is the dense model on images of {IMAGE} pixels, the most "
    "whose MACs are not above those of `tokens`; `smaller model` is DeiT-Ti beside DeiT-S, and DeiT-S beside DeiT-B. "
    "`int8` is static, `int8-dynamic` computes ranges of activations in each run. Milliseconds per batch: median "
    "[p10-p90], then the speed-up over dense float32. The graphs of a model are interleaved."
)
AGREEMENT_NOTE = (
    "Quantised with the defaults, on 128 training scenes. `layers` are in int8, others stay in float32. `class` and "
    "`tokens` are the shares of unchanged predictions and equal kept positions on 100 other training scenes. `top-1` "
    "is on {scenes} test scenes, of the graph with fewer tokens in float32 and in int8."
)
HELD_OUT = 100
"""Images that an export measures the agreement on, besides those for calibration."""


def main() -> None:
    options = parse_options()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.exports or Path(temporary)
        draw_images(folder / "images", options.images)
        costs = [row for model in options.models for row in write_all(model, options, folder)]
        agreement = [row for model in options.built_in for row in agreement_rows(model, folder, options.scenes)]
        if options.no_measure:
            return
        reports = {model: measure(model, options, folder) for model in options.models}
    body = [render(model, reports[model], options.batch_sizes) for model in options.models] + [NOTE]
    columns = ["model", "", "layers", "float32", "class", "tokens", "top-1 float32", "top-1 int8"]
    body += ["## Agreement", table(columns, agreement), AGREEMENT_NOTE.format(scenes=options.scenes)]
    columns = ["graph", "file, MB", "seconds", "peak memory, MiB"]
    body += ["## Cost of an export", table(columns, costs), f"With {options.images} images; the check is included."]
    name = next(iter(reports.values())).machine if reports else ""
    runtimes = ", ".join(f"{package} {version(package)}" for package in ("onnxruntime", "openvino"))
    machine = f"{name}; {runtimes}; {int8_note() or 'with instructions for 8-bit products'}"
    publish("int8", "int8 and fewer tokens on a CPU", machine, body, dry_run=options.dry_run)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=sorted(TITLES), default=["small", "base"])
    parser.add_argument("--built-in", nargs="*", choices=BUILT_IN, default=list(BUILT_IN))
    parser.add_argument("--images", type=int, default=128, help="calibration images")
    parser.add_argument("--scenes", type=int, default=1000, help="test scenes for top-1")
    parser.add_argument("--exports", type=Path, help="folder for exports; existing ones are used again")
    parser.add_argument("--no-measure", action="store_true", help="only export")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each graph at each batch size")
    parser.add_argument("--min-runs", type=int, default=10)
    parser.add_argument("--dry-run", action="store_true", help="print the page, write no file")
    return parser.parse_args()


def draw_images(folder: Path, count: int) -> None:
    """Random images of coarse blocks."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for number in range(count + HELD_OUT):
        pixels = torch.randint(0, 256, (14, 14, 3), dtype=torch.uint8, generator=generator).numpy()
        Image.fromarray(pixels).resize((256, 256), Image.Resampling.BICUBIC).save(folder / f"{number:04d}.png")


def run_command(*arguments: str) -> tuple[dict[str, Any], float, float]:
    """The JSON document of a command, its seconds and its peak memory in MiB."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "repshift_cli", *arguments, "--json"]
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(command, stdout=out)  # noqa: S603
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(arguments)} ended with {process.returncode}")
        out.seek(0)
        return json.load(out), time.perf_counter() - begin, usage.ru_maxrss / MIB


def graphs(model: str) -> list[tuple[str, str]]:
    """Side and kind of each graph of a model."""
    always, more = ("float32", "int8"), ("int8-dynamic", "OpenVINO float32", "OpenVINO int8")
    sides = SIDES if model != "base" else SIDES[:3]
    return [
        (side, kind) for side in sides for kind in (*always, *(more if side in SIDES[:3] and model != "base" else ()))
    ]


def write_all(model: str, options: argparse.Namespace, folder: Path) -> list[list[str]]:
    """Export the graphs of a model; returns a row of the table of costs for each that is not there."""
    rows = []
    for side, kind in graphs(model):
        output = graph_path(folder, model, side, kind)
        if output.exists():
            continue
        name = SMALLER[model] if side == "smaller model" else model
        target = "openvino" if kind.startswith("OpenVINO") else "onnx"
        arguments = ["export", f"deit_{name}_patch16_224", "--to", target, "-o", str(output)]
        arguments += ["--threads", str(options.threads)]
        if side in ("tokens", EXACT):
            arguments += ["--recipe", str(recipe_path(folder, model, side))]
        if side == "smaller images":
            arguments += ["--model-args", f"img_size={IMAGE}"]
        if "int8" in kind:  # predictions with random weights are arbitrary, so no agreement is required
            arguments += [
                "--quantize",
                kind.removeprefix("OpenVINO "),
                "--calibration",
                str(folder / "images"),
                "--agreement",
                "0",
            ]
            arguments += ["--calibration-images", str(options.images)]
        _, seconds, memory = run_command(*arguments)
        size = size_of(output) / 1e6
        rows.append([f"{TITLES[model]}, {side}, {kind}", f"{size:.0f}", f"{seconds:.0f}", f"{memory:.0f}"])
    return rows


def graph_path(folder: Path, model: str, side: str, kind: str) -> Path:
    return folder / f"{model} {side} {kind}{'' if kind.startswith('OpenVINO') else '.onnx'}"


def recipe_path(folder: Path, model: str, side: str) -> Path:
    """The paper's recipe, with the full or the exact last block."""
    text = shipped_recipes()[f"deit_{model}_paper"]
    path = folder / f"{model} {side}.yaml"
    path.write_text(text.replace("last_block: full", "last_block: exact") if side == EXACT else text, encoding="utf-8")
    return path


def agreement_rows(model: str, folder: Path, scenes: int) -> list[list[str]]:
    """What int8 changes in a built-in model, for each kind that is supported."""
    checkpoint, graph = folder / f"{model}.safetensors", folder / f"{model}.onnx"
    if not checkpoint.exists():
        run_command("compress", f"builtin:{model}", "-o", str(checkpoint), "--seconds", "0.5")
        run_command("export", str(checkpoint), "--to", "onnx", "-o", str(graph))
    rows = []
    for kind in KINDS if not model.startswith("cnn") else KINDS[:1]:
        output = folder / f"{model} {kind}.onnx"
        document, _, _ = run_command(
            "export", str(checkpoint), "--to", "onnx", "--quantize", kind, "-o", str(output), "--force"
        )
        top1 = []
        for path in (graph, output):
            found, _, _ = run_command("eval", str(path), "--dataset", "builtin:digits", "--limit", str(scenes))
            top1.append(f"{found['top1']:.2f}")
        made, verdict = document["quantized"], document["verified"]
        counts = [str(made["layers"]), str(len(made["float_layers"]))]
        rows.append([model, kind, *counts, f"{verdict['top1']:.1%}", f"{verdict['kept_equal']:.2%}", *top1])
    return rows


class Part(nn.Module):
    """A model of smaller images, which takes a part of each image; so all models take the same images."""

    def __init__(self, inner: nn.Module, height: int, width: int) -> None:
        super().__init__()
        self.inner, self.height, self.width = inner, height, width

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images[..., : self.height, : self.width].contiguous())


def measure(model: str, options: argparse.Namespace, folder: Path) -> BenchReport:
    contenders = []
    for side, kind in graphs(model):
        opened = open_exported(graph_path(folder, model, side, kind))
        size = opened.loaded.description.preprocessing.shape
        against = None if (side, kind) == ("dense", "float32") else "dense, float32"
        module = Part(opened.module, *size[1:]) if side == "smaller images" else opened.module
        contenders.append(Contender(f"{side}, {kind}", module, opened.macs, (3, SIDE, SIDE), against))
    return run_bench(contenders, options.batch_sizes, cpu_settings(options), Screen())


def render(model: str, report: BenchReport, batches: Sequence[int]) -> str:
    rows = []
    for side, kind in graphs(model):
        cells = [f"{side}, {kind}"]
        for batch in batches:
            (run,) = (run for run in report.runs if run.batch == batch and run.name == cells[0])
            gain = [ratio.speedup for ratio in report.ratios if ratio.batch == batch and ratio.name == cells[0]]
            cells += [latency(run.latency), words(gain[0]) if gain else ""]
        rows.append(cells)
    columns = ["", *(title for batch in batches for title in (f"batch {batch}, ms", "speed-up"))]
    return f"## {TITLES[model]}\n\n{table(columns, rows)}"


if __name__ == "__main__":
    main()
