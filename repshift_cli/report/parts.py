"""The parts of a checkpoint's document that the page shows, which are not checked when a file is read, and documents of
other commands."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from repshift_cli.errors import UsageError
from repshift_cli.utils.documents import parse_json
from repshift_cli.utils.files import read_text

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
    """Of the dense or of the compressed model; with `SOURCE_DATE_EPOCH` null."""

    latency_ms: Spread | None
    throughput: Positive | None
    peak_memory_mb: Amount | None


class Costs(Part):
    """Dense / compressed."""

    latency: Positive | None
    latency_clear: bool | None


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

    @property
    def latencies(self) -> dict[str, Spread]:
        """Of each model, if both were timed; else empty."""
        found = {"dense": self.dense.latency_ms, "compressed": self.compressed.latency_ms}
        timed = {name: spread for name, spread in found.items() if spread and self.ratio.latency}
        return timed if len(timed) == len(found) else {}


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
    sites: Annotated[list[SiteChoice], Field(max_length=200)]


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


class Limit(Part):
    """A limit of quality beside the target, in its own unit."""

    target: str
    reached: float | None


class Search(Part):
    """`search`; files of earlier versions have no `front` and no `selection`."""

    target: str
    met: bool
    points: dict[Literal["dense", "paper", "found", "random", "given"], Point | None]
    evaluations: Count
    interrupted: bool
    data: Inputs
    measured_on: MeasuredOn
    limit: Limit | None = None
    front: Annotated[list[Point], Field(max_length=1000)] = []
    selection: dict[Literal["dense", "paper", "found"], Point] = {}


class BenchRun(Part):
    """One model in one setting."""

    name: str
    role: str
    batch: Count
    dtype: str
    compile: str
    image_size: int | list[int]
    attention_mode: str
    gmacs: Positive
    latency_ms: Spread
    throughput: Positive


class BenchRatio(Part):
    """How many times faster a model is than another; the interval is of paired rounds."""

    name: str
    against: str
    batch: Count
    dtype: str
    compile: str
    image_size: int | list[int]
    attention_mode: str
    latency: Positive
    latency_p10: Positive
    latency_p90: Positive
    clear: bool


class BenchDocument(Part):
    """What `bench --json` prints."""

    device: str
    threads: Count
    runs: Annotated[list[BenchRun], Field(min_length=1, max_length=200)]
    ratios: Annotated[list[BenchRatio], Field(max_length=400)]

    @property
    def rows(self) -> list[tuple[BenchRun, BenchRatio | None]]:
        """Each run, with its ratio to a dense model in the same setting."""
        dense = {run.name for run in self.runs if run.role == "dense"}
        over = {_setting(ratio): ratio for ratio in self.ratios if ratio.against in dense}
        return [(run, over.get(_setting(run))) for run in self.runs]


def _setting(row: BenchRun | BenchRatio) -> tuple[object, ...]:
    return row.name, row.batch, row.dtype, row.compile, str(row.image_size), row.attention_mode


class Score(Part):
    """Accuracy of one model in percent, with its 95% interval."""

    top1: Annotated[float, Field(ge=0, le=100)]
    top1_interval: tuple[float, float]
    gmacs: Positive


class EvalDocument(Score):
    """What `eval --compare-dense --json` prints; `agreement` is the share of the same predictions."""

    dataset: str
    images: Count
    dense: Score
    agreement: Share | None


def read_document(kind: type[_Kind], path: Path, option: str, command: str) -> _Kind:
    """The JSON document of a command.

    Raises:
        UsageError: it cannot be read, or is another document.
    """
    try:
        return kind.model_validate(parse_json(read_text(path)))
    except OSError as error:
        raise UsageError(f"{option} {path}: {error.strerror or error}", f"Make it by: {command}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{option} {path}: not a document of this command", f"Make it by: {command}") from error


def check_same(option: str, path: Path, found: Iterable[float], gmacs: float) -> None:
    """Raise UsageError if no model of a document has these GMACs: it is not about this file."""
    if not any(math.isclose(each, gmacs, rel_tol=1e-6) for each in found):
        raise UsageError(
            f"{option} {path}: no model in it has the {gmacs:.4g} GMACs of this checkpoint",
            "Give the document of this checkpoint, at its own image size.",
        )


def read_part(kind: type[_Kind], document: Mapping[str, Any], name: str) -> tuple[_Kind | None, bool]:
    """A part of the document, None if it is missing or cannot be read, and whether it cannot be read."""
    if not document.get(name):
        return None, False
    try:
        return kind.model_validate(document[name]), False
    except (ValidationError, RecursionError):
        return None, True
