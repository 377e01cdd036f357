"""Counts on feature maps: kept rows and columns, strides, and errors."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny import make_plan, tiny_vit
from tiny_cnn import line_plan, shrink, tiny_cnn
from torch.nn import functional

from repshift_cli.errors import RecipeError
from repshift_cli.planning.layout import Grid, Layout, SiteInfo, Window
from repshift_cli.planning.plan import Plan
from repshift_cli.planning.recipe import LayerDrop, Recipe
from repshift_cli.planning.resolve import lines_kept, resolve

GRIDS = st.tuples(st.integers(1, 120), st.integers(1, 120))
RATIOS = st.integers(1, 9999).map(lambda number: number / 10_000)


def drop(ratio: float) -> LayerDrop:
    return LayerDrop(layer=0, drop_ratio=ratio)


class TestLinesKept:
    @given(RATIOS, GRIDS)
    def test_never_more_is_dropped_than_the_share(self, ratio: float, grid: Grid) -> None:
        rows, columns = lines_kept(drop(ratio), grid)
        share = (1 - Fraction(str(ratio))) * grid[0] * grid[1]
        assert 1 <= rows <= grid[0] and 1 <= columns <= grid[1]
        assert rows * columns >= share > rows * (columns - 1)

    @given(RATIOS, GRIDS)
    def test_rows_are_rounded_up_from_the_root_of_the_share(self, ratio: float, grid: Grid) -> None:
        rows, _ = lines_kept(drop(ratio), grid)
        share = 1 - Fraction(str(ratio))
        assert Fraction(rows, grid[0]) ** 2 >= share > Fraction(rows - 1, grid[0]) ** 2

    @given(RATIOS, RATIOS, GRIDS)
    def test_a_larger_share_keeps_no_more_rows(self, one: float, other: float, grid: Grid) -> None:
        assert lines_kept(drop(max(one, other)), grid)[0] <= lines_kept(drop(min(one, other)), grid)[0]

    @given(RATIOS, GRIDS)
    def test_a_larger_map_keeps_no_fewer_rows(self, ratio: float, grid: Grid) -> None:
        assert lines_kept(drop(ratio), grid)[0] <= lines_kept(drop(ratio), (grid[0] + 1, grid[1]))[0]

    @pytest.mark.parametrize(
        ("ratio", "grid", "kept"),
        [
            (0.2, (56, 56), (51, 50)),
            (0.36, (10, 10), (8, 8)),
            (0.19, (10, 10), (9, 9)),
            (0.75, (8, 20), (4, 10)),
            (0.01, (7, 7), (7, 7)),
            (0.999, (7, 7), (1, 1)),
            (0.5, (1, 9), (1, 5)),
            (0.5, (9, 1), (7, 1)),
            (1e-05, (400, 400), (400, 400)),
        ],
    )
    def test_known_numbers(self, ratio: float, grid: Grid, kept: Grid) -> None:
        assert lines_kept(drop(ratio), grid) == kept

    def test_keep_grid_is_kept(self) -> None:
        assert lines_kept(LayerDrop(layer=0, keep_grid=(3, 9)), (12, 10)) == (3, 9)


@st.composite
def windows(draw: st.DrawFn) -> tuple[Window, Grid]:
    def pair(low: int, high: int) -> Grid:
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    kernel, stride, dilation = pair(1, 5), pair(1, 4), pair(1, 3)
    padding = (draw(st.integers(0, kernel[0] // 2)), draw(st.integers(0, kernel[1] // 2)))
    window = Window("w", kernel, stride, padding, dilation, ceil=draw(st.booleans()))
    return window, pair(1, 24)


def has_room(window: Window, grid: Grid) -> bool:
    sides = zip(grid, window.kernel, window.padding, window.dilation, strict=True)
    return all(side + 2 * p >= d * (k - 1) + 1 for side, k, p, d in sides)


class TestWindow:
    @given(windows())
    def test_a_convolution(self, drawn: tuple[Window, Grid]) -> None:
        window, grid = drawn
        window = Window("w", window.kernel, window.stride, window.padding, window.dilation)
        assert (min(window.output(grid)) > 0) == has_room(window, grid)
        assume(has_room(window, grid))
        value, kernel = torch.empty(1, 1, *grid, device="meta"), torch.empty(1, 1, *window.kernel, device="meta")
        found = functional.conv2d(value, kernel, None, window.stride, window.padding, window.dilation)
        assert tuple(found.shape[2:]) == window.output(grid)

    @given(windows())
    def test_max_pooling(self, drawn: tuple[Window, Grid]) -> None:
        window, grid = drawn
        assume(has_room(window, grid))
        found = functional.max_pool2d(
            torch.zeros(1, 1, *grid), window.kernel, window.stride, window.padding, window.dilation, window.ceil
        )
        assert tuple(found.shape[2:]) == window.output(grid)

    @given(windows())
    def test_average_pooling(self, drawn: tuple[Window, Grid]) -> None:
        window, grid = drawn
        window = Window("w", window.kernel, window.stride, window.padding, ceil=window.ceil)
        assume(has_room(window, grid))
        found = functional.avg_pool2d(
            torch.zeros(1, 1, *grid), window.kernel, window.stride, window.padding, window.ceil
        )
        assert tuple(found.shape[2:]) == window.output(grid)

    @given(st.integers(1, 7), st.integers(1, 3), st.integers(0, 3), st.integers(1, 12))
    def test_every_tap_reads_the_least_map(self, kernel: int, dilation: int, padding: int, side: int) -> None:
        assume(2 * padding <= dilation * (kernel - 1))
        window = Window("w", (kernel, kernel), padding=(padding, padding), dilation=(dilation, dilation))
        starts = range(-padding, side + padding - dilation * (kernel - 1))
        useful = all(any(0 <= start + dilation * tap < side for start in starts) for tap in range(kernel))
        assert (side >= window.least()[0]) == useful


LAYERS = "[{layer: %s, drop_ratio: 0.2}]"


class TestErrors:
    @pytest.mark.parametrize(
        ("kind", "layers", "message", "hint"),
        [
            *(
                (
                    "bottleneck",
                    LAYERS % layer,
                    f"nothing can be dropped after {layer}: its output differs in size",
                    "layer1.1",
                )
                for layer in ("layer1.0", "0", "layer2.0", "2")
            ),
            (
                "regnet_z",
                LAYERS % "s2.b1",
                "nothing can be dropped after s2.b1: its output differs in size",
                "Possible are s2.b2",
            ),
            ("basic", LAYERS % "layer1.3", "the model has no layer layer1.3", "Did you mean layer1.1?"),
            ("basic", LAYERS % "stages.0", "the model has no layer stages.0", "1 (layer1.1) to 7 (layer4.1)"),
            ("basic", LAYERS % "8", "the model has no layer 8", "It has the layers 1 (layer1.1) to 7"),
            (
                "basic",
                "[{layer: 1, keep_tokens: 100}]",
                "r.yaml:3:10: layers[0]: keep_tokens is for sequences",
                "or keep_grid: [rows, columns] of the 25x33 that reach layer1.1",
            ),
            ("basic", "[{layer: 1, keep_grid: [26, 2]}]", "keep_grid is 26x2, but only 25x33 reach layer1.1", None),
            ("basic", "[{layer: 1, keep_grid: [2, 34]}]", "keep_grid is 2x34, but only 25x33 reach layer1.1", None),
            (
                "basic",
                "[{layer: 5, keep_grid: [7, 9]}, {layer: 3, keep_grid: [11, 16]}]",
                "r.yaml:3:10: layers[0]: keep_grid is 7x9, but only 6x8 reach layer3.1",
                None,
            ),
            (
                "basic",
                LAYERS.replace("0.2", "0.95") % 1,
                "of the map, 6x7 would be left after layer1.1, and 1x1 at layer4.0, smaller than its 3x3 kernel",
                "There it must be at least 2x2",
            ),
            (
                "basic",
                "[{layer: 1, drop_ratio: 0.1}, {layer: 5, keep_grid: [1, 3]}]",
                "r.yaml:3:39: layers[1]: of the map, 1x3 would be left after layer3.1, and 1x3 at layer4.0",
                "at least 2x2",
            ),
            (
                "convnext_large_kernel",
                "[{layer: stages.0.blocks.0, keep_grid: [3, 30]}]",
                "3x30 would be left after stages.0.blocks.0, and 3x30 at stages.0.blocks.1, smaller than its 7x7",
                "at least 4x4",
            ),
        ],
    )
    def test_a_recipe_that_does_not_fit_the_maps(self, kind: str, layers: str, message: str, hint: str | None) -> None:
        with pytest.raises(RecipeError) as caught:
            line_plan(tiny_cnn(kind), layers)
        assert message in caught.value.message
        assert hint is None or hint in (caught.value.hint or "")
        assert caught.value.exit_code == 2

    def test_a_layer_twice(self) -> None:
        with pytest.raises(RecipeError, match=r"layer layer1\.1 is given twice"):
            line_plan(tiny_cnn(), "[{layer: 1, drop_ratio: 0.2}, {layer: layer1.1, drop_ratio: 0.2}]")

    def test_a_grid_of_a_sequence(self) -> None:
        recipe = Recipe.parse("version: 1\nlayers: [{layer: 0, keep_grid: [2, 2]}]", "r.yaml")
        with pytest.raises(RecipeError, match=r"layers\[0\]: keep_grid is for feature maps") as caught:
            make_plan(tiny_vit(), recipe)
        assert (caught.value.exit_code, caught.value.hint) == (2, "Give keep_tokens or drop_ratio.")

    @pytest.mark.parametrize("grid", ["[2]", "[2, 3, 4]", "[0, 2]", "[2, -1]", "7", "[2.5, 3]", "two"])
    def test_an_invalid_grid(self, grid: str) -> None:
        with pytest.raises(RecipeError, match=r"keep_grid"):
            Recipe.parse(f"version: 1\nlayers: [{{layer: 0, keep_grid: {grid}}}]")

    @pytest.mark.parametrize("other", ["drop_ratio: 0.2", "keep_tokens: 3"])
    def test_two_amounts(self, other: str) -> None:
        with pytest.raises(RecipeError, match="exactly one of drop_ratio, drop_tokens, keep_tokens and keep_grid"):
            Recipe.parse(f"version: 1\nlayers: [{{layer: 0, keep_grid: [2, 2], {other}}}]")

    def test_a_map_may_be_as_small_as_the_dense_one(self) -> None:
        """On an image of 32x32 the last map of the dense network is 1x1 as well."""
        model = tiny_cnn("basic", (32, 32))
        plan = line_plan(model, "[{layer: 1, keep_grid: [5, 7]}, {layer: 3, drop_ratio: 0.2}]")
        assert [(site.grid_in, site.grid_out) for site in plan.sites] == [((8, 8), (5, 7)), ((3, 4), (3, 4))]
        with pytest.raises(RecipeError, match=r"3x7 would be left after layer1\.1, and 1x2 at layer3\.0"):
            line_plan(model, "[{layer: 1, keep_grid: [3, 7]}, {layer: 3, drop_ratio: 0.2}]")

    def test_a_map_after_the_last_site_is_checked_too(self) -> None:
        sites = (SiteInfo("a", 0, (Window("a", (3, 3), padding=(1, 1)),)),)
        layout = Layout("resnet", 0, 64, False, sites, (8, 8), tail=(Window("end", (5, 5)),))
        recipe = Recipe.parse("version: 1\nlayers: [{layer: 0, keep_grid: [8, 4]}]")
        with pytest.raises(RecipeError, match="8x4 would be left after a, and 8x4 at end, smaller than its 5x5 kernel"):
            resolve(recipe, layout)


class TestPlan:
    def test_shares_are_of_the_remaining_map(self) -> None:
        plan = line_plan(tiny_cnn(), "[{layer: layer1.1, drop_ratio: 0.2}, {layer: 5, drop_ratio: 0.3}]")
        assert plan.summary() == [
            {
                "site": name,
                "layer": layer,
                "tokens_in": math.prod(before),
                "tokens_out": math.prod(after),
                "grid_in": before,
                "grid_out": after,
                "metric": {"kind": "representation_shift", "operation": "block"},
            }
            for name, layer, before, after in (("layer1.1", 1, (25, 33), (23, 29)), ("layer3.1", 5, (6, 8), (6, 6)))
        ]
        assert plan.grids_kept == {1: (23, 29), 5: (6, 6)}
        assert (plan.prefix_tokens, plan.patch_tokens) == (0, 825)

    @given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=3))
    def test_a_plan_is_read_back_from_json(self, lines: list[Grid]) -> None:
        plan = shrink(MODEL, dict(enumerate(lines)))
        document = plan.model_dump(mode="json")
        assert Plan.model_validate(document) == plan
        assert Plan.model_validate_json(plan.model_dump_json()) == plan
        assert all({"grid_in", "grid_out"} <= site.keys() for site in document["sites"])

    def test_a_sequence_is_stored_without_maps(self) -> None:
        for site in make_plan(tiny_vit()).model_dump(mode="json")["sites"]:
            assert list(site) == ["site", "layer", "tokens_in", "tokens_out", "metric"]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"tokens_out": 600}, "the tokens are not those of the map"),
            ({"tokens_in": 826}, "the tokens are not those of the map"),
            ({"grid_out": [22, 27]}, "the tokens are not those of the map"),
            ({"grid_in": [33, 25]}, "more rows or columns out than in"),
            ({"grid_out": [22, 36], "tokens_out": 792}, "more rows or columns out than in"),
            ({"grid_in": None}, "a map on one side only"),
            ({"grid_out": None}, "a map on one side only"),
            ({"grid_out": [0, 28], "tokens_out": 0}, "greater than 0"),
            ({"grid_out": [616], "tokens_out": 616}, "Field required"),
            ({"grid_in": [25, 33, 1]}, "at most 2 items"),
            ({"grid_out": [26, 33], "tokens_out": 858}, "more tokens out"),
        ],
    )
    def test_an_invalid_stored_map(self, changes: dict[str, Any], message: str) -> None:
        document = shrink(MODEL, {0: (3, 5)}).model_dump(mode="json")
        assert document["sites"][0]["grid_out"] == [22, 28]
        document["sites"][0].update(changes)
        with pytest.raises(ValidationError, match=message):
            Plan.model_validate(document)


MODEL = tiny_cnn()


def test_tokens_of_a_map_are_not_rounded() -> None:
    recipe = Recipe.parse("version: 1\nround_tokens: 8\nlayers: [{layer: 0, drop_ratio: 0.2}]", "r.yaml")
    with pytest.raises(RecipeError, match=r"r\.yaml:2:\d+: round_tokens is for sequences"):
        resolve(recipe, Layout("resnet", 0, 64, False, (SiteInfo("layer1.1", 0),), (8, 8)))
