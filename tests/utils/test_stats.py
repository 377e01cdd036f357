"""Confidence intervals and the test of McNemar, against known values and properties."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repshift_cli.utils.stats import against_guessing, mcnemar, paired_difference, percent_interval, wilson_interval


@pytest.mark.parametrize(
    ("correct", "total", "classes", "verdict"),
    [
        (0, 400, 10, "below"),
        (0, 60, 10, "below"),
        (0, 30, 10, "not above"),
        (40, 400, 10, "not above"),
        (51, 400, 10, "not above"),
        (60, 400, 10, "above"),
        (4, 4, 10, "above"),
        (1, 4, 10, "not above"),
        (0, 2, 10, "undecided"),
        (8, 16, 2, "not above"),
        (3, 6, 2, "undecided"),
        (0, 1000, 1000, "not above"),
        (0, 5000, 1000, "below"),
        (5, 5, 1, "undecided"),
    ],
)
def test_against_guessing(correct: int, total: int, classes: int, verdict: str) -> None:
    assert against_guessing(correct, total, 1 / classes) == verdict


class TestWilson:
    @pytest.mark.parametrize(
        ("correct", "total", "low", "high"),
        # 81 of 263 is the example of Newcombe (1998); the ends of 0 and n are z^2 / (n + z^2)
        [(81, 263, 0.2553, 0.3662), (0, 20, 0.0, 0.1611), (20, 20, 0.8389, 1.0), (1, 29, 0.0061, 0.1718)],
    )
    def test_known_values(self, correct: int, total: int, low: float, high: float) -> None:
        assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)
        assert percent_interval(correct, total) == pytest.approx((100 * low, 100 * high), abs=5e-3)

    @pytest.mark.parametrize(("correct", "total"), [(0, 0), (-1, 3), (4, 3)])
    def test_invalid_proportion(self, correct: int, total: int) -> None:
        with pytest.raises(ValueError, match="invalid proportion"):
            wilson_interval(correct, total)


class TestPairedDifference:
    @given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 500))
    def test_contains_the_difference_and_is_antisymmetric(self, lost: int, won: int, same: int) -> None:
        total = lost + won + same
        if total == 0:
            return
        low, high = paired_difference(lost, won, total)
        assert -1 <= low <= (won - lost) / total <= high <= 1
        assert paired_difference(won, lost, total) == pytest.approx((-high, -low))

    def test_by_hand(self) -> None:
        # (9 + 1) / 102 and (3 + 1) / 102; their difference -0.0588, error sqrt((0.13725 - 0.00346) / 102) = 0.03622
        assert paired_difference(9, 3, 100) == pytest.approx((-0.12981, 0.01216), abs=5e-5)

    @pytest.mark.parametrize(("lost", "won", "total"), [(0, 0, 0), (-1, 0, 4), (3, 2, 4)])
    def test_invalid_changes(self, lost: int, won: int, total: int) -> None:
        with pytest.raises(ValueError, match="invalid changes"):
            paired_difference(lost, won, total)


class TestMcNemar:
    @given(st.integers(0, 300), st.integers(0, 300))
    def test_equals_the_binomial_test(self, lost: int, won: int) -> None:
        changed, fewer = lost + won, min(lost, won)
        tail = sum(comb(changed, k) for k in range(fewer + 1))
        exact = min(Fraction(1), Fraction(2 * tail, 2**changed))
        assert mcnemar(lost, won) == pytest.approx(float(exact), rel=1e-9)
        assert mcnemar(won, lost) == mcnemar(lost, won)

    def test_many(self) -> None:
        # 2 * 737 / sqrt(60000) = 6.018, for which the normal distribution has 1.77e-9
        assert mcnemar(30_000 + 737, 30_000 - 737) == pytest.approx(1.77e-9, rel=0.05)
        assert mcnemar(100_000, 0) == 0.0

    def test_nothing_changed(self) -> None:
        assert mcnemar(0, 0) == mcnemar(7, 7) == 1.0

    def test_invalid_counts(self) -> None:
        with pytest.raises(ValueError, match="invalid counts"):
            mcnemar(-1, 3)
