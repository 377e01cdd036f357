"""The additive model of a schedule: what it costs and harms, as sums over its sites."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["LOWEST_SHARE", "TINY", "Additive", "Curve", "Kept", "drops", "levels"]

Kept = tuple[int, ...]
"""Patch tokens that are left after each site, never rising."""


_LEVEL_STEP = 0.05
LOWEST_SHARE = 0.1
"""Steps and lower end of the levels, as shares of the tokens. Metrics are not reliable for fewer tokens."""


_LEAST_DROP_SHARE = 50
"""A site that drops fewer than one of so many tokens costs more in scoring than it saves."""


_LEAST_GAIN = 0.002
"""Of a dense pass: what scoring and gathering at a site take (2% of a layer, and of 12 layers)."""


_MOST_POWER, _LEAST_POWER = 4.0, 0.5


TINY = 1e-9


@dataclass(frozen=True)
class Additive:
    """What a schedule costs and harms, as sums over its sites.

    Attributes:
        tokens: patch tokens of the dense model.
        sites: how many there are.
        gain: `(site, kept)`: what is saved between this site and the next one when so many tokens are left, as a
            fraction of the dense cost; 0 for all tokens, never falling as fewer are kept.
        harm: `(site, kept)`: distance from the dense model when all that go, go at this site; 0 for all tokens, never
            falling as fewer are kept.
        most: `(arriving)`: how many of so many patch tokens can go at one site.
        site_cost: what dropping at one site costs in itself, as a fraction of the dense cost.
    """

    tokens: int
    sites: int
    gain: Callable[[int, int], float]
    harm: Callable[[int, int], float]
    most: Callable[[int], int] = lambda arriving: arriving - 1
    site_cost: float = 0.0

    @property
    def least(self) -> int:
        """The fewest tokens that may be left."""
        return max(1, math.ceil(LOWEST_SHARE * self.tokens))

    @property
    def least_drop(self) -> int:
        """The fewest tokens that are worth a site."""
        return max(1, -(-self.tokens // _LEAST_DROP_SHARE))

    @property
    def worthwhile(self) -> tuple[int, ...]:
        """The sites behind which fewer tokens save something."""
        return tuple(site for site in range(self.sites) if self.gain(site, self.least) > _LEAST_GAIN)

    def cost(self, kept: Kept) -> float:
        """Of the schedule, as a fraction of the dense cost."""
        used = sum(dropped > 0 for dropped in drops(kept, self.tokens))
        return 1.0 - math.fsum(self.gain(site, count) for site, count in enumerate(kept)) + used * self.site_cost

    def damage(self, kept: Kept) -> float:
        """Predicted distance of the schedule from the dense model."""
        pairs = zip((self.tokens, *kept), kept, strict=False)
        return math.fsum(self.step(site, before, after) for site, (before, after) in enumerate(pairs))

    def step(self, site: int, before: int, after: int) -> float:
        """What it harms that at this site so many tokens become so many."""
        if after >= before:
            return 0.0
        harm = self.harm(site, after)
        return max(0.0, harm - self.harm(site, before)) if math.isfinite(harm) else math.inf

    def possible(self, kept: Kept) -> bool:
        """Whether no site drops more than can go there, and enough is left in the end."""
        pairs = zip((self.tokens, *kept), kept, strict=False)
        return kept[-1] >= self.least and all(0 <= before - after <= self.most(before) for before, after in pairs)


@dataclass(frozen=True)
class Curve:
    """How the distance grows with the tokens that go at one site: through measured points, as powers between them.

    Attributes:
        tokens: patch tokens of the dense model.
        points: `(kept, distance)`; made monotone where chance has it fall as more go.
    """

    tokens: int
    points: tuple[tuple[int, float], ...]
    _steps: tuple[tuple[int, float], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        steps: list[tuple[int, float]] = []
        for kept, distance in sorted(self.points, reverse=True):
            if kept < self.tokens:
                steps.append((self.tokens - kept, max(distance, TINY, steps[-1][1] if steps else 0.0)))
        object.__setattr__(self, "_steps", tuple(steps))

    def __call__(self, kept: int) -> float:
        """The distance when so many are kept; 0 for all, infinite where nothing was measured at all."""
        gone = self.tokens - kept
        if gone <= 0:
            return 0.0
        if not self._steps:
            return math.inf
        if len(self._steps) == 1:
            return self._steps[0][1] * gone / self._steps[0][0]
        # the last segment that begins before, so that both ends go on as the segment next to them does
        first = max(0, min(sum(known <= gone for known, _ in self._steps) - 1, len(self._steps) - 2))
        (low, near), (high, far) = self._steps[first], self._steps[first + 1]
        power = math.log(far / near) / math.log(high / low)
        if gone < low or gone > high:
            power = min(max(power, _LEAST_POWER), _MOST_POWER)
        anchor, value = (high, far) if gone > high else (low, near)
        return value * (gone / anchor) ** power


def drops(kept: Kept, tokens: int) -> tuple[int, ...]:
    """How many tokens go at each site."""
    return tuple(before - after for before, after in zip((tokens, *kept), kept, strict=False))


def levels(tokens: int) -> tuple[int, ...]:
    """Numbers of tokens among which the first solution chooses: all, then ever fewer in equal steps."""
    count = round((1 - LOWEST_SHARE) / _LEVEL_STEP)
    least = max(1, math.ceil(LOWEST_SHARE * tokens))
    shares = (1 - _LEVEL_STEP * index for index in range(count + 1))
    return tuple(dict.fromkeys(max(least, round(share * tokens)) for share in shares))
