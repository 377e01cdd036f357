"""Speed of `restore: true` on this CPU: ViT-S/16 at 0.65 of the MACs, dense, without and with restoring, run in turn.

20% of the patch tokens are dropped after blocks 0, 3 and 6. Weights are random, which does not change the speed.

    python benchmarks/restore_cpu.py --threads 2 --rounds 40
"""

from __future__ import annotations

import copy
from functools import partial

import timm
import torch
from _results import publish, table
from _timing import pieces_parser, timed
from torch import nn

from repshift_cli.measure.device import device_name
from repshift_cli.planning.recipe import Recipe
from repshift_cli.reduction.compressed_model import CompressedModel, attach
from repshift_cli.reduction.plans import resolve_for

RECIPE = """\
version: 1
metric: {{kind: representation_shift, operation: mlp, distance: l2, reading: update, polarity: largest}}
reducer: {{kind: {reducer}}}
restore: {restore}
last_block: full
drop_ratio: 0.2
layers: [0, 3, 6]
"""
NOTE = (
    "Median milliseconds per batch of interleaved runs. The last column is the speed with restoring as a share of the "
    "speed without."
)


def reduced(dense: nn.Module, reducer: str, restore: bool) -> CompressedModel:
    model = copy.deepcopy(dense)
    return attach(model, resolve_for(model, Recipe.parse(RECIPE.format(reducer=reducer, restore=str(restore).lower()))))


@torch.inference_mode()
def main() -> None:
    options = pieces_parser(__doc__, [1, 8], 40).parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dense = timm.create_model("vit_small_patch16_224").eval()
    rows = []
    for reducer in ("prune", "merge"):
        plain, restored = (reduced(dense, reducer, restore) for restore in (False, True))
        share = restored.macs() / restored.dense_macs()
        for batch in options.batches:
            images = torch.randn(batch, 3, 224, 224)
            runs = {"dense": dense, "plain": plain, "restored": restored}
            found = timed({name: partial(model, images) for name, model in runs.items()}, options.rounds)
            times = [f"{1e3 * found[name]:.1f}" for name in runs]
            gains = [f"{found['dense'] / found[name]:.2f}x" for name in ("plain", "restored")]
            ratio = f"{found['plain'] / found['restored']:.2f}"
            rows.append([reducer, str(batch), f"{share:.3f}", *times, *gains, ratio])
    columns = ["reducer", "batch", "MACs", "dense", "without", "restored", "without", "restored", "restored/without"]
    machine = f"{device_name(torch.device('cpu'))}, float32, {options.threads} threads"
    publish(
        "restore_cpu",
        "Speed of restored tokens on a CPU",
        machine,
        [table(columns, rows), NOTE],
        dry_run=options.dry_run,
    )


if __name__ == "__main__":
    main()
