"""Writes the pages of docs/results/. Each run of a benchmark script replaces its own file."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from repshift_cli.measure.latency import Speedup, Spread

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""Environment variables that change how idle OpenMP threads wait, which matters at batch 1 (docs/benchmarking.md)."""


def publish(name: str, title: str, machine: str, body: Sequence[str], *, dry_run: bool) -> None:
    """Print a page, and write it to `docs/results/<name>.md` unless `dry_run` is set.

    Args:
        name: File name without the suffix.
        title: Heading of the page.
        machine: Processor, dtype and threads.
        body: Paragraphs and tables.
        dry_run: Write no file.
    """
    page = "\n\n".join([f"# {title}", provenance(machine), *body])
    print(page, flush=True)
    if not dry_run:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.md").write_text(f"{page}\n", encoding="utf-8")


def page_name(name: str, *options: tuple[object, object]) -> str:
    """Append the options that differ from their defaults; each pair is a value and its default."""
    return "_".join([name, *(str(value) for value, default in options if value != default)])


def provenance(machine: str) -> str:
    """Command, machine, versions and date, as a list."""
    variables = [f"{name}={os.environ[name]}" for name in WAITING if name in os.environ]
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "timm"))
    today = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
    return "\n".join(
        [
            f"- Command: `{' '.join([*variables, command])}`",
            f"- Machine: {machine}",
            f"- Versions: Python {platform.python_version()}, {versions}",
            f"- Date: {today}",
        ]
    )


def latency(spread: Spread) -> str:
    """Milliseconds: the median, then the 10th and 90th percentile."""
    return f"{spread.median:.1f} [{spread.p10:.1f}-{spread.p90:.1f}]"


def words(gain: Speedup) -> str:
    """The ratio, marked if it may be noise."""
    return f"{gain.ratio:.2f}x" if gain.clear or gain.clearly_slower else f"{gain.ratio:.2f}x (within noise)"


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; every column but the first is aligned to the right."""
    rule = ["---"] + ["--:"] * (len(columns) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows))
