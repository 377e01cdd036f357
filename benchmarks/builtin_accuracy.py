"""Accuracy of every score on the built-in models at the paper's schedule, and what calibration picks.

    python benchmarks/builtin_accuracy.py

For each built-in model: top-1 on test scenes of several seeds with 20% of the tokens dropped at each of three sites
(the default recipe), for every variant of representation shift and for the baselines. For a CNN, smaller images at the
same cost are a baseline too. Then calibration on 128 unlabelled training scenes is repeated, and its choices are
evaluated on the test scenes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from _results import publish, table
from torch import Tensor

from repshift_cli.calibration.calibrate import calibrate
from repshift_cli.checkpoints.builtin import BUILTIN
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.checkpoints.loaded import LoadedModel
from repshift_cli.data.builtin.digits import DigitScenes
from repshift_cli.data.inputs import load_inputs
from repshift_cli.measure.device import device_name
from repshift_cli.measure.macs import count_macs
from repshift_cli.planning.plan import Plan
from repshift_cli.planning.recipe import ComponentSpec, scaled_recipe
from repshift_cli.planning.resolve import resolve
from repshift_cli.reduction.checks import feeds
from repshift_cli.reduction.compressed_model import attach
from repshift_cli.reduction.families.base import match
from repshift_cli.reduction.metrics.base import Metric, build_metric
from repshift_cli.utils.progress import Silent

RANDOM_DRAWS = 5
CALIBRATION_IMAGES = 128


@dataclass(frozen=True)
class Scenes:
    """Test scenes of one seed: images `[n, C, H, W]` and labels `[n]`."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Row:
    """A metric and its top-1 in percent on the scenes of each seed."""

    name: str
    top1: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.top1)

    @property
    def spread(self) -> float:
        return statistics.stdev(self.top1) if len(self.top1) > 1 else 0.0


def part(**options: object) -> Metric:
    return build_metric(ComponentSpec.model_validate(options))


def draw(loaded: LoadedModel, seed: int, count: int, side: int | None = None) -> Scenes:
    """Preprocessed test scenes, or smaller ones."""
    preprocessing = loaded.description.preprocessing
    if side is not None:
        preprocessing = replace(preprocessing, input_size=(preprocessing.input_size[0], side, side))
    transform = preprocessing.transform()
    pairs = [DigitScenes("test", count, seed)[index] for index in range(count)]
    return Scenes(torch.stack([transform(image) for image, _ in pairs]), torch.tensor([label for _, label in pairs]))


@torch.inference_mode()
def top1(model: torch.nn.Module, scenes: Scenes, batch: int = 64) -> float:
    right = sum(
        int((model(images).argmax(-1) == labels).sum())
        for images, labels in zip(scenes.images.split(batch), scenes.labels.split(batch), strict=True)
    )
    return 100.0 * right / len(scenes.labels)


def accuracy(loaded: LoadedModel, plan: Plan, seeds: Sequence[Scenes]) -> tuple[float, ...]:
    compressed = attach(loaded.model, plan)
    try:
        return tuple(top1(compressed, scenes) for scenes in seeds)
    finally:
        compressed.detach()


