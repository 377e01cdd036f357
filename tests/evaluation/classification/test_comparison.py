"""Two runs on the same images: changes counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from repshift_cli.errors import DataError
from repshift_cli.evaluation.classification.comparison import Comparison, compare_predictions
from repshift_cli.evaluation.classification.predictions import Predictions


def predictions(pairs: dict[str, int], labels: dict[str, tuple[int, ...]], model: str = "m") -> Predictions:
    """Top-1 class by image; the second most likely class is the next one."""
    width = max(map(len, labels.values()))
    answers = [[*labels[name], *[-1] * (width - len(labels[name]))] for name in pairs]
    return Predictions(
        np.array(list(pairs), dtype=np.str_),
        np.array(answers, dtype=np.int32),
        np.array([[top, (top + 1) % 10] for top in pairs.values()], dtype=np.int32),
        np.full((len(pairs), 2), 0.4, dtype=np.float32),
        {"model": model, "classes": ["ant", "bee", "cat"]},
    )


LABELS: dict[str, tuple[int, ...]] = {"p": (0,), "q": (0,), "r": (1,), "s": (1, 2), "t": (2,), "u": (2,)}


@pytest.fixture
def found() -> Comparison:
    first = predictions({"p": 0, "q": 0, "r": 0, "s": 2, "t": 2, "u": 5}, LABELS, "dense")
    second = predictions({"u": 6, "t": 2, "s": 1, "r": 1, "q": 2, "p": 1}, LABELS, "fast")
    return compare_predictions(first, second)


def test_every_image_counts_once(found: Comparison) -> None:
    assert (found.images, found.only_first, found.only_second) == (6, 0, 0)
    # p and q are lost, r is won, s is correct in both with another class, t is the same, u is wrong in both
    assert (found.same, found.lost, found.won, found.other) == (1, 2, 1, 1)
    assert (found.first.top1_correct, found.second.top1_correct) == (4, 3)
    assert (found.first.top5_correct, found.second.top5_correct) == (5, 3)
    assert found.difference == pytest.approx(-100 / 6)
    low, high = found.difference_interval
    assert low < found.difference < high
    assert found.p_value == 1.0


def test_changes_by_class(found: Comparison) -> None:
    assert [(each.name, each.images, each.lost, each.won) for each in found.classes] == [
        ("ant", 2, 2, 0),
        ("bee", 2, 0, 1),
    ]


def test_document(found: Comparison) -> None:
    document = found.to_dict()
    assert document["first"]["model"] == "dense"
    assert document["first"]["top1"] == pytest.approx(400 / 6)
    assert document["agreement"] == pytest.approx(1 / 6)
    low, high = document["agreement_interval"]
    assert 0 < low < 1 / 6 < high < 1
    assert document["mcnemar_p"] == 1.0


def test_images_of_one_run_only_are_ignored() -> None:
    found = compare_predictions(predictions({"p": 0, "q": 0}, LABELS), predictions({"q": 0, "t": 2, "u": 2}, LABELS))
    assert (found.images, found.only_first, found.only_second, found.same) == (1, 1, 2, 1)


def test_padding_does_not_change_the_labels() -> None:
    one = predictions({"p": 0}, {"p": (0,)})
    other = Predictions(one.ids, np.array([[0, -1, -1]], dtype=np.int32), one.top, one.probabilities, one.meta)
    assert compare_predictions(one, other).same == 1


def test_no_common_image() -> None:
    with pytest.raises(DataError, match="no image in common"):
        compare_predictions(predictions({"p": 0}, LABELS), predictions({"q": 0}, LABELS))


def test_different_labels() -> None:
    with pytest.raises(DataError, match="have different labels for 1 images: p"):
        compare_predictions(predictions({"p": 0, "q": 0}, LABELS), predictions({"p": 0, "q": 0}, {**LABELS, "p": (1,)}))
