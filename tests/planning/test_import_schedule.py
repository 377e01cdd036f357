"""Schedules as the field writes them, imported as recipes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from repshift_cli.checkpoints.create import create, on_meta
from repshift_cli.errors import UsageError
from repshift_cli.planning.import_schedule import import_schedule
from repshift_cli.planning.recipe import Recipe
from repshift_cli.reduction.checks import check_components
from repshift_cli.reduction.compressed_model import attach
from repshift_cli.reduction.plans import resolve_for

PAPER = "drop_r = [0.2,0,0,0.2,0,0,0.2,0,0,0,0,0]"
DIFFRATE = json.dumps(
    {
        "prune_kept_num": "[197,196,190,168,150,139,129,117,99,78,58,3]",
        "merge_kept_num": "[197,194,176,156,141,133,121,107,88,64,56,3]",
    }
)
"""DeiT-S at 2.9 GMACs, as in DiffRate's file."""


@pytest.mark.parametrize(
    ("text", "options", "kinds", "tokens", "gmacs"),
    [
        (PAPER, {}, ("representation_shift", "prune"), [158, 127, 102], "2.83"),
        ("r=13", {"blocks": 12, "tokens": 196}, ("random", "bipartite"), [197 - 13 * i for i in range(1, 12)], "2.81"),
        (
            DIFFRATE,
            {"tokens": 196},
            ("class_attention", "merge"),
            [194, 176, 156, 141, 133, 121, 107, 88, 64, 56],
            "3.06",
        ),
    ],
)
def test_they_fit_a_deit(text: str, options: Any, kinds: tuple[str, str], tokens: list[int], gmacs: str) -> None:
    recipe = Recipe.parse(import_schedule(text, **options))
    check_components(recipe)
    assert (recipe.metric.kind, recipe.reducer.kind) == kinds
    with on_meta():
        model = create("deit_small_patch16_224", {}, "deit_small_patch16_224").eval()
    compressed = attach(model, resolve_for(model, recipe))
    assert [site.tokens_out for site in compressed.plan.sites] == tokens
    assert f"{compressed.macs() / 1e9:.2f}" == gmacs


NUMBERS: list[tuple[str, Any, dict[str, object]]] = [
    ("[0.2, 1e-5]", {"kind": "ratios"}, {"drop_ratios": [0.2, 1e-5]}),
    ("drop_r: 0.2", {"blocks": 2}, {"drop_ratios": [0.2, 0.2]}),
    ("r=(3, 0, 5,)", {"tokens": 16}, {"layers": [{"layer": 0, "drop_tokens": 3}, {"layer": 2, "drop_tokens": 5}]}),
    (
        "r=9",
        {"blocks": 3, "tokens": 16},
        {"layers": [{"layer": 0, "drop_tokens": 8}, {"layer": 1, "drop_tokens": 4}]},
    ),
    ("x=[9, 9, 5]", {"kind": "kept", "tokens": 9, "prefix": 0}, {"layers": [{"layer": 2, "keep_tokens": 5}]}),
    # as in DiffRate, a count above the one before it drops nothing
    (
        "merge_kept_num=[9, 8, 9, 6, 3]",
        {"tokens": 8},
        {"layers": [{"layer": 1, "keep_tokens": 7}, {"layer": 3, "keep_tokens": 5}]},
    ),
]


def test_numbers() -> None:
    for text, options, expected in NUMBERS:
        document = yaml.safe_load(import_schedule(text, **options))
        assert {key: document[key] for key in ("drop_ratios", "layers") if key in document} == expected


def test_the_comment_says_where_it_came_from() -> None:
    lines = import_schedule("r=13", blocks=12, tokens=196).splitlines()
    assert lines[0] == "# Imported from r=13 for 196 patch tokens by `repshift recipes import`."
    assert "# The last block is left out: fewer tokens behind it save nothing." in lines


ERRORS: list[tuple[str, Any, str]] = [
    ("[0.2, 0]", {}, "the kind of the numbers is unknown: schedule=[0.2, 0]\nAdd --kind ratios"),
    ("r=[0.2, 0]", {}, "the kind of the numbers is unknown: r=[0.2, 0]"),
    ("r=13", {}, "r=13 is for each block, and the number of blocks is unknown\nAdd --blocks"),
    ("r=13", {"blocks": 12}, "the number of patch tokens of the model is unknown\nAdd --tokens"),
    ("[9, 5]", {"kind": "kept", "tokens": 8}, "unknown whether the class token is counted in schedule=[9, 5]"),
    ("merge_kept_num=[257, 9]", {"tokens": 196}, "block 0 cannot keep 257 of 196 patch"),
    (
        "[9, 1, 1]",
        {"kind": "kept", "tokens": 8, "prefix": 1},
        "block 1 cannot keep 1 of 8 patch tokens and 1 prefix",
    ),
    ("drop_r=[0.2, 0]", {"blocks": 3}, "the schedule has 2 numbers, but the model has 3 blocks"),
    ("drop_r=[0, 0]", {}, "drop_r=[0, 0] drops nothing"),
    ("drop_r=[0.2, 1]", {}, "invalid ratio 1 in drop_r=[0.2, 1]: must be in [0, 1)"),
    ("drop_r=[nan]", {}, "invalid ratio nan"),
    ("r=[-1]", {"tokens": 8}, "invalid number of tokens -1 in r=[-1]: must be an integer from 0"),
    ("drop_r=[a]", {}, "not a list of numbers"),
    ("drop_r=[]", {}, "not a list of numbers"),
    ("drop_r=[0.2", {}, "must be one number or one list"),
    ("drop_r=[0.2]*12", {}, "must be one number or one list"),
    ("r=1, r=2", {}, "must be one number or one list"),
    ("a" * 100_000, {}, "must be one number or one list"),
    ("r=13", {"blocks": 0}, "invalid blocks 0"),
]


def test_errors() -> None:
    for text, options, words in ERRORS:
        with pytest.raises(UsageError) as caught:
            import_schedule(text, **options)
        assert words in str(caught.value)


@given(st.text("r=[](),.:\"'0123e-_ \n{}", max_size=30), st.sampled_from([None, "ratios", "counts", "kept"]))
def test_any_text_is_a_recipe_or_an_error(text: str, kind: Any) -> None:
    try:
        found = import_schedule(text, kind, blocks=3, tokens=9, prefix=1)
    except UsageError:
        return
    assert Recipe.parse(found).layers
