from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from repshift_cli.errors import RecipeError
from repshift_cli.planning.layout import Layout, SiteInfo
from repshift_cli.planning.plan import Plan
from repshift_cli.planning.recipe import ComponentSpec, LayerDrop, Recipe
from repshift_cli.planning.resolve import resolve, tokens_dropped

SITES = tuple(SiteInfo(f"blocks.{layer}", layer) for layer in range(12))


def layout(patches: int = 196, prefix: int = 1) -> Layout:
    return Layout("timm_vit", prefix, patches, bool(prefix), SITES)


def recipe(layers: str) -> Recipe:
    return Recipe.parse(f"version: 1\nlayers: {layers}", "r.yaml")


def counts(plan: Plan) -> list[tuple[int, int]]:
    return [(site.tokens_in, site.tokens_out) for site in plan.sites]


@given(st.decimals(min_value="0.0001", max_value="0.9999", places=4), st.integers(1, 5000))
def test_the_ratio_counts_as_the_decimal_that_is_written(ratio: Decimal, patches: int) -> None:
    dropped = tokens_dropped(LayerDrop(layer=0, drop_ratio=float(ratio)), patches)
    assert dropped == int(ratio * patches)
    assert 0 <= dropped < patches


@pytest.mark.parametrize(
    ("ratio", "patches", "dropped"), [(0.29, 100, 29), (0.57, 100, 57), (0.2, 196, 39), (0.1, 9, 0), (1e-05, 10**5, 1)]
)
def test_floor_of_known_numbers(ratio: float, patches: int, dropped: int) -> None:
    assert tokens_dropped(LayerDrop(layer=0, drop_ratio=ratio), patches) == dropped


@given(st.data(), st.integers(1, 400), st.integers(0, 5))
def test_a_plan_tracks_the_tokens(data: st.DataObject, patches: int, prefix: int) -> None:
    layers = data.draw(st.lists(st.integers(0, 11), min_size=1, max_size=6, unique=True))
    drops = []
    for layer in layers:
        if data.draw(st.booleans()):
            drops.append({"layer": layer, "drop_ratio": data.draw(st.integers(1, 99)) / 100})
        else:
            drops.append({"layer": layer, "keep_tokens": data.draw(st.integers(1, patches))})
    try:
        plan = resolve(Recipe(version=1, layers=drops), layout(patches, prefix))
    except RecipeError as error:
        assume("keep_tokens" not in error.message)
        raise
    assert [site.layer for site in plan.sites] == sorted(layers)
    tokens = prefix + patches
    for site in plan.sites:
        drop = next(LayerDrop(**drop) for drop in drops if drop["layer"] == site.layer)
        assert site.tokens_in == tokens
        assert prefix < site.tokens_out <= site.tokens_in
        assert site.tokens_in - site.tokens_out == tokens_dropped(drop, tokens - prefix)
        tokens = site.tokens_out
    at = plan.tokens_at(12)
    assert (len(at), at[0], at[-1]) == (13, prefix + patches, tokens)
    assert list(at) == sorted(at, reverse=True)
    assert Plan.model_validate(plan.model_dump(mode="json")) == plan


def test_the_papers_schedule_on_deit() -> None:
    plan = resolve(Recipe.load("deit_small_paper"), layout())
    score = {"kind": "representation_shift", "operation": "mlp", "distance": "l2"}
    score |= {"reading": "update", "polarity": "largest"}
    assert plan.summary() == [
        {"site": "blocks.0", "layer": 0, "tokens_in": 197, "tokens_out": 158, "metric": score},
        {"site": "blocks.3", "layer": 3, "tokens_in": 158, "tokens_out": 127, "metric": score},
        {"site": "blocks.6", "layer": 6, "tokens_in": 127, "tokens_out": 102, "metric": score},
    ]
    assert plan.tokens_at(12) == (197, 158, 158, 158, 127, 127, 127, 102, 102, 102, 102, 102, 102)


