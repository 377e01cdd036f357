"""Time of an export with its check, and repeatability of the exported files: DeiT-B, on this CPU.

Each export is a command in its own process. Each file is then run many times in batches of
different sizes, and the outputs are compared bit by bit with the first run. Weights are random.

    python benchmarks/export_times.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from _results import publish, table

from repshift_cli.checkpoints.exported import Runtime, open_exported
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.export.formats import FORMATS
from repshift_cli.measure.device import device_name

MODEL, RECIPE = "deit_base_patch16_224", "deit_base_paper"
BATCHES = (1, 2, 3, 4, 5)
NOTE = (
    f"{MODEL}, recipe `{RECIPE}`: one `repshift export` per format, including process start, loading and check. "
    "Batches of 1 to 5 images in turn. `equal in its size`: runs that give the same bits as the first run of that "
    "batch size. `apart`: largest difference between the outputs of an image in batches of different sizes."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--runs", type=int, default=100, help="of each file")
    parser.add_argument("--dry-run", action="store_true", help="print the page, write no file")
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        rows = [row(target, Path(folder), options.runs) for target in options.targets]
    machine = f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads"
    columns = ["format", "s, with the check", "MB", "runs", "equal in its size", "apart"]
    body = [table(columns, rows), NOTE]
    publish("export_times", "Time of an export: DeiT-B", machine, body, dry_run=options.dry_run)


def row(target: str, folder: Path, runs: int) -> list[str]:
    output = folder / FORMATS[target].default_output("deit")
    seconds = export(target, output)
    if target == "hub":
        size = sum(file.stat().st_size for file in output.iterdir())
        return [target, f"{seconds:.1f}", f"{size / 1e6:.0f}", "-", "-", "-"]
    equal, apart = repeated(open_exported(output).runtime, runs)
    return [target, f"{seconds:.1f}", f"{output.stat().st_size / 1e6:.0f}", str(runs), str(equal), f"{apart:.1g}"]


def export(target: str, output: Path) -> float:
    """Seconds that the command takes."""
    begin = time.perf_counter()
    subprocess.run(  # noqa: S603 (the command is written here)
        [sys.executable, "-m", "repshift_cli", "export", MODEL, "--recipe", RECIPE, "--to", target, "-o", str(output)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - begin


@torch.inference_mode()
def repeated(runtime: Runtime, runs: int) -> tuple[int, float]:
    """How many runs give the same bits as the first of their batch size, and how far sizes are apart."""
    images = torch.randn(max(BATCHES), *load_checkpoint(MODEL).description.preprocessing.shape)
    sizes = [BATCHES[run % len(BATCHES)] for run in range(runs)]
    first: dict[int, torch.Tensor] = {}
    equal = 0
    for size in sizes:
        output = runtime(images[:size]).clone()
        equal += torch.equal(output, first.setdefault(size, output))
    whole = first[max(first)]
    return equal, max(float((output - whole[:size]).abs().max()) for size, output in first.items())


if __name__ == "__main__":
    main()
