"""What a run costs in energy, from the counters of the device: NVML on a graphics card, RAPL on a processor.

Both count what the whole device takes, other processes and idling included, so only runs that alternate on an otherwise
quiet machine can be compared. Where no counter can be read there is no number; none is ever estimated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

__all__ = ["POWERCAP", "Counter", "Meter", "find_meter"]

POWERCAP = Path("/sys/class/powercap")
"""Where Linux shows the energy counters of processors."""

_PACKAGE = re.compile(r"intel-rapl:\d+")
"""A whole processor; its parts are named `intel-rapl:0:0` and would count twice. AMD's go by the same name."""

_RAPL_TICK_S, _NVML_TICK_S = 0.001, 0.1
_MICROJOULE, _MILLIJOULE = 1e-6, 1e-3


@dataclass(frozen=True)
class Counter:
    """A number that only grows with the energy that was used.

    Attributes:
        read: what it says now.
        joules: what one step of it stands for.
        wraps_at: the number at which it starts from 0 again; None where it does not.
    """

    read: Callable[[], int]
    joules: float
    wraps_at: int | None = None

    def between(self, before: int, after: int) -> float:
        """Joules from one reading to a later one, at most one wrap-around apart."""
        steps = after - before
        if steps < 0 and self.wraps_at is not None:
            steps += self.wraps_at
        return steps * self.joules


@dataclass(frozen=True)
class Meter:
    """All counters of a device.

    Attributes:
        source: `nvml` or `rapl`.
        tick_s: seconds between two changes of the counters. What takes less time than that cannot be told.
    """

    source: str
    counters: tuple[Counter, ...]
    tick_s: float

    def read(self) -> tuple[int, ...]:
        """What the counters say now."""
        return tuple(counter.read() for counter in self.counters)

    def between(self, before: Sequence[int], after: Sequence[int]) -> float:
        """Joules from one reading to a later one."""
        return sum(
            counter.between(first, last) for counter, first, last in zip(self.counters, before, after, strict=True)
        )


def find_meter(device: torch.device, powercap: Path = POWERCAP) -> Meter | None:
    """The meter of a device; None where it has none, or none that this user may read.

    Args:
        powercap: the folder of the kernel's energy counters, for processors.
    """
    return _nvml(device) if device.type == "cuda" else _rapl(powercap)


def _rapl(folder: Path) -> Meter | None:
    try:
        zones = sorted(zone for zone in folder.iterdir() if _PACKAGE.fullmatch(zone.name))
        counters = tuple(_zone_counter(zone) for zone in zones if _is_package(zone))
    except (OSError, ValueError):  # of some processors only the administrator may read them; a part would mislead
        return None
    return Meter("rapl", counters, _RAPL_TICK_S) if counters else None


def _is_package(zone: Path) -> bool:
    """Whether it is a processor; `psys`, the whole board, holds the processors once more."""
    return (zone / "name").read_text(encoding="ascii").startswith("package")


def _zone_counter(zone: Path) -> Counter:
    read = partial(_read_number, zone / "energy_uj")
    read()
    return Counter(read, _MICROJOULE, _read_number(zone / "max_energy_range_uj"))


def _read_number(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))


def _nvml(device: torch.device) -> Meter | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        read = partial(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle)
        read()
    except (pynvml.NVMLError, AttributeError):  # cards before Volta have no counter, older versions of torch no uuid
        return None
    return Meter("nvml", (Counter(read, _MILLIJOULE),), _NVML_TICK_S)