def test_prefix_tokens_are_never_counted_as_patches() -> None:
    assert counts(resolve(recipe("[{layer: 0, drop_ratio: 0.5}]"), layout(100, 5))) == [(105, 55)]
    assert counts(resolve(recipe("[{layer: 0, keep_tokens: 7}]"), layout(100, 5))) == [(105, 12)]


def test_layers_in_any_order_and_by_name() -> None:
    mixed = resolve(recipe("[{layer: blocks.6, keep_tokens: 10}, {layer: 2, keep_tokens: 20}]"), layout())
    assert [(site.site, site.tokens_out) for site in mixed.sites] == [("blocks.2", 21), ("blocks.6", 11)]


def test_a_small_ratio_of_few_tokens_drops_none() -> None:
    assert counts(resolve(recipe("[{layer: 0, drop_ratio: 0.1}]"), layout(9))) == [(10, 10)]


@pytest.mark.parametrize(
    ("layers", "message", "hint"),
    [
        ("[{layer: 12, drop_ratio: 0.2}]", "r.yaml:2:10: layers[0]: the model has no layer 12", "0 (blocks.0) to 11"),
        ("[{layer: block.3, drop_ratio: 0.2}]", "the model has no layer block.3", "Did you mean blocks.3?"),
        (
            "[{layer: 1, drop_ratio: 0.2}, {layer: 1, drop_ratio: 0.2}]",
            "r.yaml:2:39: layers[1]: layer 1 is given twice",
            None,
        ),
        ("[{layer: 1, drop_ratio: 0.2}, {layer: blocks.1, keep_tokens: 9}]", "layer blocks.1 is given twice", None),
        ("[{layer: 0, keep_tokens: 197}]", "keep_tokens is 197, but only 196 patch tokens reach blocks.0", None),
        ("[{layer: 3, keep_tokens: 9}, {layer: 0, keep_tokens: 8}]", "layers[0]: keep_tokens is 9, but only 8", None),
    ],
)
def test_a_recipe_that_does_not_fit_the_model(layers: str, message: str, hint: str | None) -> None:
    with pytest.raises(RecipeError) as caught:
        resolve(recipe(layers), layout())
    assert message in caught.value.message
    assert hint is None or hint in (caught.value.hint or "")
    assert caught.value.exit_code == 2


def test_a_schedule_keeps_at_least_one_token() -> None:
    ratios = ", ".join(f"{{layer: {layer}, drop_ratio: 0.999}}" for layer in range(12))
    assert resolve(recipe(f"[{ratios}]"), layout(196, 1)).sites[-1].tokens_out == 2


def test_a_schedule_that_keeps_no_token_is_refused() -> None:
    """No ratio below 1 drops all tokens, so the count is set directly."""
    none_left = recipe("[{layer: 4, keep_tokens: 1}]")
    amount = none_left.layers[0].model_copy(update={"keep_tokens": 0})
    with pytest.raises(RecipeError, match=r"nothing is left after blocks\.4: all 196 patch tokens would be dropped"):
        resolve(none_left.model_copy(update={"layers": (amount,)}), layout())


def test_with_metric_changes_the_score_at_each_site_and_nothing_else() -> None:
    plan = resolve(recipe("[{layer: 0, drop_ratio: 0.2}, {layer: 3, drop_ratio: 0.2}]"), layout())
    changed = plan.with_metric(ComponentSpec(kind="random", seed=3))
    assert {site.metric for site in changed.sites} == {ComponentSpec(kind="random", seed=3)}
    assert counts(changed) == counts(plan)
    assert plan.sites[0].metric.kind == "representation_shift"


def test_with_metrics_sets_one_metric_per_site_and_may_end_earlier() -> None:
    plan = resolve(recipe("[{layer: 0, drop_ratio: 0.2}, {layer: 3, drop_ratio: 0.2}]"), layout())
    parts = [ComponentSpec(kind="random", seed=1), ComponentSpec(kind="random", seed=2)]
    assert [site.metric for site in plan.with_metrics(parts).sites] == parts
    assert counts(plan.with_metrics(parts)) == counts(plan)
    assert counts(plan.with_metrics(parts[:1])) == counts(plan)[:1]


