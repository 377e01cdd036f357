"""Batches from a dataset: the same whoever decodes, and going on when a process that decodes ends."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from repshift_cli.data.dataset import ImageDataset
from repshift_cli.data.decode import UnreadableSample
from repshift_cli.data.loader import Batch, Feed, available_cores, default_workers
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import DataError

PLAIN = Preprocessing((3, 8, 8), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "nearest", 1.0)


class Shades(ImageDataset):
    """Plain pictures whose red value is their number; `at` is asked before each one is read."""

    def __init__(self, count: int, at: Callable[[int], None] = lambda index: None) -> None:
        self.name = "shades"
        self.count = count
        self.at = at

    @property
    def description(self) -> str:
        return "shades of red"

    @property
    def classes(self) -> None:
        return None

    def __len__(self) -> int:
        return self.count

    def sample_id(self, index: int) -> str:
        return f"shade-{index}"

    def answers(self, index: int, label: int) -> tuple[int, ...]:
        return (label, *range(100, 100 + index % 3))

    def load(self, index: int) -> tuple[Image.Image, int]:
        self.at(index)
        return Image.new("RGB", (8, 8), (index, 0, 0)), index


def feed(dataset: ImageDataset, workers: int, size: int = 4, strict: bool = False) -> tuple[Feed, list[str]]:
    warnings: list[str] = []
    count = len(dataset)
    batches = {number: range(number * size, min(count, (number + 1) * size)) for number in range(-(-count // size))}
    found = Feed(dataset, PLAIN, batches, workers=workers, pinned=False, strict=strict, warn=warnings.append)
    return found, warnings


def seen(batch: Batch) -> tuple[int, list[int], list[int]]:
    """Number, pictures by the tensor that was made of them, and those that could not be read."""
    pixels = [] if batch.pixels is None else (batch.pixels[:, 0, 0, 0] * 255).round().int().tolist()
    assert pixels == batch.indices == batch.answers[:, 0].tolist()
    return batch.number, pixels, [index for index, _ in batch.broken]


def ends(index: int, number: int = signal.SIGKILL) -> Callable[[int], None]:
    """Ends the process that reads a picture."""

    def at(place: int) -> None:
        if place == index:
            os.kill(os.getpid(), number)

    return at


class TestBatches:
    @pytest.mark.parametrize("workers", [0, 1, 3])
    def test_they_are_the_same_whoever_decodes(self, workers: int) -> None:
        batches, warnings = feed(Shades(10), workers)
        assert [seen(batch) for batch in batches] == [
            (0, [0, 1, 2, 3], []),
            (1, [4, 5, 6, 7], []),
            (2, [8, 9], []),
        ]
        assert warnings == []
        assert batches.waited >= 0

    def test_numbers_that_one_process_takes(self) -> None:
        batches, _ = feed(Shades(10), 0)
        batches.batches = {2: range(8, 10), 0: range(4)}
        assert [seen(batch)[0] for batch in batches] == [0, 2]

    def test_answers_are_filled_up(self) -> None:
        batch = next(iter(feed(Shades(3), 0)[0]))
        assert batch.answers.tolist() == [[0, -1, -1], [1, 100, -1], [2, 100, 101]]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_what_cannot_be_read_is_told(self, workers: int) -> None:
        def at(index: int) -> None:
            if index in (0, 1, 2, 3, 6):
                raise UnreadableSample(f"shade-{index}", "made to fail")

        batches = list(feed(Shades(8, at), workers)[0])
        assert [seen(batch) for batch in batches] == [(0, [], [0, 1, 2, 3]), (1, [4, 5, 7], [6])]
        assert batches[0].pixels is None
        assert batches[1].broken == [(6, "made to fail")]
        with pytest.raises(UnreadableSample, match="shade-0"):
            list(feed(Shades(8, at), workers, strict=True)[0])

    @pytest.mark.parametrize("workers", [0, 1])
    def test_what_is_wrong_with_more_than_a_picture_is_raised_as_it_is(self, workers: int) -> None:
        def at(index: int) -> None:
            raise DataError("no labels at all", "Give some.")

        with pytest.raises(DataError) as caught:
            list(feed(Shades(8, at), workers)[0])
        assert (caught.value.message, caught.value.hint) == ("no labels at all", "Give some.")

    @pytest.mark.parametrize("workers", [0, 1])
    @pytest.mark.parametrize("error", [KeyError, OSError, RuntimeError])
    def test_other_errors_are_not_swallowed(self, error: type[Exception], workers: int) -> None:
        def at(index: int) -> None:
            raise error(index)

        batches, warnings = feed(Shades(8, at), workers)
        with pytest.raises(error):
            list(batches)
        assert warnings == []


class TestLostProcesses:
    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
    def test_the_picture_is_named_and_the_others_go_on(self, number: int) -> None:
        batches, warnings = feed(Shades(24, ends(13, number)), 2)
        found = [seen(batch) for batch in batches]
        assert [pictures for _, pictures, _ in found] == [
            [*range(4)],
            [*range(4, 8)],
            [*range(8, 12)],
            [12, 14, 15],
            [*range(16, 20)],
            [*range(20, 24)],
        ]
        assert found[3][2] == [13]
        name = signal.Signals(number).name
        assert warnings == [
            f"a process that decodes pictures was lost: shade-13: the process that decodes it ends with {name}"
        ]

    def test_strict_stops_and_names_it(self) -> None:
        with pytest.raises(UnreadableSample, match="shade-2 cannot be read: the process that decodes it ends with"):
            list(feed(Shades(8, ends(2)), 1, strict=True)[0])

    def test_a_loss_that_no_picture_explains(self, tmp_path: Path) -> None:
        def once(index: int) -> None:
            if index == 5 and not (tmp_path / "lost").exists():
                (tmp_path / "lost").touch()
                os.kill(os.getpid(), signal.SIGKILL)

        batches, warnings = feed(Shades(12, once), 1)
        assert [picture for batch in batches for picture in seen(batch)[1]] == list(range(12))
        assert len(warnings) == 1
        assert "no picture is to blame; the run goes on" in warnings[0]

    def test_losses_without_end(self, tmp_path: Path) -> None:
        def first_in_each(index: int) -> None:
            # not where a picture is tried alone: that process has no worker's number
            if torch.utils.data.get_worker_info() is not None:
                os.kill(os.getpid(), signal.SIGKILL)

        batches, warnings = feed(Shades(8, first_in_each), 1)
        with pytest.raises(DataError, match="keep ending, and no picture is to blame"):
            list(batches)
        assert len(warnings) == 2

    def test_the_handler_of_the_program_stays(self) -> None:
        before = signal.getsignal(signal.SIGCHLD)
        list(feed(Shades(8), 1)[0])
        assert signal.getsignal(signal.SIGCHLD) == before


def test_workers_where_nobody_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_cores() >= 1
    for cores, processes, on_gpu, on_cpu in ((1, 1, 0, 0), (2, 1, 1, 1), (16, 1, 8, 1), (16, 4, 3, 1), (2, 2, 0, 0)):
        monkeypatch.setattr("repshift_cli.data.loader.available_cores", lambda cores=cores: cores)
        assert default_workers(torch.device("cuda"), processes) == on_gpu
        assert default_workers(torch.device("cpu"), processes) == on_cpu
