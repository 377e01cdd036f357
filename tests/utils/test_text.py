"""Texts for people."""

from __future__ import annotations

import pytest

from repshift_cli.utils.text import describe_metric

SHIFT = {"kind": "representation_shift", "operation": "mlp", "distance": "l2", "polarity": "largest"}
FITTED = {"kind": "fitted", "weights": "A" * 100, "polarity": "largest"}


@pytest.mark.parametrize(
    ("metric", "text"),
    [
        (SHIFT, "mlp, l2, largest"),
        (FITTED, "fitted (largest)"),
        ({"kind": "coverage", "of": FITTED, "weight": 0.5}, "coverage (fitted, 0.5)"),
    ],
)
def test_a_metric(metric: dict[str, object], text: str) -> None:
    assert describe_metric(metric) == text
