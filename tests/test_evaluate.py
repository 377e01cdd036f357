"""Evaluation: right counts, models on the same pictures, and broken pictures or unfit labels told apart."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from repshift_cli.data import ImageDataset, UnreadableSample, open_dataset
from repshift_cli.errors import CheckFailed, DataError, ModelError
from repshift_cli.evaluate import Evaluation, evaluate, wilson_interval
from repshift_cli.preprocessing import Preprocessing
from repshift_cli.progress import Silent

PLAIN = Preprocessing((3, 8, 8), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "nearest", 1.0)


class Shades(ImageDataset):
    """Plain pictures whose red value is their label; some can be broken."""

    def __init__(self, labels: list[int], classes: int | None = None, broken: tuple[int, ...] = ()) -> None:
        self.name = "shades"
        self.labels = labels
        self.broken = broken
        self.count = classes

    @property
    def description(self) -> str:
        return "shades of red"

    @property
    def classes(self) -> tuple[str, ...] | None:
        return None if self.count is None else tuple(str(number) for number in range(self.count))

    def __len__(self) -> int:
        return len(self.labels)

    def sample_id(self, index: int) -> str:
        return f"shade-{index}"

    def load(self, index: int) -> tuple[Image.Image, int]:
        if index in self.broken:
            raise UnreadableSample(self.sample_id(index), "made to fail")
        label = self.labels[index]
        return Image.new("RGB", (8, 8), (label % 256, 0, 0)), label


class Reader(nn.Module):
    """Reads the label off the red value, then answers `label + shift`; the runners-up follow in steps of one."""

    def __init__(self, classes: int, shift: int = 0) -> None:
        super().__init__()
        self.classes = classes
        self.shift = shift
        self.weight = nn.Parameter(torch.zeros(1))
        self.batches: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        label = (images[:, 0].mean(dim=(1, 2)).float() * 255).round().long()
        places = torch.arange(self.classes)[None, :]
        return -((places - label[:, None] - self.shift) % self.classes).float().to(images.dtype)


def run(models: dict[str, nn.Module], dataset: ImageDataset, num_classes: int = 10, **changes: Any) -> Evaluation:
    settings: dict[str, Any] = {
        "batch_size": 4,
        "device": "cpu",
        "dtype": torch.float32,
        "workers": 0,
        "strict": False,
        "num_classes": num_classes,
        "progress": Silent(),
    }
    return evaluate(models, dataset, PLAIN, **{**settings, **changes})


class TestScores:
    def test_all_right(self) -> None:
        result = run({"one": Reader(10)}, Shades(list(range(10))))
        score = result.scores["one"]
        assert (score.top1, score.top5, score.top1_correct, score.top5_correct) == (100.0, 100.0, 10, 10)
        assert (result.images, result.skipped, result.agreement) == (10, (), None)
        assert score.images_per_s > 0
        assert result.images_per_s > 0

    def test_second_place_counts_for_top5_only(self) -> None:
        # the answer is one too low, so the label comes second
        score = run({"one": Reader(10, shift=-1)}, Shades(list(range(10)))).scores["one"]
        assert (score.top1, score.top5) == (0.0, 100.0)

    @pytest.mark.parametrize(("shift", "expected"), [(-4, 100.0), (-5, 0.0)])
    def test_the_border_of_top5(self, shift: int, expected: float) -> None:
        assert run({"one": Reader(10, shift=shift)}, Shades([3, 7])).scores["one"].top5 == expected

    def test_fewer_classes_than_five(self) -> None:
        score = run({"one": Reader(3, shift=1)}, Shades([0, 1, 2]), num_classes=3).scores["one"]
        assert (score.top1, score.top5) == (0.0, 100.0)

    def test_counts_do_not_depend_on_the_batch_size(self) -> None:
        dataset = Shades([index % 10 for index in range(23)], broken=(4, 22))
        results = [run({"one": Reader(10)}, dataset, batch_size=size) for size in (1, 5, 64)]
        assert {result.scores["one"].top1_correct for result in results} == {21}
        assert {result.images for result in results} == {21}

    def test_half_precision_input(self) -> None:
        model = Reader(10)
        assert run({"one": model}, Shades([1, 2]), dtype=torch.bfloat16).scores["one"].top1 == 100.0
        assert model.weight.dtype == torch.bfloat16


class TestTwoModels:
    def test_agreement(self) -> None:
        class Sometimes(Reader):
            def forward(self, images: Tensor) -> Tensor:
                logits = super().forward(images)
                low = images[:, 0].mean(dim=(1, 2)) * 255 < 2.5
                return torch.where(low[:, None], logits.roll(1, dims=1), logits)

        result = run({"a": Reader(10), "b": Sometimes(10)}, Shades(list(range(10))))
        assert result.same_top1 == 7
        assert result.agreement == pytest.approx(0.7)
        assert (result.scores["a"].top1, result.scores["b"].top1) == (100.0, 70.0)

    def test_they_see_the_same_batches_and_only_one_warm_up(self) -> None:
        models = {"a": Reader(10), "b": Reader(10)}
        run(dict(models), Shades(list(range(10)), broken=(0,)))
        assert models["a"].batches == models["b"].batches == [3, 3, 4, 2]

    def test_eval_mode(self) -> None:
        model = nn.Sequential(nn.Dropout(0.9), Reader(10))
        assert run({"one": model.train()}, Shades(list(range(10)))).scores["one"].top1 == 100.0


class TestBroken:
    def test_left_out_and_listed(self) -> None:
        result = run({"one": Reader(10)}, Shades([1, 2, 3], broken=(1,)))
        assert result.images == 2
        assert [(entry.sample, entry.reason) for entry in result.skipped] == [("shade-1", "made to fail")]

    def test_strict_names_the_first(self) -> None:
        with pytest.raises(DataError, match="shade-1 cannot be read: made to fail") as caught:
            run({"one": Reader(10)}, Shades([1, 2, 3], broken=(1, 2)), strict=True)
        assert caught.value.exit_code == 4

    def test_a_whole_batch(self) -> None:
        assert run({"one": Reader(10)}, Shades([1, 2, 3, 4, 5], broken=(0, 1)), batch_size=2).images == 3

    def test_all(self) -> None:
        with pytest.raises(DataError, match="none of the 2 pictures of shades can be read"):
            run({"one": Reader(10)}, Shades([1, 2], broken=(0, 1)))

    def test_no_pictures(self) -> None:
        with pytest.raises(DataError, match="has no pictures"):
            run({"one": Reader(10)}, Shades([]))

    def test_other_errors_are_not_swallowed(self) -> None:
        class Wrong(Shades):
            def load(self, index: int) -> tuple[Image.Image, int]:
                raise KeyError(index)

        with pytest.raises(KeyError):
            run({"one": Reader(10)}, Wrong([1]))

    def test_files_on_disk_with_worker_processes(self, tmp_path: Path) -> None:
        for label, name in enumerate("abc"):
            (tmp_path / name).mkdir()
            for number in range(3):
                Image.new("RGB", (9, 9), (label, 0, 0)).save(tmp_path / name / f"{number}.png")
        (tmp_path / "b/1.png").write_bytes(b"")
        dataset = open_dataset("folder", tmp_path)
        result = run({"one": Reader(3)}, dataset, num_classes=3, workers=2, batch_size=2)
        assert (result.images, result.scores["one"].top1) == (8, 100.0)
        assert [entry.sample for entry in result.skipped] == [str(tmp_path / "b/1.png")]


class TestHeads:
    @pytest.mark.parametrize(
        ("classes", "outputs", "advice"),
        [(1000, 10, "Choose a model"), (1000, 1001, "background class"), (2, 1000, "empty folders")],
    )
    def test_class_lists_of_another_length(self, classes: int, outputs: int, advice: str) -> None:
        model = Reader(outputs)
        with pytest.raises(
            DataError, match=f"has {classes} classes, but the head of the model has {outputs}"
        ) as caught:
            run({"one": model}, Shades([0], classes=classes), num_classes=outputs)
        assert advice in str(caught.value)
        assert model.batches == []

    @pytest.mark.parametrize("label", [10, -1])
    def test_labels_outside_the_head(self, label: int) -> None:
        with pytest.raises(DataError, match=f"shade-1 has label {label}"):
            run({"one": Reader(10)}, Shades([1, label]))

    def test_no_head(self) -> None:
        with pytest.raises(ModelError, match="no classification head"):
            run({"one": Reader(10)}, Shades([1]), num_classes=0)

    @pytest.mark.parametrize(
        ("output", "message"),
        [
            (lambda images: torch.zeros(len(images), 7), r"returns \(2, 7\)"),
            (lambda images: torch.zeros(len(images), 3, 10), "does not return class scores"),
            (lambda images: (torch.zeros(len(images), 10),) * 2, "does not return class scores"),
        ],
    )
    def test_outputs_that_are_no_logits(self, output: Callable[[Tensor], Any], message: str) -> None:
        class Odd(nn.Module):
            def forward(self, images: Tensor) -> Any:
                return output(images)

        with pytest.raises(ModelError, match=message):
            run({"one": Odd()}, Shades([1, 2]))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_values_that_are_not_finite(self, value: float) -> None:
        class Overflowing(Reader):
            def forward(self, images: Tensor) -> Tensor:
                return super().forward(images) + value

        with pytest.raises(CheckFailed, match="not finite in float32") as caught:
            run({"one": Overflowing(10)}, Shades([1]))
        assert caught.value.exit_code == 5


class TestProgress:
    def test_every_picture_is_counted(self) -> None:
        seen: list[tuple[str, int]] = []

        class Listener(Silent):
            @contextmanager
            def task(self, label: str, total: int) -> Any:
                seen.append((label, total))
                yield self

            def advance(self, steps: int = 1) -> None:
                seen.append(("step", steps))

        run({"one": Reader(10)}, Shades([1] * 9, broken=(2,)), progress=Listener())
        assert seen[0] == ("evaluate", 9)
        assert sum(steps for _, steps in seen[1:]) == 9


class TestWilson:
    @pytest.mark.parametrize(
        ("correct", "total", "low", "high"),
        # 81 of 263 is the example of Newcombe (1998); the ends of 0 and n are z^2 / (n + z^2)
        [(81, 263, 0.2553, 0.3662), (0, 20, 0.0, 0.1611), (20, 20, 0.8389, 1.0), (1, 29, 0.0061, 0.1718)],
    )
    def test_known_values(self, correct: int, total: int, low: float, high: float) -> None:
        assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)

    @pytest.mark.parametrize(("correct", "total"), [(0, 0), (-1, 3), (4, 3)])
    def test_no_share(self, correct: int, total: int) -> None:
        with pytest.raises(ValueError, match="no share"):
            wilson_interval(correct, total)
