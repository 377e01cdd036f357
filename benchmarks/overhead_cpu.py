"""Cost of a site relative to its block: score, selection and gathering, and the operations that they add.

The profiler counts the operations of the block with and without the site. The script checks that the site adds no
float64, no second copy of the kept tokens and no value read back from the device.

    python benchmarks/overhead_cpu.py --threads 2
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from _results import publish, table
from _timing import WARMUP, pieces_parser
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from repshift_cli.compression.api import compress_dense
from repshift_cli.measure.device import device_name
from repshift_cli.ops.tokens import gather_tokens, keep_top_behind
from repshift_cli.reduction.compressed_model import CompressedModel
from repshift_cli.reduction.metrics.base import SiteContext, build_metric

MODEL, RECIPE = "deit_small_patch16_224", "deit_small_paper"
FORBIDDEN = ("aten::_local_scalar_dense", "aten::item", "aten::nonzero")


def main() -> None:
    options = pieces_parser(__doc__, batches=[1, 8, 64], rounds=40).parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    compressed = compress_dense(MODEL, RECIPE).compressed
    assert compressed is not None
    rows = [row(compressed, batch, options.rounds) for batch in options.batches]
    columns = [
        "batch",
        "block, ms",
        "score, us",
        "choice, us",
        "gathering, us",
        "score and gathering",
        "with the choice",
    ]
    note = (
        "Shares are relative to the block. Medians of runs in which block, score, selection and gathering follow "
        "each other as in the model, each on data that the previous one has just written. Operations added by the "
        f"site, by the profiler at batch {options.batches[0]}: {added(compressed, options.batches[0])}."
    )
    machine = f"{device_name(torch.device('cpu'))}, float32, {options.threads} threads"
    title = "Cost of a site: the first of DeiT-S, 197 to 158 tokens"
    publish("overhead_cpu", title, machine, [table(columns, rows), note], dry_run=options.dry_run)


@torch.inference_mode()
def row(compressed: CompressedModel, batch: int, rounds: int) -> list[str]:
    medians = {name: statistics.median(found) for name, found in samples(compressed, batch, rounds).items()}
    parts = [medians[name] for name in ("score", "choice", "gathering")]
    shown = [f"{1e6 * part:.0f}" for part in parts]
    shares = (f"{100 * part / medians['block']:.2f}%" for part in (parts[0] + parts[2], sum(parts)))
    return [str(batch), f"{1e3 * medians['block']:.2f}", *shown, *shares]


def samples(compressed: CompressedModel, batch: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of the block and of the steps of its site, each on the output of the previous one."""
    block, tokens = first_block(compressed, batch)
    planned = compressed.plan.sites[0]
    metric, site = build_metric(planned.metric), SiteContext(planned.layer, 1, True)
    probes = compressed.family.sites(compressed.model)[planned.layer].probes
    seen: dict[str, Tensor] = {}
    hooks = [probes[name].module.register_forward_hook(partial(remember, seen, name)) for name in metric.taps()]
    found: dict[str, list[float]] = {"block": [], "score": [], "choice": [], "gathering": []}
    with compressed.dense():
        for done in range(WARMUP + rounds):
            times = [time.perf_counter()]
            output = block(tokens)
            times.append(time.perf_counter())
            scores = metric.score(seen, site)
            times.append(time.perf_counter())
            keep = keep_top_behind(scores, planned.tokens_out - 1, 1)
            times.append(time.perf_counter())
            gather_tokens(output, keep)
            times.append(time.perf_counter())
            if done >= WARMUP:
                for name, (begin, end) in zip(found, pairwise(times), strict=True):
                    found[name].append(end - begin)
    for hook in hooks:
        hook.remove()
    return found


def remember(seen: dict[str, Tensor], name: str, module: object, args: object, output: Tensor) -> None:
    seen[name] = output


def added(compressed: CompressedModel, batch: int) -> str:
    """Names and numbers of the operations that the site adds.

    Raises:
        SystemExit: one of them is forbidden, or computes in float64.
    """
    block, tokens = first_block(compressed, batch)
    with torch.inference_mode():
        reduced = operations(lambda: block(tokens))
        with compressed.dense():
            plain = operations(lambda: block(tokens))
    extra = reduced - plain
    if wrong := [name for name in extra if name in FORBIDDEN or "float64" in name]:
        raise SystemExit(f"the site runs {', '.join(wrong)}")
    return ", ".join(f"{count} {name.removeprefix('aten::')}" for name, count in sorted(extra.items()))


def first_block(compressed: CompressedModel, batch: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    block = compressed.model.get_submodule(compressed.plan.sites[0].site)
    return block, torch.randn(batch, compressed.plan.sites[0].tokens_in, compressed.model.embed_dim)  # type: ignore


def operations(run: Callable[[], object]) -> Counter[str]:
    """The operations of one run and what they call, views left out."""
    run()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    views = {"view", "slice", "as_strided", "unsqueeze", "select", "expand", "transpose", "t", "permute", "flatten"}
    views |= {"unflatten", "reshape", "_unsafe_view", "narrow", "unbind", "split", "detach"}
    names = (event.name for event in profiler.events() if event.name.startswith("aten::"))
    return Counter(name for name in names if name.removeprefix("aten::") not in views)


if __name__ == "__main__":
    main()
