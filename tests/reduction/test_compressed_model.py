"""Compressed ViTs: refusals, copies, traces and merging. All families: `families/test_contract.py`."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from timm.layers import Attention, PatchEmbed
from timm.models.vision_transformer import ParallelScalingBlock
from tiny import (
    DEPTH,
    DROPS,
    KEEP_ALL,
    VARIANTS,
    compressed,
    images,
    make_plan,
    make_recipe,
    save_weights,
    tiny_vit,
)
from tiny_cnn import compressed_cnn, photos, tiny_cnn
from tiny_vim import tiny_vim
from torch import Tensor, nn

from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.errors import ModelError, RecipeError, UsageError
from repshift_cli.measure.macs import count_macs
from repshift_cli.planning.plan import Plan
from repshift_cli.planning.recipe import Recipe
from repshift_cli.reduction.compressed_model import CompressedModel, attach, detach
from repshift_cli.reduction.families.base import match
from repshift_cli.reduction.metrics.base import metric_kinds
from repshift_cli.reduction.plans import has_open_fields, resolve_for
from repshift_cli.reduction.reducers.base import Merged


def tensors_of(model: nn.Module) -> set[str]:
    """The tensors that a block of this model provides to metrics."""
    return {"block_input", "block_output", "patch_place", *match(model).sites(model)[0].probes}


REFUSED = [
    (variant, metric)
    for variant, options in VARIANTS.items()
    for tensors in [tensors_of(tiny_vit(**options))]
    for metric in metric_kinds()
    if not metric_kinds()[metric]().with_defaults().taps() <= tensors
]

each_variant = pytest.mark.parametrize("variant", VARIANTS)


def build(variant: str, metric: str, reducer: str = "prune", layers: str | None = None) -> CompressedModel:
    arguments = (layers,) if layers else ()
    return compressed(
        tiny_vit(**VARIANTS[variant]), make_recipe(*arguments, metric=f"{{kind: {metric}}}", reducer=reducer)
    )


def block_recipe(layers: str | None = None) -> Recipe:
    """A recipe that every kind of block can follow."""
    metric = "{kind: representation_shift, operation: block}"
    return make_recipe(layers, metric) if layers else make_recipe(metric=metric)


def token_counts(model: CompressedModel, batch: Tensor) -> list[int]:
    """Observed numbers of tokens that enter each block, and of those after the last one."""
    seen: list[int] = []
    blocks = model.model.blocks
    handles = [block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1])) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(lambda _, args, output: seen.append(output.shape[1])))
    with torch.no_grad():
        model(batch)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(("variant", "metric"), REFUSED)
def test_a_metric_without_its_tensors_is_refused_with_the_reason(variant: str, metric: str) -> None:
    with pytest.raises(RecipeError, match=rf"{metric} needs \w+, which blocks.0 does not provide: ") as caught:
        build(variant, metric)
    assert "operation: block works on every block" in str(caught.value)


def test_supported_pairs_are_not_refused() -> None:
    assert REFUSED == [
        ("parallel_things_block", "attention_entropy"),
        ("parallel_things_block", "class_attention"),
        ("parallel_things_block", "representation_shift"),
        ("differential_attention", "attention_entropy"),
        ("differential_attention", "class_attention"),
    ]


def test_a_fused_output_projection_has_only_the_whole_block() -> None:
    model = tiny_vit(block_fn=partial(ParallelScalingBlock, fuse_out_proj=True))
    with pytest.raises(RecipeError, match="one matrix product"):
        compressed(model, make_recipe())
    assert token_counts(compressed(model, block_recipe()), images(1)) == [17, 13, 13, 6, 6]


@pytest.mark.parametrize("variant", ["plain", "distilled"])
def test_the_same_weights_under_the_same_keys(variant: str) -> None:
    model = tiny_vit(**VARIANTS[variant])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wrapped = compressed(model, block_recipe())
    after = wrapped.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    other = tiny_vit(seed=5, **VARIANTS[variant])
    wrapped.load_state_dict(other.state_dict())
    with torch.no_grad(), wrapped.dense():
        assert torch.equal(wrapped(images()), other(images()))


def test_dense_ends_after_an_error() -> None:
    model = compressed()
    with torch.no_grad():
        reduced = model(images())
        with pytest.raises(KeyError), model.dense():
            raise KeyError
        assert torch.equal(model(images()), reduced)


def test_dense_inside_dense() -> None:
    model = compressed()
    with model.dense():
        with model.dense():
            pass
        assert token_counts(model, images()) == [17] * 5
    assert token_counts(model, images()) == [17, 13, 13, 6, 6]


def test_detach_inside_dense() -> None:
    model = compressed()
    with model.dense():
        model.detach()
    assert token_counts(model, images()) == [17] * 5


@each_variant
def test_pruning_runs_the_code_of_the_library(variant: str) -> None:
    model = compressed(tiny_vit(**VARIANTS[variant]), block_recipe()).model
    assert [type(part) for part in model.modules()] == [type(part) for part in tiny_vit(**VARIANTS[variant]).modules()]
    assert not any("forward" in vars(part) for part in model.modules())


@pytest.mark.parametrize("grad", [False, True], ids=["without_gradients", "with_gradients"])
def test_no_images(grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        assert compressed()(images()[:0]).shape == (0, 10)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_mapped_over_images() -> None:
    model = compressed()
    with torch.no_grad():
        mapped = torch.vmap(model)(images().unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(mapped, model(images()))


def test_trace_stops_recording_when_the_model_fails() -> None:
    model = compressed()
    with pytest.raises(AssertionError):
        model.trace(images(1, size=24))
    kept = model.trace(images(1)).kept
    model(images(2))
    assert [tuple(index.shape) for index in kept.values()] == [(1, 12), (1, 5)]
    assert all(hook.recorded is None for hook in model._hooks)


def test_trace_returns_what_the_model_returns() -> None:
    model = compressed()
    with torch.no_grad():
        assert torch.equal(model.trace(images()).output, model(images()))


def test_no_tensor_of_a_pass_is_kept() -> None:
    model = compressed()
    model(images())
    assert all(hook.seen == {} for hook in model._hooks)


def test_attaching_twice_is_refused() -> None:
    model = tiny_vit()
    wrapped = compressed(model)
    with pytest.raises(ModelError, match="compressed already"):
        compressed(model)
    with torch.no_grad():
        wanted = tiny_vit()(images())
        assert torch.equal(wrapped.detach()(images()), wanted)


def test_a_copy_made_inside_dense_is_dense() -> None:
    model = compressed()
    with model.dense():
        other = copy.deepcopy(model)
    assert token_counts(other, images()) == [17] * 5
    assert token_counts(model, images()) == [17, 13, 13, 6, 6]


class TestOtherInputs:
    def test_another_image_size_is_refused_by_the_model(self) -> None:
        with pytest.raises(AssertionError, match="doesn't match model"):
            compressed()(images(1, size=40))

    def test_another_number_of_tokens_is_refused_by_the_site(self) -> None:
        model = tiny_vit(pos_embed="none", embed_layer=partial(PatchEmbed, strict_img_size=False))
        wrapped = compressed(model)
        with pytest.raises(UsageError, match=r"blocks\.0 got 26 tokens, but the plan is for 17"):
            wrapped(images(1, size=40))
        assert wrapped(images(1)).shape == (1, 10)

    def test_a_mask_is_refused(self) -> None:
        model = compressed()
        mask = torch.ones(1, 1, 17, 17, dtype=torch.bool)
        with pytest.raises(UsageError, match="attention mask"):
            model(images(1), attn_mask=mask)
        with torch.no_grad(), model.dense():
            torch.testing.assert_close(model(images(1), attn_mask=mask), tiny_vit()(images(1)))

    @pytest.mark.parametrize("family", ["vit", "cnn"])
    @pytest.mark.parametrize("name", ["forward_intermediates", "get_intermediate_layers"])
    def test_feature_maps_of_the_hooked_model_are_refused(self, family: str, name: str) -> None:
        dense, model = (tiny_vit(), compressed()) if family == "vit" else (tiny_cnn(), compressed_cnn())
        inputs = images(1) if family == "vit" else photos(1)
        if not hasattr(dense, name):
            pytest.skip("the family has no such method")
        for hooked in (model.model, copy.deepcopy(model.model), pickle.loads(pickle.dumps(model.model))):
            with pytest.raises(UsageError, match="no dense feature maps"):
                getattr(hooked, name)(inputs)
            assert len(getattr(detach(hooked), name)(inputs)) == len(getattr(dense, name)(inputs))

    def test_dense_feature_maps_are_refused(self) -> None:
        model = compressed()
        with pytest.raises(UsageError, match="no dense feature maps"):
            model.forward_intermediates(images(1))
        with model.dense() as dense:
            _, maps = dense.forward_intermediates(images(1))
        assert [tuple(part.shape) for part in maps] == [(1, 32, 4, 4)] * DEPTH

    @pytest.mark.parametrize("size", [(16, 64), (64, 16), (40, 24)])
    def test_images_that_are_not_square(self, size: tuple[int, int]) -> None:
        model = compressed(tiny_vit(img_size=size), make_recipe("[{layer: 1, keep_tokens: 3}]"))
        kept = model.trace(torch.randn(2, 3, *size)).kept[1]
        assert kept.shape == (2, 3)
        assert int(kept.max()) < size[0] * size[1] // 64


class TestUnsupported:
    def test_another_kind_of_model(self) -> None:
        with pytest.raises(ModelError, match="models of the kind Linear are not supported") as caught:
            match(nn.Linear(2, 2))
        assert "timm_vit" in str(caught.value)

    def test_an_unknown_block(self) -> None:
        class OtherBlock(nn.Module):
            def __init__(self, **_: Any) -> None:
                super().__init__()

        model = tiny_vit(block_fn=OtherBlock)
        with pytest.raises(ModelError, match=r"blocks\.0 is a OtherBlock, which is not supported \(supported: Block, "):
            match(model)

    def test_a_subclass_of_a_known_block_is_refused(self) -> None:
        from timm.models.vision_transformer import Block

        class Changed(Block):
            def forward(self, x: Tensor, **_: Any) -> Tensor:
                return x

        with pytest.raises(ModelError, match="Changed, which is not supported"):
            match(tiny_vit(block_fn=Changed))

    def test_pooling_over_a_grid(self) -> None:
        with pytest.raises(ModelError, match="prr"):
            match(tiny_vit(global_pool="prr", num_classes=0))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"img_size": 40}, r"the plan is for timm_vit with 1 \+ 16 tokens, the model is timm_vit with 1 \+ 25"),
            ({"reg_tokens": 1}, r"with 1 \+ 16 tokens, the model is timm_vit with 2 \+ 16"),
            ({"depth": 2}, r"the plan names blocks\.2 as layer 2, which the model does not have"),
        ],
    )
    def test_a_plan_for_another_model(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            attach(tiny_vit(**options), make_plan(tiny_vit()))

    @pytest.mark.parametrize(("site", "layer"), [("blocks.1", 0), ("blocks.0", 1), ("blocks.3", 0)])
    def test_a_plan_whose_names_and_layers_disagree(self, site: str, layer: int) -> None:
        document = make_plan(tiny_vit(), make_recipe("[{layer: 0, keep_tokens: 3}]")).model_dump(mode="json")
        document["sites"][0] |= {"site": site, "layer": layer}
        with pytest.raises(RecipeError, match=f"the plan names {site} as layer {layer}, which the model does not have"):
            attach(tiny_vit(), Plan.model_validate(document))


def test_checkpointed_blocks_are_reduced_too() -> None:
    model = compressed()
    wanted = model(images())
    model.model.set_grad_checkpointing()
    model.train()
    output = model(images())
    torch.testing.assert_close(output, wanted)
    output.sum().backward()
    assert model.model.blocks[0].attn.qkv.weight.grad.isfinite().all()


@pytest.mark.parametrize("dynamic", [False, True])
def test_export_agrees_with_the_model(dynamic: bool) -> None:
    model = compressed(tiny_vit(reg_tokens=1))
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},) if dynamic else None
    program = torch.export.export(model.model, (images(2),), dynamic_shapes=shapes)
    batch = images(5 if dynamic else 2, seed=9)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(batch), model(batch), rtol=1e-5, atol=1e-5)


def test_half_precision_files_are_run_in_float32(tmp_path: Any) -> None:
    model = tiny_vit(embed_dim=64).half()
    loaded = load_checkpoint(save_weights(model, tmp_path / "half.safetensors"), LoadOptions(heads=2))
    assert {value.dtype for value in loaded.tensors.values()} == {torch.float16}
    assert {value.dtype for value in loaded.model.parameters()} == {torch.float32}


MERGES = {
    "merge": "merge",
    "merge_by_keys": "merge, similarity: keys",
    "fuse": "fuse",
    "fuse_carry": "fuse, carry: true",
    "bipartite": "bipartite",
}
"""The text of a recipe after `reducer: {kind: `. vid_tldr acts inside a block, which timm's blocks do not support."""


