"""Every metric with every reducer at equal cost: accuracy on the built-in ViTs, and speed on DeiT-S.

    python benchmarks/combinations.py

Tokens are dropped or merged after the paper's three sites. The drop ratio, equal at all sites, is the smallest one that
reaches the MAC ratio, including the MACs of reducer and metric. Metrics with open fields are calibrated on 128
unlabelled training scenes, with the same reducer. ToMe's matching needs no metric.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import timm
import torch
from _results import publish, table
from builtin_accuracy import Scenes, draw
from torch import Tensor, nn

from repshift_cli.calibration.calibrate import calibrate
from repshift_cli.calibration.outputs import agreement, divergence
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.checkpoints.loaded import LoadedModel
from repshift_cli.cli.ui import Screen
from repshift_cli.data.inputs import load_inputs
from repshift_cli.measure.device import device_name
from repshift_cli.measure.latency import Subject, compute_speedup, measure_latency
from repshift_cli.planning.plan import Plan
from repshift_cli.planning.recipe import Recipe, scaled_recipe
from repshift_cli.reduction.compressed_model import CompressedModel, attach
from repshift_cli.reduction.families.base import match
from repshift_cli.reduction.plans import has_open_fields, resolve_for, with_defaults
from repshift_cli.utils.progress import Silent
from repshift_cli.utils.stats import percent_interval

REDUCERS = {
    "prune": "{kind: prune}",
    "fuse": "{kind: fuse}",
    "fuse, carried": "{kind: fuse, carry: true}",
    "merge": "{kind: merge}",
    "merge by keys": "{kind: merge, similarity: keys}",
}
METRICS = {
    "shift, paper": ("{kind: representation_shift, operation: mlp, distance: l2, reading: update, polarity: largest}"),
    "shift, calibrated": "{kind: representation_shift}",
    "fitted": "{kind: fitted}",
    "class attention": "{kind: class_attention}",
    "token norm, smallest": "{kind: token_norm, polarity: smallest}",
    "random": "{kind: random}",
}
TOME = "ToMe's matching"
CALIBRATION_IMAGES = 128
SPEED_SIDES = {
    "prune, shift": ("{kind: representation_shift}", "prune"),
    "prune, fitted": ("{kind: fitted}", "prune"),
    "prune, class attention": ("{kind: class_attention}", "prune"),
    "fuse, fitted": ("{kind: fitted}", "fuse"),
    "merge, fitted": ("{kind: fitted}", "merge"),
    "merge by keys, fitted": ("{kind: fitted}", "merge by keys"),
    TOME: ("{kind: random}", TOME),
}


@dataclass(frozen=True)
class Side:
    """A combination and its cost."""

    reducer: str
    metric: str
    model: CompressedModel
    macs: float


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    machine = f"{device_name(torch.device('cpu'))}, {options.threads} threads"
    for name in options.models:
        title, body = accuracy_page(name, options)
        publish(f"combinations_{name}", title, machine, body, dry_run=options.dry_run)
    if options.speed_batches:
        title, body = speed_page(options)
        publish("combinations_speed", title, machine, body, dry_run=options.dry_run)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="*", default=["vit-digits", "vit-digits-small"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.8, 0.65, 0.5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[100, 101, 102])
    parser.add_argument("--scenes", type=int, default=1000, help="of each seed")
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing, for each MAC ratio or batch size")
    parser.add_argument("--speed-batches", nargs="*", type=int, default=[1, 8], help="of DeiT-S")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dry-run", action="store_true", help="print the page, write no file")
    return parser.parse_args()


def accuracy_page(name: str, options: argparse.Namespace) -> tuple[str, list[str]]:
    loaded = load_checkpoint(f"builtin:{name}")
    sets = [draw(loaded, seed, options.scenes) for seed in options.seeds]
    scenes = Scenes(torch.cat([each.images for each in sets]), torch.cat([each.labels for each in sets]))
    dense = outputs(loaded.model, scenes.images)
    right = int((dense.argmax(-1) == scenes.labels).sum())
    parts = [
        f"{len(options.seeds)} seeds of {options.scenes} test scenes each; top-1 in percent with its 95% interval, "
        "unchanged predictions and mean KL against the dense model (nats), and the speed-up over dense at batch 32 "
        "(interleaved in one run; paired rounds, p10 - p90). Fitted weights and calibrated choices come from "
        f"{CALIBRATION_IMAGES} training scenes.",
    ]
    for ratio in options.ratios:
        sides = list(combinations(loaded, ratio))
        gains = speeds(loaded.model, sides, scenes.images[:32], options.seconds)
        rows = [row(side, scenes, dense, gain) for side, gain in zip(sides, gains, strict=True)]
        columns = ["reducer", "score", "MACs", "top-1, %", "against dense", "unchanged, %", "KL", "faster"]
        parts += [f"## MAC ratio {ratio}", table(columns, rows)]
    return f"Scores and reducers at equal cost: builtin:{name}, dense {with_interval(right, len(dense))}", parts


def combinations(loaded: LoadedModel, ratio: float) -> Iterator[Side]:
    """Every score with every reducer, each on a copy of the model."""
    images = load_inputs(None, CALIBRATION_IMAGES, loaded.description.preprocessing, 0).tensor
    pairs: list[tuple[str, str, str, str]] = [
        (*reducer, *metric) for reducer, metric in itertools.product(REDUCERS.items(), METRICS.items())
    ]
    for reducer, reducing, metric, scoring in [*pairs, (TOME, "{kind: bipartite}", "-", "{kind: random}")]:
        plan = plan_within(loaded.model, scoring, reducing, ratio)
        if has_open_fields(plan):
            found = calibrate(
                loaded.model,
                match(loaded.model),
                plan,
                images=images,
                identity={},
                batch_size=32,
                progress=Silent(),
            )
            plan = plan.with_metrics(found.specs)
        model = attach(copy.deepcopy(loaded.model), plan)
        yield Side(reducer, metric, model, model.macs() / model.dense_macs())


def plan_within(model: nn.Module, metric: str, reducer: str, ratio: float) -> Plan:
    """The schedule with the smallest drop ratio at the paper's sites and at most this share of the MACs."""
    layout = match(model).layout(model)
    places = [drop.layer for drop in scaled_recipe("paper", len(layout.sites)).layers]
    for thousandths in range(50, 700, 2):
        drops = ", ".join(f"{{layer: {layer}, drop_ratio: {thousandths / 1000}}}" for layer in places)
        recipe = Recipe.parse(f"version: 1\nmetric: {metric}\nreducer: {reducer}\nlayers: [{drops}]")
        plan = resolve_for(model, recipe)
        filled = with_defaults(plan, {site.name: site for site in match(model).sites(model)})
        compressed = attach(model, filled)
        cost = compressed.macs() / compressed.dense_macs()
        compressed.detach()
        if cost <= ratio:
            return plan
    raise ValueError(f"no drop ratio comes down to {ratio} of the operations")


