"""The target of a search: the kinds, and how one is parsed."""

from __future__ import annotations

from dataclasses import dataclass

from repshift_cli.errors import UsageError
from repshift_cli.utils.suggest import nearest

__all__ = ["TARGETS", "Target"]

TARGETS: dict[str, str] = {
    "macs": "multiply-accumulates, as a fraction of the dense model's",
    "latency": "time of a batch, as a fraction of the dense model's, measured here",
    "agreement": "least share of unchanged predictions",
    "max-drop": "most points of top-1 that may be lost, where there are labels",
}
"""What can be asked for, in words for people."""


@dataclass(frozen=True)
class Target:
    """What a search is to reach.

    Attributes:
        kind: one of `TARGETS`.
        value: fraction of the dense model, share of predictions, or points of top-1.
    """

    kind: str
    value: float

    def __post_init__(self) -> None:
        if self.kind not in TARGETS:
            raise UsageError(f"unknown target {self.kind!r}", nearest(self.kind, TARGETS) + _allowed())
        most = 100.0 if self.kind == "max-drop" else 1.0
        least_is_fine, most_is_fine = self.kind == "max-drop", self.kind == "agreement"
        inside = 0 < self.value < most or (self.value == 0 and least_is_fine) or (self.value == most and most_is_fine)
        if not inside:
            wanted = {"max-drop": "0 points or more, and less than 100", "agreement": "above 0, and at most 1"}.get(
                self.kind, "between 0 and 1, both excluded"
            )
            raise UsageError(f"the target {self.kind}={self.value:g} cannot be", f"It must be {wanted}.")

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read `macs=0.65` and the like.

        Raises:
            UsageError: it has another form, names no target, or a value out of range.
        """
        kind, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise UsageError(f"a target has the form kind=value, not {text!r}", _allowed())
        try:
            number = float(value)
        except ValueError:
            raise UsageError(f"the target {text!r} has no number after the =", _allowed()) from None
        return cls(kind, number)

    @property
    def limits_cost(self) -> bool:
        """Whether the cost is given and the quality sought, rather than the other way round."""
        return self.kind in ("macs", "latency")

    def __str__(self) -> str:
        return f"{self.kind}={self.value:.12g}"


def _allowed() -> str:
    return (
        "Possible are macs=0.65, latency=0.6, agreement=0.99 and max-drop=0.5 ("
        + "; ".join(f"{kind}: {words}" for kind, words in TARGETS.items())
        + ")."
    )
