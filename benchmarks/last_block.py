"""Speed of the exact last block on this CPU: DeiT-S and DeiT-B, dense, with the full and with the exact block, in turn.

The exact block computes the class token only. Recipes are the paper's, and one that keeps all tokens. Weights are
random, which does not change the speed.

    python benchmarks/last_block.py --threads 2 --rounds 60
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

MODELS = {"DeiT-S": "deit_small_patch16_224", "DeiT-B": "deit_base_patch16_224"}
PAPER = """\
version: 1
metric: {kind: representation_shift, operation: mlp, distance: l2, reading: update, polarity: largest}
drop_ratio: 0.2
layers: [0, 3, 6]
"""
ALL = "version: 1\nmetric: {kind: token_norm}\nlayers: [{layer: 0, keep_tokens: 196}]\n"
NOTE = (
    "Median milliseconds per batch of interleaved runs. `full` and `exact` are the two last blocks; speed-ups are over "
    "dense, except in the column `exact/full`, which has the ratio of the MACs beside it. The recipe `all tokens` "
    "drops nothing; its only site scores the tokens. `difference` is the largest one between outputs of the two, "
    "which are at most `largest`."
)


def reduced(dense: nn.Module, text: str, last_block: str) -> CompressedModel:
    model = copy.deepcopy(dense)
    return attach(model, resolve_for(model, Recipe.parse(f"{text}last_block: {last_block}\n")))


@torch.inference_mode()
def main() -> None:
    options = pieces_parser(__doc__, [1, 8], 60).parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for title, name in MODELS.items():
        torch.manual_seed(0)
        dense = timm.create_model(name).eval()
        for schedule, text in (("paper's", PAPER), ("all tokens", ALL)):
            full, exact = (reduced(dense, text, last_block) for last_block in ("full", "exact"))
            for batch in options.batches:
                images = torch.randn(batch, 3, 224, 224)
                difference = f"{float((full(images) - exact(images)).abs().max()):.1e}"
                largest = f"{float(full(images).abs().max()):.1f}"
                runs = {"dense": dense, "full": full, "exact": exact}
                found = timed({side: partial(model, images) for side, model in runs.items()}, options.rounds)
                rows.append(
                    [
                        title,
                        schedule,
                        str(batch),
                        " -> ".join(f"{macs / 1e9:.2f}" for macs in (full.dense_macs(), full.macs(), exact.macs())),
                        *(f"{1e3 * found[side]:.1f}" for side in runs),
                        *(f"{found['dense'] / found[side]:.2f}x" for side in ("full", "exact")),
                        f"{found['full'] / found['exact']:.3f}x",
                        f"{full.macs() / exact.macs():.3f}x",
                        difference,
                        largest,
                    ]
                )
    columns = ["model", "recipe", "batch", "GMACs dense -> full -> exact", "dense", "full", "exact", "full", "exact"]
    columns += ["exact/full", "MACs", "difference", "largest"]
    machine = f"{device_name(torch.device('cpu'))}, float32, {options.threads} threads"
    publish(
        "last_block",
        "The exact last block on a CPU",
        machine,
        [table(columns, rows), NOTE],
        dry_run=options.dry_run,
    )


if __name__ == "__main__":
    main()
