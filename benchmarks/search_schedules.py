"""Found schedules compared with the paper's on other scenes, and a latency target on DeiT-S.

    python benchmarks/search_schedules.py

On the built-in ViTs, searches on 256 unlabelled training scenes with several seeds have a target share of the MACs. The
found schedule and the paper's, scaled to the same MACs and with the same metrics, are then compared on test scenes. On
DeiT-S (with random weights, since only the time matters) the search has a latency target; its result is timed again.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time

import timm
import torch
from _results import publish, table
from builtin_accuracy import Scenes, draw
from combinations import outputs
from torch import Tensor, nn

from repshift_cli.calibration.calibrate import calibrate, fit_open
from repshift_cli.calibration.outputs import agreement, distance
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.cli.ui import Screen
from repshift_cli.data.inputs import load_inputs
from repshift_cli.measure.device import device_name
from repshift_cli.measure.latency import Subject, compute_speedup, measure_latency
from repshift_cli.planning.plan import Plan
from repshift_cli.planning.recipe import Budget, ComponentSpec, LayerDrop, Recipe
from repshift_cli.reduction.compressed_model import attach
from repshift_cli.reduction.families.base import match
from repshift_cli.reduction.plans import resolve_for
from repshift_cli.search.result import SearchResult, SearchSettings
from repshift_cli.search.search import search
from repshift_cli.search.target import SearchTarget
from repshift_cli.utils.progress import Silent

IMAGES = 256
FIT_IMAGES = 64
TEST_SEED = 200
METRICS = {"fitted": "merge", "representation_shift": "prune"}


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    machine = f"{device_name(torch.device('cpu'))}, {options.threads} threads"
    if options.models:
        title = "Searched schedules against the paper's at equal operations"
        publish("search_quality", title, machine, quality(options), dry_run=options.dry_run)
    if options.latency:
        title = f"A latency target: DeiT-S, {IMAGES} images, batch {options.batch}"
        publish("search_latency", title, machine, latencies(options), dry_run=options.dry_run)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="*", default=["vit-digits", "vit-digits-small"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.65, 0.5, 0.35])
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=list(METRICS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--scenes", type=int, default=1000, help="test scenes, other ones for each seed")
    parser.add_argument("--latency", nargs="*", type=float, default=[0.6], help="targets for DeiT-S")
    parser.add_argument("--batch", type=int, default=8, help="of the latency targets")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dry-run", action="store_true", help="print the page, write no file")
    return parser.parse_args()


def start(target: SearchTarget, metric: str) -> Recipe:
    """Where a search begins."""
    budget = Budget.model_validate({target.kind: target.value})
    return Recipe(
        version=1, metric=ComponentSpec(kind=metric), reducer=ComponentSpec(kind=METRICS[metric]), budget=budget
    )


def quality(options: argparse.Namespace) -> list[str]:
    rows = []
    for name in options.models:
        model = load_checkpoint(f"builtin:{name}")
        sets = [draw(model, TEST_SEED + seed, options.scenes) for seed in options.seeds]
        for metric in options.metrics:
            for ratio in options.ratios:
                for seed, scenes in zip(options.seeds, sets, strict=True):
                    images = load_inputs(None, IMAGES, model.description.preprocessing, seed)
                    settings = SearchSettings(
                        target=SearchTarget("macs", ratio),
                        images=images.tensor,
                        identity=images.identity,
                        start=start(SearchTarget("macs", ratio), metric),
                        batch_size=32,
                        seed=seed,
                        seconds=0.0,
                    )
                    found = search(model.model, match(model.model), settings, Silent())
                    rows.append([name, metric, METRICS[metric], str(ratio), str(seed)])
                    rows[-1] += compared(model.model, found, images.tensor, metric, scenes)
                    print(rows[-1], file=sys.stderr, flush=True)
    columns = ["model", "score", "reducer", "target", "seed", "MACs found", "MACs paper", "distance found"]
    columns += ["distance paper", "unchanged found, %", "unchanged paper, %", "top-1 found, %", "top-1 paper, %", "s"]
    note = (
        f"Each row is one search on {IMAGES} training scenes of its seed; distance (squared Hellinger), unchanged "
        f"predictions and top-1 on {options.scenes} test scenes that no search used. The paper's schedule has its "
        "ratios scaled by one factor; its scores are fitted or calibrated on the same scenes. `=`: the search returned "
        "the paper's schedule, because no other was better on the search scenes and on the held-out scenes."
    )
    return [note, table(columns, rows)]


def compared(model: nn.Module, found: SearchResult, images: Tensor, metric: str, scenes: Scenes) -> list[str]:
    dense = outputs(model, scenes.images)
    plans = [found.plan, found.plan if found.paper_is_found else paper_plan(model, found, images, metric)]
    cells: list[list[str]] = []
    for plan in plans:
        compressed = attach(copy.deepcopy(model), plan)
        given = outputs(compressed, scenes.images)
        cells.append(
            [
                f"{compressed.macs() / compressed.dense_macs():.3f}",
                f"{float(distance(dense, given, has_head=True).mean()):.5f}",
                f"{100 * float(agreement(dense, given).mean()):.1f}",
                f"{100 * float((given.argmax(-1) == scenes.labels).float().mean()):.1f}",
            ]
        )
    if found.paper_is_found:
        cells[1] = ["="] * len(cells[1])
    return [cell for pair in zip(*cells, strict=True) for cell in pair] + [f"{found.seconds:.0f}"]


def paper_plan(model: nn.Module, found: SearchResult, images: Tensor, metric: str) -> Plan:
    """The paper's schedule that the search compared with, with the same metrics."""
    assert found.paper is not None
    prefix = match(model).layout(model).prefix_tokens
    layers = tuple(LayerDrop(layer=layer, keep_tokens=left - prefix) for layer, left in found.paper.tokens)
    recipe = Recipe(
        version=1, metric=ComponentSpec(kind=metric), reducer=ComponentSpec(kind=METRICS[metric]), layers=layers
    )
    plan = resolve_for(model, recipe)
    if metric == "fitted":
        return fit_open(model, plan, images[:FIT_IMAGES], 32, Silent())
    chosen = calibrate(
        model, match(model), plan, images=images[: 2 * FIT_IMAGES], identity={}, batch_size=32, progress=Silent()
    )
    return plan.with_metrics(chosen.specs)


