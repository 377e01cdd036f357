"""A sample of the campaign of hostile attempts (the long run: benchmarks/hostile.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from _hostile.attempt import Attempt, Result, problems, same_number
from _hostile.runner import run

TWICE = ("options", "arguments", "recipes", "headers of safetensors")
SLOW = (
    "new interpreters",
    "processes that differ",
    "states of searches",
    "states of evaluations",
    "documents of exports",
)
SLOW += ("archives of programs", "code in files", "videos and annotations", "names", "signals")
"""Kinds that are slow, or need inputs that are slow to make."""


SAMPLE = f"""
import sys
from pathlib import Path

sys.path[:0] = [{str(ROOT / "benchmarks")!r}, {str(ROOT)!r}]
import hostile
from _hostile.runner import attempt

folder, slow, twice = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3].split(",")
good = hostile.prepare(folder / "base", slow=False)
for kind, (make, _) in hostile.KINDS.items():
    for number in range(0 if kind in slow else 2 if kind in twice else 1):
        found = attempt(kind, make, number, seed=20, good=good, base=folder / "attempt")
        if found.problems:
            print(kind, number, found.problems, found.commands, found.text)
print("end")
"""
"""The attempts are forked, and torch forbids gradients in a process that is forked from one that had some."""


@pytest.mark.slow
def test_a_sample_of_attempts_ends_as_documented(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SAMPLE, str(tmp_path), ",".join(SLOW), ",".join(TWICE)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=900)
    assert done.stdout == "end\n", done.stdout + done.stderr


class TestRules:
    def result(self, code: int | None = 0, stdout: str = "", stderr: str = "", memory: float = 100.0) -> Result:
        return Result(code, stdout, stderr, 1.0, memory)

    def words(self, attempt: Attempt, *results: Result) -> list[str]:
        return [problem.partition(":")[0] for problem in problems(attempt, results, {}, {})]

    def test_each_rule(self) -> None:
        plain = Attempt([["x"]])
        assert self.words(plain, self.result(), self.result(2, "", "error: no\n")) == []
        assert self.words(plain, self.result(2)) == ["message"]
        assert self.words(plain, self.result(0, "", "error: no\n")) == ["message"]
        assert self.words(plain, self.result(1, "", "error: unexpected: KeyError: 3\n")) == ["unexpected"]
        assert self.words(plain, self.result(-11)) == ["died"]
        assert self.words(plain, self.result(None)) == ["hang"]
        assert self.words(plain, self.result(memory=3000.0)) == ["memory"]
        assert self.words(plain, self.result(7, "", "error: no\n")) == ["code"]
        trace = "Traceback (most recent call last):\nKeyError\n"
        assert self.words(plain, self.result(1, "", trace)) == ["traceback", "message"]

    def test_files(self) -> None:
        before, after = {"a": (1, 1, "x"), "b": (1, 1, "x")}, {"a": (1, 1, "y"), "c": (1, 1, "x")}
        found = problems(Attempt([["x"]]), [self.result()], before, after)
        assert found == ["files: 'a' was changed", "files: 'b' was lost", "files: 'c' was left"]
        assert problems(Attempt([["x"]], outputs=("c",), replaced=("a", "b")), [self.result()], before, after) == []
        assert len(problems(Attempt([["x"]], outputs=("*",)), [self.result()], before, after)) == 2

    def test_numbers(self) -> None:
        attempt = Attempt([["x"]], check=same_number((3, 0, 2)))
        right, wrong = (json.dumps({"images": 3, "skipped": 0, "top1_correct": correct}) for correct in (2, 1))
        assert self.words(attempt, self.result(stdout=right)) == []
        assert self.words(attempt, self.result(stdout=wrong)) == ["number"]
        assert self.words(attempt, self.result(4, stderr="error: no\n")) == []

    def test_a_file_that_is_left_is_found(self, tmp_path: Path) -> None:
        made = Attempt([["--version"]], inside=lambda: Path("left").touch())
        folders = [tmp_path / name for name in ("work", "streams", "temporary")]
        for folder in folders:
            folder.mkdir()
        (result,) = run(made, *folders)
        assert (result.code, result.stdout[:8]) == (0, "repshift")
        assert (folders[0] / "left").exists()
