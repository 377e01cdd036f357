"""Batches of a dataset: the same for any number of workers, and continued after a worker process died."""

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
from repshift_cli.data.loader import Batch, BatchLoader, available_cores, cut_batches, default_workers, image_loader
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import DataError

PLAIN = Preprocessing((3, 8, 8), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "nearest", 1.0)


class Shades(ImageDataset):
    """Plain images whose red value is their number; `at` is called before each one is read."""

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


def load(
    dataset: ImageDataset, workers: int, size: int = 4, strict: bool = False, persistent: bool = False
) -> tuple[BatchLoader, list[str]]:
    warnings: list[str] = []
    batches = cut_batches(len(dataset), size)
    loader = image_loader(
        dataset,
        PLAIN,
        batches,
        workers=workers,
        pinned=False,
        strict=strict,
        persistent=persistent,
        warn=warnings.append,
    )
    return loader, warnings


def seen(batch: Batch) -> tuple[int, list[int], list[int]]:
    """Number of the batch, the images by their pixels, and those that could not be read."""
    pixels = [] if batch.pixels is None else (batch.pixels[:, 0, 0, 0] * 255).round().int().tolist()
    assert pixels == batch.indices == batch.answers[:, 0].tolist()
    return batch.number, pixels, [index for index, _ in batch.broken]


def kills(index: int, number: int = signal.SIGKILL) -> Callable[[int], None]:
    """Kill the process that reads an image."""

    def at(place: int) -> None:
        if place == index:
            os.kill(os.getpid(), number)

    return at


def fails_at(*broken: int) -> Callable[[int], None]:
    """Reading these images fails."""

    def at(index: int) -> None:
        if index in broken:
            raise UnreadableSample(f"shade-{index}", "made to fail")

    return at


class TestBatches:
    @pytest.mark.parametrize("workers", [0, 1, 3])
    def test_batches_are_the_same_for_any_number_of_workers(self, workers: int) -> None:
        batches, warnings = load(Shades(10), workers)
        assert [seen(batch) for batch in batches] == [
            (0, [0, 1, 2, 3], []),
            (1, [4, 5, 6, 7], []),
            (2, [8, 9], []),
        ]
        assert warnings == []
        assert batches.waited >= 0

    def test_batches_are_in_the_order_of_their_numbers(self) -> None:
        batches, _ = load(Shades(10), 0)
        batches.batches = {2: range(8, 10), 0: range(4)}
        assert [seen(batch)[0] for batch in batches] == [0, 2]

    def test_answers_are_padded(self) -> None:
        batch = next(iter(load(Shades(3), 0)[0]))
        assert batch.answers.tolist() == [[0, -1, -1], [1, 100, -1], [2, 100, 101]]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_unreadable_images_are_reported(self, workers: int) -> None:
        at = fails_at(0, 1, 2, 3, 6)
        batches = list(load(Shades(8, at), workers)[0])
        assert [seen(batch) for batch in batches] == [(0, [], [0, 1, 2, 3]), (1, [4, 5, 7], [6])]
        assert batches[0].pixels is None
        assert batches[1].broken == [(6, "made to fail")]
        with pytest.raises(UnreadableSample, match="shade-0"):
            list(load(Shades(8, at), workers, strict=True)[0])

    @pytest.mark.parametrize("workers", [0, 1])
    def test_errors_about_more_than_one_image_are_raised_unchanged(self, workers: int) -> None:
        def at(index: int) -> None:
            raise DataError("no labels at all", "Give some.")

        with pytest.raises(DataError) as caught:
            list(load(Shades(8, at), workers)[0])
        assert (caught.value.message, caught.value.hint) == ("no labels at all", "Give some.")

    @pytest.mark.parametrize("workers", [0, 1])
    @pytest.mark.parametrize("error", [KeyError, OSError, RuntimeError])
    def test_other_errors_are_not_swallowed(self, error: type[Exception], workers: int) -> None:
        def at(index: int) -> None:
            raise error(index)

        batches, warnings = load(Shades(8, at), workers)
        with pytest.raises(error):
            list(batches)
        assert warnings == []

    @pytest.mark.parametrize("workers", [0, 2])
    def test_persistent_workers_load_the_same_again(self, workers: int) -> None:
        loader, _ = load(Shades(10, fails_at(6)), workers, persistent=True)
        first, second = ([seen(batch) for batch in loader] for _ in range(2))
        assert first == second == [(0, [0, 1, 2, 3], []), (1, [4, 5, 7], [6]), (2, [8, 9], [])]

    @pytest.mark.usefixtures("frequent_checks")
    def test_persistent_workers_after_a_death(self) -> None:
        loader, warnings = load(Shades(10, kills(6)), 2, persistent=True)
        first, second = ([seen(batch) for batch in loader] for _ in range(2))
        assert first == second == [(0, [0, 1, 2, 3], []), (1, [4, 5, 7], [6]), (2, [8, 9], [])]
        assert len(warnings) == 1


@pytest.fixture
def frequent_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch notices a dead worker after 5 seconds, the default of this argument; here after 0.2."""
    from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))


@pytest.mark.usefixtures("frequent_checks")
class TestDeadWorkers:
    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
    def test_the_image_is_named_and_the_others_are_loaded(self, number: int) -> None:
        batches, warnings = load(Shades(24, kills(13, number)), 2)
        found = [seen(batch) for batch in batches]
        assert [images for _, images, _ in found] == [
            [*range(4)],
            [*range(4, 8)],
            [*range(8, 12)],
            [12, 14, 15],
            [*range(16, 20)],
            [*range(20, 24)],
        ]
        assert found[3][2] == [13]
        name = signal.Signals(number).name
        assert warnings == [f"a worker process died: shade-13: decoding ends the process with {name}"]

    def test_strict_stops_and_names_the_image(self) -> None:
        with pytest.raises(UnreadableSample, match="shade-2 cannot be read: decoding ends the process with"):
            list(load(Shades(8, kills(2)), 1, strict=True)[0])

    def test_a_death_that_no_image_explains(self, tmp_path: Path) -> None:
        def once(index: int) -> None:
            if index == 5 and not (tmp_path / "lost").exists():
                (tmp_path / "lost").touch()
                os.kill(os.getpid(), signal.SIGKILL)

        batches, warnings = load(Shades(12, once), 1)
        assert [image for batch in batches for image in seen(batch)[1]] == list(range(12))
        assert len(warnings) == 1
        assert "no input is the reason; loading continues" in warnings[0]

    def test_repeated_deaths_stop_loading(self, tmp_path: Path) -> None:
        def first_in_each(index: int) -> None:
            # not in the process that decodes a single image: it is no worker
            if torch.utils.data.get_worker_info() is not None:
                os.kill(os.getpid(), signal.SIGKILL)

        batches, warnings = load(Shades(8, first_in_each), 1)
        with pytest.raises(DataError, match="keep dying, and no input is the reason"):
            list(batches)
        assert len(warnings) == 2

    def test_the_sigchld_handler_is_restored(self) -> None:
        before = signal.getsignal(signal.SIGCHLD)
        list(load(Shades(8), 1)[0])
        assert signal.getsignal(signal.SIGCHLD) == before


def test_default_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_cores() >= 1
    for cores, processes, on_gpu, on_cpu in ((1, 1, 0, 0), (2, 1, 1, 1), (16, 1, 8, 1), (16, 4, 3, 1), (2, 2, 0, 0)):
        monkeypatch.setattr("repshift_cli.data.loader.available_cores", lambda cores=cores: cores)
        assert default_workers(torch.device("cuda"), processes) == on_gpu
        assert default_workers(torch.device("cpu"), processes) == on_cpu
