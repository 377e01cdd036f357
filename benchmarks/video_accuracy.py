"""Accuracy of the built-in video models with fewer tokens: retrieval and question answering on encoded test videos.

The baseline is the dense model on fewer, evenly spaced frames. At the same number of operations, tokens of all frames
are dropped or merged after three blocks, by several scores.

    python benchmarks/video_accuracy.py --videos 300
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from _results import page_name, publish, table
from _shape_videos import write_dataset
from torch import Tensor

from repshift_cli.calibration.calibrate import calibrate
from repshift_cli.checkpoints.artifact import Opened
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.data.builtin.moving_shapes import TEST_SEED
from repshift_cli.data.inputs import load_inputs
from repshift_cli.data.video.annotations import Task
from repshift_cli.data.video.decode import frame_indices
from repshift_cli.evaluation.video_text.data import DatasetOptions, open_data
from repshift_cli.evaluation.video_text.evaluate import answer, retrieve
from repshift_cli.evaluation.video_text.models import open_tokenizer
from repshift_cli.evaluation.video_text.settings import VideoSettings
from repshift_cli.measure.device import device_name
from repshift_cli.measure.macs import count_macs
from repshift_cli.models.umt import VisionShape
from repshift_cli.ops.tokens import Sized
from repshift_cli.planning.plan import Plan
from repshift_cli.planning.recipe import Recipe
from repshift_cli.reduction.compressed_model import attach
from repshift_cli.reduction.families.base import match
from repshift_cli.reduction.plans import has_open_fields, resolve_for, with_defaults
from repshift_cli.utils.progress import Silent

LAYERS = (0, 2, 4)
CLIPS = 64
OPEN = "{kind: representation_shift}"
FITTED = "{kind: fitted}"
SIDES = {
    "shift (paper)": (
        "{kind: representation_shift, operation: mlp, distance: l2, reading: update, polarity: largest}",
        "prune",
    ),
    "shift, smallest": (
        "{kind: representation_shift, operation: mlp, distance: l2, reading: update, polarity: smallest}",
        "prune",
    ),
    "shift, calibrated": (OPEN, "prune"),
    "shift, calibrated, merged": (OPEN, "merge"),
    "fitted": (FITTED, "prune"),
    "fitted, merged": (FITTED, "merge"),
    "ToMe": ("{kind: random}", "bipartite"),
    "random": ("{kind: random}", "prune"),
    "class attention": ("{kind: class_attention}", "prune"),
    "vid-TLDR, own score": ("{kind: attention_entropy}", "vid_tldr"),
    "vid-TLDR, shift": (
        "{kind: representation_shift, operation: attention, distance: l2, polarity: largest}",
        "vid_tldr",
    ),
}
NOTE = (
    "R@1 of text-to-video and video-to-text by cosine, then re-ranked by the matching head (the best 16), and share "
    "of correct answers, in percent, mean over the seeds (each with its own videos). All pool over all tokens. "
    "`frames` is the dense model on fewer frames; the others cost about as many operations."
)


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    sections = [section(frames, options) for frames in options.frames]
    machine = f"{device_name(torch.device('cpu'))}, {options.threads} threads"
    title = "Built-in video models: retrieval and question answering"
    page = page_name("video_accuracy", (options.clips, CLIPS))
    publish(page, title, machine, [*sections, NOTE], dry_run=options.dry_run)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--videos", type=int, default=300, help="of each seed")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--frames", nargs="+", type=int, default=[4, 3], help="frames that set the cost")
    parser.add_argument("--rerank", type=int, default=16)
    parser.add_argument("--clips", type=int, default=CLIPS, help="for calibration")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dry-run", action="store_true", help="print the page, write no file")
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
    return f"## At the cost of {frames} of 6 frames, {count} videos\n\n{table(columns, rows)}"


def results(videos: Path, frames: int, options: argparse.Namespace) -> Iterator[tuple[str, float, list[float]]]:
    """Name, cost relative to dense, and the five numbers of each side."""
    pair = tuple(Opened(load_checkpoint(f"builtin:umt-shapes{end}"), None) for end in ("", "-qa"))
    for each in pair:
        each.loaded.model.pooling = "all"
    dense = pair[0].dense_macs
    yield "dense", 1.0, measured(pair, videos, options)
    with shown_frames(pair, frames) as macs:
        yield f"frames, {frames} of 6", macs / dense, measured(pair, videos, options)
    for name, plans in all_plans(pair, macs, options).items():
        compressed = [attach(each.loaded.model, plan) for each, plan in zip(pair, plans, strict=True)]
        try:
            yield name, compressed[0].macs() / dense, measured(pair, videos, options)
        finally:
            for each in compressed:
                each.detach()


@contextmanager
def shown_frames(pair: Sequence[Opened], frames: int) -> Iterator[int]:
    """The dense models on evenly spaced frames, each at its own place in time; yields the operations of the first."""
    encoders = [each.loaded.model.vision_encoder.encoder for each in pair]
    before = [encoder.forward for encoder in encoders]
    shape = pair[0].loaded.model.vision
    try:
        for encoder in encoders:
            encoder.forward = partial(encode_frames, encoder, kept=frame_indices(shape.frames, frames), shape=shape)
        yield count_macs(pair[0].loaded.model, (shape.frames, 3, shape.img_size, shape.img_size))
    finally:
        for encoder, forward in zip(encoders, before, strict=True):
            encoder.forward = forward


def encode_frames(encoder: Any, video: Tensor, *, kept: list[int], shape: VisionShape) -> Tensor:
    places = encoder.positions.unflatten(1, (shape.frames, -1))[:, kept].flatten(1, 2)
    stream = Sized(encoder.patch_embed(video[:, kept]) + places)
    for block in encoder.blocks:
        stream = block(stream)
    output: Tensor = encoder.norm(stream.tokens)
    return output


def all_plans(pair: Sequence[Opened], macs: int, options: argparse.Namespace) -> dict[str, list[Plan]]:
    """By name, a plan for each of the two models, of at most so many operations."""
    found = {}
    for name, (metric, reducer) in SIDES.items():
        plans = [plan_within(each, metric, reducer, macs) for each in pair]
        if has_open_fields(plans[0]):
            plans = [calibrated(each, plan, options) for each, plan in zip(pair, plans, strict=True)]
        else:
            plans = [_filled(each, plan) for each, plan in zip(pair, plans, strict=True)]
        found[name] = plans
    return found


def plan_within(opened: Opened, metric: str, reducer: str, macs: int) -> Plan:
    """The mildest schedule, of one drop ratio at all sites, that costs at most so many operations."""
    model = opened.loaded.model
    for thousandths in range(20, 500, 2):
        drops = ", ".join(f"{{layer: {layer}, drop_ratio: {thousandths / 1000}}}" for layer in LAYERS)
        recipe = Recipe.parse(f"version: 1\nmetric: {metric}\nreducer: {{kind: {reducer}}}\nlayers: [{drops}]")
        plan = resolve_for(model, recipe)
        compressed = attach(model, _filled(opened, plan))
        cost = compressed.macs()
        compressed.detach()
        if cost <= macs:
            return plan
    raise ValueError(f"no drop ratio comes down to {macs} operations")


def _filled(opened: Opened, plan: Plan) -> Plan:
    """The plan with open fields as the paper has them."""
    model = opened.loaded.model
    return with_defaults(plan, {site.name: site for site in match(model).sites(model)})


def calibrated(opened: Opened, plan: Plan, options: argparse.Namespace) -> Plan:
    clips = load_inputs(None, options.clips, opened.loaded.description.preprocessing, 0)
    model = opened.loaded.model
    result = calibrate(
        model, match(model), plan, images=clips.tensor, identity=clips.identity, batch_size=16, progress=Silent()
    )
    return plan.with_metrics(result.specs)


def measured(pair: Sequence[Opened], videos: Path, options: argparse.Namespace) -> list[float]:
    """R@1 by cosine in both directions, by matching in both directions, and answers right; in percent."""
    settings = VideoSettings(16, torch.device("cpu"), torch.float32, rerank_k=options.rerank)
    found, asked = (
        run(each, videos, file, task, settings)
        for each, file, task in zip(pair, ("retrieval.json", "qa.json"), ("retrieval", "qa"), strict=True)
    )
    score = found.scores["model"]
    assert score.matching is not None
    both = (score.vtc, score.matching)
    ranks = [stats.r1 for directions in both for stats in (directions.text_to_video, directions.video_to_text)]
    return [*ranks, asked.scores["model"].accuracy]


def run(opened: Opened, videos: Path, file: str, task: Task, settings: VideoSettings) -> Any:
    answers = videos / "answers.json" if task == "qa" else None
    data = open_data(DatasetOptions(annotations=videos / file, videos=videos / "videos", answers=answers), task, task)
    scorer = retrieve if task == "retrieval" else answer
    result, _ = scorer(
        {"model": opened.loaded.model},
        data,  # type: ignore[arg-type]
        preprocessing=opened.loaded.description.preprocessing,
        tokenizer=open_tokenizer(None, opened, data),
        settings=settings,
        progress=Silent(),
    )
    return result


if __name__ == "__main__":
    main()
