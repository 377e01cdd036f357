from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from paths import ROOT

from repshift_cli.errors import RecipeError
from repshift_cli.planning.recipe import LayerDrop, Recipe, default_recipe, shipped_recipes
from repshift_cli.reduction.checks import check_components
from repshift_cli.reduction.metrics.base import build_metric, metric_kinds
from repshift_cli.reduction.reducers.base import build_reducer, reducer_kinds
from repshift_cli.search.target import SearchTarget
from repshift_cli.utils.suggest import nearest

GOOD = """\
version: 1
metric:
  kind: representation_shift
  operation: mlp
reducer: {kind: prune}
layers:
  - {layer: 0, drop_ratio: 0.2}
  - layer: blocks.3
    keep_tokens: 40
"""


def failure(text: str) -> RecipeError:
    """The error of parsing a recipe and building its metric and reducer."""
    with pytest.raises(RecipeError) as caught:
        recipe = Recipe.parse(text, "r.yaml")
        build_metric(recipe.metric, recipe.place)
        build_reducer(recipe.reducer, recipe.place)
    return caught.value


def test_a_valid_recipe() -> None:
    recipe = Recipe.parse(GOOD, "r.yaml")
    assert recipe.text == GOOD
    assert recipe.metric.options == {"operation": "mlp"}
    assert recipe.layers == (LayerDrop(layer=0, drop_ratio=0.2), LayerDrop(layer="blocks.3", keep_tokens=40))
    assert recipe.model is None


def test_metric_and_reducer_have_defaults() -> None:
    recipe = Recipe.parse("version: 1\nlayers: [{layer: 0, drop_ratio: 0.5}]")
    assert (recipe.metric.kind, recipe.reducer.kind) == ("representation_shift", "prune")


def test_a_recipe_cannot_be_changed() -> None:
    recipe = Recipe.parse(GOOD)
    with pytest.raises(ValueError, match="frozen"):
        recipe.model = "other"


