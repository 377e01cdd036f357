"""The result of a sweep: rows with intervals, and its tables as CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from repshift_cli.errors import RepshiftError
from repshift_cli.planning.recipe import ComponentSpec
from repshift_cli.sweep.combinations import Combination
from repshift_cli.sweep.results import Result, from_bits
from repshift_cli.utils.stats import Z95, mean_spread, paired_difference, wilson_interval
from repshift_cli.utils.text import visible

Measure = Literal["correct", "same", "cosine"]

LABELS: Mapping[Measure, str] = {"correct": "top-1 %", "same": "same %", "cosine": "cosine"}
_COLUMNS = ("drop", "MACs %", "metric", "reducer", "seed")
_TEXTS = {"drop", "metric", "reducer", "seed"}
_QUALITY = len(_COLUMNS)
"""The column of the quality by which rows are compared."""

_KEYS: Mapping[Measure, str] = {"correct": "top1", "same": "agreement", "cosine": "cosine"}


class Value(NamedTuple):
    """A mean over images and seeds with its 95% interval, a share or a cosine."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One result, or the mean over the seeds of a combination.

    Attributes:
        combination: without seed for a mean; None for the dense model.
        results: one, or one per seed.
        values: the first is the quality by which rows are compared.
        best: whether it is the best of its group, or differs from it by no more than chance; None for single seeds.
    """

    combination: Combination | None
    results: tuple[Result, ...]
    gmacs: float
    macs: float
    values: Mapping[Measure, Value]
    best: bool | None = None

    @property
    def quality(self) -> Value:
        """The value by which rows are compared."""
        return next(iter(self.values.values()))

    @property
    def seed(self) -> str:
        """The seed, `mean of N`, or `-` if the result depends on no seed."""
        seeds = [result.combination.seed for result in self.results if result.combination]
        if len(seeds) > 1:
            return f"mean of {len(seeds)}"
        return "-" if not seeds or seeds[0] is None else str(seeds[0])

    def cells(self) -> list[str]:
        """Cost, MACs, metric, reducer and seed as text."""
        one = self.combination
        if one is None:
            return ["dense", f"{100 * self.macs:.1f}", "-", "-", "-"]
        cost = f"{one.amount:g}" if one.cost == "ratio" else f"macs {one.amount:g}"
        metric = "-" if one.metric is None else label(one.metric)
        return [cost, f"{100 * self.macs:.1f}", metric, label(one.reducer), self.seed]

    def to_dict(self) -> dict[str, Any]:
        one, ratios = self.combination, [each.ratio for each in self.results if each.ratio is not None]
        clear = [each.clear for each in self.results if each.clear is not None]
        document: dict[str, Any] = {
            "cost": one and one.cost,
            "amount": one and one.amount,
            "layers": one and list(one.layers),
            "metric": one and one.metric and label(one.metric),
            "reducer": one and label(one.reducer),
            "seed": self.seed,
            "ratio": sum(ratios) / len(ratios) if ratios else None,
            "gmacs": self.gmacs,
            "macs": self.macs,
            "calibration_clear": all(clear) if clear else None,
            "best": self.best,
        }
        for measure, name in _KEYS.items():
            value = self.values.get(measure)
            scale = 100.0 if measure == "correct" else 1.0
            document[name] = None if value is None else scale * value.mean
            document[f"{name}_interval"] = None if value is None else [scale * value.low, scale * value.high]
        return document


@dataclass(frozen=True)
class Unsupported:
    """Combinations of a metric and a reducer that the model does not support."""

    metric: str | None
    reducer: str
    amounts: tuple[float, ...]
    reason: str

    @staticmethod
    def of(refused: Sequence[tuple[Combination, RepshiftError]]) -> tuple[Unsupported, ...]:
        """Each metric, reducer and reason once."""
        found: dict[tuple[str | None, str, str], dict[float, None]] = {}
        for one, error in refused:
            key = (label(one.metric) if one.metric else None, label(one.reducer), error.message)
            found.setdefault(key, {})[one.amount] = None
        return tuple(Unsupported(*key[:2], tuple(amounts), key[2]) for key, amounts in found.items())


@dataclass(frozen=True)
class SweepReport:
    """All results of a sweep.

    Attributes:
        data, identity: description and identity of the images.
        images: their number.
        results: those of the combinations that ran.
        interrupted: whether combinations are missing.
    """

    model: str
    family: str
    data: str
    identity: Mapping[str, Any]
    images: int
    dense: Result
    results: tuple[Result, ...]
    unsupported: tuple[Unsupported, ...]
    interrupted: bool

    @property
    def measures(self) -> tuple[Measure, ...]:
        """What was measured, the quality by which rows are compared first."""
        return tuple(name for name in LABELS if getattr(self.dense, name) is not None)

    @cached_property
    def groups(self) -> list[list[Row]]:
        """Rows without single seeds: one group per cost, most MACs first; within a group the best row first."""
        by_cost: dict[tuple[str, float], dict[Combination, list[Result]]] = {}
        for result in self.results:
            one = result.combination
            assert one is not None
            by_cost.setdefault((one.cost, one.amount), {}).setdefault(one.without_seed, []).append(result)
        groups = []
        for same in by_cost.values():
            rows = sorted((self._row(one, each) for one, each in same.items()), key=lambda row: -row.quality.mean)
            best = rows[0]
            groups.append([self._row(row.combination, row.results, not self._is_worse(row, best)) for row in rows])
        return sorted(groups, key=lambda rows: -max(row.macs for row in rows))

    @property
    def rows(self) -> list[Row]:
        """The dense model, then each mean, followed by its seeds."""
        found = [self._row(None, (self.dense,))]
        for row in (row for group in self.groups for row in group):
            single = row.results if len(row.results) > 1 else ()
            found += [row, *(self._row(each.combination, (each,)) for each in single)]
        return found

    def _row(self, one: Combination | None, results: Sequence[Result], best: bool | None = None) -> Row:
        macs = sum(each.macs for each in results) / len(results)
        values = {measure: self._value(results, measure) for measure in self.measures}
        return Row(one, tuple(results), macs / 1e9, macs / self.dense.macs, values, best)

    def _value(self, results: Sequence[Result], measure: Measure) -> Value:
        """The mean. Its interval joins that over images and that over seeds (square and add: Zou and Donner, 2008)."""
        if results[0] is self.dense and measure != "correct":
            return Value(1.0, 1.0, 1.0)
        means = _means(results, measure, self.images)
        mean, spread = sum(means) / len(means), mean_spread(means)
        if measure == "cosine":
            error = Z95 * max(each.cosine_error or 0.0 for each in results)
            low, high, least = mean - error, mean + error, -1.0
        else:
            (low, high), least = wilson_interval(mean * self.images, self.images), 0.0
        below, above = math.hypot(mean - low, spread), math.hypot(high - mean, spread)
        return Value(mean, max(least, mean - below), min(1.0, mean + above))

    def _is_worse(self, row: Row, best: Row) -> bool:
        """Whether a row is worse than the best one by more than chance, paired by image and by seed where possible."""
        measure = self.measures[0]
        if measure == "cosine":
            return row.quality.high < best.quality.low
        difference = _by_image(best.results, measure, self.images) - _by_image(row.results, measure, self.images)
        won, lost = float(difference.clip(min=0).sum()), float(-difference.clip(max=0).sum())
        low, _ = paired_difference(lost, won, self.images)
        mean = (won - lost) / self.images
        first, second = (_means(each.results, measure, self.images) for each in (best, row))
        if len(first) == len(second):
            spread = mean_spread([one - other for one, other in zip(first, second, strict=True)])
        else:
            spread = math.hypot(mean_spread(first), mean_spread(second))
        return mean > math.hypot(mean - low, spread)

    def to_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return {
            "model": {"name": self.model, "family": self.family},
            "data": dict(self.identity),
            "images": self.images,
            "labelled": self.dense.correct is not None,
            "rows": [row.to_dict() for row in self.rows],
            "unsupported": [vars(each) | {"amounts": list(each.amounts)} for each in self.unsupported],
            "interrupted": self.interrupted,
        }

    def to_csv(self) -> str:
        """A header and one line per row; an interval is two columns."""
        rows = []
        for document in (row.to_dict() for row in self.rows):
            for name in _KEYS.values():
                low, high = document.pop(f"{name}_interval") or (None, None)
                document |= {f"{name}_low": low, f"{name}_high": high}
            rows.append(document | {"layers": " ".join(map(str, document["layers"] or ()))})
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def to_markdown(self) -> str:
        """A table with means and seeds; bold as `notes` says."""

        def line(cells: Sequence[str]) -> str:
            return f"| {' | '.join(cells)} |"

        columns = self.columns
        lines = [
            visible(self.title),
            "",
            line(columns),
            line(["---" if name in _TEXTS else "---:" for name in columns]),
        ]
        for row in self.rows:
            cells = self.cells(row)
            cells[_QUALITY] = f"**{cells[_QUALITY]}**" if row.best else cells[_QUALITY]
            lines.append(line(cells))
        return "\n".join([*lines, "", *(f"- {visible(text)}" for text in self.notes)]) + "\n"

    def to_latex(self) -> str:
        """As `to_markdown`, for the package booktabs."""

        def line(cells: Sequence[str]) -> str:
            return " & ".join(cells) + r" \\"

        columns = self.columns
        lines = [f"% {visible(text)}" for text in (self.title, *self.notes)]
        form = "".join("l" if name in _TEXTS else "r" for name in columns)
        lines += [rf"\begin{{tabular}}{{{form}}}", r"\toprule", line(list(map(_tex, columns)))]
        before = None
        for row in self.rows:
            cells = list(map(_tex, self.cells(row)))
            lines += [r"\midrule"] * (cells[0] != before)
            before = cells[0]
            cells[_QUALITY] = rf"\textbf{{{cells[_QUALITY]}}}" if row.best else cells[_QUALITY]
            lines.append(line(cells))
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"

    @property
    def columns(self) -> list[str]:
        """Headers of the tables."""
        return [*_COLUMNS, *(LABELS[measure] for measure in self.measures)]

    def cells(self, row: Row) -> list[str]:
        """A row of the tables."""
        return [*row.cells(), *(value_text(measure, row.values[measure]) for measure in self.measures)]

    @property
    def title(self) -> str:
        """Model and data."""
        return f"{self.model}, {self.data}"

    @property
    def notes(self) -> list[str]:
        """What a reader of a table must know."""
        texts = ["MACs % of the dense model. Brackets: 95% intervals over images and, for means, over seeds."]
        if self.measures[0] != "cosine":
            texts.append("Bold: the best at its cost, and what differs from it by no more than chance (95%, paired).")
        else:
            texts.append("Bold: the best at its cost, and what overlaps with its interval.")
        calibrated = (each.combination for each in self.results if each.clear is False)
        unclear = {label(one.metric) for one in calibrated if one and one.metric}
        texts += [f"{name}: not clearly better than random dropping in calibration" for name in sorted(unclear)]
        texts += [
            f"not supported: {each.metric or '-'}, {each.reducer} at {', '.join(f'{x:g}' for x in each.amounts)}: "
            f"{each.reason}"
            for each in self.unsupported
        ]
        return texts


def label(part: ComponentSpec) -> str:
    """The kind of a metric or reducer with its options, weights left out."""
    options = ", ".join(str(value) for key, value in part.options.items() if key != "weights")
    return f"{part.kind} ({options})" if options else part.kind


def value_text(measure: Measure, value: Value, shorter: int = 0) -> str:
    """Mean and interval, with fewer digits if it must be shorter; shares in percent."""
    scale, digits = (1, 4 - shorter) if measure == "cosine" else (100, 2 - shorter)
    mean, low, high = (f"{scale * each:.{digits}f}" for each in value)
    return f"{mean} [{low}, {high}]"


def _means(results: Sequence[Result], measure: Measure, images: int) -> list[float]:
    """The mean over the images of each result."""
    if measure == "cosine":
        return [each.cosine or 0.0 for each in results]
    return [float(from_bits(getattr(each, measure), images).mean()) for each in results]


def _by_image(results: Sequence[Result], measure: Measure, images: int) -> NDArray[np.float64]:
    """The mean over the results of each image, `[images]`."""
    found: NDArray[np.float64] = np.mean([from_bits(getattr(each, measure), images) for each in results], axis=0)
    return found


def _tex(text: str) -> str:
    """Text with LaTeX's special characters escaped."""
    return re.sub(r"[&%$#_{}]", lambda found: rf"\{found.group()}", text)
