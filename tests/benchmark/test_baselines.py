"""Baselines cost as much as the compressed model, share its weights, and compute what their names say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny import DEPTH, images, make_plan, make_recipe, tiny_vit
from tiny_cnn import tiny_cnn
from tiny_vim import tiny_vim
from torch import nn

from repshift_cli.benchmark.baselines import contenders_against
from repshift_cli.benchmark.run import BenchSettings, Contender, run_bench
from repshift_cli.checkpoints.artifact import Opened
from repshift_cli.checkpoints.loaded import LoadedModel, ModelDescription
from repshift_cli.checkpoints.weights import Source
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import UsageError
from repshift_cli.measure.macs import count_macs
from repshift_cli.planning.recipe import ComponentSpec, Recipe
from repshift_cli.reduction.baselines import BASELINES, shared_copy
from repshift_cli.reduction.compressed_model import CompressedModel, attach
from repshift_cli.reduction.plans import resolve_for
from repshift_cli.utils.progress import Silent

ALL = tuple(BASELINES)
LAYERS = "[{layer: 1, drop_ratio: 0.25}, {layer: 3, drop_ratio: 0.5}]"


def opened(model: nn.Module, recipe: Recipe | None = None, last_block: str = "full") -> Opened:
    plan = resolve_for(model, recipe or make_recipe(LAYERS)).model_copy(update={"last_block": last_block})
    how = Preprocessing((3, 32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9)
    loaded = LoadedModel(model, ModelDescription("tiny", None, {}, how), Source("random", None, None), {})
    return Opened(loaded, attach(model, plan))


def contenders(model: nn.Module, names: tuple[str, ...] = ALL, recipe: Recipe | None = None) -> dict[str, Contender]:
    return {each.name: each for each in contenders_against({"tiny": opened(model, recipe)}, names)}


@contextmanager
def block_inputs(model: nn.Module) -> Iterator[list[int]]:
    """Numbers of tokens that enter each block."""
    seen: list[int] = []
    handles = [
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1])) for block in model.blocks
    ]
    yield seen
    for handle in handles:
        handle.remove()


def tokens(contender: Contender) -> list[int]:
    module: Any = contender.module
    with contender.context(), torch.inference_mode(), block_inputs(module.model) as seen:
        module(images())
    return seen


class TestCounts:
    def test_the_same_tokens_at_the_same_sites(self) -> None:
        found = contenders(tiny_vit())
        assert list(found) == ["dense", "compressed", *(name for name in ALL if name != "dense")]
        assert tokens(found["dense"]) == tokens(found["explicit"]) == [17] * DEPTH
        for name in ("compressed", "class-attention", "class-attention-row", "bipartite", "fuse", "random"):
            assert tokens(found[name]) == [17, 17, 13, 13], name

    def test_tome_merges_the_same_number_in_every_block(self) -> None:
        recipe = make_recipe("[{layer: 0, drop_ratio: 0.2}, {layer: 1, drop_ratio: 0.2}]")
        found = contenders(tiny_vit(), ("tome",), recipe)
        left = tokens(found["tome"])
        assert {before - after for before, after in pairwise(left)} == {2}
        assert found["tome"].module.plan.tokens_at(DEPTH) == (17, 15, 13, 11, 9)

    def test_tome_does_not_merge_after_an_exact_last_block(self) -> None:
        compressed = opened(tiny_vit(), make_recipe("[{layer: 0, drop_ratio: 0.2}]"), "exact")
        found: Any = {each.name: each.module for each in contenders_against({"tiny": compressed}, ("tome",))}
        plan = found["tome"].plan
        assert plan.last_block == "exact"
        assert [site.layer for site in plan.sites] == [0, 1, 2]

    def test_tome_merges_no_more_than_half(self) -> None:
        found = contenders(tiny_vit(), ("tome",), make_recipe("[{layer: 0, keep_tokens: 1}]"))
        assert tokens(found["tome"]) == [17, 10, 6, 4]  # 16 patches, 7 of them, then halves: 9, 5, 3

    def test_tome_has_the_nearest_macs(self) -> None:
        """No other number of tokens per block has MACs nearer to those of the compressed model."""
        for layers in (LAYERS, "[{layer: 0, drop_ratio: 0.2}]", "[{layer: 0, drop_ratio: 0.6}]"):
            found = contenders(tiny_vit(), ("tome",), make_recipe(layers))
            wanted = found["compressed"].macs
            apart = abs(found["tome"].macs - wanted)
            for count in range(1, 8):
                plan = make_plan(tiny_vit())
                sites, patches = [], 16
                for layer in range(DEPTH):
                    left = patches - min(count, patches // 2)
                    site = plan.sites[0].model_copy(
                        update={
                            "site": f"blocks.{layer}",
                            "layer": layer,
                            "tokens_in": 1 + patches,
                            "tokens_out": 1 + left,
                            "metric": ComponentSpec(kind="random"),
                        }
                    )
                    sites.append(site.model_dump())
                    patches = left
                other = type(plan).model_validate(
                    {**plan.model_dump(), "sites": sites, "reducer": {"kind": "bipartite"}}
                )
                assert abs(attach(tiny_vit(), other).macs() - wanted) >= apart


class TestCost:
    def test_equal_up_to_the_score(self) -> None:
        found = contenders(tiny_vit())
        plain = found["compressed"].macs  # its score has no matrix products
        row = 2 * 32 * (17 + 13) // 2  # one query and all keys, at both sites
        assert found["class-attention"].macs == found["class-attention-row"].macs == plain + row
        assert found["fuse"].macs == found["random"].macs == plain
        assert found["bipartite"].macs == plain + 16 * (8 * 8) + 16 * (6 * 6)
        assert found["explicit"].macs == found["dense"].macs

    def test_macs_are_those_of_the_module(self) -> None:
        for name, contender in contenders(tiny_vit()).items():
            with contender.context():
                assert count_macs(contender.module, (3, 32, 32)) == contender.macs, name


class TestWeights:
    def test_parameters_are_shared(self) -> None:
        found = contenders(tiny_vit(init_values=0.3))
        own = dict(found["dense"].module.model.named_parameters())
        for contender in found.values():
            for name, parameter in contender.module.model.named_parameters():
                assert parameter is own[name]

    def test_parameters_are_shared_after_a_change_of_dtype(self) -> None:
        found = contenders(tiny_vit())
        settings = BenchSettings(torch.device("cpu"), torch.bfloat16, seconds=0, min_runs=1, threads=1)
        run_bench(list(found.values()), [1], settings, Silent())
        pointers = {
            name: [parameter.data_ptr() for parameter in each.module.model.parameters()] for name, each in found.items()
        }
        assert all(found_here == pointers["dense"] for found_here in pointers.values())
        assert {parameter.dtype for parameter in found["fuse"].module.model.parameters()} == {torch.bfloat16}

    def test_a_copy_has_its_own_modules(self) -> None:
        model = tiny_vit()
        twin = shared_copy(model)
        assert twin.blocks[0] is not model.blocks[0]
        attach(twin, make_plan(twin))
        assert not any(module._forward_hooks for module in model.modules())
        assert all(one is other for one, other in zip(model.parameters(), twin.parameters(), strict=True))

    def test_the_compressed_model_is_not_changed(self) -> None:
        model = opened(tiny_vit())
        before = model.module(images())
        contenders_against({"tiny": model}, ALL)
        assert torch.equal(model.module(images()), before)


class TestOutputs:
    def test_explicit_attention_in_every_block(self) -> None:
        for name, contender in contenders(tiny_vit()).items():
            seen: list[bool] = []
            module: Any = contender.module
            for block in module.model.blocks:
                block.attn.register_forward_pre_hook(lambda part, args, seen=seen: seen.append(part.fused_attn))
            with contender.context(), torch.inference_mode():
                module(images())
            assert set(seen) == {name not in ("explicit", "class-attention")}, name

    def test_explicit_attention_has_the_outputs_of_dense(self) -> None:
        found = contenders(tiny_vit(), ("explicit",))
        outputs = []
        for name in ("dense", "explicit"):
            with found[name].context(), torch.inference_mode():
                outputs.append(found[name].module(images()))
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)

    def test_both_forms_of_class_attention_keep_the_same_tokens(self) -> None:
        found = contenders(tiny_vit(), ("class-attention", "class-attention-row"))
        traces = []
        for name in ("class-attention", "class-attention-row"):
            module = found[name].module
            assert isinstance(module, CompressedModel)
            with found[name].context():
                traces.append(module.trace(images()).kept)
        assert traces[0].keys() == traces[1].keys()
        assert all(torch.equal(traces[0][layer], traces[1][layer]) for layer in traces[0])

    def test_ratios(self) -> None:
        found = contenders(tiny_vit(), ("tome", "explicit"))
        settings = BenchSettings(torch.device("cpu"), torch.float32, seconds=0, min_runs=1, threads=1)
        report = run_bench(list(found.values()), [1], settings, Silent())
        assert [(ratio.name, ratio.against) for ratio in report.ratios] == [
            ("compressed", "dense"),
            ("compressed", "tome"),
            ("compressed", "explicit"),
            ("tome", "dense"),
            ("explicit", "dense"),
        ]

    def test_several_models_have_their_own_baselines(self) -> None:
        models = {"a": opened(tiny_vit()), "b": opened(tiny_vit(seed=1))}
        names = [each.name for each in contenders_against(models, ("fuse",))]
        assert names == ["tiny dense", "tiny dense 2", "a", "b", "a, fuse", "b, fuse"]


class TestUnsupported:
    def test_unknown(self) -> None:
        with pytest.raises(UsageError, match="unknown baseline 'tomee'") as found:
            contenders_against({"tiny": opened(tiny_vit())}, ["tomee"])
        assert "Did you mean tome?" in str(found.value.hint)

    def test_nothing_is_compressed(self) -> None:
        model = opened(tiny_vit())
        dense = Opened(model.loaded, None)
        with pytest.raises(UsageError, match="no model is compressed"):
            contenders_against({"tiny": dense}, ["tome"])
        assert [each.name for each in contenders_against({"tiny": dense}, ["dense"])] == ["dense"]

    @pytest.mark.parametrize(
        "name", ["explicit", "class-attention", "class-attention-row", "bipartite", "tome", "fuse"]
    )
    def test_on_a_network_without_attention(self, name: str) -> None:
        model = opened(tiny_cnn(), make_recipe("[{layer: layer1.1, drop_ratio: 0.3}]", "{kind: token_norm}"))
        with pytest.raises(UsageError, match=f"--against {name}: unsupported for compressed \\(resnet\\)") as found:
            contenders_against({"tiny": model}, [name])
        assert found.value.hint == "Supported for this model and its plan: dense, random."

    def test_merging_on_vim(self) -> None:
        recipe = make_recipe("[{layer: 0, drop_ratio: 0.25}]", "{kind: token_norm}")
        with pytest.raises(UsageError, match="do not carry how many tokens each stands for"):
            contenders(tiny_vim(), ("bipartite",), recipe)

    def test_more_than_matching_can_merge(self) -> None:
        recipe = make_recipe("[{layer: 1, drop_ratio: 0.75}]")
        with pytest.raises(UsageError, match=r"removes 12 of 16 tokens at blocks\.1; bipartite can remove 8") as found:
            contenders(tiny_vit(), ("bipartite",), recipe)
        assert found.value.hint is not None
        assert "tome" in found.value.hint
        assert "bipartite" not in found.value.hint