def latencies(options: argparse.Namespace) -> list[str]:
    torch.manual_seed(0)
    model = timm.create_model("deit_small_patch16_224").eval()
    images = torch.randn(IMAGES, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    rows = []
    for value in options.latency:
        settings = SearchSettings(
            target=SearchTarget("latency", value),
            images=images,
            identity={"where": "noise"},
            start=start(SearchTarget("latency", value), "fitted"),
            batch_size=options.batch,
            reducers=(ComponentSpec(kind="prune"),),
        )
        begin = time.monotonic()
        found = search(model, match(model), settings, Screen())
        spent = time.monotonic() - begin
        compressed = attach(copy.deepcopy(model), found.plan)
        subjects = [Subject("dense", model), Subject("found", compressed)]
        again = measure_latency(
            subjects, images[: options.batch], max_seconds=60.0, warmup=2, progress=Screen(), min_runs=10
        )
        gain = compute_speedup(again["dense"], again["found"])
        rows.append(
            [
                str(value),
                f"{found.found.latency:.3f}" if found.found.latency else "-",
                f"{1 / gain.ratio:.3f} ({1 / gain.p90:.3f} - {1 / gain.p10:.3f})",
                f"{found.found.macs:.3f}",
                found.plan.reducer.kind,
                str(found.evaluations),
                f"{spent / 60:.1f} min",
            ]
        )
    columns = [
        "target",
        "latency as searched",
        "timed anew (p10 - p90 of rounds)",
        "MACs",
        "reducer",
        "tried",
        "search",
    ]
    note = "Random weights and noise inputs: only the time matters here. All values are fractions of the dense model's."
    return [note, table(columns, rows)]


if __name__ == "__main__":
    main()
