"""What letting tokens go costs the built-in video models: retrieval and question answering on videos that were encoded
and decoded again, none of which training saw.

At the cost of showing the dense model only some of the frames, evenly spaced, the same operations are spent on all
frames with tokens let go after three blocks: by representation shift as the paper has it, calibrated, at random, and by
merging as vid-TLDR does, with its own score and with shift.

    python benchmarks/video_accuracy.py --videos 300
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from _results import provenance, table, write_section
from torch import Tensor, nn

from repshift_cli import measure
from repshift_cli.artifact import Opened
from repshift_cli.attach import CompressedModel, attach, resolve_for, with_defaults
from repshift_cli.calibrate import calibrate
from repshift_cli.checkpoint import load
from repshift_cli.data.clips import load_clips
from repshift_cli.data.moving_shapes import TEST_SEED, write_dataset
from repshift_cli.families import match
from repshift_cli.models.umt import UmtModel, VideoTokens
from repshift_cli.plan import Plan
from repshift_cli.preprocessing import Preprocessing
from repshift_cli.progress import Silent
from repshift_cli.recipe import Recipe
from repshift_cli.video_evaluation import Settings, Wanted, answer, open_data, open_tokenizer, retrieve

LAYERS = (0, 2, 4)
CALIBRATION_CLIPS = 64
SHIFT = "{kind: representation_shift}"
ATTENTION_SHIFT = "{kind: representation_shift, operation: attention, distance: l2, polarity: largest}"
OWN_SCORE = "{kind: attention_entropy}"
NOTE = (
    "R@1 of text-to-video and of video-to-text by cosine, then re-ranked by the matching head (the best 16), and share "
    "of questions answered right, in percent, mean over the seeds (each with its own videos). Every side pools over all "
    "tokens. `frames` is the dense model on fewer frames; the others have about its operations."
)


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    sections = [section(frames, options) for frames in options.frames]
    machine = f"{measure.device_name(torch.device('cpu'))}, {options.threads} threads"
    command = shlex.join(["python", "benchmarks/video_accuracy.py", *sys.argv[1:]])
    title = "## Built-in video models: retrieval and question answering"
    text = "\n\n".join([title, provenance(command, machine), *sections, NOTE])
    print(text)
    if not options.dry_run:
        write_section("video_accuracy", text)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--videos", type=int, default=300, help="of each seed")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--frames", nargs="+", type=int, default=[4, 3], help="frames that set the cost")
    parser.add_argument("--rerank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dry-run", action="store_true", help="print the tables, leave docs/results.md as it is")
    return parser.parse_args()


def section(frames: int, options: argparse.Namespace) -> str:
    found: dict[str, list[list[float]]] = {}
    costs: dict[str, float] = {}
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            videos = Path(folder) / "set"
            write_dataset(videos, options.videos, TEST_SEED + 1000 + seed, 24, 96)
            for name, cost, values in results(videos, frames, options):
                found.setdefault(name, []).append(values)
                costs[name] = cost
    columns = ["", "MACs", "t2v", "v2t", "t2v matched", "v2t matched", "answers"]
    rows = [
        [name, f"{costs[name]:.2f}", *(f"{mean(column):.1f}" for column in zip(*values, strict=True))]
        for name, values in found.items()
    ]
    count = len(options.seeds) * options.videos
    return f"### At the cost of {frames} of 6 frames, {count} videos\n\n{table(columns, rows)}"


def results(videos: Path, frames: int, options: argparse.Namespace) -> Iterator[tuple[str, float, list[float]]]:
    """Name, cost relative to dense, and the five numbers of each side."""
    retrieval, answering = (Opened(load(f"builtin:umt-shapes{end}"), None) for end in ("", "-qa"))
    dense = [one.dense_macs for one in (retrieval, answering)]
    fewer = [load(one.loaded.source.path, frames=None) if False else cost_of_frames(one, frames) for one in (retrieval, answering)]
    ratio = fewer[0] / dense[0]
    for name, cost, sides in all_sides(retrieval, answering, ratio, frames):
        with sides as (first, second):
            yield name, cost, [*look(first, retrieval, videos, options), ask(second, answering, videos, options)]