def test_a_layer_with_its_own_metric() -> None:
    layers = "[{layer: 0, drop_ratio: 0.2, metric: {kind: random, seed: 4}}, {layer: 3, drop_ratio: 0.2}]"
    plan = resolve(recipe(layers), layout())
    assert [site.metric.kind for site in plan.sites] == ["random", "representation_shift"]
    assert plan.sites[0].metric.options == {"seed": 4}


def stored(**changes: Any) -> dict[str, Any]:
    plan = resolve(recipe("[{layer: 0, keep_tokens: 20}, {layer: 3, keep_tokens: 10}]"), layout(30))
    return {**plan.model_dump(mode="json"), **changes}


def with_site(index: int, **changes: Any) -> dict[str, Any]:
    document = stored()
    document["sites"][index].update(changes)
    return document


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (with_site(0, tokens_out=40), "more tokens out"),
        (with_site(1, tokens_in=22), "22 tokens in, but 21 arrive"),
        (with_site(0, tokens_in=30), "30 tokens in, but 31 arrive"),
        (with_site(1, layer=0), "blocks.3"),
        (with_site(0, tokens_out=1), "no patch token is left"),
        (with_site(0, layer=-1), "greater than or equal to 0"),
        (with_site(0, surprise=1), "Extra inputs"),
        (stored(prefix_tokens=-1), "greater than or equal to 0"),
        (stored(patch_tokens=0), "greater than 0"),
        (stored(sites="none"), "valid tuple"),
        ({key: value for key, value in stored().items() if key != "reducer"}, "Field required"),
    ],
)
def test_an_invalid_stored_plan(document: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Plan.model_validate(document)


class TestRoundTokens:
    def test_counts_of_deit_are_multiples_of_eight(self) -> None:
        text = "[{layer: 0, drop_ratio: 0.2}, {layer: 3, drop_ratio: 0.2}, {layer: 6, drop_ratio: 0.2}]"
        rounded_recipe = Recipe.parse(f"version: 1\nround_tokens: 8\nlayers: {text}", "r.yaml")
        assert counts(resolve(rounded_recipe, layout())) == [(197, 160), (160, 128), (128, 104)]

    @given(st.integers(1, 400), st.integers(0, 5), st.integers(1, 64), st.integers(1, 99))
    def test_the_nearest_multiple_that_still_drops(self, patches: int, prefix: int, multiple: int, share: int) -> None:
        drop = LayerDrop(layer=0, drop_ratio=share / 100)
        plan = resolve(Recipe(version=1, round_tokens=multiple, layers=(drop,)), layout(patches, prefix))
        plain = resolve(Recipe(version=1, layers=(drop,)), layout(patches, prefix))
        ((total, kept),), ((_, wanted),) = counts(plan), counts(plain)
        between = [count for count in range(prefix + 1, total) if count % multiple == 0]
        if wanted == total or not between:
            assert kept == wanted
        else:
            nearest = min(between, key=lambda count: (abs(count - wanted), -count))
            # only within one multiple
            assert kept == (nearest if abs(nearest - wanted) < multiple else wanted)

    def test_keep_tokens_is_not_rounded(self) -> None:
        plan = resolve(
            Recipe.parse("version: 1\nround_tokens: 8\nlayers: [{layer: 0, keep_tokens: 101}]", "r.yaml"), layout()
        )
        assert counts(plan) == [(197, 102)]

    @pytest.mark.parametrize("value", ["0", "-8", "2.5", "true", "eight"])
    def test_invalid_multiples(self, value: str) -> None:
        with pytest.raises(RecipeError, match=r"r\.yaml:2:\d+: round_tokens"):
            Recipe.parse(f"version: 1\nround_tokens: {value}\nlayers: [{{layer: 0, drop_ratio: 0.2}}]", "r.yaml")
