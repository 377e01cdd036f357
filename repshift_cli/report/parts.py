"""The parts of a checkpoint's document that the page shows. They are not checked when a file is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

_Kind = TypeVar("_Kind", bound="Part")

Amount = Annotated[float, Field(ge=0, le=1e12)]
Positive = Annotated[float, Field(gt=0, le=1e12)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]


class Part(BaseModel):
    """A part of the document; other keys are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Spread(Part):
    """Milliseconds."""

    median: Positive
    p10: Positive
    p90: Positive


class Cost(Part):
    """Of the dense or of the compressed model."""

    latency_ms: Spread
    throughput: Positive
    peak_memory_mb: Amount


class Costs(Part):
    """Dense / compressed."""

    latency: Positive
    latency_clear: bool


class Inputs(Part):
    """The images or clips of a measurement."""

    where: str
    count: Count
    part: str | None = None


class Measured(Part):
    """`measured`; `ratio` is dense / compressed."""

    dense: Cost
    compressed: Cost
    ratio: Costs
    agreement: Share | None
    divergence: float
    images: Inputs
    batch: Count
    device: str
    dtype: str
    threads: Count
    attention: str


class Numbers(Part):
    """The distance of some predictions from the dense model's."""

    images: Count
    distance: float | None
    agreement: Share | None


class MetricSpec(BaseModel):
    """Kind and options."""

    model_config = ConfigDict(frozen=True, extra="allow")

    kind: str


class Candidate(Numbers):
    """One metric at one site."""

    metric: MetricSpec


class SiteChoice(Part):
    """The candidates of one site, the chosen one first."""

    site: str
    candidates: list[Candidate]


class Checked(Part):
    """On held-out inputs."""

    chosen: Numbers
    default: Numbers
    random: Numbers


class Calibration(Part):
    """`calibration`."""

    clear: bool
    mild: bool = False
    sigmas: float
    images: Count
    data: Inputs
    checked: Checked
    sites: list[SiteChoice]


class Point(Part):
    """A schedule; `macs` and `latency` are fractions of the dense model's."""

    macs: Annotated[float, Field(ge=0, le=10)]
    latency: Positive | None
    distance: float
    kl: float
    agreement: Share | None
    top1: Annotated[float, Field(ge=0, le=100)] | None
    images: Count
    recall: Share | None = None


class MeasuredOn(Part):
    """Where latency was measured."""

    device: str
    dtype: str
    batch: Count
    threads: Count


class Search(Part):
    """`search`; files of earlier versions have no `front` and no `selection`."""

    target: str
    met: bool
    points: dict[Literal["dense", "paper", "found", "random", "given"], Point | None]
    evaluations: Count
    interrupted: bool
    data: Inputs
    measured_on: MeasuredOn
    front: Annotated[list[Point], Field(max_length=1000)] = []
    selection: dict[Literal["dense", "paper", "found"], Point] = {}


def read_part(kind: type[_Kind], document: Mapping[str, Any], name: str) -> tuple[_Kind | None, bool]:
    """A part of the document, None if it is missing or cannot be read, and whether it cannot be read."""
    if not document.get(name):
        return None, False
    try:
        return kind.model_validate(document[name]), False
    except (ValidationError, RecursionError):
        return None, True
