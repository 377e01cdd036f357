"""Parsing of targets."""

from __future__ import annotations

import pytest

from repshift_cli.errors import UsageError
from repshift_cli.search.target import SearchTarget, lower_agreement, split_goals


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("macs=0.65", "macs", 0.65),
        (" latency = 0.6", "latency", 0.6),
        ("max-drop=0", "max-drop", 0.0),
        ("recall@10=1", "recall@10", 1.0),
    ],
)
def test_parses(text: str, kind: str, value: float) -> None:
    assert SearchTarget.parse(text) == SearchTarget(kind, value)


def test_a_speedup_is_an_inverse_latency() -> None:
    target = SearchTarget.parse("speedup=1.5")
    assert (target.kind, target.value, str(target)) == ("latency", 1 / 1.5, "speedup=1.5")
    assert target.reached(0.8) == "speedup=1.25"
    assert SearchTarget.parse(str(target)) == target


def test_goals_are_split_into_a_target_and_a_limit() -> None:
    macs, drop = SearchTarget("macs", 0.6), SearchTarget("max-drop", 1.0)
    assert split_goals([]) == (None, None)
    assert split_goals(["max-drop=1"]) == (drop, None)
    assert split_goals(["max-drop=1", "macs=0.6"]) == (macs, drop)


def test_str_can_be_parsed() -> None:
    assert SearchTarget.parse(str(SearchTarget("agreement", 0.995))) == SearchTarget("agreement", 0.995)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("macs", "kind=value"),
        ("mac=0.5", "Did you mean macs"),
        ("macs=half", "no number"),
        ("macs=0", "in (0, 1)"),
        ("macs=1", "in (0, 1)"),
        ("latency=nan", "in (0, 1)"),
        ("agreement=1.01", "in (0, 1]"),
        ("max-drop=-0.1", "in [0, 100)"),
        ("max-drop=inf", "in [0, 100)"),
        ("recall@10=0", "recall@10=0: must be in (0, 1]"),
        ("cosine=1.1", "in (0, 1]"),
        ("recall@0=0.5", "unknown target 'recall@0'"),
        ("recall@K=0.5", "unknown target 'recall@K'"),
        ("recall=0.5", "recall@10=0.99"),
        ("speedup=1", "in (1, 20]"),
        ("speedup=nan", "in (1, 20]"),
    ],
)
def test_an_invalid_target_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        SearchTarget.parse(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ("max-drop=1", 100),
        ("max-drop=0.5", 200),
        ("max-drop=3", 34),
        ("agreement=0.99", 99),
        ("agreement=0.75", 3),
        ("recall@10=0.9", 20),
    ],
)
def test_the_images_that_a_target_needs(text: str, needed: int) -> None:
    target = SearchTarget.parse(text)
    assert target.images_needed == needed
    if target.kind == "agreement":
        assert lower_agreement(1.0, needed) >= target.value - 1e-9 > lower_agreement(1.0, needed - 1)
    assert SearchTarget.parse("macs=0.5").images_needed == SearchTarget.parse("agreement=1").images_needed == 0
