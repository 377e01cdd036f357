"""How sure a share is, and a difference of two: intervals and a test for counts. Plain numbers."""

from __future__ import annotations

from math import exp, lgamma, log, sqrt

__all__ = ["mcnemar", "paired_difference", "percent_interval", "significant", "wilson_interval"]

_Z = 1.959963984540054
"""Quantile of the normal distribution for 95%."""


def significant(value: float) -> float:
    """The value rounded to four significant digits."""
    return float(f"{value:.4g}")


def percent_interval(correct: int, total: int) -> tuple[float, float]:
    """`wilson_interval` at 95%, in percent."""
    low, high = wilson_interval(correct, total)
    return 100.0 * low, 100.0 * high


def wilson_interval(correct: int, total: int, z: float = _Z) -> tuple[float, float]:
    """Wilson's score interval of a share.

    Args:
        correct, total: `0 <= correct <= total`, `total > 0`.
        z: quantile of the normal distribution; the default gives 95%.

    Returns:
        Lower and upper end, in 0..1.
    """
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"{correct} of {total} is no share")
    share = correct / total
    spread = z * sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    middle = share + z * z / (2 * total)
    scale = 1 + z * z / total
    # the share lies inside, also where rounding says otherwise
    return min(share, max(0.0, (middle - spread) / scale)), max(share, min(1.0, (middle + spread) / scale))


def paired_difference(lost: int, won: int, total: int, z: float = _Z) -> tuple[float, float]:
    """Interval of the difference of two shares of the same things, as Bonett and Price (2012) have it.

    It is Wald's, with one more of each kind of change, which keeps its promise for few changes as well.

    Args:
        lost: things that the first counted and the second did not.
        won: the reverse.
        total: things, changed or not; more than 0.

    Returns:
        Lower and upper end of `(won - lost) / total`, in -1..1.
    """
    if lost < 0 or won < 0 or lost + won > total or total == 0:
        raise ValueError(f"{lost} and {won} of {total} are no shares")
    down, up = (lost + 1) / (total + 2), (won + 1) / (total + 2)
    spread = z * sqrt((down + up - (up - down) ** 2) / (total + 2))
    plain = (won - lost) / total
    return min(plain, max(-1.0, up - down - spread)), max(plain, min(1.0, up - down + spread))


def mcnemar(lost: int, won: int) -> float:
    """The p-value of McNemar's exact test: how likely changes as uneven as these are, or more so, by chance alone.

    Args:
        lost, won: as `paired_difference`.

    Returns:
        Two-sided, in 0..1; 1 where nothing changed.
    """
    changed, fewer = lost + won, min(lost, won)
    if lost < 0 or won < 0:
        raise ValueError(f"{lost} and {won} are no counts")
    if lost == won:
        return 1.0
    # logarithms: the number of ways is far above what a float holds
    logs = [lgamma(changed + 1) - lgamma(k + 1) - lgamma(changed - k + 1) for k in range(fewer + 1)]
    return min(1.0, 2.0 * sum(exp(ways - changed * log(2.0)) for ways in logs))
