"""Runs attempts: each command in a process that is forked from this one, which has torch and repshift imported."""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import multiprocessing.util
import os
import pkgutil
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from _hostile.attempt import Attempt, Kind, Result, canary, problems, snapshot
from _hostile.good import Good

SECONDS = 30.0
"""Maximum seconds of a command."""

_ROOM = 3 << 30
_POLL_SECONDS = 0.004
_ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Outcome:
    """A finished attempt."""

    kind: str
    number: int
    commands: list[list[str]]
    codes: list[int | None]
    problems: list[str]
    seconds: float
    text: str = field(repr=False, default="")


def import_everything() -> None:
    """Import what the commands import, so that the forked processes need not."""
    import torch

    import repshift_cli

    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(repshift_cli.__path__, "repshift_cli."):
        if not module.name.endswith("__main__"):
            with contextlib.suppress(ImportError):
                importlib.import_module(module.name)
    for name in ("av", "onnx", "onnxruntime", "timm", "matplotlib.backends.backend_agg", "PIL.WebPImagePlugin"):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


def attempt(name: str, kind: Kind, number: int, *, seed: int, good: Good, base: Path) -> Outcome:
    """Make and run an attempt in a scratch folder under `base`, which is empty afterwards."""
    scratch, streams, temporary = (base / part for part in ("work", "streams", "temporary"))
    for folder in (scratch, streams, temporary):
        folder.mkdir(parents=True)
    began = time.monotonic()
    try:
        made = kind(random.Random(f"{seed} {name} {number}"), good, scratch)  # noqa: S311
        before = {**snapshot(scratch), **_prefixed(good)}
        results = run(made, scratch, streams, temporary)
        after = {**snapshot(scratch), **_prefixed(good)}
        found = problems(made, results, before, after)
        found += [f"files: {path.name!r} stays in the temporary folder" for path in temporary.iterdir()]
        if canary(scratch).exists():
            found.append("ran: code of a file was run")
        text = "\n".join(f"--- exit code {each.code}\n{each.stdout}{each.stderr}" for each in results)
        return Outcome(
            name, number, made.commands, [each.code for each in results], found, time.monotonic() - began, text
        )
    finally:
        if (scratch / "disk").is_mount():
            subprocess.run(["umount", "-l", scratch / "disk"], check=False, capture_output=True)  # noqa: S603, S607
        shutil.rmtree(base, ignore_errors=True)


def _prefixed(good: Good) -> dict[str, tuple[int, int, str]]:
    """Sizes and times of the shared inputs, which no attempt may change."""
    found = {}
    for path in good.folder.rglob("*"):
        status = path.lstat()
        found[f"good/{path.relative_to(good.folder)}"] = (status.st_mode, status.st_size, str(status.st_mtime_ns))
    return found


def run(made: Attempt, scratch: Path, streams: Path, temporary: Path) -> list[Result]:
    """Run the commands of an attempt."""
    if made.together:
        return _together(made, scratch, streams, temporary)
    results = []
    for index, command in enumerate(made.commands):
        process = _start(made, command, scratch, streams / str(index), {"TMPDIR": str(temporary)})
        if made.meanwhile is not None:
            made.meanwhile(process)
        results.append(_wait([process], [streams / str(index)])[0])
    return results


def _together(made: Attempt, scratch: Path, streams: Path, temporary: Path) -> list[Result]:
    """Run the commands as the ranks of a job; if one fails, the others are ended, as `torchrun` does."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {"TMPDIR": str(temporary), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    count = str(len(made.commands))
    places = [streams / str(rank) for rank in range(len(made.commands))]
    processes = [
        _start(made, command, scratch, place, {**job, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": count})
        for rank, (command, place) in enumerate(zip(made.commands, places, strict=True))
    ]
    return _wait(processes, places)


def _start(made: Attempt, command: list[str], scratch: Path, place: Path, variables: Mapping[str, str]) -> int:
    """Start a command; its streams go to `<place>.out` and `<place>.err`."""
    environment = {**variables, **made.environment}
    if made.fresh:
        full = {key: value for key, value in {**os.environ, **environment}.items() if value is not None}
        full["PYTHONPATH"] = str(_ROOT)
        with place.with_suffix(".out").open("wb") as out, place.with_suffix(".err").open("wb") as err:
            process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", "repshift_cli", *command],
                cwd=scratch, env=full, stdout=out, stderr=err, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        return process.pid
    child = os.fork()
    if child:
        return child
    try:
        _command(made, command, scratch, place, environment)
    finally:
        os._exit(99)


def _command(
    made: Attempt, command: list[str], scratch: Path, place: Path, environment: Mapping[str, str | None]
) -> None:
    """In the new process: run the command and end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setsid()
    os.chdir(scratch)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(place.with_suffix(suffix), os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    tempfile.tempdir = None
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # as in a shell
    multiprocessing.util._finalizer_registry.clear()  # those of this process
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _ROOM, used + _ROOM))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.argv = ["repshift", *command]
    from repshift_cli.cli.app import main

    code: object = 99
    try:
        if made.inside is not None:
            made.inside()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        main()
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    multiprocessing.util._exit_function()  # what Python does at the end of a process
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code if isinstance(code, int) else 1)


def _wait(processes: Sequence[int], places: Sequence[Path]) -> list[Result]:
    """Wait for processes; they are ended after `SECONDS`, and all of them soon after one has failed."""
    began = time.monotonic()
    found: dict[int, tuple[int | None, float, float]] = {}
    ended: set[int] = set()
    while len(found) < len(processes):
        for index, process in enumerate(processes):
            if index in found:
                continue
            late = time.monotonic() - began > SECONDS
            if late:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process, signal.SIGKILL)
            done, status, usage = os.wait4(process, 0 if late else os.WNOHANG)
            if done:
                code = None if late else os.waitstatus_to_exitcode(status)
                found[index] = (code, time.monotonic() - began, usage.ru_maxrss / 1024)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process, signal.SIGKILL)  # workers that it left
            elif index not in ended and any(code for code, *_ in found.values()):
                ended.add(index)
                os.kill(process, signal.SIGTERM)
        time.sleep(_POLL_SECONDS)
    texts = [[_text(place.with_suffix(suffix)) for suffix in (".out", ".err")] for place in places]
    return [
        Result(found[index][0], out, err, *found[index][1:], ended=index in ended)
        for index, (out, err) in enumerate(texts)
    ]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
