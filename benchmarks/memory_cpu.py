"""Peak memory of the commands on large models, compared with the size of the weights.

Linux reports two kinds: anonymous memory, which the process allocated, and pages of mapped files, which the system may
reclaim at any time. Weights are read into anonymous memory, once. Each command runs in its own process. Weights are
random.

    python benchmarks/memory_cpu.py --threads 2
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from _results import publish, table
from PIL import Image
from safetensors.torch import save_file

from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.measure.device import device_name

SAMPLE_SECONDS = 0.01
MIB = 1024
"""KiB, the unit of Linux."""

IMAGES, CLASSES = 64, 1000
VOCABULARY = 30522
"""Vocabulary of UMT's text encoder; the built-in words come first, the others are unused."""


@dataclass(frozen=True)
class Subject:
    """A model, its recipe, and its batch sizes for timing and evaluation."""

    title: str
    model: str
    recipe: str
    batch: int
    clips: int = 0


SUBJECTS = {
    "vit_base": Subject("ViT-B", "vit_base_patch16_224", "vit_base_paper", 8),
    "vit_large": Subject("ViT-L", "vit_large_patch16_224", "vit_large", 8),
    "umt_large": Subject("UMT-L", "umt_large", "umt_large_paper", 1, clips=4),
}
NOTE = (
    "Largest MiB over the life of the process, sampled every 10 ms. `held`: anonymous memory, with the weights. "
    "`mapped`: pages of mapped files, such as torch's libraries (`inspect` of a small model: {idle}). The two maxima "
    "need not coincide. `float32 weights` is the size of the file. `compress` runs without calibration; `bench` "
    f"times dense and compressed; `eval` runs both on {IMAGES} images (UMT: on clips of 12 frames with captions), "
    "in batches of the given size. `bench` and `eval` read the compressed file."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dry-run", action="store_true", help="print the page, write no file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        draw_images(Path(folder) / "images")
        write_vocabulary(Path(folder) / "vocab.txt")
        idle = peak(["inspect", "deit_tiny_patch16_224"])[1]
        rows = [row for key in options.models for row in rows_of(SUBJECTS[key], Path(folder), options.threads)]
    machine = f"{device_name(torch.device('cpu'))}, float32, {options.threads} threads"
    columns = ["model", "float32 weights", "command", "batch", "held", "mapped"]
    body = [table(columns, rows), NOTE.format(idle=f"{idle:.0f}")]
    publish("memory_cpu", "Memory of the commands on a CPU", machine, body, dry_run=options.dry_run)


def draw_images(root: Path) -> None:
    """One image per class of ImageNet."""
    for label in range(CLASSES):
        folder = root / f"{label:04d}"
        folder.mkdir(parents=True)
        Image.new("RGB", (320, 240), (label % 256, label // 4, 99)).save(folder / "a.jpg")


def write_vocabulary(path: Path) -> None:
    words = (files("repshift_cli") / "assets" / "shapes_vocab.txt").read_text(encoding="utf-8").split()
    path.write_text("\n".join([*words, *(f"[unused{index}]" for index in range(VOCABULARY - len(words)))]) + "\n")


def rows_of(subject: Subject, folder: Path, threads: int) -> list[list[str]]:
    """A row for each command; files are removed after measuring."""
    dense, fast = folder / "dense.safetensors", folder / "fast.safetensors"
    save_file(load_checkpoint(subject.model).tensors, dense)
    size = dense.stat().st_size / 2**20
    quick, run = ["--seconds", "1"], ["-b", subject.batch, "--threads", threads]
    clips = ["builtin:shapes", "--limit", subject.clips, "--vocab", folder / "vocab.txt"]
    data = clips if subject.clips else [folder / "images", "--limit", IMAGES]
    what = ["--model", subject.model, "--recipe", subject.recipe, "--no-calibrate", "-o", fast]
    commands = {
        "compress": [dense, *what, *run, *quick],
        "bench": [fast, *run, *quick, "--min-runs", 3],
        "eval": [fast, "--dataset", *data, "--compare-dense", "--workers", 0, *run],
    }
    rows = []
    for name, arguments in commands.items():
        most = (f"{number:.0f}" for number in peak([name, *arguments]))
        rows.append([subject.title, f"{size:.0f}", name, str(subject.batch), *most])
        print(*rows[-1], file=sys.stderr, flush=True)
    dense.unlink()
    fast.unlink()
    return rows


def peak(arguments: list[object]) -> tuple[float, float]:
    """Peak anonymous and mapped memory of a command, in MiB.

    Raises:
        SystemExit: the command fails.
    """
    words = [sys.executable, "-m", "repshift_cli", *map(str, arguments)]
    held = mapped = 0
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=errors)  # noqa: S603 (written here)
        while process.poll() is None:
            now = status(process.pid)
            held, mapped = max(held, now.get("RssAnon", 0)), max(mapped, now.get("RssFile", 0))
            time.sleep(SAMPLE_SECONDS)
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"{shlex.join(words)} ended with {process.returncode}:\n{errors.read()}")
    return held / MIB, mapped / MIB


def status(pid: int) -> dict[str, int]:
    """Kinds of memory of a process in KiB; empty if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}


if __name__ == "__main__":
    main()
