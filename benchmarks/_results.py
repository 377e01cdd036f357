"""Where the benchmark scripts write what they measured: marked sections of docs/results.md."""

from __future__ import annotations

import datetime
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path

from repshift_cli.measure import Speedup, Spread

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results.md"
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""What tells OpenMP's idle threads how to wait, which at batch 1 makes a difference (docs/benchmarking.md)."""

TITLE = "# Results\n\nEvery section is written by the script that it names; run that script to renew it.\n"


def write_section(name: str, markdown: str, path: Path = RESULTS) -> None:
    """Put `markdown` between the marks of section `name`; a section that is not there yet goes to the end.

    Raises:
        ValueError: the file has only one of the two marks, or one of them twice.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    text = path.read_text(encoding="utf-8") if path.exists() else TITLE
    section = f"{begin}\n{markdown.strip()}\n{end}"
    counts = (text.count(begin), text.count(end))
    if counts == (0, 0):
        text = f"{text.rstrip()}\n\n{section}\n"
    elif counts == (1, 1) and text.index(begin) < text.index(end):
        pattern = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
        text = pattern.sub(lambda _: section, text)
    else:
        raise ValueError(f"{path} needs one '{begin}' and, after it, one '{end}'")
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")


def section_name(name: str, *options: tuple[object, object]) -> str:
    """A name that also tells which options are not as usual: pairs of what was chosen and what is usual."""
    return "_".join([name, *(str(chosen) for chosen, usual in options if chosen != usual)])


def publish(name: str, markdown: str, dry_run: bool) -> None:
    """Print a section, and write it unless only the tables are wanted."""
    print(markdown, flush=True)
    if not dry_run:
        write_section(name, markdown)


def provenance(command: str, machine: str) -> str:
    """One paragraph: how, when and on what a section was measured."""
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "timm"))
    today = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
    told = [f"{name}={os.environ[name]}" for name in WAITING if name in os.environ]
    return f"`{' '.join([*told, command])}`, {today}, on {machine}; Python {platform.python_version()}, {versions}."


def latency(spread: Spread) -> str:
    """Milliseconds: median and the interval from p10 to p90."""
    return f"{spread.median:.1f} [{spread.p10:.1f}-{spread.p90:.1f}]"


def words(gain: Speedup) -> str:
    """The ratio, marked where it may be noise."""
    return f"{gain.ratio:.2f}x" if gain.clear or gain.clearly_slower else f"{gain.ratio:.2f}x (within noise)"


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; every column but the first is aligned to the right."""
    rule = ["---"] + ["--:"] * (len(columns) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows))