@pytest.mark.parametrize(
    ("old", "new", "message", "hint"),
    [
        ("version: 1", "version: 2", "r.yaml:1:1: version: should be 1 (it is 2)", None),
        ("version: 1", "version: '1'", "r.yaml:1:1: version: should be 1 (it is '1')", None),
        ("version: 1\n", "", "r.yaml:1:1: the key version is missing", None),
        ("metric:", "metrics:", "r.yaml:2:1: unknown key metrics", "Did you mean metric? Allowed keys: version"),
        (
            "drop_ratio: 0.2",
            "drop_rate: 0.2",
            "r.yaml:7:16: unknown key layers[0].drop_rate",
            "Did you mean drop_ratio?",
        ),
        (
            "  operation: mlp",
            "  operations: mlp",
            "r.yaml:4:3: unknown key metric.operations",
            "Did you mean operation?",
        ),
        ("{kind: prune}", "{kind: prune, x: 1}", "r.yaml:5:24: unknown key reducer.x", None),
        (
            "{kind: prune}",
            "{kind: prun}",
            "r.yaml:5:11: reducer.kind: unknown reducer 'prun'",
            "Did you mean prune?",
        ),
        (
            "kind: representation_shift",
            "kind: representation_shft",
            "r.yaml:3:3: metric.kind: unknown metric 'representation_shft'",
            "Did you mean representation_shift? Allowed: attention_entropy, class_attention",
        ),
        ("{kind: prune}", "prune", "r.yaml:5:1: reducer: should be a mapping with the key kind", None),
        ("{kind: prune}", "{}", "r.yaml:5:1: the key reducer.kind is missing", None),
        ("{kind: prune}", "{kind: 3}", "r.yaml:5:11: reducer.kind: should be a valid string (it is 3)", None),
        (
            "operation: mlp",
            "operation: mpl",
            "r.yaml:4:3: metric.operation: should be 'mlp', 'attention', 'mixer' or 'block'",
            None,
        ),
        ("drop_ratio: 0.2", "drop_ratio: 0.0", "r.yaml:7:16: layers[0].drop_ratio: should be greater than 0", None),
        ("drop_ratio: 0.2", "drop_ratio: 1.0", "r.yaml:7:16: layers[0].drop_ratio: should be less than 1", None),
        ("drop_ratio: 0.2", "drop_ratio: -0.1", "layers[0].drop_ratio: should be greater than 0 (it is -0.1)", None),
        ("drop_ratio: 0.2", "drop_ratio: .nan", "layers[0].drop_ratio: should be", None),
        ("drop_ratio: 0.2", "drop_ratio: half", "layers[0].drop_ratio: should be a valid number (it is 'half')", None),
        ("drop_ratio: 0.2", "drop_ratio: true", "layers[0].drop_ratio: should be a valid number (it is True)", None),
        (
            "keep_tokens: 40",
            "keep_tokens: 0",
            "r.yaml:9:5: layers[1].keep_tokens: should be greater than or equal",
            None,
        ),
        ("keep_tokens: 40", "keep_tokens: 4.5", "layers[1].keep_tokens: should be a valid integer (it is 4.5)", None),
        ("layer: 0", "layer: -1", "layers[0].layer: should be greater than or equal to 0 (it is -1)", None),
        (
            "drop_ratio: 0.2",
            "drop_ratio: 0.2, keep_tokens: 3",
            "layers[0]: give exactly one of drop_ratio, keep_tokens and keep_grid",
            None,
        ),
        (", drop_ratio: 0.2", "", "layers[0]: give exactly one of drop_ratio, keep_tokens", None),
        ("{layer: 0, drop_ratio: 0.2}", "{drop_ratio: 0.2}", "r.yaml:7:5: the key layers[0].layer is missing", None),
        ("{layer: 0, drop_ratio: 0.2}", "0", "r.yaml:7:5: layers[0]: should be a", None),
    ],
)
def test_errors_name_their_place(old: str, new: str, message: str, hint: str | None) -> None:
    assert old in GOOD
    error = failure(GOOD.replace(old, new, 1))
    assert message in error.message
    assert hint is None or hint in (error.hint or "")
    assert error.exit_code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version: 1\nlayers: []\n", "r.yaml:2:1: layers: is empty: name at least one layer"),
        ("version: 1\n", "the key layers is missing"),
        ("version: 1\nlayers: 3\n", "r.yaml:2:1: layers: should be a list, such as"),
        ("version: 1\nlayers: {layer: 0}\n", "r.yaml:2:1: layers: should be a list"),
        ("- 1\n- 2\n", "r.yaml:1:1: a recipe is a mapping with the keys version"),
        ("", "r.yaml:1:1: a recipe is a mapping"),
        ("just words", "r.yaml:1:1: a recipe is a mapping"),
        ("version: 1\nlayers: [{layer: 0\n", "r.yaml:3:1: this is not YAML"),
        ("version: 1\n\tlayers: 1\n", "r.yaml:2:1: this is not YAML: found character '\\t'"),
        (
            "a: !!python/object/apply:os.system [ls]\n",
            "r.yaml:1:4: this is not YAML: could not determine a constructor",
        ),
        ("version: 1\nversion: 1\nlayers: []\n", "r.yaml:2:1: the key version is given twice"),
        ("version: 1\nlayers:\n  - {layer: 0, layer: 1}\n", "r.yaml:3:16: the key layers[0].layer is given twice"),
        ("version: 1\nlayers: &a [*a]\n", "layers[0]: should be a"),
        ("version: 1\n? [a]\n: 1\n", "this is not YAML"),
        ("version: 1\nlayers: [{layer: 0, drop_ratio: 0.1}]\n7: 8\n", "r.yaml:3:1: unknown key 7"),
        ("a: \x00", "this is not YAML"),
        pytest.param("a" * (1 << 24) + "\n", "r.yaml has 16777217 characters, which are too many", id="too long"),
        ("version: 1\n---\nversion: 1\n", "r.yaml:2:1: this is not YAML: but found another document"),
    ],
)
def test_text_that_is_not_a_recipe(text: str, message: str) -> None:
    assert message in failure(text).message


def test_a_long_value_is_shortened() -> None:
    error = failure(f"version: 1\nlayers: [{{layer: 0, drop_ratio: {'x' * 4000}}}]\n")
    assert "(it is 'xxx" in error.message
    assert len(error.message) < 160


BUDGET = "version: 1\nreducer: {kind: prune}\nbudget: {macs: 0.65}\n"


