"""Energy counters, from a folder that looks like the kernel's."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from repshift_cli.energy import Counter, find_meter

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def zone(folder: Path, place: str, name: str, microjoules: int, largest: int = 1_000_000) -> Path:
    """A counter as the kernel shows it."""
    made = folder / place
    made.mkdir(parents=True)
    for file, text in (("name", name), ("energy_uj", microjoules), ("max_energy_range_uj", largest)):
        (made / file).write_text(f"{text}\n")
    return made


def test_two_processors_are_added(tmp_path: Path) -> None:
    first = zone(tmp_path, "intel-rapl:0", "package-0", 100)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 999_999)
    zone(tmp_path, "intel-rapl:0:0", "core", 5)
    zone(tmp_path, "intel-rapl:2", "psys", 7)
    (tmp_path / "intel-rapl").mkdir()
    meter = find_meter(CPU, tmp_path)
    assert meter is not None
    assert (meter.source, len(meter.counters)) == ("rapl", 2)
    before = meter.read()
    assert before == (100, 999_999)
    (first / "energy_uj").write_text("500100\n")
    (second / "energy_uj").write_text("499999\n")  # it has started from 0 again: half a joule
    assert meter.between(before, meter.read()) == pytest.approx(1.0)


def test_no_such_folder(tmp_path: Path) -> None:
    assert find_meter(CPU, tmp_path / "missing") is None
    assert find_meter(CPU, tmp_path) is None


@pytest.mark.parametrize("damage", ["unreadable", "no number", "no range"])
def test_a_part_is_not_taken_for_the_whole(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 100)
    bad = zone(tmp_path, "intel-rapl:1", "package-1", 100)
    if damage == "no range":
        (bad / "max_energy_range_uj").unlink()
    elif damage == "no number":
        (bad / "energy_uj").write_text("")
    else:
        plain = Path.read_text

        def read(path: Path, **options: str) -> str:
            if path == bad / "energy_uj":
                raise PermissionError(13, "Permission denied")
            return plain(path, **options)

        monkeypatch.setattr(Path, "read_text", read)
    assert find_meter(CPU, tmp_path) is None


def test_a_counter_without_a_range_goes_on() -> None:
    assert Counter(lambda: 0, 0.5).between(10, 14) == 2.0


class _NoCounter(Exception):
    pass


def _nvml(total: int | None) -> SimpleNamespace:
    """Stands for pynvml, with a card that has used so many millijoules."""

    def consumption(handle: str) -> int:
        assert handle == "handle of GPU-1234"
        if total is None:
            raise _NoCounter
        return total

    return SimpleNamespace(
        NVMLError=_NoCounter,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: f"handle of {uuid}",
        nvmlDeviceGetTotalEnergyConsumption=consumption,
    )


@pytest.mark.parametrize("total", [2500, None])
def test_a_card(total: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", _nvml(total))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    meter = find_meter(CUDA)
    if total is None:
        assert meter is None
    else:
        assert meter is not None
        assert meter.read() == (2500,)
        assert meter.between((0,), meter.read()) == 2.5


def test_a_card_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert find_meter(CUDA) is None
