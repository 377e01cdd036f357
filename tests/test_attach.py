"""What every metric, every reducer and every form of model owe each other; new ones join by being registered."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import ParallelScalingBlock
from tiny import DEPTH, KEEP_ALL, PATCHES, VARIANTS, compressed, images, make_plan, make_recipe, save_weights, tiny_vit
from torch import Tensor, nn

from repshift_cli import checkpoint
from repshift_cli.attach import CompressedModel, attach
from repshift_cli.errors import ModelError, RecipeError, UsageError
from repshift_cli.families import families, match
from repshift_cli.metrics import Metric, metric_kinds
from repshift_cli.plan import Plan
from repshift_cli.recipe import Recipe
from repshift_cli.reducers import Chooser, reducer_kinds


def possible(metric: Metric, variant: str) -> bool:
    """Whether the blocks of this model can show what the metric asks for."""
    site = match(tiny_vit(**VARIANTS[variant])).sites(tiny_vit(**VARIANTS[variant]))[0]
    return metric.taps() <= {"block_input", "block_output", *site.probes}


CHOOSERS = [kind for kind, found in reducer_kinds().items() if issubclass(found, Chooser)]
"""Those that merge need a family that carries sizes: tests/families/test_umt_family.py."""

ALL = [
    (variant, metric, reducer)
    for variant in VARIANTS
    for metric in metric_kinds()
    for reducer in CHOOSERS
    if possible(metric_kinds()[metric]().with_defaults(), variant)
]
REFUSED = [
    (variant, metric)
    for variant in VARIANTS
    for metric in metric_kinds()
    if not possible(metric_kinds()[metric]().with_defaults(), variant)
]

everything = pytest.mark.parametrize(("variant", "metric", "reducer"), ALL)
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
    """Tokens that really enter each block, and those that leave the last one."""
    seen: list[int] = []
    blocks = model.model.blocks
    handles = [block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1])) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(lambda _, args, output: seen.append(output.shape[1])))
    with torch.no_grad():
        model(batch)
    for handle in handles:
        handle.remove()
    return seen


def test_most_pairs_are_possible() -> None:
    assert len(ALL) > 3 * len(VARIANTS) * len(CHOOSERS)
    assert [family.name for family in families()] == ["resnet", "timm_vit", "umt", "vim"]


@everything
def test_tokens_leave_as_the_plan_says(variant: str, metric: str, reducer: str) -> None:
    model = build(variant, metric, reducer)
    prefix = model.plan.prefix_tokens
    expected = [prefix + count for count in (16, 12, 12, 5, 5)]
    assert token_counts(model, images(2)) == expected == list(model.plan.tokens_at(DEPTH))


@everything
def test_prefix_tokens_pass_untouched(variant: str, metric: str, reducer: str) -> None:
    model = build(variant, metric, reducer)
    before: list[Tensor] = []
    site = model.model.blocks[0]
    # a hook that stands before the site's own sees what the block itself returned
    site.register_forward_hook(lambda _, args, output: before.append(output), prepend=True)
    after: list[Tensor] = []
    model.model.blocks[1].register_forward_pre_hook(lambda _, args: after.append(args[0]))
    with torch.no_grad():
        model(images(2))
    prefix = model.plan.prefix_tokens
    assert torch.equal(before[0][:, :prefix], after[0][:, :prefix])
    kept = model.trace(images(2)).kept[0]
    expected = before[0][:, prefix:].gather(1, kept.unsqueeze(-1).expand(-1, -1, 32))
    assert torch.equal(after[0][:, prefix:], expected)


@everything
def test_a_plan_that_keeps_all_changes_no_bit(variant: str, metric: str, reducer: str) -> None:
    with torch.no_grad():
        wanted = tiny_vit(**VARIANTS[variant])(images(3))
        assert torch.equal(build(variant, metric, reducer, KEEP_ALL)(images(3)), wanted)


@everything
def test_dense_is_the_model_as_it_was(variant: str, metric: str, reducer: str) -> None:
    with torch.no_grad():
        wanted = tiny_vit(**VARIANTS[variant])(images(3))
        model = build(variant, metric, reducer)
        reduced = model(images(3))
        with model.dense() as dense:
            assert torch.equal(dense(images(3)), wanted)
            assert torch.equal(model(images(3)), wanted)
        assert torch.equal(model(images(3)), reduced)
    assert not torch.allclose(reduced, wanted)


@everything
def test_what_is_kept_is_ascending_and_nested(variant: str, metric: str, reducer: str) -> None:
    trace = build(variant, metric, reducer).trace(images(4))
    assert list(trace.kept) == [0, 2]
    first, second = trace.kept[0].tolist(), trace.kept[2].tolist()
    for row, inner in zip(first, second, strict=True):
        assert (len(row), len(inner)) == (12, 5)
        assert row == sorted(set(row)) and set(row) <= set(range(PATCHES))
        assert inner == sorted(set(inner)) and set(inner) <= set(row)


@everything
def test_the_batch_decides_nothing(variant: str, metric: str, reducer: str) -> None:
    model, batch = build(variant, metric, reducer), images(32)
    together = model.trace(batch)
    moved = model.trace(batch.flip(0))
    for layer, kept in together.kept.items():
        alone = torch.cat([model.trace(image.unsqueeze(0)).kept[layer] for image in batch[:8]])
        assert torch.equal(kept[:8], alone)
        assert torch.equal(kept, moved.kept[layer].flip(0))
    torch.testing.assert_close(together.output, moved.output.flip(0), rtol=1e-4, atol=1e-4)
    single = model.trace(batch[:1]).output
    torch.testing.assert_close(together.output[:1], single, rtol=1e-4, atol=1e-4)


@everything
def test_gradients_reach_every_weight_that_is_used(variant: str, metric: str, reducer: str) -> None:
    dense, model = tiny_vit(**VARIANTS[variant]), build(variant, metric, reducer)
    dense(images(2)).square().sum().backward()
    model(images(2)).square().sum().backward()
    used = {name for name, parameter in dense.named_parameters() if parameter.grad is not None}
    reached = {name for name, parameter in model.model.named_parameters() if parameter.grad is not None}
    assert reached == used
    assert all(parameter.grad.isfinite().all() for parameter in model.model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize(("variant", "metric"), REFUSED)
def test_a_metric_that_a_block_cannot_feed_is_refused_with_the_reason(variant: str, metric: str) -> None:
    with pytest.raises(RecipeError, match=rf"{metric} needs \w+, which blocks.0 cannot show: ") as caught:
        build(variant, metric)
    assert "operation: block works on every block" in str(caught.value)


def test_refused_are_only_the_pairs_that_cannot_be() -> None:
    assert REFUSED == [
        ("parallel_things_block", "attention_entropy"),
        ("parallel_things_block", "class_attention"),
        ("parallel_things_block", "representation_shift"),
        ("differential_attention", "attention_entropy"),
        ("differential_attention", "class_attention"),
    ]


def test_a_fused_output_projection_hides_the_parts_of_a_block() -> None:
    model = tiny_vit(block_fn=partial(ParallelScalingBlock, fuse_out_proj=True))
    with pytest.raises(RecipeError, match="one matrix product"):
        compressed(model, make_recipe())
    assert token_counts(compressed(model, block_recipe()), images(1)) == [17, 13, 13, 6, 6]


@each_variant
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


@each_variant
def test_detach_takes_every_hook_off(variant: str) -> None:
    model = tiny_vit(**VARIANTS[variant])
    with torch.no_grad():
        wanted = model(images())
        wrapped = compressed(model, block_recipe())
        assert wrapped.detach() is model
        assert torch.equal(model(images()), wanted)
        assert torch.equal(wrapped(images()), wanted)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    compressed(model, block_recipe())


def test_dense_comes_to_an_end_when_an_error_is_raised() -> None:
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


def test_no_tensor_of_a_pass_is_held_after_it() -> None:
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


def copies(model: CompressedModel) -> dict[str, CompressedModel]:
    """Copies by `deepcopy`, `pickle` and `torch.save`."""
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    return {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(stored, weights_only=False),
    }


@pytest.mark.parametrize("metric", metric_kinds())
@pytest.mark.parametrize("variant", ["qk_norm", "parallel_scaling_block"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_stands_on_its_own(way: str, variant: str, metric: str) -> None:
    model = build(variant, metric)
    with torch.no_grad():
        wanted = model(images())
        other = copies(model)[way]
        assert torch.equal(other(images()), wanted)
        for parameter in model.model.parameters():
            parameter.zero_()
        assert torch.equal(other(images()), wanted)
        other.detach()
        assert torch.equal(other(images()), tiny_vit(**VARIANTS[variant])(images()))
    assert token_counts(model, images()) == list(model.plan.tokens_at(DEPTH))
    with pytest.raises(ModelError, match="compressed already"):
        attach(model.model, model.plan)


def test_a_copy_made_inside_dense_is_dense() -> None:
    model = compressed()
    with model.dense():
        other = copy.deepcopy(model)
    assert token_counts(other, images()) == [17] * 5
    assert token_counts(model, images()) == [17, 13, 13, 6, 6]


class TestOtherInputs:
    def test_another_image_size_is_refused_by_the_model_itself(self) -> None:
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


class TestWhatCannotBe:
    def test_another_kind_of_model(self) -> None:
        with pytest.raises(ModelError, match="models of the kind Linear are not supported") as caught:
            match(nn.Linear(2, 2))
        assert "timm_vit" in str(caught.value)

    def test_an_unknown_block(self) -> None:
        class OtherBlock(nn.Module):
            def __init__(self, **_: Any) -> None:
                super().__init__()

        model = tiny_vit(block_fn=OtherBlock)
        with pytest.raises(ModelError, match=r"blocks\.0 is a OtherBlock, which is not known \(known: Block, "):
            match(model)

    def test_a_subclass_of_a_known_block_may_do_anything(self) -> None:
        from timm.models.vision_transformer import Block

        class Changed(Block):
            def forward(self, x: Tensor, **_: Any) -> Tensor:
                return x

        with pytest.raises(ModelError, match="Changed, which is not known"):
            match(tiny_vit(block_fn=Changed))

    def test_dynamic_image_size(self) -> None:
        with pytest.raises(ModelError, match="dynamic_img_size"):
            match(tiny_vit(dynamic_img_size=True))

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("metric", metric_kinds())
def test_other_number_types(dtype: torch.dtype, metric: str) -> None:
    model = compressed(tiny_vit().to(dtype), make_recipe(metric=f"{{kind: {metric}}}"))
    output = model.trace(images().to(dtype)).output
    assert output.dtype == dtype
    assert output.isfinite().all()


@pytest.mark.parametrize("metric", metric_kinds())
def test_inference_mode_and_autocast(metric: str) -> None:
    model = compressed(tiny_vit(), make_recipe(metric=f"{{kind: {metric}}}"))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert model(images()).shape == (2, 10)


def test_checkpointed_blocks_reduce_all_the_same() -> None:
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
    loaded = checkpoint.load(save_weights(model, tmp_path / "half.safetensors"), heads=2)
    assert {value.dtype for value in loaded.tensors.values()} == {torch.float16}
    assert {value.dtype for value in loaded.model.parameters()} == {torch.float32}
