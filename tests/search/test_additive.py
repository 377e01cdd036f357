"""Harm curves and levels of the additive model."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repshift_cli.search.additive import Curve, levels


@given(st.dictionaries(st.integers(0, 99), st.floats(0, 1), max_size=5))
def test_a_curve_is_monotone(points: dict[int, float]) -> None:
    curve = Curve(100, tuple(points.items()))
    values = [curve(kept) for kept in range(100, 0, -1)]
    assert values[0] == 0.0
    assert all(after >= before * (1 - 1e-9) for before, after in itertools.pairwise(values))


def test_a_curve_goes_through_its_points() -> None:
    curve = Curve(100, ((90, 0.01), (50, 0.2), (30, 0.25)))
    assert [curve(kept) for kept in (90, 50, 30)] == pytest.approx([0.01, 0.2, 0.25])


def test_a_curve_is_a_power_beyond_its_points() -> None:
    curve = Curve(100, ((80, 0.04), (60, 0.16)))
    assert curve(90) == pytest.approx(0.01)
    assert curve(20) == pytest.approx(0.64)


def test_a_curve_without_points_is_infinite() -> None:
    assert Curve(100, ())(99) == math.inf


def test_levels_fall_from_all_to_a_tenth() -> None:
    assert levels(100) == tuple(range(100, 5, -5))[:19]
    assert levels(16)[0] == 16
    assert levels(16)[-1] == 2
    assert list(levels(7)) == sorted(set(levels(7)), reverse=True)
