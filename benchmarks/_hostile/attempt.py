"""What an attempt is, and the rules that its outcome must meet."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import random
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _hostile.good import Good

CODES = frozenset({0, 1, 2, 3, 4, 5})
STOPPED = frozenset({0, 130, 143})
MOST_MEMORY = 2000
"""Maximum resident MB of a command."""

_LARGEST_HASHED = 1 << 26
_ERROR = re.compile(r"^(error|Error):", re.MULTILINE)


@dataclass(frozen=True)
class Result:
    """A command that has ended. `code` is negative for a signal, and None if it was ended for its time."""

    code: int | None
    stdout: str
    stderr: str
    seconds: float
    memory: float
    ended: bool = False
    """Whether it was ended because another one had failed."""

    @property
    def number(self) -> tuple[int, int, int] | None:
        """Evaluated images, skipped images and correct ones of `eval --json`."""
        try:
            found = json.loads(self.stdout)
            return found["images"], found["skipped"], found["top1_correct"]
        except (ValueError, KeyError, TypeError):
            return None


Check = Callable[[Sequence[Result]], "str | None"]
"""Returns what is wrong with the results, for example a wrong number."""


@dataclass
class Attempt:
    """Commands and the circumstances that they run in; the files are already in the scratch folder.

    Attributes:
        commands: arguments of each; run one after the other.
        codes: allowed exit codes.
        outputs: patterns of files that may appear in the scratch folder.
        replaced: patterns of files that may change or go.
        environment: variables; None removes one.
        inside: runs in the new process before the command.
        meanwhile: runs outside while the command runs, with its process id.
        check: an additional rule.
        together: runs the commands at the same time, as ranks of a `torchrun` job.
        fresh: starts a new interpreter in place of a fork.
        large: the options ask for more memory than there is, so running out of it is right.
        silent: an error need not be printed, for example because stderr is closed.
    """

    commands: list[list[str]]
    codes: frozenset[int] = CODES
    outputs: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    environment: Mapping[str, str | None] = field(default_factory=dict)
    inside: Callable[[], None] | None = None
    meanwhile: Callable[[int], None] | None = None
    check: Check | None = None
    together: bool = False
    fresh: bool = False
    large: bool = False
    silent: bool = False


Kind = Callable[[random.Random, "Good", Path], Attempt]
"""Makes an attempt from a seed; writes its files into the scratch folder, in which the commands run."""

Entry = tuple[int, int, str]
Snapshot = dict[str, Entry]


def canary(scratch: Path) -> Path:
    """A folder that exists only if code of an input was run."""
    return scratch.parent / "canary"


def snapshot(folder: Path) -> Snapshot:
    """Mode, size and hash of everything in a folder."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        content = str(status.st_mtime_ns)
        if stat.S_ISREG(status.st_mode) and status.st_size <= _LARGEST_HASHED:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        elif stat.S_ISLNK(status.st_mode):
            content = str(path.readlink())
        elif stat.S_ISDIR(status.st_mode):
            content = ""
        size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
        found[str(path.relative_to(folder))] = (status.st_mode, size, content)
    return found


def problems(attempt: Attempt, results: Sequence[Result], before: Snapshot, after: Snapshot) -> list[str]:
    """What is wrong with the outcome; each starts with a word for the table."""
    found = [problem for result in results if not result.ended for problem in _of_result(attempt, result)]
    if attempt.together and any(result.code for result in results):
        found = [problem for problem in found if not problem.startswith("message")]
        if not attempt.silent and not any(_ERROR.search(result.stderr) for result in results):
            found.append("message: no process printed an error")
    for name in sorted(before.keys() | after.keys()):
        allowed = (*attempt.replaced, *(() if name in before else attempt.outputs))
        if before.get(name) == after.get(name) or any(fnmatch.fnmatch(name, pattern) for pattern in allowed):
            continue
        change = "left" if name not in before else "lost" if name not in after else "changed"
        found.append(f"files: {name!r} was {change}")
    if attempt.check is not None and (wrong := attempt.check(results)):
        found.append(wrong)
    return found


def _of_result(attempt: Attempt, result: Result) -> list[str]:
    found = []
    text = result.stdout + result.stderr
    if result.code is None:
        return [f"hang: ended after {result.seconds:.0f} s"]
    if result.code < 0:
        found.append(f"died: by signal {-result.code}")
    elif result.code not in attempt.codes:
        found.append(f"code: exit code {result.code}, allowed {sorted(attempt.codes)}")
    if "unexpected:" in text:
        found.append("unexpected: " + text.partition("unexpected:")[2].split("\n")[0].strip()[:200])
    if "Traceback (most recent call last)" in text:
        found.append("traceback: " + result.stderr.strip().splitlines()[-1][:200])
    if result.memory > MOST_MEMORY:
        found.append(f"memory: {result.memory:.0f} MB")
    if "out of memory" in text and not attempt.large:
        found.append("memory: ran out of it")
    errors = len(_ERROR.findall(result.stderr))
    wanted = 0 if result.code in STOPPED else 1
    if result.code >= 0 and errors != wanted and not attempt.silent:
        found.append(f"message: {errors} error lines with exit code {result.code}")
    return found


def same_number(reference: tuple[int, int, int]) -> Check:
    """All images are evaluated, with the same number of correct ones, or the exit code is not 0."""

    def check(results: Sequence[Result]) -> str | None:
        result = results[-1]
        if result.code != 0 or result.number == reference:
            return None
        return f"number: {result.number} evaluated, skipped, correct in place of {reference}"

    return check


def all_counted(images: int) -> Check:
    """Every image is evaluated or reported as skipped, or the exit code is not 0."""

    def check(results: Sequence[Result]) -> str | None:
        result = results[-1]
        if result.code != 0 or result.number is None or sum(result.number[:2]) == images:
            return None
        return f"number: {sum(result.number[:2])} of {images} images, and exit code 0"

    return check


def refused(results: Sequence[Result]) -> str | None:
    """The input must not be accepted."""
    return "accepted: exit code 0 for a damaged input" if any(result.code == 0 for result in results) else None