def study(name: str, count: int, seeds: Sequence[int], calibrations: int) -> tuple[str, list[str]]:
    """Title and body of the page of one model."""
    loaded = load_checkpoint(f"builtin:{name}")
    family = match(loaded.model)
    layout = family.layout(loaded.model)
    layers = [site.layer for site in layout.sites]
    plan = resolve(scaled_recipe("paper", len(layers), layers), layout)
    site = next(site for site in family.sites(loaded.model) if site.layer == plan.sites[0].layer)
    sets = [draw(loaded, seed, count) for seed in seeds]
    dense = Row("dense", tuple(top1(loaded.model, scenes) for scenes in sets))

    def row(metric: Metric, name: str | None = None) -> Row:
        return Row(name or str(metric), accuracy(loaded, plan.with_metric(metric.spec()), sets))

    shifts = [
        row(metric, str(metric).removeprefix("representation_shift "))
        for metric in part(kind="representation_shift").variants()
        if feeds(metric, site)
    ]
    attention = part(kind="class_attention")
    baselines = [row(attention, "class attention")] if feeds(attention, site) else []
    baselines += [row(part(kind="token_norm", polarity=end), f"token norm ({end})") for end in ("largest", "smallest")]
    draws = [row(part(kind="random", seed=seed)).top1 for seed in range(RANDOM_DRAWS)]
    baselines.append(
        Row(f"random ({RANDOM_DRAWS} draws)", tuple(statistics.fmean(c) for c in zip(*draws, strict=True)))
    )
    share = family.macs(loaded.model, plan) / family.macs(loaded.model, None)
    smaller = smaller_images(loaded, share, count, seeds) if layout.map_size else []
    sites = ", ".join(f"{planned.site} ({planned.tokens_in} to {planned.tokens_out})" for planned in plan.sites)
    return f"Accuracy on builtin:{name}: dense {dense.mean:.1f}%, MAC ratio {share:.3f}", [
        f"{len(seeds)} seeds of {count} test scenes; mean and standard deviation. Tokens are dropped after {sites}.",
        score_table(dense, [*shifts, *baselines, *smaller]),
        f"Calibration, site by site, on {CALIBRATION_IMAGES} unlabelled training scenes:",
        calibration_table(loaded, plan, shifts, sets, dense=dense, random=baselines[-1], times=calibrations),
    ]


def smaller_images(loaded: LoadedModel, share: float, count: int, seeds: Sequence[int]) -> list[Row]:
    """The dense model on smaller images: the largest that cost no more than the share, and those for a tenth more.

    (The cost is a staircase, because maps have whole sizes: what costs a little more may be much better.)
    """
    channels, full, _ = loaded.description.preprocessing.input_size
    dense = count_macs(loaded.model, (channels, full, full))
    costs = {side: count_macs(loaded.model, (channels, side, side)) / dense for side in range(full // 2, full + 1)}
    below, above = (max(side for side, cost in costs.items() if cost <= most) for most in (share, 1.1 * share))
    return [
        Row(
            f"images of {side} px, MAC ratio {costs[side]:.3f}",
            tuple(top1(loaded.model, draw(loaded, seed, count, side)) for seed in seeds),
        )
        for side in (below, above)
    ]


def score_table(dense: Row, rows: Sequence[Row]) -> str:
    ranked = sorted(rows, key=lambda row: -row.mean)
    cells = [[row.name, f"{row.mean:.2f} +- {row.spread:.2f}", f"{row.mean - dense.mean:+.2f}"] for row in ranked]
    return table(
        ["score", "top-1, %", "against dense"], [["dense", f"{dense.mean:.2f} +- {dense.spread:.2f}", ""], *cells]
    )


def calibration_table(
    loaded: LoadedModel,
    plan: Plan,
    shifts: Sequence[Row],
    sets: Sequence[Scenes],
    *,
    dense: Row,
    random: Row,
    times: int,
) -> str:
    best = max(row.mean for row in shifts)
    rows = []
    for seed in range(times):
        batch = load_inputs(None, CALIBRATION_IMAGES, loaded.description.preprocessing, seed)
        found = calibrate(
            loaded.model,
            match(loaded.model),
            plan.with_metric(ComponentSpec(kind="representation_shift")),
            images=batch.tensor,
            identity=batch.identity,
            batch_size=32,
            progress=Silent(),
        )
        got = Row("", accuracy(loaded, plan.with_metrics(found.specs), sets)).mean
        names = "; ".join(str(choice.chosen).removeprefix("representation_shift ") for choice in found.sites)
        gaps = [f"{got - other:+.2f}" for other in (dense.mean, best, random.mean)]
        rows.append([names, str(seed), f"{got:.2f}", *gaps, f"{found.sigmas:.1f}"])
    columns = ["chosen at the three sites", "seed", "top-1, %", "against dense", "against the best single score"]
    columns += ["against random", "standard errors over random"]
    return table(columns, rows)


def main() -> None:
    names = [name.removeprefix("builtin:") for name in BUILTIN]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--calibrations", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dry-run", action="store_true", help="print the page, write no file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = f"{device_name(torch.device('cpu'))}, {options.threads} threads"
    for name in options.models:
        title, body = study(name, options.scenes, options.seeds, options.calibrations)
        publish(f"builtin_accuracy_{name}", title, machine, body, dry_run=options.dry_run)


if __name__ == "__main__":
    main()
