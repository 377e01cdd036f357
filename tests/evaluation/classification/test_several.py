"""Several models on the same images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shades import PLAIN, Reader, Shades

from repshift_cli.checkpoints.artifact import Opened
from repshift_cli.checkpoints.loaded import LoadedModel, ModelDescription
from repshift_cli.checkpoints.weights import Source
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import CheckFailed, UsageError
from repshift_cli.evaluation.classification import several
from repshift_cli.evaluation.classification.result import Evaluation
from repshift_cli.evaluation.classification.several import compare_models, evaluate_passes, label_for_all
from repshift_cli.evaluation.models import Candidate
from repshift_cli.utils.progress import Silent

OTHER = Preprocessing((3, 8, 8), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "nearest", 0.9)
DATA = Shades([index % 10 for index in range(40)])


def candidate(shift: int = 0, how: Preprocessing = PLAIN, given: bool = True) -> Candidate:
    model = Reader(10, shift)
    loaded = LoadedModel(model, ModelDescription("tiny", None, {}, how), Source("random", None, None), {})
    return Candidate(model, 1, Opened(loaded, None), given)


def run(models: dict[str, Candidate], data: Shades = DATA, **changes: Any) -> Evaluation:
    settings: dict[str, Any] = {"batch_size": 4, "device": "cpu", "dtype": torch.float32, "workers": 0, "strict": False}
    settings |= {"num_classes": 10, "progress": Silent(), "keep_rows": True}
    return evaluate_passes(models, data, **settings | changes)


def test_differences_beyond_chance() -> None:
    models = {"a": candidate(), "dense": candidate(given=False), "b": candidate(1)}
    paired = compare_models(run(models), DATA, models)
    assert (paired.reference, paired.first) == ("dense", "a")
    assert (paired.predictions["a"].same, paired.predictions["b"].same) == (40, 0)
    assert (paired.accuracy["b"].lost, paired.accuracy["b"].won) == (40, 0)
    assert [paired.beyond_chance(name) for name in ("dense", "b")] == [False, True]


def test_the_level_is_for_all_models_together() -> None:
    """Six lost images have p = 0.031, which is beyond chance for one comparison, but not for two."""

    class Six(Reader):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits = super().forward(images)
            low = images[:, 0].mean(dim=(1, 2)) * 255 < 5.5
            return torch.where(low[:, None], logits.roll(1, dims=1), logits)

    six = Candidate(Six(10), 1, candidate().opened, given=True)
    data = Shades(list(range(10)))
    for models, marked in (
        ({"a": candidate(), "six": six}, True),
        ({"a": candidate(), "six": six, "b": candidate()}, False),
    ):
        assert compare_models(run(models, data), data, models).beyond_chance("six") is marked


def test_one_pass_for_each_preprocessing() -> None:
    models = {"a": candidate(), "b": candidate(1, OTHER), "c": candidate()}
    result = run(models)
    batches = [models[name].module.batches for name in models]
    assert batches[0] == batches[2] == batches[1]
    assert [result.scores[name].top1 for name in ("a", "b", "c")] == [100.0, 0.0, 100.0]
    assert (result.images, result.fresh, result.pace.processes) == (40, 80, 1)


@pytest.mark.parametrize("interrupted", [0, 1])
def test_an_interrupted_pass(monkeypatch: pytest.MonkeyPatch, interrupted: int) -> None:
    """The result has the models of the passes before it."""
    passes = []
    whole = several.evaluate

    def until(*arguments: Any, **settings: Any) -> Evaluation:
        passes.append(1)
        if len(passes) > interrupted:
            raise KeyboardInterrupt
        return whole(*arguments, **settings)

    monkeypatch.setattr(several, "evaluate", until)
    models = {"a": candidate(), "b": candidate(1, OTHER)}
    if interrupted == 0:
        with pytest.raises(KeyboardInterrupt):
            run(models)
    else:
        result = run(models)
        assert (list(result.scores), result.interrupted, result.images) == (["a"], True, 40)


def test_passes_read_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Shades([1, 2, 3, 4])
    whole = several.evaluate

    def losing(*arguments: Any, **settings: Any) -> Evaluation:
        result = whole(*arguments, **settings)
        data.broken = (1,)
        return result

    monkeypatch.setattr(several, "evaluate", losing)
    with pytest.raises(CheckFailed, match="not the same images"):
        run({"a": candidate(), "b": candidate(1, OTHER)}, data)


def test_other_inputs_and_classes() -> None:
    one, other = candidate().opened, candidate().opened
    one.loaded.model.num_classes, other.loaded.model.num_classes = 10, 11  # type: ignore[assignment]
    with pytest.raises(UsageError, match="a has 10 classes, and b has 11"):
        label_for_all(DATA, {"a": one, "b": other})