class Gated(Attention):
    """Makes a block build a plain `Attention` with a gate."""

    def __new__(cls, *args: Any, **options: Any) -> Any:
        return Attention(*args, gated=True, **options)


MORE_VARIANTS: dict[str, dict[str, Any]] = {
    "average_and_max_pooling": {"class_token": False, "global_pool": "avgmax"},
    "mean_pooling_with_prefix": {"global_pool": "avg", "reg_tokens": 2, "pool_include_prefix": True},
    "mean_pooling_behind_the_norm": {"global_pool": "avg", "fc_norm": False},
    "max_pooling": {"global_pool": "max"},
    "gated_attention": {"attn_layer": Gated},
    "scaled_attention_norm": {"scale_attn_norm": True},
    "no_pooling": {"global_pool": "", "num_classes": 0},
}
if "gated" not in inspect.signature(Attention).parameters:  # older timm
    del MORE_VARIANTS["gated_attention"]

MERGE_VARIANTS = {
    name: options
    for name, options in {**VARIANTS, **MORE_VARIANTS}.items()
    for model in [tiny_vit(**options)]
    if match(model).merge_refusal(model) is None
}
WITH_KEYS = ("merge_by_keys", "bipartite")
MERGING = [
    (variant, merge)
    for variant in MERGE_VARIANTS
    for merge in MERGES
    if not (merge in WITH_KEYS and variant == "parallel_things_block")
]
MERGE_DROPS = "[{layer: 0, drop_ratio: 0.25}, {layer: 2, keep_tokens: 7}]"
MERGE_COUNTS = [16, 12, 12, 7, 7]
SHIFT = "{kind: representation_shift, operation: block}"

