"""`last_block: exact`: where the head reads prefix tokens only, the last block computes only these."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import export_to, stored
from outcome import Command
from tiny import DEPTH, KEEP_ALL, PATCHES, VARIANTS, images, tiny_vit
from tiny_cnn import tiny_cnn
from torch import Tensor, nn

import repshift_cli
from repshift_cli.checkpoints import artifact
from repshift_cli.errors import RecipeError
from repshift_cli.measure.compiled import Compiled, fresh_graphs
from repshift_cli.measure.macs import count_macs
from repshift_cli.models.attention_mode import attention_mode
from repshift_cli.planning.recipe import Recipe
from repshift_cli.reduction.compressed_model import CompressedModel, attach
from repshift_cli.reduction.families.base import match
from repshift_cli.reduction.permute import TOLERANCE, permute_difference
from repshift_cli.reduction.plans import resolve_for

LAYERS = "[{layer: 0, drop_ratio: 0.25}, {layer: 2, keep_tokens: 5}]"
EXACT = ("plain", "distilled", "registers", "qk_norm", "post_norm_block")
FULL = ("mean_pooling_with_class_token", "map_pooling_with_prefix", "parallel_scaling_block", "differential_attention")

pytestmark = pytest.mark.filterwarnings("ignore:.*not calibrated")


def recipe(last_block: str = "", layers: str = LAYERS, reducer: str = "prune") -> Recipe:
    line = f"last_block: {last_block}\n" if last_block else ""
    return Recipe.parse(
        f"version: 1\n{line}metric: {{kind: token_norm}}\nreducer: {{kind: {reducer}}}\nlayers: {layers}\n"
    )


def reduced(model: nn.Module, *options: str) -> CompressedModel:
    return attach(model, resolve_for(model, recipe(*options)))


def both(**variant: Any) -> tuple[CompressedModel, CompressedModel]:
    """The model with an exact and with a full last block."""
    return reduced(tiny_vit(**variant)), reduced(tiny_vit(**variant), "full")


def tokens_of_last_block(model: CompressedModel, run: Callable[[], Any]) -> int:
    seen: list[int] = []
    block = model.model.get_submodule(f"blocks.{DEPTH - 1}")
    handle = block.register_forward_hook(lambda _, args, output: seen.append(output.shape[1]))
    run()
    handle.remove()
    return seen[0]


@torch.no_grad()
@pytest.mark.parametrize("name", EXACT)
def test_outputs_and_costs(name: str) -> None:
    for reducer in ("prune", "merge"):
        made = (tiny_vit(**VARIANTS[name]) for _ in range(2))
        exact, full = (reduced(model, last, LAYERS, reducer) for model, last in zip(made, ("", "full"), strict=True))
        assert (exact.plan.last_block, full.plan.last_block) == ("exact", "full")
        torch.testing.assert_close(exact(images(3)), full(images(3)), rtol=0, atol=1e-5)
        with attention_mode(exact, "explicit"):
            torch.testing.assert_close(exact(images(1)), full(images(1)), rtol=0, atol=1e-5)
        prefix, entering = exact.plan.prefix_tokens, exact.plan.tokens_at(DEPTH)[-2]
        width, tokens = 32, entering - prefix
        # of each patch token: query, projection, both layers of the MLP, and its row of the attention
        assert full.macs() - exact.macs() == tokens * (2 * width**2 + 8 * width**2 + 2 * entering * width)
        assert reducer != "prune" or count_macs(exact, (3, 32, 32)) == exact.macs()
        assert tokens_of_last_block(exact, partial(exact, images())) == prefix


@torch.no_grad()
def test_gates_and_norms_of_the_attention() -> None:
    exact, full = both(scale_attn_norm=True)
    for model in (exact, full):
        for index, block in enumerate(model.model.get_submodule("blocks").children()):
            gate = block.get_submodule("attn").gate = nn.Linear(32, 32)
            nn.init.constant_(gate.weight, 0.01 * (1 + index))
            nn.init.zeros_(gate.bias)
    assert exact.plan.last_block == "exact"
    torch.testing.assert_close(exact(images()), full(images()), rtol=0, atol=1e-5)


def test_models_that_read_more_are_full() -> None:
    for name in FULL:
        model = tiny_vit(**VARIANTS[name])
        assert resolve_for(model, recipe()).last_block == "full", name
        with pytest.raises(RecipeError, match=r"recipe:2:1: last_block: exact is not possible: "):
            resolve_for(model, recipe("exact"))
    subclass = type("Pooled", (type(tiny_vit()),), {})
    changed = tiny_vit()
    changed.__class__ = subclass
    assert resolve_for(changed, recipe()).last_block == "full"


@torch.no_grad()
def test_without_dropped_tokens_it_is_full() -> None:
    model = tiny_vit()
    assert resolve_for(model, recipe(layers=KEEP_ALL)).last_block == "full"
    wanted = tiny_vit()(images())
    kept = reduced(model, "exact", KEEP_ALL)
    torch.testing.assert_close(kept(images()), wanted, rtol=0, atol=1e-5)
    assert kept.macs() < kept.dense_macs()
    with kept.dense() as dense:
        assert torch.equal(dense(images()), wanted)
    assert torch.equal(kept.detach()(images()), wanted)


@pytest.mark.parametrize(
    ("line", "layers", "reason"),
    [
        ("", "[{layer: 3, keep_tokens: 5}]", "tokens are dropped after it, at blocks.3"),
        ("restore: true", LAYERS, "restore puts tokens back behind it"),
    ],
)
def test_plans_that_need_the_whole_block(line: str, layers: str, reason: str) -> None:
    model = tiny_vit()
    text = f"version: 1\nmetric: {{kind: token_norm}}\nlayers: {layers}\n{line}\n"
    plan = resolve_for(model, Recipe.parse(text))
    assert plan.last_block == "full"
    with pytest.raises(RecipeError, match=reason):
        resolve_for(model, Recipe.parse(text + "last_block: exact\n"))
    with pytest.raises(RecipeError, match=reason):
        attach(model, plan.model_copy(update={"last_block": "exact"}))


def test_other_families_are_refused() -> None:
    layers = "[{layer: layer1.1, drop_ratio: 0.2}]"
    with pytest.raises(RecipeError, match="not supported for models of the family resnet") as caught:
        resolve_for(tiny_cnn(), recipe("exact", layers))
    assert "Use full" in str(caught.value.hint)
    assert resolve_for(tiny_cnn(), recipe("full", layers)).last_block == "full"
    with pytest.raises(RecipeError, match=r"recipe:2:1: last_block: should be 'exact' or 'full' \(it is 'half'\)"):
        recipe("half")


class TestOtherCalls:
    """The last block is full where more than the output of the head is asked for, or could be."""

    @torch.no_grad()
    def test_features(self) -> None:
        exact, full = both()
        entering = exact.plan.tokens_at(DEPTH)[-2]
        for inputs in (images(), images(1)):
            assert torch.equal(exact.forward_features(inputs), full.forward_features(inputs))
            exact(inputs)
        assert tokens_of_last_block(exact, lambda: exact.forward_features(images())) == entering
        logits: Tensor = exact.model.forward_head(exact.forward_features(images()))  # type: ignore[operator]
        torch.testing.assert_close(logits, exact(images()), rtol=0, atol=1e-5)

    def test_training_and_checkpointing(self) -> None:
        exact, full = both()
        entering = exact.plan.tokens_at(DEPTH)[-2]
        assert tokens_of_last_block(exact.train(), lambda: exact(images())) == entering
        exact.eval().model.set_grad_checkpointing(True)  # type: ignore[operator]
        exact(images()).sum().backward()
        full(images()).sum().backward()
        wanted = dict(full.model.named_parameters())
        for name, parameter in exact.model.named_parameters():
            torch.testing.assert_close(parameter.grad, wanted[name].grad, msg=name)

    @torch.no_grad()
    def test_another_pooling_and_causal_attention(self) -> None:
        exact, full = both()
        assert torch.equal(exact(images(), is_causal=True), full(images(), is_causal=True))
        for model in (exact, full):
            model.model.reset_classifier(10, "avg")  # type: ignore[operator]
        full.load_state_dict(exact.state_dict())
        assert torch.equal(exact(images()), full(images()))

    @torch.no_grad()
    def test_after_an_exception(self) -> None:
        exact, full = both()
        with pytest.raises(AssertionError):
            exact(images(size=64))
        assert torch.equal(exact.forward_features(images()), full.forward_features(images()))


@torch.no_grad()
def test_a_projection_that_is_more_than_its_weight() -> None:
    """Such as an adapter: `[B, T, C]` is then projected whole."""
    exact, full = both()
    for model in (exact, full):
        layer = model.model.get_submodule(f"blocks.{DEPTH - 1}.attn.qkv")
        layer.register_forward_hook(lambda _, args, output: 2 * output)
    torch.testing.assert_close(exact(images()), full(images()), rtol=0, atol=1e-5)


@torch.no_grad()
def test_permuted_tokens_give_the_same_output() -> None:
    model = reduced(tiny_vit(), "exact", KEEP_ALL)
    family = match(model.model)
    for site in family.sites(model.model)[:-1]:
        assert permute_difference(model.model, family, images(3), site, None) < TOLERANCE
    assert model.plan.tokens_at(DEPTH)[-2] == PATCHES + 1


class TestCheckpoint:
    def test_versions(self, tmp_path: Path) -> None:
        for last_block, version in (("full", 1), ("exact", 7)):
            compressed = repshift_cli.compress(tiny_vit(), recipe(last_block))
            document = compressed.plan.model_dump()
            assert document.get("last_block") == ("exact" if last_block == "exact" else None)
            made = artifact.open_model(stored(version)).compressed
            assert made is not None
            assert made.plan.last_block == last_block
        assert made is not None
        copied = copy.deepcopy(made)
        assert torch.equal(copied(torch.ones(1, 3, 24, 24)), made(torch.ones(1, 3, 24, 24)))

    def test_the_recipe_of_a_checkpoint_states_what_is_not_the_default(self, cli: Command) -> None:
        assert "last_block: full" in cli("recipes", "show", stored(1), "--calibrated").stdout
        assert "last_block" not in cli("recipes", "show", stored(7), "--calibrated").stdout

    def test_it_is_shown(self, cli: Command) -> None:
        assert "last block: exact" in cli("inspect", stored(7)).stdout
        assert '"last_block": "exact"' in cli("inspect", stored(7), "--json").stdout
        assert "last block" not in cli("inspect", stored(1)).stdout
        assert "last block: prefix tokens only" in repr(reduced(tiny_vit()))

    @pytest.mark.slow
    def test_a_new_process(self) -> None:
        path = str(stored(7))
        code = (
            "import repshift_cli, sys, torch; print(repshift_cli.load(sys.argv[1])(torch.ones(1, 3, 24, 24)).tolist())"
        )
        done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
        with torch.no_grad():
            assert str(repshift_cli.load(path)(torch.ones(1, 3, 24, 24)).tolist()) == done.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "pt2"])
def test_exports(target: str, tmp_path: Path) -> None:
    verdict = export_to(artifact.open_model(stored(7)), target, tmp_path / f"model.{target}").document.verified
    assert verdict is not None
    assert verdict.passed
    if target == "onnx":
        import onnx

        # keys and values of all tokens in one product, everything else of the class token
        inferred = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "model.onnx"))
        shapes = {value.name: value.type.tensor_type.shape.dim for value in inferred.graph.value_info}
        made = [
            [dim.dim_value for dim in shapes[node.output[0]]][1:]
            for node in inferred.graph.node
            if "Gelu" in node.op_type
        ]
        assert made == [[10, 64], [1, 64]]


@pytest.mark.slow
@torch.inference_mode()
def test_compiled() -> None:
    exact, full = both()
    with fresh_graphs():
        compiled = Compiled("exact", exact, "default")
        compiled.first(images())
        torch.testing.assert_close(compiled(images()), full(images()), rtol=0, atol=1e-5)
