"""The selective scan on this CPU: the loop that reference code runs, the loop over tokens, and the blocked scan.

The variants run in turn, without gradients, at the sizes of Vision Mamba (E = 384, N = 16, two directions): 197 tokens,
and 158 and 126 after dropping.

    python benchmarks/scan_cpu.py --threads 2 --runs 30
"""

from __future__ import annotations

import argparse
import time

import torch
from _results import latency, publish, table
from torch import Tensor

from repshift_cli.measure.device import device_name, num_threads
from repshift_cli.measure.latency import Spread, Subject, compute_speedup, measure_latency
from repshift_cli.ops.selective_scan import selective_scan, sequential_scan
from repshift_cli.utils.progress import Silent

SCANS = 2
NOTE = (
    "Milliseconds for both directions: median [p10-p90] of interleaved runs. `naive` forms the decays and inputs of "
    "all tokens as `[B, E, L, N]`, then takes one step per token, direction by direction. The ratios are to the "
    "others' median; `per token` is the blocked scan's median divided by B L, in microseconds."
)


def main() -> None:
    options = parse_options()
    with num_threads(options.threads) as count, torch.inference_mode():
        machine = f"{device_name(torch.device('cpu'))}, {count} threads"
        rows = [measure(batch, length, options) for batch in options.batch_sizes for length in options.lengths]
        training = [train(options)] if options.train else []
    columns = ["", "naive", "sequential", "blocked", "over naive", "over sequential", "per token"]
    title = f"Selective scan on a CPU (E = {options.width}, N = {options.state})"
    publish("scan_cpu", title, machine, [table(columns, rows), *training, NOTE], dry_run=options.dry_run)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--lengths", nargs="+", type=int, default=[197, 158, 126], help="tokens")
    parser.add_argument("--width", type=int, default=384, help="channels of the scan")
    parser.add_argument("--state", type=int, default=16, help="state of each channel")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--runs", type=int, default=20, help="of each variant at each size")
    parser.add_argument(
        "--train", action="store_true", help="also time the gradient, at B = 64, L = 82, E = 128, N = 8"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the page, write no file")
    return parser.parse_args()


def measure(batch: int, length: int, options: argparse.Namespace) -> list[str]:
    """One row of the table."""
    inputs = random_inputs(batch, length, options.width, options.state)
    check(inputs)
    sides = {"naive": naive_scan, "sequential": sequential_scan, "blocked": selective_scan}
    subjects = [Subject(name, lambda u, run=run: run(u, *inputs[1:])) for name, run in sides.items()]
    timings = measure_latency(subjects, inputs[0], max_seconds=0, warmup=2, progress=Silent(), min_runs=options.runs)
    naive, sequential, blocked = (timings[name] for name in sides)
    ratios = [f"{compute_speedup(slow, blocked).ratio:.2f}x" for slow in (naive, sequential)]
    per_token = f"{blocked.spread.median * 1e3 / (batch * length):.2f}"
    cells = [latency(timing.spread) for timing in (naive, sequential, blocked)]
    return [f"batch {batch}, {length} tokens", *cells, *ratios, per_token]


def random_inputs(batch: int, length: int, width: int, state: int) -> tuple[Tensor, ...]:
    """u, delta, A, B, C; delta and A in the range of a trained model."""
    torch.manual_seed(0)
    u, b, c = (torch.randn(SCANS, batch, length, size) for size in (width, state, state))
    delta = torch.nn.functional.softplus(torch.randn_like(u) - 2)
    return u, delta, -torch.arange(1.0, state + 1).expand(SCANS, width, state).contiguous(), b, c


def check(inputs: tuple[Tensor, ...]) -> None:
    """Check that the three variants have equal outputs."""
    u, delta, a, b, c = inputs
    expected = sequential_scan(u, delta, a, b, c)
    for run in (naive_scan, selective_scan):
        torch.testing.assert_close(run(u, delta, a, b, c), expected, atol=1e-4, rtol=1e-4)


def naive_scan(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """As in the reference code: one direction at a time, all decays at once, then a step per token."""
    directions = zip(u, delta, a, b, c, strict=True)
    return torch.stack([naive_direction(*direction) for direction in directions])


def naive_direction(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """`[B, L, E]`; the arguments are those of one direction."""
    decays = torch.exp(torch.einsum("ble,en->beln", delta, a))
    drives = torch.einsum("ble,bln,ble->beln", delta, b, u)
    state = decays.new_zeros(decays.shape[0], *a.shape)
    outputs = []
    for token in range(u.shape[1]):
        state = decays[:, :, token] * state + drives[:, :, token]
        outputs.append(torch.einsum("ben,bn->be", state, c[:, token]))
    return torch.stack(outputs, dim=1)


def train(options: argparse.Namespace) -> str:
    """Forward and backward of the two-level scan, which runs with gradients, and of the loop over tokens."""
    times: dict[str, tuple[list[float], list[float]]] = {"sequential": ([], []), "two-level": ([], [])}
    with torch.inference_mode(False), torch.enable_grad():
        inputs = [tensor.requires_grad_() for tensor in random_inputs(64, 82, 128, 8)]
        for _ in range(max(3, options.runs // 2)):
            for name, run in (("sequential", sequential_scan), ("two-level", selective_scan)):
                start = time.perf_counter()
                y = run(*inputs)
                middle = time.perf_counter()
                torch.autograd.grad(y.sum(), inputs)
                for samples, seconds in zip(times[name], (middle - start, time.perf_counter() - middle), strict=True):
                    samples.append(seconds)
    rows = [[name, *(latency(Spread.of_seconds(part)) for part in parts)] for name, parts in times.items()]
    return "With the gradient, B = 64, L = 82, E = 128, N = 8:\n\n" + table(["", "forward", "backward"], rows)


if __name__ == "__main__":
    main()