all_merging = pytest.mark.parametrize(("variant", "merge"), MERGING)
merging = pytest.mark.parametrize(
    ("variant", "merge"), [pair for pair in MERGING if pair[1] == "merge" or pair[0] in ("registers", "map_pooling")]
)


def merged_recipe(merge: str = "merge", layers: str = MERGE_DROPS, metric: str = SHIFT) -> Recipe:
    recipe = make_recipe(layers, metric, MERGES.get(merge, merge))
    return recipe.model_copy(update={"last_block": "full"})  # which computes all tokens


def merged(variant: str = "plain", merge: str = "merge", layers: str = MERGE_DROPS) -> CompressedModel:
    """Compressed as the command line does it."""
    model = tiny_vit(**MERGE_VARIANTS[variant])
    return attach(model, resolve_for(model, merged_recipe(merge, layers)))


def merges_of(model: CompressedModel, batch: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, list[Merged]]:
    """The output, and what the reducer returned at each site."""
    kind, found = type(model._hooks[0].reducer), []
    plain = kind.merge  # type: ignore[attr-defined]

    def watched(*args: Any, **kwargs: Any) -> Merged:
        found.append(plain(*args, **kwargs))
        return found[-1]

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(kind, "merge", watched)
        return model(batch), found


class TestMerging:
    def test_most_variants_can_merge(self) -> None:
        missing = {*VARIANTS, *MORE_VARIANTS} - set(MERGE_VARIANTS)
        assert missing == {"parallel_scaling_block", "differential_attention"}

    @all_merging
    def test_each_token_counts_as_the_tokens_that_it_stands_for(
        self, variant: str, merge: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After each site the dense model on tokens repeated by their size gives the same result."""
        options = MERGE_VARIANTS[variant]
        model, dense = merged(variant, merge), tiny_vit(**options).double()
        model.model.double()
        before: list[Tensor] = []
        for block in model.model.blocks:
            # a hook before that of the site gets the output of the block itself
            block.register_forward_hook(lambda _, args, output: before.append(output), prepend=True)
        batch = images(3).double()
        output, found = merges_of(model, batch, monkeypatch)
        assert [site.sizes.sum(1).tolist() for site in found] == [[16.0 + model.plan.prefix_tokens] * 3] * 2
        for row in range(3):
            for site, blocks in zip(found, (range(1, 3), range(3, 4)), strict=True):
                times = site.sizes[row].long()
                assert times.max() > 1
                stream = site.tokens[row].repeat_interleave(times, dim=0).unsqueeze(0)
                for index in blocks:
                    stream = dense.blocks[index](stream)
                    wanted = before[index][row].repeat_interleave(times, dim=0)
                    torch.testing.assert_close(stream[0], wanted, rtol=0, atol=1e-10)
            if options.get("global_pool") == "":
                continue
            head = dense.forward_head(dense.norm(stream))
            torch.testing.assert_close(output[row], head[0], rtol=0, atol=1e-7)  # sizes are float32

    @pytest.mark.parametrize("merge", ["merge", "bipartite", "fuse"])
    def test_the_trace_says_which_token_went_into_which(self, merge: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model = merged("registers", merge)
        found, prefix = merges_of(model, images(3), monkeypatch)[1], model.plan.prefix_tokens
        trace = model.trace(images(3))
        assert list(trace.groups) == list(trace.kept) == [0, 2]
        places = found[0].places, found[0].places.gather(1, found[1].places)
        for (layer, groups), site, at in zip(trace.groups.items(), found, places, strict=True):
            assert torch.equal(groups.gather(1, trace.kept[layer]), trace.kept[layer])
            counts = (groups.unsqueeze(1) == at.unsqueeze(2)).sum(dim=2)
            assert torch.equal(counts.float(), site.sizes[:, prefix:])
        assert not compressed().trace(images()).groups

    @pytest.mark.parametrize("variant", ["plain", "qk_norm", "map_pooling", "scaled_attention_norm"])
    def test_explicit_attention_gives_the_same_result(self, variant: str) -> None:
        model = merged(variant)
        with torch.no_grad():
            wanted = model(images(2))
            for block in model.model.blocks:
                assert block.attn.fused_attn
                block.attn.fused_attn = False
            torch.testing.assert_close(model(images(2)), wanted, rtol=1e-4, atol=1e-4)
            with model.dense() as dense:
                torch.testing.assert_close(dense(images(2)), tiny_vit(**MERGE_VARIANTS[variant])(images(2)))

    @merging
    def test_dense_and_a_plan_that_keeps_all_are_bit_identical(self, variant: str, merge: str) -> None:
        model = merged(variant, merge)
        with torch.no_grad():
            wanted = tiny_vit(**MERGE_VARIANTS[variant])(images(3))
            reduced = model(images(3))
            with model.dense() as dense:
                assert torch.equal(dense(images(3)), wanted)
            assert torch.equal(model(images(3)), reduced)
            assert torch.equal(merged(variant, merge, KEEP_ALL)(images(3)), wanted)
        assert reduced.shape != wanted.shape or not torch.allclose(reduced, wanted)

    @merging
    def test_macs_equal_the_counter(self, variant: str, merge: str) -> None:
        model = merged(variant, merge)
        assert count_macs(model.model, (3, 32, 32)) == model.macs()
        with model.dense():
            assert count_macs(model.model, (3, 32, 32)) == model.dense_macs()

    @pytest.mark.parametrize("merge", MERGES)
    @pytest.mark.parametrize("variant", ["plain", "map_pooling"])
    def test_checkpointed_blocks_merge_too(self, variant: str, merge: str) -> None:
        plain, model = merged(variant, merge).train(), merged(variant, merge).train()
        model.model.set_grad_checkpointing()
        outputs = [one(images()) for one in (plain, model)]
        assert torch.equal(*outputs)
        for output in outputs:
            output.square().sum().backward()
        others = dict(plain.model.named_parameters())
        for name, parameter in model.model.named_parameters():
            torch.testing.assert_close(parameter.grad, others[name].grad)

    def test_dropout_of_attention_weights(self) -> None:
        model = tiny_vit(attn_drop_rate=0.5)
        wrapped = attach(model, resolve_for(model, merged_recipe()))
        with torch.no_grad():
            still = wrapped(images())
            assert torch.equal(wrapped(images()), still)
            assert wrapped.train().training
            assert not torch.equal(wrapped(images()), still)
            assert torch.equal(wrapped.eval()(images()), still)
            wrapped.train()
            assert model.blocks[0].attn.training
            assert wrapped.detach().blocks[0].attn.training

    def test_passes_are_independent(self) -> None:
        model = merged("mean_pooling", "fuse")
        with torch.no_grad():
            wanted = model(images(2))
            model(images(5, seed=7))
            with model.dense() as dense:
                dense(images(3))
            assert torch.equal(model(images(2)), wanted)

    def test_causal_attention_is_refused(self) -> None:
        """Merged tokens have no order."""
        with pytest.raises(UsageError, match="causal"):
            merged()(images(1), is_causal=True)

    def test_a_second_detach_does_not_change_a_later_attachment(self) -> None:
        model = tiny_vit()
        plan = resolve_for(model, merged_recipe())
        first = attach(model, plan)
        first.detach()
        second = attach(model, plan)
        with torch.no_grad():
            wanted = second(images(2))
            first.detach()
            assert torch.equal(second(images(2)), wanted)

    def test_a_head_that_is_called_alone_uses_no_stored_sizes(self) -> None:
        model = merged("mean_pooling")
        with torch.no_grad():
            two = model.model.forward_features(images(2))
            model.model.forward_features(images(1))
            assert model.model.forward_head(two).shape == (2, 10)

    def test_a_reducer_without_a_score_needs_no_calibration(self) -> None:
        model = tiny_vit()
        assert has_open_fields(resolve_for(model, merged_recipe("merge", metric="{kind: representation_shift}")))
        assert not has_open_fields(
            resolve_for(model, merged_recipe("bipartite", metric="{kind: representation_shift}"))
        )


class TestUnsupportedMerging:
    @pytest.mark.parametrize(
        ("variant", "attends"),
        [("parallel_scaling_block", "ParallelScalingBlock"), ("differential_attention", "DiffAttention")],
    )
    @pytest.mark.parametrize("merge", MERGES)
    def test_attention_without_token_sizes(self, merge: str, variant: str, attends: str) -> None:
        model = tiny_vit(**VARIANTS[variant])
        message = rf"merges tokens, and blocks\.0 attends by {attends}, which cannot weight tokens by size"
        with pytest.raises(RecipeError, match=rf"^recipe:3:1: \w+ {message}") as caught:
            resolve_for(model, merged_recipe(merge))
        assert caught.value.hint == "Use reducer: {kind: prune}."
        with pytest.raises(RecipeError, match=message):
            attach(model, make_plan(model, merged_recipe(merge)))
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())

    @pytest.mark.parametrize(("build_model", "family"), [(tiny_vim, "vim"), (tiny_cnn, "resnet")])
    def test_families_without_sizes(self, build_model: Callable[[], nn.Module], family: str) -> None:
        message = (
            f"^recipe:3:1: merge merges tokens, and models of the family {family} do not carry how many tokens each"
        )
        with pytest.raises(RecipeError, match=message) as caught:
            resolve_for(build_model(), merged_recipe())
        assert caught.value.hint == "Use reducer: {kind: prune}."

    @pytest.mark.parametrize("merge", WITH_KEYS)
    def test_keys_that_are_not_available(self, merge: str) -> None:
        model = tiny_vit(**VARIANTS["parallel_things_block"])
        message = r"needs attention_key, which blocks\.0 does not provide: it runs several branches in parallel"
        with pytest.raises(RecipeError, match=rf"^recipe:3:1: \w+ {message}") as caught:
            resolve_for(model, merged_recipe(merge))
        assert "{kind: merge} (by the hidden state)" in str(caught.value.hint)
        with pytest.raises(RecipeError, match=message):
            attach(model, make_plan(model, merged_recipe(merge)))

    @pytest.mark.parametrize("variant", ["plain", "registers", "mean_pooling"])
    def test_more_than_half_at_a_site(self, variant: str) -> None:
        model = tiny_vit(**VARIANTS[variant])
        message = (
            r"recipe:4:\d+: layers\[1\]: 7 of 12 tokens would be removed at blocks\.2, but bipartite can remove 6 there"
        )
        with pytest.raises(RecipeError, match=message) as caught:
            resolve_for(model, merged_recipe("bipartite", DROPS))
        assert caught.value.hint == "Keep 6 or more."
        assert resolve_for(model, merged_recipe("merge", DROPS)).sites
        most = resolve_for(
            model, merged_recipe("bipartite", "[{layer: 0, keep_tokens: 8}, {layer: 1, keep_tokens: 4}]")
        )
        with torch.no_grad():
            assert attach(model, most)(images()).isfinite().all()
