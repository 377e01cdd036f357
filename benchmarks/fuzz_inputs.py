"""Fuzz every reader of untrusted files: crashes, hangs and memory.

Every input is a valid one with seeded changes (tests/fuzzing.py). An exception other than RepshiftError is a crash,
more than `--hang` seconds is a hang, and memory is limited to `--room` MiB above the start.

    python benchmarks/fuzz_inputs.py --inputs 100000
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
from _results import publish, table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from fuzzing import TARGETS, Fuzzer

from repshift_cli.errors import RepshiftError
from repshift_cli.measure.device import device_name

NOTE = (
    "Inputs: valid files with one to four seeded changes. Accepted: read without an error. Refused: RepshiftError. "
    "Crashes: any other exception, including exceeding the memory limit of {room} MiB above the start. Slowest: "
    "milliseconds for one input."
)
SHARES = {"headers of safetensors": 2, "annotations": 3, "exported files": 2}
"""Shares of the inputs; other targets get one."""


_SHOWN_FRAMES = 8


class Hang(BaseException):
    """An input took too long."""


@dataclass
class Outcome:
    inputs: int = 0
    taken: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    crashes: list[tuple[int, str]] = field(default_factory=list)
    hangs: list[int] = field(default_factory=list)
    slowest: float = 0.0


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, stop)
    parts = {name: SHARES.get(name, 1) for name in TARGETS}
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder))
        limit_memory(options.room)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = {
            name: campaign(fuzzer, name, -(-options.inputs * share // sum(parts.values())), options)
            for name, share in parts.items()
        }
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    report(found, grown, options)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first input")
    parser.add_argument("--hang", type=float, default=10.0, help="maximum seconds per input")
    parser.add_argument("--room", type=int, default=1024, help="maximum memory in MiB above that at the start")
    parser.add_argument("--dry-run", action="store_true", help="print the page, write no file")
    return parser.parse_args()


def stop(number: int, frame: FrameType | None) -> None:
    raise Hang


def limit_memory(room: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (room << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def campaign(fuzzer: Fuzzer, name: str, inputs: int, options: argparse.Namespace) -> Outcome:
    outcome = Outcome(inputs)
    for seed in range(options.seed, options.seed + inputs):
        began = time.perf_counter()
        # a hang that no signal can interrupt ends the run with a traceback
        faulthandler.dump_traceback_later(6 * options.hang, exit=True)
        signal.setitimer(signal.ITIMER_REAL, options.hang)
        try:
            TARGETS[name](fuzzer, random.Random(f"{name} {seed}"))  # noqa: S311
            outcome.taken += 1
        except RepshiftError as error:
            outcome.refused[type(error).__name__] += 1
        except Hang:
            outcome.hangs.append(seed)
        except Exception:
            outcome.crashes.append((seed, traceback.format_exc(limit=-_SHOWN_FRAMES)))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        outcome.slowest = max(outcome.slowest, time.perf_counter() - began)
    faulthandler.cancel_dump_traceback_later()
    print(f"{name}: {inputs} inputs, {len(outcome.crashes)} crashes, {len(outcome.hangs)} hangs", file=sys.stderr)
    return outcome


def report(found: dict[str, Outcome], grown: float, options: argparse.Namespace) -> None:
    rows = [
        [
            name,
            str(each.inputs),
            str(each.taken),
            str(each.refused.total()),
            str(len(each.crashes)),
            str(len(each.hangs)),
            f"{1e3 * each.slowest:.0f}",
        ]
        for name, each in found.items()
    ]
    numbers = [sum(int(row[column]) for row in rows) for column in range(1, 6)]
    rows.append(["all", *map(str, numbers), max(rows, key=lambda row: int(row[-1]))[-1]])
    columns = ["what is read", "inputs", "accepted", "refused", "crashes", "hangs", "slowest ms"]
    memory = f"The largest resident set grew by {grown:.0f} MiB over the campaign."
    body = [table(columns, rows), f"{NOTE.format(room=options.room)} {memory}"]
    publish("fuzz_inputs", "Hostile inputs", device_name(torch.device("cpu")), body, dry_run=options.dry_run)
    for name, each in found.items():
        for seed, trace in each.crashes[:3]:
            print(f"\n{name}, seed {seed}:\n{trace}", file=sys.stderr)
        for seed in each.hangs[:3]:
            print(f"\n{name}, seed {seed} hangs", file=sys.stderr)
    if any(each.crashes or each.hangs for each in found.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