@torch.inference_mode()
def outputs(model: nn.Module, images: Tensor, batch: int = 64) -> Tensor:
    return torch.cat([model(part) for part in images.split(batch)])


def row(side: Side, scenes: Scenes, dense: Tensor, gain: str) -> list[str]:
    given = outputs(side.model, scenes.images)
    right, before = (int((found.argmax(-1) == scenes.labels).sum()) for found in (given, dense))
    total = len(dense)
    return [
        side.reducer,
        side.metric,
        f"{side.macs:.3f}",
        with_interval(right, total),
        f"{100 * (right - before) / total:+.2f}",
        f"{100 * float(agreement(dense, given).mean()):.2f}",
        f"{float(divergence(dense, given, has_head=True).mean()):.4f}",
        gain,
    ]


def with_interval(right: int, total: int) -> str:
    low, high = percent_interval(right, total)
    return f"{100 * right / total:.2f} ({low:.1f} - {high:.1f})"


def speeds(dense: nn.Module, sides: Sequence[Side], inputs: Tensor, seconds: float) -> list[str]:
    """Speed-up of each model over dense, all timed in turn."""
    subjects = [Subject("dense", dense), *(Subject(f"{side.reducer}, {side.metric}", side.model) for side in sides)]
    times = measure_latency(subjects, inputs, max_seconds=seconds, warmup=2, progress=Screen(), min_runs=5)
    gains = [compute_speedup(times["dense"], times[subject.name]) for subject in subjects[1:]]
    return [f"{gain.ratio:.2f}x ({gain.p10:.2f} - {gain.p90:.2f})" for gain in gains]


def speed_page(options: argparse.Namespace) -> tuple[str, list[str]]:
    torch.manual_seed(0)
    model = timm.create_model("deit_small_patch16_224").eval()
    images = torch.randn(max(16, *options.speed_batches), 3, 224, 224)
    reducing = {**REDUCERS, TOME: "{kind: bipartite}"}
    sides = []
    for name, (metric, reducer) in SPEED_SIDES.items():
        plan = plan_within(model, metric, reducing[reducer], 0.65)
        if has_open_fields(plan):  # random weights cannot be calibrated, and the time does not depend on them
            found = calibrate(
                model, match(model), plan, images=images[:16], identity={}, batch_size=8, progress=Silent()
            )
            plan = plan.with_metrics(found.specs)
        compressed = attach(copy.deepcopy(model), plan)
        sides.append(Side(name, metric, compressed, compressed.macs() / compressed.dense_macs()))
    parts = [
        "Random weights; all contenders use the fused kernel and are interleaved in one run. Medians, and paired "
        "rounds against pruning by shift (p10 - p90; above 1 is faster).",
    ]
    for batch in options.speed_batches:
        subjects = [Subject("dense", model), *(Subject(side.reducer, side.model) for side in sides)]
        times = measure_latency(
            subjects, images[:batch], max_seconds=options.seconds, warmup=2, progress=Screen(), min_runs=5
        )
        rows = []
        for side in sides:
            gain, against = (compute_speedup(times[name], times[side.reducer]) for name in ("dense", "prune, shift"))
            rows.append(
                [
                    side.reducer,
                    f"{side.macs:.3f}",
                    f"{times[side.reducer].spread.median:.1f}",
                    f"{gain.ratio:.2f}x",
                    f"{against.ratio:.3f}x ({against.p10:.2f} - {against.p90:.2f})",
                ]
            )
        dense = times["dense"].spread.median
        heading = f"## Batch {batch}, dense {dense:.1f} ms"
        parts += [heading, table(["contender", "MACs", "ms", "over dense", "over pruning by shift"], rows)]
    return "Speed of the reducers: DeiT-S at a MAC ratio of 0.65", parts


if __name__ == "__main__":
    main()