class TestBudget:
    @pytest.mark.parametrize(
        ("text", "target"),
        [
            ("macs: 0.65", "macs=0.65"),
            ("latency: 0.6", "latency=0.6"),
            ("agreement: 0.99", "agreement=0.99"),
            ("agreement: 1", "agreement=1"),
            ("max_drop: 0", "max-drop=0"),
            ("max_drop: 0.123456789", "max-drop=0.123456789"),
        ],
    )
    def test_it_replaces_the_layers(self, text: str, target: str) -> None:
        recipe = Recipe.parse(BUDGET.replace("macs: 0.65", text))
        assert recipe.layers == ()
        assert str(recipe.budget) == target
        assert str(SearchTarget.parse(target)) == target

    @pytest.mark.parametrize(
        ("old", "new", "message", "hint"),
        [
            (
                "{macs: 0.65}",
                "{mac: 0.65}",
                "r.yaml:3:10: unknown key budget.mac",
                "Did you mean macs? Allowed keys: mac",
            ),
            ("{macs: 0.65}", "{max-drop: 0.5}", "r.yaml:3:10: unknown key budget.max-drop", "Did you mean max_drop?"),
            ("{macs: 0.65}", "{}", "r.yaml:3:1: budget: give exactly one of macs, latency, agreement, max_drop", None),
            ("0.65}", "0.65, latency: 0.6}", "r.yaml:3:1: budget: give exactly one of macs", None),
            ("{macs: 0.65}", "0.65", "r.yaml:3:1: budget: should be a mapping with one key, such as {macs:", None),
            ("0.65", "1.0", "r.yaml:3:10: budget.macs: should be less than 1 (it is 1.0)", None),
            ("0.65", "0", "r.yaml:3:10: budget.macs: should be greater than 0 (it is 0)", None),
            ("0.65", "half", "r.yaml:3:10: budget.macs: should be a valid number (it is 'half')", None),
            ("macs: 0.65", "latency: 1.5", "r.yaml:3:10: budget.latency: should be less than 1", None),
            ("macs: 0.65", "agreement: 1.1", "budget.agreement: should be less than or equal to 1", None),
            ("macs: 0.65", "agreement: 0", "budget.agreement: should be greater than 0", None),
            ("macs: 0.65", "max_drop: 100", "budget.max_drop: should be less than 100", None),
            ("macs: 0.65", "max_drop: -1", "budget.max_drop: should be greater than or equal to 0", None),
            (
                "budget:",
                "layers: [{layer: 0, drop_ratio: 0.5}]\nbudget:",
                "r.yaml:4:1: budget: give exactly one of layers and budget",
                None,
            ),
            ("budget:", "layers: []\nbudget:", "r.yaml:3:1: layers: is empty", None),
            ("budget: {macs: 0.65}", "", "r.yaml:1:1: the key layers is missing; give it, or budget: {macs", None),
        ],
    )
    def test_errors_name_their_place(self, old: str, new: str, message: str, hint: str | None) -> None:
        assert old in BUDGET
        error = failure(BUDGET.replace(old, new, 1))
        assert message in error.message
        assert hint is None or hint in (error.hint or "")
        assert error.exit_code == 2

    def test_as_yaml_and_back(self) -> None:
        recipe = Recipe.parse(BUDGET)
        written = recipe.to_yaml()
        assert "layers" not in written
        assert Recipe.parse(written).model_dump() == recipe.model_dump()


def test_aliases_are_not_expanded() -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]" for n in range(1, 40)]
    assert "unknown key a0" in failure("\n".join(lines)).message


@given(st.text(max_size=80))
def test_any_text_is_a_recipe_or_a_recipe_error(text: str) -> None:
    try:
        Recipe.parse(text, "r.yaml")
    except RecipeError as error:
        assert error.message.startswith("r.yaml")


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("{kind: mlp}", r"r\.yaml:3:42: layers\[0\]\.metric\.kind: unknown metric 'mlp'"),
        ("{kind: random, sed: 3}", r"r\.yaml:3:56: unknown key layers\[0\]\.metric\.sed"),
        ("{kind: token_norm, polarity: up}", r"r\.yaml:3:60: layers\[0\]\.metric\.polarity: should be"),
    ],
)
def test_errors_in_the_metric_of_a_layer_name_their_place(metric: str, message: str) -> None:
    text = f"version: 1\nlayers:\n  - {{layer: 0, drop_ratio: 0.2, metric: {metric}}}\n"
    with pytest.raises(RecipeError, match=message):
        check_components(Recipe.parse(text, "r.yaml"))


@given(st.sampled_from(["version", "metric", "reducer", "layers", "model", "description"]), json_like)
def test_any_value_of_a_key_is_valid_or_a_recipe_error(key: str, value: object) -> None:
    data = {**yaml.safe_load(GOOD), key: value}
    try:
        Recipe.parse(yaml.safe_dump(data), "r.yaml")
    except RecipeError as error:
        assert key in error.message


