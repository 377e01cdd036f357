"""Evaluation: counts, models on the same images, unreadable images and labels that do not fit the head."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from shades import PLAIN, Reader, Shades
from torch import Tensor, nn

from repshift_cli.data.catalog import open_dataset
from repshift_cli.data.dataset import ImageDataset
from repshift_cli.errors import CheckFailed, DataError, ModelError, UsageError
from repshift_cli.evaluation.classification.evaluate import evaluate
from repshift_cli.evaluation.classification.result import Evaluation, Pace, predictions_of
from repshift_cli.utils.distributed import Processes
from repshift_cli.utils.progress import Silent


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


def test_names_of_predictions_are_unique_utf8() -> None:
    class Named(Shades):
        def key(self, index: int) -> str:
            return ("a.png", "a.png", "a.png #2", "\udce9.png")[index]

    data = Named([1, 2, 3, 4])
    result = run({"one": Reader(10)}, data, keep_rows=True)
    assert predictions_of(result, "one", data, "m").ids.tolist() == ["a.png", "a.png #2#", "a.png #2", "\\udce9.png"]


class TestScores:
    def test_all_correct(self) -> None:
        result = run({"one": Reader(10)}, Shades(list(range(10))))
        score = result.scores["one"]
        assert (score.top1, score.top5, score.top1_correct, score.top5_correct) == (100.0, 100.0, 10, 10)
        assert (result.images, result.skipped, result.agreement) == (10, (), None)
        assert score.images_per_s > 0
        assert result.images_per_s > 0

    def test_second_place_counts_for_top5_only(self) -> None:
        # the prediction is one too low, so the label is second
        score = run({"one": Reader(10, shift=-1)}, Shades(list(range(10)))).scores["one"]
        assert (score.top1, score.top5) == (0.0, 100.0)

    @pytest.mark.parametrize(("shift", "expected"), [(-4, 100.0), (-5, 0.0)])
    def test_the_limit_of_top5(self, shift: int, expected: float) -> None:
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

    def test_same_batches_and_one_warm_up(self) -> None:
        models = {"a": Reader(10), "b": Reader(10)}
        run(dict(models), Shades(list(range(10)), broken=(0,)))
        assert models["a"].batches == models["b"].batches == [3, 3, 4, 2]

    def test_eval_mode(self) -> None:
        model = nn.Sequential(nn.Dropout(0.9), Reader(10))
        assert run({"one": model.train()}, Shades(list(range(10)))).scores["one"].top1 == 100.0


class TestUnreadable:
    def test_skipped_and_listed(self) -> None:
        result = run({"one": Reader(10)}, Shades([1, 2, 3], broken=(1,)))
        assert result.images == 2
        assert [(entry.sample, entry.reason) for entry in result.skipped] == [("shade-1", "made to fail")]

    def test_strict_raises_for_the_first(self) -> None:
        with pytest.raises(DataError, match="shade-1 cannot be read: made to fail") as caught:
            run({"one": Reader(10)}, Shades([1, 2, 3], broken=(1, 2)), strict=True)
        assert caught.value.exit_code == 4

    def test_a_whole_batch(self) -> None:
        assert run({"one": Reader(10)}, Shades([1, 2, 3, 4, 5], broken=(0, 1)), batch_size=2).images == 3

    def test_all(self) -> None:
        with pytest.raises(DataError, match="none of the 2 images of shades can be read"):
            run({"one": Reader(10)}, Shades([1, 2], broken=(0, 1)))

    def test_no_images(self) -> None:
        with pytest.raises(DataError, match="has no images"):
            run({"one": Reader(10)}, Shades([]))

    def test_other_errors_are_raised(self) -> None:
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
    @pytest.mark.parametrize(("classes", "outputs"), [(1000, 10), (1000, 1001), (2, 1000)])
    def test_class_lists_of_another_length(self, classes: int, outputs: int) -> None:
        model = Reader(outputs)
        with pytest.raises(
            DataError, match=f"has {classes} classes, but the head of the model has {outputs}"
        ) as caught:
            run({"one": model}, Shades([0], classes=classes), num_classes=outputs)
        assert "Choose a model" in str(caught.value)
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
    def test_every_image_is_counted(self) -> None:
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


class TestMemory:
    """A device with memory for a limited number of images."""

    class Small(Reader):
        def __init__(self, room: int, error: Exception) -> None:
            super().__init__(10)
            self.room, self.error = room, error

        def forward(self, images: Tensor) -> Tensor:
            if len(images) > self.room:
                self.batches.append(-len(images))
                raise self.error
            return super().forward(images)

    class Notes(Silent):
        def __init__(self) -> None:
            self.texts: list[str] = []

        def note(self, text: str) -> None:
            self.texts.append(text)

    ERRORS = (
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory"),
    )

    @pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu"])
    @pytest.mark.parametrize("room", [1, 3, 5])
    def test_the_batch_is_halved_until_it_fits_with_one_note(self, room: int, error: Exception) -> None:
        model, notes = self.Small(room, error), self.Notes()
        labels = [index % 10 for index in range(50)]
        result = run({"one": model}, Shades(labels, broken=(47,)), batch_size=16, progress=notes)
        assert (result.images, result.scores["one"].top1_correct) == (49, 49)
        assert result.batch_size <= room
        assert len(notes.texts) == 1
        assert "not enough memory for 16 images at a time" in notes.texts[0]
        # a size that did not fit is not tried again
        assert [count for count in model.batches if count < 0] == sorted(
            {count for count in model.batches if count < 0}
        )

    def test_both_models_see_the_same_images(self) -> None:
        models = {"a": Reader(10), "b": self.Small(3, self.ERRORS[0])}
        result = run(dict(models), Shades([index % 10 for index in range(20)]), batch_size=8, keep_rows=True)
        assert result.same_top1 == 20
        assert result.rows is not None
        assert result.rows.top_k["a"].top.tolist() == result.rows.top_k["b"].top.tolist()

    def test_one_image_does_not_fit(self) -> None:
        with pytest.raises(UsageError, match="not enough memory for one image") as caught:
            run({"one": self.Small(0, self.ERRORS[0])}, Shades([1, 2]))
        assert caught.value.exit_code == 2

    def test_other_errors_of_the_model_are_raised(self) -> None:
        with pytest.raises(RuntimeError, match="shapes"):
            run({"one": self.Small(0, RuntimeError("shapes do not match"))}, Shades([1, 2]))


class TestInterruption:
    class Interrupting(Shades):
        """Raises KeyboardInterrupt while an image is read."""

        def __init__(self, at: int) -> None:
            super().__init__([index % 10 for index in range(20)], broken=(1,))
            self.at = at

        def load(self, index: int) -> tuple[Image.Image, int]:
            if index == self.at:
                raise KeyboardInterrupt
            return super().load(index)

    def test_complete_batches_are_counted(self) -> None:
        result = run({"one": Reader(10)}, self.Interrupting(10))
        assert (result.interrupted, result.images, result.total, len(result.skipped)) == (True, 7, 20, 1)
        assert result.scores["one"].top1_correct == 7

    def test_before_the_first_batch_it_is_raised(self) -> None:
        with pytest.raises(KeyboardInterrupt):
            run({"one": Reader(10)}, self.Interrupting(3))

    def test_in_a_model(self) -> None:
        class Slow(Reader):
            def forward(self, images: Tensor) -> Tensor:
                if len(self.batches) == 3:
                    raise KeyboardInterrupt
                return super().forward(images)

        result = run({"one": Reader(10), "two": Slow(10)}, Shades([1] * 20))
        assert (result.images, result.same_top1) == (8, 8)


class TestRows:
    def test_prediction_of_each_image(self) -> None:
        labels = [index % 10 for index in range(11)]
        result = run({"one": Reader(10), "two": Reader(10, 1)}, Shades(labels, broken=(3,)), keep_rows=True)
        rows = result.rows
        assert rows is not None
        assert rows.indices == (0, 1, 2, 4, 5, 6, 7, 8, 9, 10)
        assert rows.answers[:, 0].tolist() == [labels[index] for index in rows.indices]
        for name, shift in (("one", 0), ("two", 1)):
            top_k = rows.top_k[name]
            expected = [[(labels[index] + shift + place) % 10 for place in range(5)] for index in rows.indices]
            assert top_k.top.tolist() == expected
            logits = -torch.arange(10.0)
            assert torch.allclose(torch.from_numpy(top_k.probabilities[0]), logits.softmax(0)[:5])
        assert run({"one": Reader(10)}, Shades(labels)).rows is None


class TestAnswers:
    """Images with several correct classes, and datasets with fewer classes than the head."""

    class Several(Shades):
        def answers(self, index: int, label: int) -> tuple[int, ...]:
            return (label, (label + 1) % 10) if index % 2 else (label,)

    def test_each_of_several_answers_is_correct(self) -> None:
        data = self.Several([index % 10 for index in range(20)])
        assert run({"one": Reader(10)}, data).scores["one"].top1_correct == 20
        assert run({"one": Reader(10, 1)}, data).scores["one"].top1_correct == 10
        score = run({"one": Reader(10, -3)}, data).scores["one"]
        assert (score.top1_correct, score.top5_correct) == (0, 20)  # two correct answers count once

    def test_outputs_outside_the_dataset_are_ignored(self) -> None:
        data = Shades([1, 4, 8])
        data.outputs = (1, 4, 8)
        # the prediction is one too high, but 2, 5 and 9 are not allowed: the next allowed class is predicted
        result = run({"one": Reader(10, 1)}, data, keep_rows=True)
        assert result.rows is not None
        assert result.rows.top_k["one"].top.tolist() == [[4, 8, 1], [8, 1, 4], [1, 4, 8]]
        assert result.rows.top_k["one"].probabilities.sum(axis=1).tolist() == pytest.approx([1, 1, 1])
        assert result.scores["one"].top1_correct == 0
        assert run({"one": Reader(10)}, data).scores["one"].top1_correct == 3

    def test_a_label_outside_the_dataset(self) -> None:
        data = Shades([1, 2])
        data.outputs = (1, 4, 8)
        with pytest.raises(DataError, match="shade-1 has label 2"):
            run({"one": Reader(10)}, data)


class TestPace:
    def pace(self, **changes: Any) -> Pace:
        usual = {"total": 10.0, "waited": 0.0, "decoding": 1.0, "models": 9.0, "workers": 1, "processes": 1}
        return Pace(**{**usual, "shares_cores": True, **changes})

    def test_on_shared_cores_the_larger_cpu_time(self) -> None:
        assert self.pace().bottleneck == "model"
        assert self.pace(decoding=12.0).bottleneck == "data"

    def test_on_a_device_the_waiting_time(self) -> None:
        assert self.pace(shares_cores=False, waited=0.5).bottleneck == "model"
        assert self.pace(shares_cores=False, waited=4.0, decoding=0.1).bottleneck == "data"

    def test_pace_of_a_run(self) -> None:
        pace = run({"one": Reader(10)}, Shades([1] * 20)).pace
        assert 0 <= pace.waiting <= 1
        assert pace.total > 0
        assert pace.decoding > 0
        assert (pace.workers, pace.processes, pace.shares_cores) == (0, 1, True)


def test_a_stream_cannot_be_shared() -> None:
    class Two(Processes):
        def __init__(self) -> None:
            super().__init__()
            self.count = 2

        def collect(self, mine: Any) -> list[Any]:
            return [mine, mine]

    data = Shades([1, 2])
    data.random_access = False
    with pytest.raises(UsageError, match="processes cannot share it"):
        run({"one": Reader(10)}, data, group=Two())
