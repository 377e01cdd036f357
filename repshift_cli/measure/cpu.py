"""Instruction sets of the CPU."""

from __future__ import annotations

from functools import cache
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")

INSTRUCTIONS = {
    "vector": ("avx2", "avx512f", "asimd", "sve"),
    "int8": ("avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm"),
    "bfloat16": ("avx512_bf16", "amx_bf16", "bf16"),
}
"""Instruction sets of x86 and Arm by what they speed up. Those of `int8` add 8-bit products into 32 bits."""


@cache
def cpu_features() -> frozenset[str]:
    """Names of the instruction sets as in /proc/cpuinfo, such as `avx2`; empty where the system does not list them."""
    if _CPUINFO.is_file():
        for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, names = line.partition(":")
            if key.strip() in ("flags", "Features"):
                return frozenset(names.split())
    return frozenset()


def int8_note() -> str | None:
    """A note if this CPU has no instruction for 8-bit products, None if it has one or the system lists none."""
    features = cpu_features()
    if not features or not features.isdisjoint(INSTRUCTIONS["int8"]):
        return None
    return "this CPU has no VNNI or similar instructions for 8-bit products: int8 may gain little here"
