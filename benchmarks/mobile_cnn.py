"""Accuracy of a small EfficientNet with fewer rows and columns, against smaller images at the same cost.

    python benchmarks/mobile_cnn.py

A model of 11 blocks is trained on the built-in scenes with the schedule of `scripts/train_builtin.py`, in a few minutes
on one core. Then lines are dropped after a block of the 18x18 map and one of the 9x9 map, at an equal share, so that
the MACs are the given share of the dense ones. The smaller images are the largest that cost no more.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from _results import publish, table
from builtin_accuracy import draw, top1
from torch import Tensor, nn

from repshift_cli.data.builtin.digits import SCENE_SIZE
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.measure.device import device_name
from repshift_cli.planning.recipe import Recipe
from repshift_cli.reduction.compressed_model import attach
from repshift_cli.reduction.families.base import match
from repshift_cli.reduction.plans import resolve_for

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from train_builtin import Setup, train

STAGES = ("ds_r1_k3_s1_e1_c16_se0.25", "ir_r3_k3_s2_e3_c24_se0.25", "ir_r4_k5_s2_e3_c48_se0.25", "ir_r3_k3_s1_e3_c64")
SITES = ("blocks.1.1", "blocks.2.1")
SHARES = (0.8, 0.65)
METRICS = {
    "shift, largest kept": "{kind: representation_shift, operation: block, distance: l2, polarity: largest}",
    "shift, smallest kept": "{kind: representation_shift, operation: block, distance: l2, polarity: smallest}",
    "token norm, largest kept": "{kind: token_norm, polarity: largest}",
    "random": "{kind: random, seed: 0}",
}


@dataclass(frozen=True, kw_only=True)
class MobileSetup(Setup):
    """An `EfficientNet` of timm; the patch loss reads its last map, whose stride is 8."""

    architecture: ClassVar[str | None] = "efficientnet_b0"

    @property
    def patch_width(self) -> int:
        return 128

    def args(self) -> dict[str, Any]:
        return {}

    def build(self) -> nn.Module:
        from timm.models._efficientnet_builder import decode_arch_def
        from timm.models.efficientnet import EfficientNet

        blocks = decode_arch_def([[stage] for stage in STAGES])
        return EfficientNet(blocks, num_classes=10, num_features=self.patch_width, stem_size=16, act_layer=nn.SiLU)

    def read(self, model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        last = model.forward_features(images)
        return model.forward_head(last), last.flatten(2).mT


@dataclass
class Described:
    """What `draw` needs: preprocessing."""

    preprocessing: Preprocessing

    @property
    def description(self) -> Described:
        return self


def set_side(model: nn.Module, side: int) -> None:
    """State the size of the images of a model."""
    model.pretrained_cfg = {"input_size": (3, side, side)}  # type: ignore[assignment]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--count", type=int, default=512, help="test scenes of each of three seeds")
    parser.add_argument("--dry-run", action="store_true", help="write no page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = train(MobileSetup(seed=0, steps=options.steps, learning_rate=2e-3))
    described: Any = Described(Preprocessing((3, SCENE_SIZE, SCENE_SIZE), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0))
    sets = [draw(described, seed, options.count) for seed in range(3)]
    set_side(model, SCENE_SIZE)
    family = match(model)
    dense = family.macs(model, None)

    def mean(network: nn.Module, scenes: list[Any]) -> str:
        found = [top1(network, each) for each in scenes]
        return f"{statistics.fmean(found):.1f} +- {statistics.stdev(found):.1f}"

    rows = [["dense", "100%", mean(model, sets)]]
    for share in SHARES:
        side = SCENE_SIZE
        while family.macs(model, None) > share * dense:
            side -= 1
            set_side(model, side)
        smaller = family.macs(model, None) / dense
        rows.append(
            [
                f"images of {side}x{side}",
                f"{smaller:.1%}",
                mean(model, [draw(described, seed, options.count, side) for seed in range(3)]),
            ]
        )
        set_side(model, SCENE_SIZE)
        for name, metric in METRICS.items():
            for percent in range(2, 90):
                layers = ", ".join(f"{{layer: {site}, drop_ratio: {percent / 100}}}" for site in SITES)
                plan = resolve_for(model, Recipe.parse(f"version: 1\nmetric: {metric}\nlayers: [{layers}]\n", "r.yaml"))
                if family.macs(model, plan) <= share * dense:
                    break
            compressed = attach(model, plan)
            rows.append(
                [
                    f"{percent}% dropped at {len(SITES)} sites, {name}",
                    f"{family.macs(model, plan) / dense:.1%}",
                    mean(compressed, sets),
                ]
            )
            compressed.detach()
    publish(
        "mobile_cnn",
        "A small EfficientNet on the built-in scenes",
        f"{device_name(torch.device('cpu'))}, float32, 1 thread",
        [
            f"Top-1 in percent, mean and standard deviation of 3 sets of {options.count} test scenes of "
            f"{SCENE_SIZE}x{SCENE_SIZE}; {dense / 1e6:.1f} MMACs dense.",
            "The model is trained on none of the reduced inputs. A scene has one digit among clutter, so most lines "
            "hold no part of the answer; where an object fills the image, fewer lines can go.",
            table(["", "MACs", "top-1"], rows),
        ],
        dry_run=options.dry_run,
    )


if __name__ == "__main__":
    main()
