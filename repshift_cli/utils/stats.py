"""Confidence intervals of proportions, and McNemar's test."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, lgamma, log, sqrt
from statistics import stdev
from typing import Literal

GuessVerdict = Literal["above", "not above", "below", "undecided"]
"""A proportion against guessing."""

Z95 = 1.959963984540054
"""Quantile of the normal distribution for 95%."""


def significant(value: float) -> float:
    """The value rounded to four significant digits."""
    return float(f"{value:.4g}")


def percent_interval(correct: int, total: int) -> tuple[float, float]:
    """`wilson_interval` at 95%, in percent."""
    low, high = wilson_interval(correct, total)
    return 100.0 * low, 100.0 * high


def wilson_interval(correct: float, total: int, z: float = Z95) -> tuple[float, float]:
    """Wilson score interval of a proportion.

    Args:
        correct, total: `0 <= correct <= total`, `total > 0`; `correct` can be a mean over several runs.
        z: quantile of the normal distribution; the default gives 95%.

    Returns:
        Lower and upper end, in [0, 1].
    """
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"invalid proportion {correct}/{total}")
    share = correct / total
    spread = z * sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    middle = share + z * z / (2 * total)
    scale = 1 + z * z / total
    # the proportion lies inside the interval; rounding could move an end past it
    return min(share, max(0.0, (middle - spread) / scale)), max(share, min(1.0, (middle + spread) / scale))


def against_guessing(correct: int, total: int, chance: float) -> GuessVerdict:
    """How a proportion compares with guessing, by its 95% interval.

    It is undecided if even a proportion half way between guessing and 1 would not be above guessing.
    """
    low, high = wilson_interval(correct, total)
    if high < chance:
        return "below"
    if low > chance:
        return "above"
    return "not above" if wilson_interval(int(total * (1 + chance) / 2), total)[0] > chance else "undecided"


def paired_difference(lost: float, won: float, total: int, z: float = Z95) -> tuple[float, float]:
    """Interval of the difference of two paired proportions (Bonett and Price, 2012).

    Wald's interval with one more of each change, which keeps its coverage for few changes.

    Args:
        lost: items that only the first counted; a mean over several runs need not be an integer.
        won: items that only the second counted, likewise.
        total: all items, `total > 0`.

    Returns:
        Lower and upper end of `(won - lost) / total`, in [-1, 1].
    """
    if lost < 0 or won < 0 or lost + won > total or total == 0:
        raise ValueError(f"invalid changes {lost} and {won} of {total}")
    down, up = (lost + 1) / (total + 2), (won + 1) / (total + 2)
    spread = z * sqrt((down + up - (up - down) ** 2) / (total + 2))
    plain = (won - lost) / total
    return min(plain, max(-1.0, up - down - spread)), max(plain, min(1.0, up - down + spread))


_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Quantiles of Student's t distribution for 95%, for 1 to 9 degrees of freedom."""


def mean_spread(values: Sequence[float]) -> float:
    """Half of the 95% interval of a mean over independent runs, by Student's t; 0 for one run."""
    freedom = len(values) - 1
    if freedom < 1:
        return 0.0
    # beyond the table the first term of the Cornish-Fisher expansion, which is within 0.02
    quantile = _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else Z95 + (Z95**3 + Z95) / (4 * freedom)
    return quantile * stdev(values) / sqrt(len(values))


def mcnemar(lost: int, won: int) -> float:
    """Two-sided p-value of McNemar's exact test; 1 if nothing changed.

    Args:
        lost, won: as in `paired_difference`.
    """
    changed, fewer = lost + won, min(lost, won)
    if lost < 0 or won < 0:
        raise ValueError(f"invalid counts {lost} and {won}")
    if lost == won:
        return 1.0
    # logarithms, because the binomial coefficients overflow a float
    logs = [lgamma(changed + 1) - lgamma(k + 1) - lgamma(changed - k + 1) for k in range(fewer + 1)]
    return min(1.0, 2.0 * sum(exp(ways - changed * log(2.0)) for ways in logs))
