from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from paths import ROOT
from tiny import DEPTH, tiny_vit
from tiny_cnn import tiny_cnn

from repshift_cli.errors import RecipeError
from repshift_cli.planning.recipe import LayerDrop, Recipe, scaled_recipe, shipped_recipes
from repshift_cli.planning.resolve import resolve
from repshift_cli.reduction.checks import check_components
from repshift_cli.reduction.families.base import match
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
            "layers[0]: give exactly one of drop_ratio, drop_tokens, keep_tokens and keep_grid",
            None,
        ),
        (", drop_ratio: 0.2", "", "layers[0]: give exactly one of drop_ratio, drop_tokens", None),
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
            ("recall: 0.99", "recall@10=0.99"),
            ("recall: 0.99, k: 5", "recall@5=0.99"),
            ("cosine: 0.98", "cosine=0.98"),
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
            ("macs: 0.65", "macs: 0.65, k: 3", "budget: k is the number of neighbours of recall", None),
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


LAYER = "layers: [{layer: 0, drop_ratio: 0.2}]\n"


class TestShortForms:
    @pytest.mark.parametrize(
        ("text", "layers"),
        [
            ("layers: [{layer: '3', drop_ratio: 0.2}]", [(3, 0.2)]),
            ("drop_ratio: 0.2\nlayers: [0, '3', blocks.6]", [(0, 0.2), (3, 0.2), ("blocks.6", 0.2)]),
            ("drop_ratio: 0.2\nlayers: [0, {layer: 3, drop_ratio: 0.5}, {layer: 6}]", [(0, 0.2), (3, 0.5), (6, 0.2)]),
            ("drop_ratios: [0.2, 0, 0.0, 0.5]", [(0, 0.2), (3, 0.5)]),
        ],
    )
    def test_they_are_written_out(self, text: str, layers: list[tuple[object, float]]) -> None:
        recipe = Recipe.parse(f"version: 1\n{text}\n")
        assert [(drop.layer, drop.drop_ratio) for drop in recipe.layers] == layers
        assert Recipe.parse(recipe.to_yaml()).model_dump() == recipe.model_dump()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("layers: [0, 3]", "r.yaml:2:10: layers[0]: should be a mapping, such as {layer: 0, drop_ratio: 0.2}; an"),
            ("layers: [{layer: all, drop_ratio: 0.2}]", "2:11: layers[0].layer: should be the index of one block"),
            ("layers: [{layer: '03', drop_ratio: 0.2}]", "layers[0].layer: should be the index of one block"),
            ("drop_ratio: 2\nlayers: [0]", "r.yaml:2:1: drop_ratio: should be less than 1 (it is 2)"),
            (f"drop_ratio: 0.2\n{LAYER}", "drop_ratio is for entries of layers without an amount, and there are none"),
            ("drop_ratio: 0.2\nbudget: {macs: 0.5}", "drop_ratio is for entries of layers without an amount"),
            ("drop_ratios: [0.2, 1.5]", "r.yaml:2:20: drop_ratios[1]: should be less than 1 (it is 1.5)"),
            ("drop_ratios: 0.2", "r.yaml:2:1: drop_ratios: should be a list of numbers (it is 0.2)"),
            ("drop_ratios: [0, 0]", "drop_ratios drops nothing"),
            ("drop_ratios: [true]", "drop_ratios[0]: should be a valid number (it is True)"),
            (f"drop_ratios: [0.2]\n{LAYER}", "give exactly one of drop_ratios, layers (with drop_ratio) and budget"),
            ("layers: [{layer: 0, keep_grid: 3}]", "layers[0].keep_grid: should be a list of numbers (it is 3)"),
        ],
    )
    def test_errors(self, text: str, message: str) -> None:
        assert message in failure(f"version: 1\n{text}\n").message

    def test_a_schedule_replaces_the_layers(self) -> None:
        text = f"version: 1\n{LAYER}schedules:\n  a: [3, 0, 2]\n  b: [15, 1]\n"
        assert Recipe.parse(text).layers[0].drop_ratio == 0.2
        layout = match(tiny_vit()).layout(tiny_vit())
        plan = resolve(Recipe.parse(f"{text}schedule: a\n"), layout)
        assert [(site.layer, site.tokens_in, site.tokens_out) for site in plan.sites] == [(0, 17, 14), (2, 14, 12)]
        with pytest.raises(RecipeError, match=r"r:5:3: layers\[1\]: nothing is left after blocks\.1"):
            resolve(Recipe.parse(f"{text}schedule: b\n", "r"), layout)

    def test_errors_of_schedules(self) -> None:
        errors = [
            ("schedules: {a: [1]}\nschedule: b", "unknown schedule 'b': allowed are a"),
            (f"{LAYER}schedule: [a]", "unknown schedule ['a']: the recipe has no schedules"),
            (
                "schedules: {a: [1, -2]}\nschedule: a",
                "r.yaml:2:20: schedules.a[1]: should be greater than or equal to 0",
            ),
            ("schedules: {a: 3}\nschedule: a", "r.yaml:2:13: schedules.a: should be a list of numbers (it is 3)"),
            ("schedules: {a: [0]}\nschedule: a", "the schedule a drops nothing"),
            ("schedules: {a: []}", "the key layers is missing"),
            ("schedules: {a: [1]}\nschedule: a\ndrop_ratio: 0.2", "drop_ratio is for entries of layers without"),
        ]
        for text, message in errors:
            assert message in failure(f"version: 1\n{text}\n").message

    def test_a_schedule_of_a_shipped_recipe_is_part_of_its_name(self) -> None:
        recipe = Recipe.load("umt_base_vidtldr:activitynet")
        assert [(drop.layer, drop.drop_tokens) for drop in recipe.layers] == [(0, 500)]
        assert Recipe.parse(recipe.text).layers == recipe.layers
        assert Recipe.parse(recipe.to_yaml()).layers == recipe.layers
        for name in ("umt_base_vidtldr:", "umt_base_vidtldr:x\ny", "umt_base_paper:msvd"):
            with pytest.raises(RecipeError, match="unknown schedule"):
                Recipe.load(name)

    def test_there_is_one_ratio_per_block(self) -> None:
        layout = match(tiny_vit()).layout(tiny_vit())
        assert layout.blocks == DEPTH
        plan = resolve(Recipe.parse("version: 1\ndrop_ratios: [0.5, 0, 0.5, 0]\n"), layout)
        assert [(site.layer, site.tokens_out) for site in plan.sites] == [(0, 9), (2, 5)]
        with pytest.raises(RecipeError, match=r"r:2:1: drop_ratios has 3 numbers, and the model has 4 blocks"):
            resolve(Recipe.parse("version: 1\ndrop_ratios: [0.5, 0, 0.5]\n", "r"), layout)

    def test_blocks_of_a_cnn_that_are_no_sites_count(self) -> None:
        layout = match(tiny_cnn()).layout(tiny_cnn())
        assert layout.blocks == len(layout.sites) + len(layout.barred) // 2

    @given(st.lists(st.floats(0, 0.99) | st.integers(-1, 1) | json_like, max_size=6), st.booleans())
    def test_any_list_is_valid_or_a_recipe_error(self, values: list[object], several: bool) -> None:
        data = {"version": 1, **({"drop_ratios": values} if several else {"drop_ratio": 0.2, "layers": values})}
        try:
            recipe = Recipe.parse(yaml.safe_dump(data), "r.yaml")
        except RecipeError as error:
            assert error.message.startswith("r.yaml")
        else:
            assert all(0 < (drop.drop_ratio or 0.5) < 1 for drop in recipe.layers)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version: 1\n~: 3\n", "r.yaml:2:1: unknown key ~: keys are names"),
        ("version: 1\nlayers: [{~: 3}]\n", "r.yaml:2:11: unknown key layers[0].~: keys are names"),
        ("1.5: 3\n", "r.yaml:1:1: unknown key 1.5: keys are names"),
        ("description: !!timestamp bad\n", "r.yaml:1:14: this is not YAML: could not determine a constructor"),
        ("round_tokens: !!int ''\n", "this is not YAML: could not determine a constructor"),
        ("version: 1\nround_tokens: 1" + ":59" * 5000, "round_tokens: should be a valid integer (it is '1:59:"),
        ("version: 1\nround_tokens: 1" + ":59" * 5000 + ".5", "r.yaml: this is not YAML: int too large"),
        ("version: 1\nround_tokens: " + "9" * 5000, "round_tokens: should be a valid integer (it is '999"),
        (f"version: 1\nlayers: [{{layer: 0, drop_ratio: {'9' * 5000}.0}}]", "should be less than 1 (it is inf)"),
        ("- a\n" * 100_000, "r.yaml:20000:3: this is not YAML: more than 20000 values"),
        ("- " * 100_000, "this is not YAML: maximum recursion depth"),
        (
            "\n".join(["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 60))]),
            "unknown key a0",
        ),
        (
            "\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60)), "? *a59"]),
            "unhash",
        ),
    ],
    ids=lambda value: value[:20],
)
def test_yaml_that_is_no_recipe_ends_soon(text: str, message: str) -> None:
    assert message in failure(text).message


