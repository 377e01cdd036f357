"""The additive model: cost and harm of a schedule as sums over its sites. Plain numbers, no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

Kept = tuple[int, ...]
"""A schedule: patch tokens kept after each site, never rising.

For a feature map the number is in units of the map at the first site, and only its ratio counts.
"""

_LEVEL_STEP = 0.05
_LOWEST_SHARE = 0.1
"""Step and lower end of the levels, as shares of the tokens. Metrics are not reliable for fewer tokens."""

_LEAST_DROP_SHARE = 50
"""A site that drops fewer than one of so many tokens costs more in scoring than it saves."""

_LEAST_GAIN = 0.002
"""Cost of scoring and gathering at a site, as a fraction of a dense pass: 2% of one of 12 layers."""

_MOST_POWER, _LEAST_POWER = 4.0, 0.5
TINY = 1e-9


@dataclass(frozen=True)
class Additive:
    """Cost and harm of schedules.

    Attributes:
        tokens: patch tokens of the dense model.
        sites: number of sites.
        gain: `(site, kept)`: saved cost between this site and the next one, as a fraction of the dense cost; 0 for all
            tokens, and monotone.
        harm: `(site, kept)`: distance from the dense model if tokens are dropped at this site only; 0 for all tokens,
            and monotone.
        most: `(arriving)`: how many of the arriving patch tokens can be dropped at one site.
        site_cost: cost of a site that drops tokens, as a fraction of the dense cost.
    """

    tokens: int
    sites: int
    gain: Callable[[int, int], float]
    harm: Callable[[int, int], float]
    most: Callable[[int], int] = lambda arriving: arriving - 1
    site_cost: float = 0.0

    @property
    def least(self) -> int:
        """The fewest tokens that a schedule may keep."""
        return max(1, math.ceil(_LOWEST_SHARE * self.tokens))

    @property
    def least_drop(self) -> int:
        """The fewest tokens that are worth a site."""
        return max(1, -(-self.tokens // _LEAST_DROP_SHARE))

    @property
    def worthwhile(self) -> tuple[int, ...]:
        """The sites at which dropping saves cost."""
        return tuple(site for site in range(self.sites) if self.gain(site, self.least) > _LEAST_GAIN)

    def cost(self, kept: Kept) -> float:
        """Predicted cost as a fraction of the dense cost."""
        used = sum(dropped > 0 for dropped in drops(kept, self.tokens))
        return 1.0 - math.fsum(self.gain(site, count) for site, count in enumerate(kept)) + used * self.site_cost

    def damage(self, kept: Kept) -> float:
        """Predicted distance from the dense model."""
        pairs = zip((self.tokens, *kept), kept, strict=False)
        return math.fsum(self.step(site, before, after) for site, (before, after) in enumerate(pairs))

    def step(self, site: int, before: int, after: int) -> float:
        """Harm of reducing `before` tokens to `after` at a site."""
        if after >= before:
            return 0.0
        harm = self.harm(site, after)
        return max(0.0, harm - self.harm(site, before)) if math.isfinite(harm) else math.inf

    def possible(self, kept: Kept) -> bool:
        """Whether a schedule keeps enough tokens and respects the limit of each site."""
        pairs = zip((self.tokens, *kept), kept, strict=False)
        return kept[-1] >= self.least and all(0 <= before - after <= self.most(before) for before, after in pairs)


@dataclass(frozen=True)
class Curve:
    """Distance by the number of kept tokens: power laws through measured points.

    Attributes:
        tokens: patch tokens of the dense model.
        points: `(kept, distance)`; made monotone, which noise can break.
    """

    tokens: int
    points: tuple[tuple[int, float], ...]

    @cached_property
    def _steps(self) -> list[tuple[int, float]]:
        """`(dropped, distance)`, both rising."""
        steps: list[tuple[int, float]] = []
        for kept, distance in sorted(self.points, reverse=True):
            if kept < self.tokens:
                steps.append((self.tokens - kept, max(distance, TINY, steps[-1][1] if steps else 0.0)))
        return steps

    def __call__(self, kept: int) -> float:
        """The distance; 0 for all tokens, infinite if nothing was measured."""
        dropped, steps = self.tokens - kept, self._steps
        if dropped <= 0:
            return 0.0
        if not steps:
            return math.inf
        if len(steps) == 1:
            return steps[0][1] * dropped / steps[0][0]
        # the last segment that begins before; the first and the last one continue beyond the points
        first = max(0, min(sum(known <= dropped for known, _ in steps) - 1, len(steps) - 2))
        (low, near), (high, far) = steps[first], steps[first + 1]
        power = math.log(far / near) / math.log(high / low)
        if dropped < low or dropped > high:
            power = min(max(power, _LEAST_POWER), _MOST_POWER)
        anchor, value = (high, far) if dropped > high else (low, near)
        return value * (dropped / anchor) ** power


def drops(kept: Kept, tokens: int) -> tuple[int, ...]:
    """Tokens dropped at each site."""
    return tuple(before - after for before, after in zip((tokens, *kept), kept, strict=False))


def levels(tokens: int) -> tuple[int, ...]:
    """The token counts of the first solution: all, then fewer in equal steps."""
    count = round((1 - _LOWEST_SHARE) / _LEVEL_STEP)
    least = max(1, math.ceil(_LOWEST_SHARE * tokens))
    shares = (1 - _LEVEL_STEP * index for index in range(count + 1))
    return tuple(dict.fromkeys(max(least, round(share * tokens)) for share in shares))
