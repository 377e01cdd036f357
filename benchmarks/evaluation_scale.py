"""Tests of evaluation: processes, kills, broken files, full disks and memory, on generated images.

Every evaluation is a `repshift eval` command in its own process.

    python benchmarks/evaluation_scale.py --parts processes kills broken disk memory
"""

# ruff: noqa: S603, S607 (all commands are written in this file)

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _results import publish, table
from PIL import Image

from repshift_cli.data.builtin.digits import DigitScenes
from repshift_cli.measure.device import device_name

TITLES = {
    "processes": "Evaluation by one process and by two",
    "kills": "Evaluation that is killed and goes on",
    "broken": "Evaluation among broken files",
    "disk": "Evaluation on a disk that becomes full",
    "memory": "Memory over an evaluation",
}
MODEL = "builtin:vit-digits-small"
INTEGERS = ("images", "of", "skipped", "top1_correct", "top5_correct")
LANES = 2
"""Series of killed runs at a time."""

SLOWER = 1.3
"""How many times slower a run is when another one runs too."""

SAMPLE_SECONDS = 0.25
SETTLED, ENDING = 0.25, 0.92
"""Shares of a run between which its memory should stay constant; after that it frees memory."""

FULL_DISKS = (
    ("progress, no room from the start", 0, "--resume", "state"),
    ("progress, room for the mark of the run", 4, "--resume", "state"),
    ("progress, room for some shards", 40, "--resume", "state"),
    ("predictions", 4, "--save-predictions", "p.npz"),
)
"""What is written, KiB of free space, the option that writes it and its file or folder."""

Section = tuple[str, str]