class TestLoad:
    def test_file(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.yaml"
        path.write_text(GOOD, encoding="utf-8")
        assert Recipe.load(path).place.at(("layers", 1)) == f"{path}:8:5"

    def test_shipped_name_with_and_without_suffix(self) -> None:
        assert Recipe.load("deit_small_paper").text == Recipe.load("deit_small_paper.yaml").text

    def test_unknown_name_has_a_nearest_match(self) -> None:
        with pytest.raises(RecipeError, match="no recipe deit_smal_paper") as caught:
            Recipe.load("deit_smal_paper")
        assert "Did you mean deit_small_paper?" in str(caught.value)

    def test_a_path_is_never_a_shipped_name(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="no such file"):
            Recipe.load(tmp_path / "deit_small_paper.yaml")

    def test_folder(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="is a folder, not a recipe"):
            Recipe.load(tmp_path)

    def test_text_in_place_of_a_name(self) -> None:
        with pytest.raises(RecipeError, match="no such file"):
            Recipe.load(GOOD * 50)

    def test_not_text(self, tmp_path: Path) -> None:
        path = tmp_path / "r.yaml"
        path.write_bytes(b"\xff\xfe\x00\x9f")
        with pytest.raises(RecipeError, match="is not text"):
            Recipe.load(path)


def test_to_yaml_reads_back_as_the_same_recipe() -> None:
    recipe = Recipe.parse(GOOD)
    again = Recipe.parse(recipe.to_yaml())
    assert again.model_dump() == recipe.model_dump()
    assert "null" not in recipe.to_yaml()


@pytest.mark.parametrize(
    ("blocks", "layers"), [(12, [0, 3, 6]), (24, [0, 6, 12]), (4, [0, 1, 2]), (1, [0]), (2, [0, 1])]
)
def test_the_default_recipe_is_the_papers_scaled(blocks: int, layers: list[int]) -> None:
    recipe = default_recipe(blocks)
    assert [drop.layer for drop in recipe.layers] == layers
    assert {drop.drop_ratio for drop in recipe.layers} == {0.2}
    assert len(build_metric(recipe.metric).variants()) == 42


def test_nearest() -> None:
    assert nearest("prun", ["prune", "merge"]) == "Did you mean prune? "
    assert nearest("xyz", ["prune", "merge"]) == ""


REDUCERS = {"bipartite", "fuse", "merge", "prune", "vid_tldr"}


class TestParts:
    def test_an_alias_of_a_type_is_not_a_member(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Before Python 3.11 `isinstance(tuple[int, int], type)` is true, and then `issubclass` fails."""
        monkeypatch.setattr("repshift_cli.reduction.reducers.prune.Pair", tuple[int, int], raising=False)
        assert set(reducer_kinds()) == REDUCERS

    def test_registries_have_one_member_per_file(self) -> None:
        scores = {"attention_entropy", "class_attention", "fitted", "random", "representation_shift", "token_norm"}
        assert set(metric_kinds()) == scores
        assert set(reducer_kinds()) == REDUCERS

    def test_the_spec_of_a_metric_builds_it_again(self) -> None:
        for kind in metric_kinds().values():
            for variant in kind().variants():
                assert build_metric(variant.spec()) == variant

    @pytest.mark.parametrize(
        ("fixed", "count"),
        [
            ({}, 42),
            ({"polarity": "largest"}, 21),
            ({"operation": "block"}, 6),
            ({"operation": "block", "reading": "literal"}, 6),
            ({"operation": "mlp", "distance": "l2", "reading": "update", "polarity": "smallest"}, 1),
        ],
    )
    def test_variants_fill_only_open_fields(self, fixed: dict[str, str], count: int) -> None:
        recipe = Recipe.parse(GOOD.replace("  operation: mlp", "".join(f"  {k}: {v}\n" for k, v in fixed.items())))
        variants = build_metric(recipe.metric).variants()
        assert len(set(variants)) == len(variants) == count
        assert all(variant.spec().options.items() >= fixed.items() for variant in variants)
        assert all(len(variant.variants()) == 1 for variant in variants)

    def test_defaults_are_those_of_the_paper(self) -> None:
        recipe = Recipe.parse("version: 1\nlayers: [{layer: 0, drop_ratio: 0.5}]")
        assert str(build_metric(recipe.metric).with_defaults()) == "representation_shift (mlp, l2, update, largest)"

    @pytest.mark.parametrize("seed", ["-1", "2147483648", "1.5", "x"])
    def test_seed_of_random(self, seed: str) -> None:
        text = GOOD.replace("kind: representation_shift", "kind: random").replace("operation: mlp", f"seed: {seed}")
        assert "metric.seed" in failure(text).message


def test_shipped_recipes_are_those_in_the_repository() -> None:
    folder = ROOT / "recipes"
    assert sorted(shipped_recipes()) == sorted(path.stem for path in folder.glob("*.yaml"))
    assert len(shipped_recipes()) >= 3
