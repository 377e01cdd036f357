"""Odd circumstances: environment, disks, streams, signals, files that change meanwhile, processes that differ."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from _hostile.attempt import CODES, STOPPED, Attempt, Result, same_number
from _hostile.good import BUILTIN, SMALL, Good

_VARIABLES: dict[str, tuple[str | None, ...]] = {
    "RANK": ("0", "1", "-1", "garbage", "", "99999999999999999999"),
    "WORLD_SIZE": ("garbage", "0", "-1", "", "1", "1.5"),
    "LOCAL_WORLD_SIZE": ("0", "garbage", "-3", ""),
    "LOCAL_RANK": ("garbage", "9", "-1", ""),
    "COLUMNS": ("0", "-5", "garbage", "1", "999999999", ""),
    "LINES": ("garbage", "0"),
    "TERM": ("dumb", "garbage", "", None),
    "HOME": (None, "/nonexistent", "", "\udcff"),
    "TMPDIR": ("/nonexistent", "/dev/null", ""),
    "REPSHIFT_DATA_DIR": ("/dev/zero", "", "\udcff", "/nonexistent"),
    "NO_COLOR": ("1", ""),
    "FORCE_COLOR": ("1",),
    "OMP_NUM_THREADS": ("garbage", "0", "-1"),
    "PATH": (None, ""),
    "LANG": ("C", "garbage", "tr_TR.UTF-8"),
    "HF_HUB_CACHE": ("/dev/null", "/nonexistent"),
    "TZ": ("garbage", "\udcff"),
}
_AT_START: dict[str, tuple[str | None, ...]] = {
    "MPLBACKEND": ("garbage", "", "TkAgg", "module://x"),
    "PYTHONIOENCODING": ("ascii", "latin-1", "utf-16"),
    "LC_ALL": ("C", "POSIX"),
    "PYTHONUTF8": ("0",),
    "MPLCONFIGDIR": ("/dev/null", "/nonexistent"),
    "XDG_CACHE_HOME": ("/dev/null",),
    "PYTHONWARNINGS": ("error", "garbage"),
}
"""Read when Python or a library starts, so that they need a new interpreter."""


def _commands(good: Good) -> list[list[str]]:
    data, model = str(good.data), str(good.artifact)
    return [
        good.evaluate(BUILTIN),
        good.evaluate(BUILTIN),
        ["inspect", model],
        ["visualize", model, "--data", data, "--count", "1", "-o", "o.png"],
        ["export", model, "--to", "hub", "-o", "o"],
        ["bench", model, "--seconds", "0", "--min-runs", "1", "-b", "1", "--plot", "o.pdf"],
        ["compress", SMALL, "--seconds", "0", "--no-calibrate", "-o", "o.safetensors"],
        ["recipes", "list"],
        ["--help"],
        ["--version"],
    ]


def environment(rng: random.Random, good: Good, folder: Path) -> Attempt:
    """One or two environment variables with odd values."""
    chosen = {name: rng.choice(_VARIABLES[name]) for name in rng.sample(sorted(_VARIABLES), k=rng.choice([1, 1, 2]))}
    if "RANK" in chosen and rng.random() < 0.5:
        chosen["WORLD_SIZE"] = rng.choice(_VARIABLES["WORLD_SIZE"])
    return _in_environment(rng, good, chosen, fresh=False)


def start(rng: random.Random, good: Good, folder: Path) -> Attempt:
    """A new interpreter with an odd variable."""
    name = rng.choice(sorted(_AT_START))
    return _in_environment(rng, good, {name: rng.choice(_AT_START[name])}, fresh=True)


def _in_environment(rng: random.Random, good: Good, chosen: dict[str, str | None], *, fresh: bool) -> Attempt:
    command = rng.choice(_commands(good))
    check = same_number(good.numbers[BUILTIN]) if command[0] == "eval" else None
    return Attempt([command], outputs=("o", "o*", "o/*"), environment=chosen, fresh=fresh, check=check)


def disks(rng: random.Random, good: Good, folder: Path) -> Attempt:
    """A disk that is full, or nearly."""
    disk = folder / "disk"
    disk.mkdir()
    size = int(2 ** rng.uniform(12, 22))
    mounted = subprocess.run(  # noqa: S603
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk],  # noqa: S607
        check=False,
        capture_output=True,
    )
    data, model = str(good.data), str(good.artifact)
    command = rng.choice(
        [
            ["compress", str(good.tiny), *good.heads, "--seconds", "0", "--no-calibrate", "-o", "disk/o.safetensors"],
            ["export", model, "--to", "pt2", "-o", "disk/o.pt2", "--no-verify"],
            ["export", model, "--to", "hub", "-o", "disk/o"],
            ["visualize", model, "--data", data, "--count", "2", "-o", f"disk/o.{rng.choice(['pdf', 'png', 'svg'])}"],
            good.evaluate(BUILTIN, "--save-predictions", "disk/o.npz"),
            good.evaluate(BUILTIN, "--resume", "disk/o"),
            [*good.search(), "-o", "disk/o.yaml"],
            [
                "bench",
                model,
                "--seconds",
                "0",
                "--min-runs",
                "1",
                "-b",
                "1",
                "--csv",
                "disk/o.csv",
                "--plot",
                "disk/o.pdf",
            ],
        ]
    )
    if mounted.returncode != 0:
        return Attempt([["--version"]])
    output = command[-1] if command[-1].startswith("disk/") else command[command.index("-o") + 1]

    def check(results: Sequence[Result]) -> str | None:
        exists = (folder / output).exists()
        if "--resume" in command:
            return None
        if results[0].code == 0 and not exists:
            return "files: exit code 0 without an output"
        return (
            "files: an output in spite of an error"
            if results[0].code == 1 and exists and "bench" not in command
            else None
        )

    return Attempt([command], codes=frozenset({0, 1}), outputs=("disk/o*",), check=check)


def _closed(number: int) -> None:
    stream = "stdout" if number == 1 else "stderr"
    os.close(number)
    setattr(sys, stream, None)


def _reopen(number: int) -> None:
    """A new stream: the old one remembers whether its file could seek."""
    setattr(sys, "stdout" if number == 1 else "stderr", os.fdopen(number, "w", closefd=False))


def full(number: int) -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), number)
    _reopen(number)


def _broken(number: int) -> None:
    read, write = os.pipe()
    os.dup2(write, number)
    os.close(write)
    os.close(read)
    _reopen(number)


def _ascii(number: int) -> None:
    (sys.stdout if number == 1 else sys.stderr).reconfigure(encoding="ascii", errors="strict")  # type: ignore[union-attr]


def streams(rng: random.Random, good: Good, folder: Path) -> Attempt:
    """Standard output or error that is closed, full, or a pipe that nobody reads."""
    number, change = rng.choice([1, 1, 2]), rng.choice([_closed, full, _broken, _ascii])
    command = rng.choice(
        [
            *_commands(good),
            good.evaluate(BUILTIN, "--save-predictions", "o.npz"),
            ["inspect", "missing"],
            ["recipes", "x"],
        ]
    )
    silent = number == 2 or change is _broken

    def check(results: Sequence[Result]) -> str | None:
        lost = "--save-predictions" in command and not (folder / "o.npz").exists()
        if lost:
            return "files: the predictions were lost"
        if number == 1 and change in (_closed, full) and results[0].code == 0:
            return "accepted: exit code 0 though nothing could be printed"
        return None

    return Attempt([command], outputs=("o", "o*", "o/*"), inside=lambda: change(number), silent=silent, check=check)


def _send(process: int, number: int, seconds: float) -> None:
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if os.getpgid(process) == process:
            os.killpg(process, number)


def signals(rng: random.Random, good: Good, folder: Path) -> Attempt:
    """SIGINT or SIGTERM to the group of a command at a random moment."""
    data, model = str(good.data), str(good.artifact)
    command, usual, kept = rng.choice(
        [
            (["compress", SMALL, "--seconds", "0", "--no-calibrate", "-o", "o.safetensors"], 0.8, ()),
            (["compress", BUILTIN, "--calibration", data, "--force", "--seconds", "0", "-o", "o.safetensors"], 1.5, ()),
            (["export", model, "--to", "pt2", "-o", "o.pt2"], 3.0, ()),
            (["export", model, "--to", "hub", "-o", "o"], 0.5, ()),
            (["visualize", model, "--data", data, "--count", "2", "-o", "o.pdf"], 1.0, ()),
            (good.evaluate(BUILTIN, "--resume", "state"), 0.6, ("state", "state/*.json")),
            (["eval", BUILTIN, "--dataset", data, "--json", "--workers", "2"], 1.0, ()),
            ([*good.search(), "-o", "o.yaml"], 3.0, ("o.state.json",)),
            (["bench", model, "--seconds", "0.5", "-b", "1", "--csv", "o.csv"], 1.2, ()),
        ]
    )
    number, moment = rng.choice([signal.SIGINT, signal.SIGTERM]), max(0.15, rng.uniform(0.02, 1.1) * usual)
    return Attempt(
        [command],
        codes=STOPPED | {5},
        outputs=("o", "o.*", "o/config.json", "o/README.md", "o/model.safetensors", *kept),
        meanwhile=lambda process: _send(process, number, moment),
    )


def appearing(rng: random.Random, good: Good, folder: Path) -> Attempt:
    """The output appears while the command writes it; without `--force` it stays."""
    data, model = str(good.data), str(good.artifact)
    name, command = rng.choice(
        [
            ("o.safetensors", ["compress", SMALL, "--seconds", "0", "--no-calibrate", "-o", "o.safetensors"]),
            ("o.pt2", ["export", model, "--to", "pt2", "-o", "o.pt2", "--no-verify"]),
            ("o", ["export", model, "--to", "hub", "-o", "o"]),
            ("o.png", ["visualize", model, "--data", data, "--count", "1", "-o", "o.png"]),
            ("o.npz", good.evaluate(BUILTIN, "--save-predictions", "o.npz")),
            ("o.csv", ["bench", model, "--seconds", "0", "--min-runs", "1", "-b", "1", "--csv", "o.csv"]),
        ]
    )
    kind = rng.choice(["file", "link", "folder"])
    made: list[bool] = []

    def meanwhile(process: int) -> None:
        end = time.monotonic() + 10
        while time.monotonic() < end and not made:
            if any(each.name.endswith(".part") for each in folder.iterdir()):
                with contextlib.suppress(FileExistsError):
                    if kind == "file":
                        with (folder / name).open("x") as file:
                            file.write("mine")
                    elif kind == "link":
                        (folder / name).symlink_to("missing")
                    else:
                        (folder / name).mkdir()
                        (folder / name / "mine").touch()
                    made.append(True)
                return
            try:
                ended = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
            except OSError:
                return
            if ended:
                return

    def check(results: Sequence[Result]) -> str | None:
        path = folder / name
        if not made:
            return None
        mine = path.is_symlink() if kind == "link" else (path / "mine").exists() if kind == "folder" else (
            path.is_file() and path.read_bytes() == b"mine"
        )  # fmt: skip
        return None if mine else "files: a file that had appeared was replaced"

    return Attempt([command], outputs=(name, f"{name}/*"), meanwhile=meanwhile, check=check)


def overwritten(rng: random.Random, good: Good, folder: Path) -> Attempt:
    """A checkpoint or an image that is overwritten, cut or deleted in place while the command runs."""
    shutil.copy(good.artifact, folder / "m.safetensors")
    other = bytearray(good.artifact.read_bytes())
    for place in range(len(other) // 2, len(other), 97):
        other[place] ^= 0x11
    kind = rng.choice(["overwritten", "cut", "deleted"])
    moment = rng.uniform(0, 0.5)

    def meanwhile(process: int) -> None:
        time.sleep(moment)
        if kind == "deleted":
            (folder / "m.safetensors").unlink()
        elif kind == "cut":
            os.truncate(folder / "m.safetensors", len(other) // 2)
        else:
            with (folder / "m.safetensors").open("rb+") as file:
                file.write(other)

    command = rng.choice([good.evaluate("m.safetensors"), ["export", "m.safetensors", "--to", "hub", "-o", "o"]])
    check = same_number(good.numbers[str(good.artifact)]) if command[0] == "eval" and kind != "overwritten" else None
    return Attempt([command], outputs=("o", "o/*"), replaced=("m.safetensors",), meanwhile=meanwhile, check=check)


def ranks(rng: random.Random, good: Good, folder: Path) -> Attempt:
    """Two processes of a job, alike or with another input, option or environment."""
    data = good.copy_data(folder)
    shutil.copy(good.artifact, folder / "m.safetensors")
    shutil.copy(good.hub / "model.safetensors", folder / "other.safetensors")
    first = good.evaluate("m.safetensors", data="data")
    differ: dict[str, Callable[[], list[str]]] = {
        "alike": lambda: first,
        "data": lambda: _other_data(data, folder, good),
        "labels": lambda: _other_labels(data, folder, good),
        "model": lambda: good.evaluate(BUILTIN, data="data"),
        "limit": lambda: [*first, "--limit", "7"],
        "dense": lambda: [*first, "--compare-dense"],
        "batch": lambda: [*first, "-b", "5"],
        "missing": lambda: good.evaluate("missing.safetensors", data="data"),
        "usage": lambda: [*first, "--limit", "x"],
    }
    kind = rng.choice(sorted(differ))
    pair = [first, differ[kind]()]
    if rng.random() < 0.5:
        pair.reverse()

    def check(results: Sequence[Result]) -> str | None:
        codes = [result.code for result in results]
        if kind in ("alike", "batch"):
            found = [result.number for result in results if result.number]
            right = found == [good.numbers[str(good.artifact)]]
            return None if right or (kind == "batch" and any(codes)) else f"number: {found} with exit codes {codes}"
        if any(codes):
            return None
        return f"number: processes that differ by {kind} ended with exit code 0"

    return Attempt(pair, codes=CODES, together=True, check=check)


def _other_data(data: Path, folder: Path, good: Good) -> list[str]:
    shutil.copytree(data, folder / "fewer")
    for path in sorted((folder / "fewer").rglob("*.png"))[::7]:
        path.unlink()
    return good.evaluate("m.safetensors", data="fewer")


def _other_labels(data: Path, folder: Path, good: Good) -> list[str]:
    shutil.copytree(data, folder / "moved")
    (folder / "moved" / "air").rename(folder / "moved" / "x")
    (folder / "moved" / "bus").rename(folder / "moved" / "air")
    (folder / "moved" / "x").rename(folder / "moved" / "bus")
    return good.evaluate("m.safetensors", data="moved")


KINDS = {
    "environment": (environment, 6),
    "new interpreters": (start, 1),
    "disks": (disks, 6),
    "streams": (streams, 5),
    "signals": (signals, 7),
    "outputs that appear": (appearing, 4),
    "inputs that change": (overwritten, 4),
    "processes that differ": (ranks, 2),
}