def main() -> None:
    options = parse_options()
    makers: dict[str, Callable[[argparse.Namespace, Path], Section]] = {
        "processes": several_processes,
        "kills": kill_and_resume,
        "broken": broken_files,
        "disk": full_disk,
        "memory": memory_over_the_run,
    }
    machine = f"{device_name(torch.device('cpu'))}, {os.cpu_count()} cores"
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for part in options.parts:
            root = Path(folder) / part
            root.mkdir()
            body = makers[part](options, root)
            publish(f"evaluation_{part}", TITLES[part], machine, body, dry_run=options.dry_run)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parts", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--images", type=int, default=20_000, help="of `processes` and `memory`")
    parser.add_argument("--size", type=int, default=256, help="side of the images in pixels")
    parser.add_argument("--kills", type=int, default=50, help="how often a run is killed")
    parser.add_argument("--killed-images", type=int, default=1500, help="of a run that is killed")
    parser.add_argument("--broken", type=int, default=500, help="broken files, among three times as many good ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="folder for the images, kept for the next run")
    parser.add_argument("--dry-run", action="store_true", help="print the page, write no file")
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------------------------------
# Images, and the command


def make_images(options: argparse.Namespace, root: Path, count: int) -> Path:
    """Folder of images: of this part, or in `--folder`, to be used again."""
    if options.folder is None:
        return draw(root / "images", count, options.size)
    kept: Path = options.folder / f"digits-{count}-{options.size}"
    if not kept.is_dir():
        draw(root / "drawn", count, options.size).rename(kept)
    return kept


def draw(root: Path, count: int, size: int) -> Path:
    """Scenes of the built-in digits as JPEGs in class folders."""
    for label in range(10):
        (root / str(label)).mkdir(parents=True)
    scenes = DigitScenes("test", count)
    for index in range(count):
        image, label = scenes[index]
        enlarged = image.resize((size, size), Image.Resampling.BICUBIC)
        enlarged.save(root / str(label) / f"{index:06d}.jpg", quality=90)
    return root


def command(arguments: Sequence[object], processes: int = 1) -> list[str]:
    run = [sys.executable, "-m"]
    if processes > 1:
        run += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return [*run, "repshift_cli", "eval", MODEL, "--json", *map(str, arguments)]


def environment() -> dict[str, str]:
    # one thread per process, so that only the number of processes differs
    root = str(Path(__file__).resolve().parents[1])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def evaluate(arguments: Sequence[object], processes: int = 1, **options: Any) -> tuple[dict[str, Any], float]:
    """JSON document and seconds of a run that must succeed."""
    began = time.perf_counter()
    done = subprocess.run(
        command(arguments, processes), capture_output=True, text=True, check=False, env=environment(), **options
    )
    if done.returncode != 0:
        raise SystemExit(f"{shlex.join(done.args)} ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout), time.perf_counter() - began


def shortened(text: str) -> str:
    """A message for a cell of a table."""
    return textwrap.shorten(text.replace("|", "/"), 80, placeholder=" ...")


def integers(document: dict[str, Any]) -> tuple[int, ...]:
    return tuple(document[key] for key in INTEGERS)


# ---------------------------------------------------------------------------------------------------------------------
# The parts


def several_processes(options: argparse.Namespace, root: Path) -> Section:
    folder = make_images(options, root, options.images)
    rows, counts = [], []
    for processes in (1, 2):
        # each process decodes its own images, so decoding is shared too
        document, seconds = evaluate(["--dataset", folder, "--workers", 0], processes)
        counts.append(integers(document))
        work = document["images"] / document["end_to_end_images_per_s"]
        rows.append(
            [str(processes), *map(str, counts[-1]), f"{seconds:.1f}", f"{work:.1f}", document["data"]["bottleneck"]]
        )
    same = "the same whole numbers" if counts[0] == counts[1] else "DIFFERENT NUMBERS"
    ratio = float(rows[0][-2]) / float(rows[1][-2])
    what = f"{options.images} JPEGs of {options.size} pixels, {MODEL}, one thread per process"
    columns = ["processes", *(key.replace("_", " ") for key in INTEGERS), "s, all", "s, evaluating", "bottleneck"]
    note = f"{what}: {same}; two evaluate {ratio:.2f}x as fast."
    return table(columns, rows), note


def kill_and_resume(options: argparse.Namespace, root: Path) -> Section:
    folder = make_images(options, root, options.killed_images)
    arguments = ["--dataset", folder, "--workers", 0, "-b", 8]
    whole, seconds = evaluate(arguments)
    lanes = [
        Lane(arguments, root / f"state-{number}", integers(whole), seconds, random.Random(options.seed + number))  # noqa: S311
        for number in range(LANES)
    ]
    with ThreadPoolExecutor(LANES) as pool:
        list(pool.map(lambda lane: lane.run(-(-options.kills // LANES)), lanes))
    moments = [moment for lane in lanes for moment in lane.moments]
    left = [path for path in root.iterdir() if path.name.startswith("state")]
    finished, wrong = sum(lane.finished for lane in lanes), sum(lane.wrong for lane in lanes)
    taken_up = sum(lane.taken_up for lane in lanes)
    span = f"{min(moments):.1f}-{max(moments):.1f}"
    rows = [[str(len(moments)), str(taken_up), str(finished), str(wrong), span, str(len(left))]]
    columns = [
        *("kills", "of them with shards kept", "runs that came to their end", "of them with other numbers"),
        *("killed after s", "folders left"),
    ]
    note = (
        f"SIGKILL at random moments of runs over {options.killed_images} images, {MODEL}, {LANES} runs at a time; "
        f"one alone and without a kill takes {seconds:.1f} s."
    )
    return table(columns, rows), note


@dataclass
class Lane:
    """A series of runs with one state, each killed at a random moment unless it ends before."""

    arguments: Sequence[object]
    state: Path
    expected: tuple[int, ...]
    seconds: float
    rng: random.Random
    moments: list[float] = field(default_factory=list)
    taken_up: int = 0
    finished: int = 0
    wrong: int = 0

    def run(self, kills: int) -> None:
        """Kill a number of runs, then run to the end."""
        while len(self.moments) < kills:
            self._attempt(self.rng.uniform(0, SLOWER * self.seconds))
        self._attempt(None)

    def _attempt(self, moment: float | None) -> None:
        with subprocess.Popen(
            command([*self.arguments, "--resume", self.state]),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
        ) as process:
            try:
                out, _ = process.communicate(timeout=moment)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                self.moments.append(moment or 0.0)
                self.taken_up += any(self.state.glob("0*.json"))
                return
        self.finished += 1
        self.wrong += process.returncode != 0 or integers(json.loads(out)) != self.expected


def broken_files(options: argparse.Namespace, root: Path) -> Section:
    good = 3 * options.broken
    folder = draw(root / "images", good, options.size)
    whole, _ = evaluate(["--dataset", folder])
    kinds: Counter[str] = Counter()
    for index in range(options.broken):
        name, make = BROKEN[index % len(BROKEN)]
        make(folder / str(index % 10) / f"broken-{index:04d}.jpg")
        kinds[name] += 1
    document, _ = evaluate(["--dataset", folder, "--workers", 2])
    named = {Path(entry["file"]).name for entry in document["skipped_files"]}
    missed = options.broken - sum(name.startswith("broken-") for name in named)
    same = document["top1_correct"] == whole["top1_correct"] and document["images"] == good
    reasons = {Path(entry["file"]).name: entry["reason"] for entry in document["skipped_files"]}
    rows = [
        [name, str(kinds[name]), shortened(reasons.get(f"broken-{place:04d}.jpg", "NOT SKIPPED"))]
        for place, (name, _) in enumerate(BROKEN)
    ]
    note = (
        f"{options.broken} broken files of {len(kinds)} kinds among {good} good ones: {document['skipped']} skipped, "
        f"{missed} missed, the good ones counted {'as before' if same else 'DIFFERENTLY'}."
    )
    return table(["kind", "files", "message"], rows), note


def full_disk(options: argparse.Namespace, root: Path) -> Section:
    folder = make_images(options, root, 400)
    arguments: list[object] = ["--dataset", folder, "-b", 8, "--workers", 0]
    expected = integers(evaluate(arguments)[0])
    rows = []
    for what, room, option, name in FULL_DISKS:
        with small_disk(root / "disk", room) as (disk, how):
            done = subprocess.run(
                command([*arguments, option, disk / name]),
                capture_output=True,
                text=True,
                check=False,
                env=environment(),
            )
            left = sum(1 for path in disk.rglob("*") if path.is_file() and path.suffix in (".part", ".npz"))
        numbers = integers(json.loads(done.stdout)) == expected if done.stdout else None
        shown = {None: "none printed", True: "right", False: "WRONG"}[numbers]
        rows.append([what, how, str(done.returncode), shown, str(left), *complaint(done.stderr, root)])
    rows.append(full_stdout([*arguments, "--resume", root / "state"], expected, root))
    columns = ["what is written", "disk", "exit code", "numbers", "half files", "traceback", "message"]
    return table(columns, rows), "Each write of an evaluation, on a disk that becomes full."


def full_stdout(arguments: Sequence[object], expected: tuple[int, ...], root: Path) -> list[str]:
    """A run that cannot print its result, and the one that resumes it."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command(arguments), stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment()
        )
    again, _ = evaluate(arguments)
    shown = "right, by the same command again" if integers(again) == expected else "WRONG"
    what = "the numbers, with --resume"
    return [what, "stdout on /dev/full", str(done.returncode), shown, "0", *complaint(done.stderr, root)]


def complaint(stderr: str, root: Path) -> tuple[str, str]:
    """Whether there was a traceback, and the message about the disk."""
    problem = next((line for line in stderr.splitlines() if "space" in line or "cannot write" in line), "-")
    return "TRACEBACK" if "Traceback" in stderr else "no", shortened(problem.replace(str(root), ""))


def memory_over_the_run(options: argparse.Namespace, root: Path) -> Section:
    folder = make_images(options, root, options.images)
    rows = []
    for workers in (0, 1):
        with subprocess.Popen(
            command(["--dataset", folder, "--workers", workers]),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
        ) as process:
            samples = Samples(process.pid)
            out, _ = process.communicate()
            samples.stop()
        images = json.loads(out)["images"]
        rows.append([str(workers), *samples.cells(images)])
    columns = ["workers", "of", "MiB at a quarter", "MiB near the end", "slope, MiB per 1000 images"]
    flat = [[row[0], *cells] for row in rows for cells in (("the run", *row[1:4]), ("its workers", *row[4:7]))]
    span = f"{SETTLED:.0%} to {ENDING:.0%} of the time"
    note = f"Resident memory over {options.images} images, {MODEL}; slopes by least squares over {span}."
    return table(columns, [row for row in flat if row[2] != "-"]), note


# ---------------------------------------------------------------------------------------------------------------------
# Memory and disks


@dataclass
class Samples:
    """Resident memory of a process and of its children, sampled until it ends."""

    pid: int

    def __post_init__(self) -> None:
        self.times: list[float] = []
        self.own: list[float] = []
        self.children: list[float] = []
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._ended = threading.Event()
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def cells(self, images: int) -> list[str]:
        return [*self._series(self.own, images), *self._series(self.children, images)]

    def _series(self, values: list[float], images: int) -> list[str]:
        middle = slice(int(SETTLED * len(values)), int(ENDING * len(values)))
        kept, times = np.array(values[middle]), np.array(self.times[middle])
        if len(kept) < 4 or kept.max() == 0:
            return ["-", "-", "-"]
        seconds = self.times[-1] - self.times[0]
        slope = float(np.polyfit(times, kept, 1)[0]) * seconds / images * 1000
        return [f"{kept[0]:.0f}", f"{kept[-1]:.0f}", f"{slope:+.3f}"]

    def _sample(self) -> None:
        while not self._ended.is_set():
            own = resident(self.pid)
            if own:
                self.times.append(time.perf_counter())
                self.own.append(own)
                self.children.append(sum(resident(child) for child in children_of(self.pid)))
            self._ended.wait(SAMPLE_SECONDS)


def resident(pid: int) -> float:
    """MiB; 0 if the process has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * resource.getpagesize() / 2**20


def children_of(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


@contextmanager
def small_disk(folder: Path, room: int) -> Iterator[tuple[Path, str]]:
    """A tmpfs of this many KiB, which only root can mount."""
    folder.mkdir()
    size = max(room, 4) + 64
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        shutil.rmtree(folder)
        raise SystemExit("a small disk could not be mounted: run this part as root, or leave it out")
    try:
        filler = folder / ".filler"
        with filler.open("wb", buffering=0) as stream, suppress(OSError):
            while True:
                stream.write(b"0" * 1024)
        if room:
            os.truncate(filler, max(0, filler.stat().st_size - room * 1024))
        yield folder, f"tmpfs, {room} KiB free"
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def encoded(kind: str, size: tuple[int, int] = (64, 48)) -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, kind)
    return stream.getvalue()


def huge_png() -> bytes:
    """A header for 60,000 x 60,000 pixels."""
    content = bytearray(encoded("PNG"))
    content[16:24] = (60_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    return bytes(content)


def huge_jpeg() -> bytes:
    content = bytearray(encoded("JPEG"))
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    return bytes(content)


def damaged_png() -> bytes:
    content = bytearray(encoded("PNG"))
    content[60:90] = b"\xff" * 30
    return bytes(content)


def writer(content: Callable[[], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content()) and None


def dangling(path: Path) -> None:
    path.symlink_to(path.with_name("gone.jpg"))


BROKEN: tuple[tuple[str, Callable[[Path], None]], ...] = (
    ("empty", writer(bytes)),
    ("text", writer(lambda: b"no image at all\n" * 20)),
    ("zeros", writer(lambda: bytes(20_000))),
    ("JPEG, its first 300 bytes", writer(lambda: encoded("JPEG")[:300])),
    ("JPEG, cut off in the middle", writer(lambda: encoded("JPEG")[:-900])),
    ("JPEG of 65,535 x 65,535", writer(huge_jpeg)),
    ("PNG, cut off", writer(lambda: encoded("PNG")[:-200])),
    ("PNG, damaged", writer(damaged_png)),
    ("PNG of 60,000 x 60,000", writer(huge_png)),
    ("PNG of 2 x 4,000", writer(lambda: encoded("PNG", (2, 4000)))),
    ("PostScript", writer(lambda: encoded("EPS"))),
    ("a link to nothing", dangling),
)


if __name__ == "__main__":
    main()
