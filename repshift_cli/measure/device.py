"""Devices, dtypes and threads."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from repshift_cli.errors import UsageError
from repshift_cli.utils.ranges import check_ranges

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error is out of memory; the CPU allocator raises a plain RuntimeError."""
    words = ("not enough memory", "alloc_cpu")
    return isinstance(error, torch.OutOfMemoryError) or any(each in str(error) for each in words)


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished all queued work; the CPU queues none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """Product name of the CPU or GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "cpu"


def resolve_device(name: str) -> torch.device:
    """The device of this name; raises a UsageError if it is not cpu or cuda[:N], or does not exist."""
    allowed = "Allowed are cpu, cuda and cuda:N."
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}", allowed) from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise UsageError(f"unsupported device {name!r}", allowed)
    if not torch.cuda.is_available():
        raise UsageError(f"device {name!r}: torch finds no CUDA device", "Use --device cpu.")
    count = torch.cuda.device_count()
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= count:
        raise UsageError(f"device {name!r} does not exist", f"torch finds {count}: cuda:0 to cuda:{count - 1}.")
    return torch.device("cuda", index)


def resolve_dtype(name: str) -> torch.dtype:
    """The floating-point type of this name; raises a UsageError for names not in `DTYPES`."""
    if name not in DTYPES:
        raise UsageError(f"unknown dtype {name!r}", f"Allowed are {', '.join(DTYPES)}.")
    return DTYPES[name]


@contextmanager
def num_threads(count: int | None) -> Iterator[int]:
    """Use this many CPU threads, None for torch's default; yields the number in use."""
    check_ranges(threads=count)
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def waking_note(device: torch.device, count: int) -> str | None:
    """A note if OMP_WAIT_POLICY=PASSIVE makes idle threads sleep: every operation has to wake them."""
    policy = os.environ.get("OMP_WAIT_POLICY", "").strip().upper()
    if device.type != "cpu" or count == 1 or policy != "PASSIVE":
        return None
    return "OMP_WAIT_POLICY=PASSIVE is set: every operation has to wake its threads, which is slow at batch 1"


_MATRIX_TILE = 16
"""Rows of a tile of AMX."""


def tiles_note(device: torch.device, dtype: torch.dtype, tokens: Sequence[int]) -> str | None:
    """A note if token counts after the sites are not multiples of the tile of a CPU's matrix unit (AMX).

    Attention over 158 tokens in bfloat16 takes twice as long as over 160 (benchmarks/kernels_cpu.py).
    """
    odd = [count for count in dict.fromkeys(tokens) if count % _MATRIX_TILE]
    if not odd or device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16) or not _has_matrix_unit():
        return None
    return (
        f"token counts ({', '.join(map(str, odd))}) are not multiples of {_MATRIX_TILE}, the tile of the matrix unit "
        f"of this CPU in {str(dtype).removeprefix('torch.')}: `round_tokens: {_MATRIX_TILE}` in a recipe may be faster"
    )


def _has_matrix_unit() -> bool:
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # missing in older versions
    return bool(capabilities.get("amx_tile"))
