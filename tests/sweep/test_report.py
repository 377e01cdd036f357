"""Rows, intervals and tables of a sweep, from given results."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import numpy as np
import pytest

from repshift_cli.errors import RecipeError
from repshift_cli.planning.recipe import ComponentSpec
from repshift_cli.sweep.combinations import Combination
from repshift_cli.sweep.report import SweepReport, Unsupported
from repshift_cli.sweep.results import Result, from_bits, to_bits

IMAGES = 100


def combination(metric: str, amount: float = 0.3, seed: int | None = None) -> Combination:
    parts = {"metric": ComponentSpec(kind=metric), "reducer": ComponentSpec(kind="prune"), "seed": seed}
    return Combination.model_validate({"cost": "ratio", "amount": amount, "layers": (0,), **parts})


def result(metric: str, right: int, *, first: int = 0, macs: int = 600, **options: object) -> Result:
    """A result with `right` correct images from the image `first` on."""
    bits = np.zeros(IMAGES, bool)
    bits[first : first + right] = True
    one = combination(metric, **options)  # type: ignore[arg-type]
    return Result(combination=one, ratio=one.amount, macs=macs, correct=to_bits(bits), same=to_bits(bits))


def report(*results: Result) -> SweepReport:
    full = to_bits(np.ones(IMAGES, bool))
    dense = Result(macs=1000, correct=full, same=full)
    return SweepReport("tiny_vit", "vit", "100 of 200 images", {}, IMAGES, dense, results, (), False)


def test_bits_are_read_back() -> None:
    values = np.arange(13) % 3 == 0
    assert (from_bits(to_bits(values), 13) == values).all()


class TestBest:
    def test_a_row_that_differs_by_chance_is_marked(self) -> None:
        (group,) = report(result("token_norm", 80), result("fitted", 82), result("class_attention", 50)).groups
        assert [(row.cells()[2], row.best) for row in group] == [
            ("fitted", True),
            ("token_norm", True),
            ("class_attention", False),
        ]

    def test_images_are_paired(self) -> None:
        """78 and 90 of 100: the intervals overlap, and no image is lost."""
        (group,) = report(result("fitted", 90), result("token_norm", 78)).groups
        assert group[1].values["correct"].high > group[0].values["correct"].low
        assert [row.best for row in group] == [True, False]

    def test_seeds_that_scatter_leave_it_open(self) -> None:
        seeds = [result("random", right, seed=seed) for seed, right in enumerate((60, 90))]
        (group,) = report(result("fitted", 90), *seeds).groups
        assert [row.best for row in group] == [True, True]

    def test_each_cost_has_its_own(self) -> None:
        groups = report(result("fitted", 40, amount=0.5, macs=400), result("fitted", 90)).groups
        assert [(round(row.macs, 3), row.best) for group in groups for row in group] == [(0.6, True), (0.4, True)]

    def test_without_a_head_intervals_are_compared(self) -> None:
        rows = [("fitted", 0.99, 0.001), ("token_norm", 0.988, 0.001), ("random", 0.9, 0.001)]
        results = [
            Result(combination=combination(kind), macs=600, cosine=mean, cosine_error=error)
            for kind, mean, error in rows
        ]
        found = replace(report(*results), dense=Result(macs=1000, cosine=1.0, cosine_error=0.0))
        assert [row.best for row in found.groups[0]] == [True, True, False]
        assert found.cells(found.groups[0][0])[-1] == "0.9900 [0.9880, 0.9920]"


def test_the_interval_of_a_mean_covers_the_seeds() -> None:
    seeds = [result("random", right, seed=seed) for seed, right in enumerate((60, 70, 80))]
    value = report(*seeds).groups[0][0].quality
    alone = report(seeds[1]).groups[0][0].quality
    assert value.mean == pytest.approx(0.7)
    assert value.low < 0.7 - 4.303 * 0.1 / 3**0.5 < alone.low
    equal = [seed.model_copy(update={"correct": seeds[0].correct}) for seed in seeds]
    assert report(*equal).groups[0][0].quality == pytest.approx(report(seeds[0]).groups[0][0].quality)


class TestTables:
    found = report(result("token_norm", 80), *(result("random", 50 + seed, seed=seed) for seed in range(2)))

    def test_means_are_followed_by_their_seeds(self) -> None:
        assert [row.seed for row in self.found.rows] == ["-", "-", "mean of 2", "0", "1"]

    def test_markdown(self) -> None:
        lines = self.found.to_markdown().splitlines()
        assert lines[2] == "| drop | MACs % | metric | reducer | seed | top-1 % | same % |"
        assert lines[5].startswith("| 0.3 | 60.0 | token_norm | prune | - | **80.00 [71.12, 86.66]** | 80.00 [")
        assert lines[6].startswith("| 0.3 | 60.0 | random | prune | mean of 2 | 50.50 [")

    def test_latex(self) -> None:
        lines = self.found.to_latex().splitlines()
        assert r"\begin{tabular}{lrlllrr}" in lines
        assert lines[-2:] == [r"\bottomrule", r"\end{tabular}"]
        assert any(line.startswith(r"0.3 & 60.0 & token\_norm & prune & - & \textbf{80.00 [") for line in lines)
        assert lines.count(r"\midrule") == 2

    def test_csv(self) -> None:
        rows = list(csv.DictReader(io.StringIO(self.found.to_csv())))
        assert [row["metric"] for row in rows] == ["", "token_norm", "random", "random", "random"]
        assert (rows[1]["top1"], rows[1]["macs"], rows[1]["layers"]) == ("80.0", "0.6", "0")


def test_each_reason_is_listed_once() -> None:
    error = RecipeError("prune is not possible")
    refused = [(combination("random", amount, seed), error) for amount in (0.2, 0.3) for seed in (0, 1)]
    assert Unsupported.of(refused) == (Unsupported("random", "prune", (0.2, 0.3), "prune is not possible"),)