def test_a_date_and_a_time_are_texts() -> None:
    for text in ("2020-01-01", "12:30"):
        assert Recipe.parse(f"version: 1\ndescription: {text}\n{LAYER}").description == text


class TestLoad:
    def test_a_pipe_is_read_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        writer = threading.Thread(target=pipe.write_text, args=(GOOD,))
        writer.start()
        assert Recipe.load(pipe).text == Recipe.load(pipe).text == GOOD
        writer.join()
        monkeypatch.setattr("repshift_cli.utils.files.PIPE_SECONDS", 0.1)
        os.mkfifo(tmp_path / "silent")
        with pytest.raises(RecipeError, match=r"silent: has no end after 0\.1 s"):
            Recipe.load(tmp_path / "silent")

    def test_a_device_without_end(self) -> None:
        with pytest.raises(RecipeError, match="/dev/zero: has more than the maximum"):
            Recipe.load("/dev/zero")

    def test_a_name_that_is_not_utf8(self, tmp_path: Path) -> None:
        path = tmp_path / os.fsdecode(b"r\xff.yaml")
        path.write_text(GOOD, encoding="utf-8")
        assert Recipe.load(path).place.name.endswith("r\\udcff.yaml")

    def test_file(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.yaml"
        path.write_text(GOOD, encoding="utf-8")
        assert Recipe.load(path).place.at(("layers", 1)) == f"{path}:8:5"

    def test_shipped_name_with_and_without_suffix(self) -> None:
        assert Recipe.load("deit_small_paper").text == Recipe.load("deit_small_paper.yaml").text

    @pytest.mark.parametrize("name", ["blocks.3", "layer1.0", "block4"])
    def test_a_layer_has_the_name_of_its_module(self, name: str) -> None:
        recipe = Recipe.parse(
            f"version: 1\nmetric: {{kind: token_norm}}\nlayers: [{{layer: {name}, drop_ratio: 0.2}}]\n"
        )
        assert recipe.layers[0].layer == name

    def test_unknown_name_has_a_nearest_match(self) -> None:
        with pytest.raises(RecipeError, match="no recipe deit_smal_paper") as caught:
            Recipe.load("deit_smal_paper")
        assert "Did you mean deit_small_paper?" in str(caught.value)

    def test_the_recipe_that_is_scaled_to_a_model_has_a_command(self) -> None:
        with pytest.raises(RecipeError, match="no recipe default") as caught:
            Recipe.load("default")
        assert "repshift recipes show default --blocks 12" in str(caught.value)

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
def test_the_scaled_recipe_is_the_papers_scaled(blocks: int, layers: list[int]) -> None:
    recipe = scaled_recipe("paper", blocks)
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
        scores |= {"coverage", "grid", "redundancy"}
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
