"""The specs of the transformers library on tiny models of every class that they list."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from tiny_transformers import (
    BEIT,
    MODELS,
    SMALL,
    TEXT,
    VIDEO,
    WITHOUT_PIXELS,
    as_function,
    tiny_inputs,
    tiny_transformer,
)
from torch import Tensor, nn

from repshift_cli.errors import ModelError, RecipeError, UsageError
from repshift_cli.measure.attention_kernel import observed_attention
from repshift_cli.measure.macs import count_macs
from repshift_cli.models.attention_mode import AttentionMode, attention_mode
from repshift_cli.planning.recipe import Recipe
from repshift_cli.reduction.compressed_model import CompressedModel, attach
from repshift_cli.reduction.families.base import match
from repshift_cli.reduction.families.transformer import Transformer, all_specs, tower_of
from repshift_cli.reduction.hooks import register_edit
from repshift_cli.reduction.permute import TOLERANCE, check_permutation, permute_difference
from repshift_cli.reduction.plans import resolve_for

every = pytest.mark.parametrize("name", MODELS)
bare = pytest.mark.parametrize("name", [name for name in MODELS if name not in WITHOUT_PIXELS])

MERGING = (
    "ViTForImageClassification",
    "DeiTForImageClassification",
    "ViTMSNModel",
    "Dinov2Model",
    "Dinov2WithRegistersModel",
    "CLIPVisionModelWithProjection",
    "CLIPModel",
    "SiglipVisionModel",
    "VivitForVideoClassification",
    "ASTForAudioClassification",
)
NOT_MERGING = {
    "IJepaModel": "mean over tokens",
    "CLIPForImageClassification": "mean over tokens",
    "SiglipForImageClassification": "mean over tokens",
    "Dinov2ForImageClassification": "mean over tokens",
    "ViTMAEModel": "mean over tokens",
    "VideoMAEForVideoClassification": "cannot weight tokens",
    "DINOv3ViTModel": "reads positions",
    "BeitForImageClassification": "reads positions",
    "VisionEncoderDecoderModel": "reads all tokens",
}


def recipe(
    layers: str = "[{layer: 0, drop_ratio: 0.25}, {layer: 1, keep_tokens: 4}]",
    reducer: str = "prune",
    restore: bool = False,
) -> Recipe:
    metric, flag = "{kind: representation_shift, operation: block}", str(restore).lower()
    text = f"version: 1\nmetric: {metric}\nreducer: {{kind: {reducer}}}\nrestore: {flag}\nlayers: {layers}\n"
    return Recipe.parse(text)


def needs_restore(model: nn.Module) -> bool:
    return match(model).needs_restore(model) is not None


def reduced(model: nn.Module, reducer: str = "prune") -> CompressedModel:
    return attach(model, resolve_for(model, recipe(reducer=reducer, restore=needs_restore(model))))


def worst(model: nn.Module) -> float:
    """The largest difference of the permute test over all blocks."""
    family, inputs = match(model), tiny_inputs(model)
    restore = needs_restore(model)
    return max(permute_difference(model, family, inputs, site, None, restore) for site in family.sites(model))


def test_every_listed_class_is_tested() -> None:
    listed = {name for spec in all_specs() if spec.library == "transformers" for name in spec.outputs}
    assert listed == set(MODELS)


class TestPermutation:
    @every
    def test_as_function(self, name: str) -> None:
        assert worst(as_function(tiny_transformer(name))) < TOLERANCE

    @bare
    def test_bare(self, name: str) -> None:
        assert worst(tiny_transformer(name)) < TOLERANCE

    @pytest.mark.parametrize("name", ["DINOv3ViTModel", "BeitModel", "BeitForImageClassification"])
    def test_a_spec_that_forgets_what_follows_fails(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model = as_function(tiny_transformer(name))
        tower = tower_of(model)
        assert tower is not None
        monkeypatch.setattr(
            "repshift_cli.reduction.families.transformer.all_specs", lambda: [replace(tower.spec, follows=())]
        )
        with pytest.raises(ModelError, match=r"fails the permute test behind .*layers?\.0"):
            check_permutation(model, Transformer(), tiny_inputs(model))


class TestReduced:
    @every
    def test_keeping_everything_changes_nothing(self, name: str) -> None:
        model = as_function(tiny_transformer(name))
        inputs, patches = tiny_inputs(model), match(model).layout(model).patch_tokens
        with torch.no_grad():
            wanted = model(inputs)
            layers = f"[{{layer: 0, keep_tokens: {patches}}}, {{layer: 1, keep_tokens: {patches}}}]"
            plan = resolve_for(model, recipe(layers, restore=needs_restore(model)))
            assert torch.equal(attach(model, plan)(inputs), wanted)

    @every
    def test_counts_and_macs(self, name: str) -> None:
        model = as_function(tiny_transformer(name))
        inputs, counts = tiny_inputs(model), []
        compressed = reduced(model)
        for site in compressed.family.sites(model):
            site.block.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1]))
        with torch.no_grad():
            compressed(inputs)
        assert tuple(counts) == compressed.plan.tokens_at(len(counts))[:-1]
        size = tuple(inputs.shape[1:])
        assert compressed.macs(counted=True) == count_macs(compressed, size)
        assert compressed.macs() < compressed.dense_macs()

    @pytest.mark.slow
    @bare
    def test_macs_of_the_bare_model(self, name: str) -> None:
        model = tiny_transformer(name)
        size = tuple(tiny_inputs(model).shape[1:])
        assert match(model).macs(model, None) == count_macs(model, size)
        compressed = reduced(model)
        assert compressed.macs(counted=True) == count_macs(compressed, size)

    @pytest.mark.parametrize("name", ["ViTForImageClassification", "BeitModel", "DINOv3ViTModel"])
    def test_detach_leaves_nothing(self, name: str) -> None:
        model = tiny_transformer(name)
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")

        def state() -> list[Any]:
            return [(set(vars(part)), [len(getattr(part, kind)) for kind in hooks]) for part in model.modules()]

        before, inputs = state(), tiny_inputs(model)
        with torch.no_grad():
            wanted = model(inputs)[0]
            compressed = reduced(model)
            assert compressed(inputs)[0].shape != wanted.shape or name == "ViTForImageClassification"
            compressed.detach()
            assert torch.equal(model(inputs)[0], wanted)
        assert state() == before

    def test_an_update_is_scaled_as_in_the_block(self) -> None:
        model = tiny_transformer("BeitModel")
        site = match(model).sites(model)[0]
        update = site.probes["attention_update"]
        seen: list[Any] = []
        update.module.register_forward_hook(lambda _, args, output: seen.append(output[0]))
        model(tiny_inputs(model))
        view: Any = update.view
        torch.testing.assert_close(view((seen[0], None)), 0.3 * seen[0])


class TestAgainstReference:
    """The layers in a plain loop, with the tensors that follow the tokens indexed by hand."""

    @pytest.mark.parametrize("name", ["DINOv3ViTModel", "BeitModel", "BeitForImageClassification"])
    def test_dropping(self, name: str) -> None:
        model = as_function(tiny_transformer(name))
        inputs = tiny_inputs(model)
        compressed = reduced(model)
        with torch.no_grad():
            trace = compressed.trace(inputs)
            compressed.detach()
            for row, image in enumerate(inputs):
                kept = {layer: places[row] for layer, places in trace.kept.items()}
                wanted = self.run(model, image[None], kept)
                torch.testing.assert_close(trace.output[row : row + 1], wanted, rtol=1e-4, atol=1e-5)

    def run(self, model: Any, image: Tensor, kept: dict[int, Tensor]) -> Tensor:
        inner, blocks = model.inner, match(model).sites(model)
        prefix = match(model).layout(model).prefix_tokens
        places = torch.arange(match(model).layout(model).patch_tokens)
        current = {"places": places}

        def cut(value: Any, pairs: bool, prefixed: bool) -> Any:
            index = torch.cat([torch.arange(prefix), current["places"] + prefix]) if prefixed else current["places"]
            value = value[..., index, :]
            return value[..., index] if pairs else value

        def before(_: Any, args: Any, kwargs: Any) -> Any:
            if kwargs.get("position_embeddings") is not None:
                kwargs["position_embeddings"] = tuple(cut(part, False, False) for part in kwargs["position_embeddings"])
            if kwargs.get("attention_mask") is not None:
                kwargs["attention_mask"] = cut(kwargs["attention_mask"], True, True)
            return args, kwargs

        def after(site: Any) -> Any:
            def hook(_: Any, args: Any, output: Tensor) -> Tensor:
                if site.layer not in kept:
                    return output
                index = torch.searchsorted(current["places"], kept[site.layer])
                current["places"] = kept[site.layer]
                return torch.cat([output[:, :prefix], output[:, prefix:][:, index]], dim=1)

            return hook

        handles = []
        for site in blocks:
            handles += [
                site.block.register_forward_pre_hook(before, with_kwargs=True),
                site.block.register_forward_hook(after(site)),
            ]
            if getattr(site.block, "relative_position_bias", None) is not None:
                bias: Any = site.block.relative_position_bias
                handles.append(bias.register_forward_hook(lambda _, args, output: cut(output, True, True)))
        found: Tensor = model(image)
        for handle in handles:
            handle.remove()
        assert inner is model.inner
        return found


class TestMerging:
    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    @pytest.mark.parametrize("name", MERGING)
    def test_one_token_of_size_two_is_two_equal_tokens(self, name: str, implementation: str) -> None:
        model = as_function(tiny_transformer(name))
        model.inner.set_attn_implementation(implementation)  # type: ignore[operator]
        family, inputs = match(model), tiny_inputs(model)
        first = family.sites(model)[0].block

        def repeated(_: Any, args: Any, output: Tensor) -> Tensor:
            return torch.cat([output, output[:, -1:]], dim=1)

        with torch.no_grad():
            handle = first.register_forward_hook(repeated)
            wanted = model(inputs)
            handle.remove()
            stream: Any = family.stream(model)
            edits, _ = family.use_proportional_attention(model, stream)
            for edit in edits:
                register_edit(edit)

            def sized(_: Any, args: Any, output: Tensor) -> None:
                stream.sizes[output.shape[1]] = torch.ones(output.shape[:2]).index_fill(
                    1, torch.tensor([output.shape[1] - 1]), 2.0
                )

            plain = model(inputs)
            first.register_forward_hook(sized)
            found = model(inputs)
        scale = float(wanted.abs().max())
        assert float((found - wanted).abs().max()) / scale < 2e-6
        assert float((plain - wanted).abs().max()) / scale > 1e-5

    @pytest.mark.parametrize("reducer", ["merge", "bipartite"])
    @pytest.mark.parametrize("name", MERGING)
    def test_recipes(self, name: str, reducer: str) -> None:
        model = as_function(tiny_transformer(name))
        inputs, layout = tiny_inputs(model), match(model).layout(model)
        layers = f"[{{layer: 0, keep_tokens: {layout.patch_tokens - 3}}}, {{layer: 1, drop_ratio: 0.3}}]"
        compressed = attach(model, resolve_for(model, recipe(layers, reducer)))
        with torch.no_grad():
            assert bool(compressed(inputs).isfinite().all())
        assert compressed.macs(counted=True) == count_macs(compressed, tuple(inputs.shape[1:]))

    @pytest.mark.parametrize("name", NOT_MERGING)
    def test_refused(self, name: str) -> None:
        model = as_function(tiny_transformer(name))
        with pytest.raises(RecipeError, match=NOT_MERGING[name]):
            attach(model, resolve_for(model, recipe(reducer="merge")))

    def test_every_class_is_refused_or_has_a_tower_that_is_tested(self) -> None:
        tested: set[str] = set()
        merges: set[str] = set()
        for name in MODELS:
            model = as_function(tiny_transformer(name))
            tower = tower_of(model)
            assert tower is not None
            if match(model).merge_refusal(model) is None:
                merges.add(tower.spec.tower)
            if name in MERGING:
                tested.add(tower.spec.tower)
        assert merges == tested

    def test_an_implementation_without_masks(self) -> None:
        model: Any = tiny_transformer("ViTModel")
        model.config._attn_implementation = "flex_attention"
        assert "flex_attention does not weight tokens" in str(match(model).merge_refusal(model))
        family = match(model)
        stream: Any = family.stream(model)
        edits, _ = family.use_proportional_attention(model, stream)
        stream.sizes[5] = torch.ones(1, 5)
        with pytest.raises(UsageError, match="flex_attention does not weight tokens"):
            edits[0].change((torch.zeros(1, 5, 32),), {})

    def test_a_mask_of_the_caller_is_not_ignored(self) -> None:
        model = tiny_transformer("ViTModel")
        inputs = tiny_inputs(model)
        compressed = reduced(model, "merge")
        mask = torch.ones(3, 17)
        mask[:, 5] = 0
        with pytest.raises(UsageError, match="called with a mask"):
            compressed(inputs, attention_mask=mask)

    def test_a_mask_of_the_caller_follows_dropped_tokens(self) -> None:
        model = tiny_transformer("ViTModel")
        inputs, mask = tiny_inputs(model), torch.ones(3, 17)
        mask[:, 1:9] = 0
        compressed = reduced(model)
        with torch.no_grad():
            assert not torch.equal(compressed(inputs, attention_mask=mask)[0], compressed(inputs)[0])


class _Wrapped(nn.Module):
    """A class that no spec lists; `position` makes it read a token by its place."""

    def __init__(self, position: int | None) -> None:
        super().__init__()
        self.encoder = tiny_transformer("ViTModel")
        self.head, self.position = nn.Linear(32, 4), position

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.encoder(images).last_hidden_state
        read: Tensor = self.head(tokens[:, 0] if self.position is None else tokens[:, self.position])
        return read


class TestRefusals:
    def test_a_class_that_is_not_listed_is_tried(self) -> None:
        model = _Wrapped(None).train()
        reduced(model)
        assert model.training and model.encoder.training
        with pytest.raises(ModelError, match=r"_Wrapped cannot be reduced: .*fails the permute test"):
            reduced(_Wrapped(3))
        with pytest.raises(ModelError, match="needs its weights in float32"):
            reduced(_Wrapped(None).half())

    def test_a_part_that_needs_all_tokens(self) -> None:
        model = tiny_transformer("", lambda: hf.ViTForMaskedImageModeling(hf.ViTConfig(**SMALL, encoder_stride=8)))
        with pytest.raises(ModelError, match="ViTForMaskedImageModeling cannot be reduced: no spec"):
            reduced(model)

    def test_a_language_model_around_the_encoder(self) -> None:
        text = hf.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
        vision = hf.CLIPVisionConfig(**SMALL, projection_dim=8)
        model = hf.LlavaModel(hf.LlavaConfig(vision_config=vision, text_config=text))
        with pytest.raises(ModelError, match="LlavaModel cannot be reduced: no spec"):
            reduced(model.eval())

    @pytest.mark.parametrize(
        ("build", "reason"),
        [
            (lambda: hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**SMALL, num_patches=16)), "a mask for each image"),
            (
                lambda: hf.BeitBackbone(hf.BeitConfig(**BEIT, out_indices=[0, 1, 2, 3], add_fpn=True)),
                "feature pyramid",
            ),
            (lambda: hf.SwinModel(hf.SwinConfig(embed_dim=8, depths=[1], num_heads=[2])), "windows"),
            (
                lambda: hf.BertModel(hf.BertConfig(**TEXT)),
                "BertModel cannot be reduced: no spec .*similar names: .*Model",
            ),
            (lambda: hf.ViTMAEModel(hf.ViTMAEConfig(**SMALL)), "set `config.mask_ratio` to 0"),
            (lambda: hf.ViTMAEModel(hf.ViTMAEConfig(**SMALL, mask_ratio=0.0)), "random order"),
            (lambda: hf.IJepaModel(hf.IJepaConfig(**SMALL), add_pooling_layer=True), "reads the first patch"),
            (
                lambda: hf.VideoMAEForVideoClassification(hf.VideoMAEConfig(**VIDEO, use_mean_pooling=False)),
                "classifies by the first patch",
            ),
            (lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**SMALL, vision_use_head=False)), "no pooling head"),
        ],
    )
    def test_the_reason(self, build: Any, reason: str) -> None:
        with pytest.raises(ModelError, match=reason):
            match(build())

    def test_positions_of_another_size(self) -> None:
        model = tiny_transformer("", lambda: hf.BeitModel(hf.BeitConfig(**BEIT, use_relative_position_bias=True)))
        with pytest.raises(UsageError, match="the plan is for"):
            reduced(model)(torch.randn(3, 3, 40, 40))


class TestAttentionMode:
    @pytest.mark.parametrize("name", ["ViTForImageClassification", "DINOv3ViTModel", "BeitModel", "CLIPModel"])
    @pytest.mark.parametrize(("mode", "kernel"), [("sdpa", "sdpa:flash"), ("explicit", "explicit"), ("sdpa:math", "")])
    def test_it_takes_effect_and_is_restored(self, mode: AttentionMode, kernel: str, name: str) -> None:
        model = as_function(tiny_transformer(name))
        inputs = tiny_inputs(model)
        with torch.no_grad():
            wanted = model(inputs)
            for implementation in ("sdpa", "eager"):
                model.inner.set_attn_implementation(implementation)  # type: ignore[operator]
                with attention_mode(model, mode):
                    assert observed_attention(model, inputs) == (kernel or mode)
                    torch.testing.assert_close(model(inputs), wanted, rtol=1e-4, atol=1e-4)
                configs: list[Any] = [part.config for part in model.modules() if hasattr(part, "config")]
                assert {config._attn_implementation for config in configs} == {implementation}

    def test_merged_tokens(self) -> None:
        model = as_function(tiny_transformer("SiglipVisionModel"))
        inputs = tiny_inputs(model)
        compressed = reduced(model, "merge")
        with torch.no_grad():
            wanted = compressed(inputs)
            with attention_mode(compressed, "explicit"):
                torch.testing.assert_close(compressed(inputs), wanted, rtol=1e-4, atol=1e-4)
                assert observed_attention(compressed, inputs) == "explicit"

    def test_flash_is_refused(self) -> None:
        with pytest.raises(UsageError, match="no attention in ViTModel can run on flash-attn"):
            attention_mode(tiny_transformer("ViTModel"), "flash").__enter__()

    def test_a_class_that_does_not_read_its_configuration(self) -> None:
        model = hf.Data2VecVisionModel(hf.Data2VecVisionConfig(**SMALL))
        with pytest.raises(UsageError, match="attention of Data2VecVisionModel cannot be switched to 'explicit'"):
            attention_mode(model, "explicit").__enter__()

    def test_multihead_attention_of_torch(self) -> None:
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 16, batch_first=True), 1).eval()
        fast = torch.backends.mha.get_fastpath_enabled()
        with torch.no_grad(), attention_mode(model, "sdpa"):
            assert observed_attention(model, torch.randn(2, 5, 16)) == "sdpa:flash"
        assert torch.backends.mha.get_fastpath_enabled() == fast
        refused: tuple[AttentionMode, ...] = ("explicit", "sdpa:math")
        for mode in refused:
            with pytest.raises(UsageError, match="no attention in TransformerEncoder"):
                attention_mode(model, mode).__enter__()


@pytest.mark.parametrize("name", ["ViTForImageClassification", "DINOv3ViTModel"])
class TestPrograms:
    @pytest.mark.slow
    def test_compile(self, name: str) -> None:
        model = reduced(as_function(tiny_transformer(name)))
        inputs = tiny_inputs(model.model)
        torch._dynamo.reset()
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(model, backend="eager")(inputs), model(inputs))

    def test_export(self, name: str) -> None:
        model = reduced(as_function(tiny_transformer(name)))
        inputs = tiny_inputs(model.model)
        with torch.no_grad():
            program = torch.export.export(model, (inputs,)).module()
            other = tiny_inputs(model.model).flip(0) * 2
            torch.testing.assert_close(program(other), model(other))

    @pytest.mark.slow
    def test_export_of_merged_tokens(self, name: str) -> None:
        if name not in MERGING:
            pytest.skip("its tokens cannot be merged")
        model = reduced(as_function(tiny_transformer(name)), "merge")
        inputs = tiny_inputs(model.model)
        with torch.no_grad():
            program = torch.export.export(model, (inputs,)).module()
            torch.testing.assert_close(program(inputs), model(inputs))

    def test_gradients(self, name: str) -> None:
        model = reduced(as_function(tiny_transformer(name)))
        model(tiny_inputs(model.model)).square().sum().backward()
        missing = [key for key, part in model.named_parameters() if part.grad is None and "mask_token" not in key]
        assert not missing

    def test_copies(self, name: str) -> None:
        model = reduced(as_function(tiny_transformer(name)))
        inputs, other = tiny_inputs(model.model), copy.deepcopy(model)
        with torch.no_grad():
            wanted = model(inputs)
            model.detach()
            assert torch.equal(other(inputs), wanted)
