"""DINOv3 ViT-S/16 and CLIP ViT-B/16 of transformers at 0.65 of the MACs on this CPU.

Dense and compressed run in turn, both as the library runs them (fused attention). 20% of the patch tokens are dropped
after blocks 0, 3 and 6. Weights are random, which does not change the speed.

    python benchmarks/transformers_cpu.py --threads 2 --seconds 15
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from _results import latency, publish, table, words
from _timing import cpu_settings
from torch import nn

from repshift_cli.benchmark.report import BenchReport
from repshift_cli.benchmark.run import contenders_of, run_bench
from repshift_cli.cli.ui import Screen
from repshift_cli.compression.api import compress_dense

RECIPE = """\
version: 1
metric: {kind: representation_shift, operation: mlp, distance: l2, reading: update, polarity: largest}
reducer: {kind: prune}
layers:
  - {layer: 0, drop_ratio: 0.2}
  - {layer: 3, drop_ratio: 0.2}
  - {layer: 6, drop_ratio: 0.2}
"""
NOTE = (
    "Milliseconds per batch: median [p10-p90] of interleaved runs. Efficiency is the speed-up divided by the ratio of "
    "the MACs. DINOv3 gathers its rotary positions for the tokens that are left."
)


def dinov3() -> nn.Module:
    """DINOv3 ViT-S/16 with four registers, images of 224 pixels."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    config = DINOv3ViTConfig(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        intermediate_size=1536,
        image_size=224,
        patch_size=16,
        num_register_tokens=4,
    )
    return DINOv3ViTModel(config)


def clip() -> nn.Module:
    """The image tower of CLIP ViT-B/16 with its projection."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(CLIPVisionConfig(patch_size=16))


MODELS = {"DINOv3 ViT-S/16": dinov3, "CLIP ViT-B/16": clip}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=15.0, help="for each model at each batch size")
    parser.add_argument("--min-runs", type=int, default=10)
    parser.add_argument("--dry-run", action="store_true", help="print the page, write no file")
    options = parser.parse_args()
    reports = {title: measure(title, options) for title in MODELS}
    rows = [row for title, report in reports.items() for row in render(title, report)]
    columns = ["model", "GMACs", "batch", "dense", "compressed", "speed-up", "efficiency"]
    machine = next(iter(reports.values())).machine
    body = [table(columns, rows), NOTE]
    publish("transformers_cpu", "Models of transformers on a CPU", machine, body, dry_run=options.dry_run)


def measure(title: str, options: argparse.Namespace) -> BenchReport:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder, recipe = Path(name) / "model", Path(name) / "recipe.yaml"
        MODELS[title]().save_pretrained(folder)
        recipe.write_text(RECIPE, encoding="utf-8")
        opened = compress_dense(folder, recipe)
    return run_bench(contenders_of({title: opened}), options.batch_sizes, cpu_settings(options), Screen())


def render(title: str, report: BenchReport) -> list[list[str]]:
    rows = []
    runs = {(run.batch, run.name): run for run in report.runs}
    for ratio in report.ratios:
        dense, compressed = (runs[ratio.batch, name] for name in (ratio.against, ratio.name))
        rows.append(
            [
                title,
                f"{dense.macs / 1e9:.2f} -> {compressed.macs / 1e9:.2f}",
                str(ratio.batch),
                latency(dense.latency),
                latency(compressed.latency),
                words(ratio.speedup),
                f"{ratio.efficiency:.2f}",
            ]
        )
    return rows


if __name__ == "__main__":
    main()
