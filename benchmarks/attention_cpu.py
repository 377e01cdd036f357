"""Cost of token sizes in attention, and of a score relative to a block, at the sizes of DeiT-S.

python benchmarks/attention_cpu.py
"""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
from _results import publish, table
from _timing import pieces_parser, timed

from repshift_cli.measure.device import device_name
from repshift_cli.ops.attention import attend
from repshift_cli.planning.recipe import ComponentSpec
from repshift_cli.reduction.metrics.base import Metric, SiteContext, build_metric
from repshift_cli.reduction.metrics.fitted import Fitted

HEADS, WIDTH, TOKENS = 6, 64, 158
ARRIVING = 197


def main() -> None:
    options = pieces_parser(__doc__, batches=[1, 8], rounds=200).parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = [row for batch in options.batches for row in rows_for(batch, options.rounds)]
    note = (
        f"Medians of interleaved runs, float32. Attention: {HEADS} heads of {WIDTH} channels, {TOKENS} tokens, "
        f"relative to the fused kernel without sizes. Scores: {ARRIVING} tokens of 384 channels, relative to a block."
    )
    body = [note, table(["batch", "what", "ms", "of the first"], rows)]
    machine = f"{device_name(torch.device('cpu'))}, {options.threads} threads"
    title = "Sizes in attention, and the cost of a score: DeiT-S"
    publish("attention_cpu", title, machine, body, dry_run=options.dry_run)


@torch.inference_mode()
def rows_for(batch: int, rounds: int) -> list[list[str]]:
    found = []
    for group in (attentions(batch), scores(batch)):
        medians = timed(group, rounds)
        first = next(iter(medians.values()))
        found += [
            [str(batch), name, f"{1e3 * median:.3f}", f"{100 * median / first:.1f}%"]
            for name, median in medians.items()
        ]
    return found


def attentions(batch: int) -> dict[str, Callable[[], object]]:
    query, key, value = torch.randn(3, batch, TOKENS, HEADS, WIDTH).transpose(2, 3).unbind(0)
    sizes = torch.randint(1, 6, (batch, TOKENS)).float()
    return {
        "attention without sizes": lambda: attend(query, key, value, form="mask"),
        "sizes as a mask": lambda: attend(query, key, value, sizes, form="mask"),
        "sizes folded into channels": lambda: attend(query, key, value, sizes, form="folded"),
        "sizes, explicit": lambda: attend(query, key, value, sizes, form="explicit"),
    }


def scores(batch: int) -> dict[str, Callable[[], object]]:
    block = timm.create_model("deit_small_patch16_224").eval().blocks[0]
    tokens = torch.randn(batch, ARRIVING, HEADS * WIDTH)
    seen = {"block_output": tokens, "mlp_update": torch.randn_like(tokens)}
    site = SiteContext(layer=0, prefix=1, class_token=True)
    shift: Metric = build_metric(ComponentSpec(kind="representation_shift")).with_defaults()
    fitted = Fitted.of(torch.randn(HEADS * WIDTH).tolist())
    return {
        "block": lambda: block(tokens),
        "fitted score": lambda: fitted.score(seen, site),
        "representation shift (mlp, l2)": lambda: shift.score(seen, site),
    }


if __name__ == "__main__":
    main()
