"""Hostile attempts on the command line: valid inputs, options and circumstances with one thing changed.

Each attempt is made from the seed and its number, and runs in a process of its own. Its rules: an exit code of the
documented ones with one error line, no traceback and no "unexpected", at most 30 s and 2 GB, no file of the user's
changed, none left, no code run, and the number of an unchanged model on unchanged images right.

    python benchmarks/hostile.py --attempts 2000 --seed 1
    python benchmarks/hostile.py --seed 1 --only "tars:17"     # one attempt again, with what it printed
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shlex
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from _hostile import archives, documents, files, options, processes, tensors
from _hostile.attempt import Attempt, Kind
from _hostile.good import BUILTIN, Good
from _hostile.runner import Outcome, attempt, import_everything, run
from _results import publish, table

from repshift_cli.measure.device import device_name

KINDS: dict[str, tuple[Kind, int]] = {
    **documents.KINDS, **archives.KINDS, **tensors.KINDS, **options.KINDS, **files.KINDS, **processes.KINDS
}  # fmt: skip
"""How attempts are made, and the share of each kind."""

DEFECTS = {
    "number": "wrong number with exit code 0",
    "accepted": "damaged input accepted",
    "ran": "code of a file run",
    "code": "exit code not allowed",
    "unexpected": "`unexpected:`",
    "traceback": "traceback",
    "died": "ended by a signal of its own",
    "hang": "longer than 30 s",
    "memory": "more than 2 GB",
    "message": "not exactly one error line",
    "campaign": "the attempt could not be made",
    "files": "a file changed, lost or left",
}
NOTE = (
    "Done: exit code 0. Refused: 1 (system), 2 (usage, recipe), 3 (checkpoint), 4 (data), 5 (check). Stopped: 130 and "
    "143. Defects: attempts that break a rule."
)
_SECONDS = 1500.0


def main() -> None:
    parsed = parse_options()
    os.setpriority(os.PRIO_PROCESS, 0, 10)
    base = Path(tempfile.mkdtemp(prefix="repshift-hostile-"))
    base.chmod(0o755)
    import_everything()
    warnings.simplefilter("ignore")  # about the odd inputs that are made
    good = prepare(base)
    try:
        if parsed.only:
            name, _, number = parsed.only.rpartition(":")
            outcomes = [attempt(name, KINDS[name][0], int(number), seed=parsed.seed, good=good, base=base / "only")]
            print(outcomes[0].text)
        else:
            chosen = {key: getattr(parsed, key) for key in ("attempts", "seed", "seconds", "jobs", "first")}
            outcomes = campaign(good, base, **chosen)
        report(outcomes, parsed)
    finally:
        good.clear()
    if any(outcome.problems for outcome in outcomes):
        sys.exit(1)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--attempts", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="leave out so many attempts, to run a campaign in parts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="start no attempt after this time")
    parser.add_argument("--jobs", type=int, default=2, help="attempts at the same time")
    parser.add_argument("--only", metavar="KIND:N", help="run this attempt alone")
    parser.add_argument("--dry-run", action="store_true", help="print the page, write no file")
    return parser.parse_args()


def prepare(base: Path, *, slow: bool = True) -> Good:
    """Make the valid inputs; without the `slow` ones, some kinds cannot be tried."""
    good = Good(base)
    work = base / "made"
    for folder in (work / "work", work / "streams", work / "temporary"):
        folder.mkdir(parents=True)
    places = (work / "work", work / "streams", work / "temporary")
    for command in good.commands(slow=slow):
        (result,) = run(Attempt([command]), *places)
        if result.code != 0:
            raise SystemExit(f"a valid command fails: {shlex.join(command)}\n{result.stderr}")
        if command[0] == "eval":
            assert result.number is not None, result.stdout
            good.numbers[command[1]] = result.number
    if not slow:
        good.finish()
        return good
    interrupted = [good.evaluate(BUILTIN, "--resume", str(good.state))]
    run(Attempt(interrupted, inside=lambda: processes.full(1)), *places)
    searched = good.folder / "search.json"

    def stop_when_written(process: int) -> None:
        end = time.monotonic() + 30
        while time.monotonic() < end and not searched.exists():
            time.sleep(0.01)
        os.kill(process, signal.SIGTERM)

    run(Attempt([[*good.search(), "--state", str(searched)]], meanwhile=stop_when_written), *places)
    good.finish()
    return good


def plan(attempts: int) -> list[tuple[str, int]]:
    """Kind and number of each attempt, in a fixed order that mixes the kinds."""
    total = sum(share for _, share in KINDS.values())
    counts = {name: max(1, round(attempts * share / total)) for name, (_, share) in KINDS.items()}
    places = [((number + 0.5) / count, name, number) for name, count in counts.items() for number in range(count)]
    return [(name, number) for _, name, number in sorted(places)][:attempts]


_shared: tuple[Good, Path, int, float] | None = None


def _one(task: tuple[int, str, int]) -> Outcome | None:
    index, name, number = task
    assert _shared is not None
    good, base, seed, end = _shared
    if time.monotonic() > end:
        return None
    try:
        return attempt(name, KINDS[name][0], number, seed=seed, good=good, base=base / str(index))
    except Exception as error:
        return Outcome(name, number, [], [None], [f"campaign: {error!r}"], 0.0, traceback.format_exc())


def campaign(
    good: Good, base: Path, *, attempts: int, seed: int, seconds: float, jobs: int, first: int = 0
) -> list[Outcome]:
    """Run the attempts until the time is up."""
    global _shared  # noqa: PLW0603 (the workers are forked, so that they share the valid inputs)
    _shared = good, base, seed, time.monotonic() + seconds
    tasks = [(index, name, number) for index, (name, number) in enumerate(plan(attempts))][first:]
    outcomes = []
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for outcome in pool.imap_unordered(_one, tasks):
            if outcome is None:
                continue
            outcomes.append(outcome)
            if outcome.problems:
                show(outcome, seed)
    return outcomes


def show(outcome: Outcome, seed: int) -> None:
    """Print a defect, and how to see it again."""
    print(f"\n{outcome.kind}:{outcome.number} exit codes {outcome.codes}, {outcome.seconds:.1f} s", file=sys.stderr)
    for command in outcome.commands:
        shown = " ".join(part if len(part) < 80 else part[:60] + "..." for part in map(ascii, command))
        print(f"  repshift {shown}", file=sys.stderr)
    for problem in outcome.problems:
        print(f"  {problem!a}", file=sys.stderr)
    print(
        f'  python benchmarks/hostile.py --seed {seed} --only "{outcome.kind}:{outcome.number}"',
        file=sys.stderr,
        flush=True,
    )


def report(outcomes: Sequence[Outcome], parsed: argparse.Namespace) -> None:
    """Print counts by kind and by defect, and write the page of a whole campaign."""
    rows = []
    for name in KINDS:
        mine = [outcome for outcome in outcomes if outcome.kind == name]
        if mine:
            rows.append([name, *map(str, _counts(mine))])
    rows.append(["all", *map(str, _counts(outcomes))])
    columns = ["kind", "attempts", "done", "1", "2", "3", "4", "5", "stopped", "defects"]
    defects = Counter(problem.partition(":")[0] for outcome in outcomes for problem in set(outcome.problems))
    found = table(["defect", "number"], [[text, str(defects[key])] for key, text in DEFECTS.items()])
    slowest = max((outcome.seconds for outcome in outcomes), default=0.0)
    body = [table(columns, rows), NOTE, found, f"Slowest attempt: {slowest:.1f} s. Seed {parsed.seed}."]
    dry = parsed.dry_run or bool(parsed.only)
    publish("hostile", "Hostile attempts on the command line", device_name(torch.device("cpu")), body, dry_run=dry)


def _counts(outcomes: Sequence[Outcome]) -> list[int]:
    codes = Counter(outcome.codes[-1] for outcome in outcomes)
    stopped = codes[130] + codes[143]
    defects = sum(bool(outcome.problems) for outcome in outcomes)
    return [len(outcomes), *(codes[code] for code in range(6)), stopped, defects]


if __name__ == "__main__":
    main()
