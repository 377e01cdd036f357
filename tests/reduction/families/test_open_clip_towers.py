"""open_clip and torchvision: vision transformers on `nn.MultiheadAttention`, and timm's models inside open_clip."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import Transformer as ClipTransformer
from timm.models.vision_transformer import VisionTransformer as TimmTransformer
from torch import Tensor, nn
from torchvision.models import ResNet, VisionTransformer
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.vision_transformer import ConvStemConfig

from repshift_cli.errors import ModelError, RecipeError
from repshift_cli.measure.macs import count_macs
from repshift_cli.models.tensor_model import TensorModel
from repshift_cli.planning.recipe import Recipe
from repshift_cli.reduction.compressed_model import CompressedModel, attach
from repshift_cli.reduction.families.base import match
from repshift_cli.reduction.families.transformer import Tower, output_of
from repshift_cli.reduction.permute import TOLERANCE, check_permutation, permute_difference
from repshift_cli.reduction.plans import resolve_for

TEXT = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
VISION = {"image_size": 48, "patch_size": 8, "width": 32, "head_width": 16, "layers": 3}
COCA = {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 4, "output_tokens": True}


def wrapped(inner: nn.Module) -> TensorModel:
    output = output_of(inner)
    assert output is not None
    return TensorModel(inner, output.tensor, output.call, output.arguments, 1, 0)


def clip(kind: Any = CLIP, quick_gelu: bool = False, **vision: Any) -> Any:
    torch.manual_seed(0)
    model = kind(24, {**VISION, **vision}, dict(TEXT), quick_gelu=quick_gelu).eval()
    nn.init.normal_(model.visual.positional_embedding)
    return wrapped(model)


def coca() -> TensorModel:
    torch.manual_seed(0)
    multimodal = {"context_length": 8, "width": 16, "heads": 2, "layers": 1}
    return wrapped(CoCa(24, dict(multimodal), {**TEXT, "embed_cls": True}, {**VISION, **COCA}).eval())


def sequence_first() -> Any:
    model = clip()
    layers = ClipTransformer(32, 3, 2, batch_first=False).eval()
    layers.load_state_dict(model.inner.visual.transformer.state_dict())
    model.inner.visual.transformer = layers
    return model


def timm_trunk(name: str, pool: str = "token", **options: Any) -> Any:
    torch.manual_seed(0)
    vision = {"timm_model_name": name, "timm_pool": pool, "timm_proj": "linear", "image_size": 160, **options}
    return wrapped(CustomTextCLIP(24, vision, dict(TEXT)).eval())


def tv_vit(**options: Any) -> TensorModel:
    torch.manual_seed(0)
    shape = {"image_size": 48, "patch_size": 8, "num_layers": 3, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64}
    model = VisionTransformer(**{**shape, "num_classes": 7, **options}).eval()
    nn.init.normal_(model.heads.head.weight)
    return wrapped(model)


MODELS: dict[str, Callable[[], Any]] = {
    "clip": clip,
    "custom_text": lambda: clip(CustomTextCLIP),
    "quick_gelu": lambda: clip(quick_gelu=True),
    "average": lambda: clip(pool_type="avg", final_ln_after_pool=True, no_ln_pre=True),
    "layer_scale": lambda: clip(ls_init_value=0.5),
    "custom_block": lambda: clip(qk_norm=True, scale_heads=True, scale_attn_inner=True, scale_fc=True),
    "attention_pool": lambda: clip(attentional_pool=True, attn_pooler_queries=5, attn_pooler_heads=4),
    "wide_image": lambda: clip(image_size=[32, 48]),
    "coca": coca,
    "sequence_first": sequence_first,
    "torchvision": tv_vit,
    "torchvision_hidden": lambda: tv_vit(representation_size=20),
}


def images(model: Any, count: int = 3) -> Tensor:
    inner = getattr(model, "inner", model)
    size = getattr(getattr(inner, "visual", inner), "image_size", 64)
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def compressed(
    model: Any, layers: dict[int, str], metric: str = "{kind: token_norm}", more: str = ""
) -> CompressedModel:
    lines = "".join(f"  - {{layer: {layer}, {drop}}}\n" for layer, drop in layers.items())
    text = f"version: 1\nmetric: {metric}\n{more}layers:\n{lines}"
    return attach(model, resolve_for(model, Recipe.parse(text)))


@pytest.mark.parametrize("name", MODELS)
def test_every_block_passes_the_permute_test(name: str) -> None:
    model = MODELS[name]()
    family = match(model)
    for site in family.sites(model):
        assert permute_difference(model, family, images(model), site, None) < TOLERANCE


def test_a_sequence_first_model_that_is_taken_for_batch_first_fails_the_permute_test(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = sequence_first()
    monkeypatch.setattr(Tower, "batch_first", property(lambda tower: True))
    with pytest.raises(ModelError):
        check_permutation(model, match(model), images(model))


@pytest.mark.parametrize("name", MODELS)
def test_macs_equal_the_counter(name: str) -> None:
    model = MODELS[name]()
    shape = tuple(images(model).shape[1:])
    assert match(model).macs(model, None) == count_macs(model, shape)
    reduced = compressed(model, {0: "drop_ratio: 0.3", 1: "drop_ratio: 0.4"})
    assert reduced.macs() == count_macs(reduced, shape)


@pytest.mark.parametrize("grad", [False, True])  # without gradients nn.MultiheadAttention runs a kernel of its own
@pytest.mark.parametrize("name", MODELS)
def test_keep_all_is_bit_identical_to_the_dense_model(name: str, grad: bool) -> None:
    model, patches = MODELS[name](), match(MODELS[name]()).layout(MODELS[name]()).patch_tokens
    with torch.set_grad_enabled(grad):
        expected = model(images(model))
        reduced = compressed(model, {1: f"keep_tokens: {patches}"}, "{kind: representation_shift, operation: mlp}")
        assert torch.equal(reduced(images(model)), expected)
        assert expected.ndim == 2


@pytest.mark.parametrize("metric", ["attention", "mlp", "block"])
def test_tokens_first_keeps_what_images_first_keeps(metric: str) -> None:
    found = []
    for build in (clip, sequence_first):
        shift = f"{{kind: representation_shift, operation: {metric}}}"
        model = compressed(build(), {0: "drop_ratio: 0.3", 1: "drop_ratio: 0.4"}, shift)
        found.append(model.trace(images(model.model)))
    assert all(torch.equal(found[0].kept[layer], found[1].kept[layer]) for layer in (0, 1))
    torch.testing.assert_close(found[0].output, found[1].output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "torchvision", "coca"])
def test_the_native_kernel_of_torch_gives_the_same(name: str) -> None:
    model = compressed(MODELS[name](), {0: "drop_ratio: 0.3"})
    inputs = images(model.model)
    with torch.no_grad():
        native = model(inputs)
    torch.testing.assert_close(native, model(inputs).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "coca", "torchvision", "sequence_first"])
def test_the_result_equals_a_plain_loop(name: str) -> None:
    model = MODELS[name]()
    inputs = images(model)
    expected = naive(model, inputs, 0, 20)
    reduced = compressed(model, {0: "keep_tokens: 20"})
    with torch.no_grad():
        torch.testing.assert_close(reduced(inputs), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def naive(model: Any, inputs: Tensor, layer: int, keep: int) -> Tensor:
    """The model with the `keep` patch tokens of the largest norm after a block, without hooks."""
    inner = model.inner
    blocks = inner.encoder.layers if isinstance(inner, VisionTransformer) else inner.visual.transformer.resblocks
    first = getattr(getattr(getattr(inner, "visual", None), "transformer", None), "batch_first", True)
    forward = blocks[layer].forward

    def shortened(*args: Any, **kwargs: Any) -> Tensor:
        output = forward(*args, **kwargs)
        output = output if first else output.transpose(0, 1)
        rows = []
        for row in output:
            kept = row[1:].norm(dim=-1).topk(keep).indices.sort().values
            rows.append(torch.cat((row[:1], row[1:][kept])))
        output = torch.stack(rows)
        return output if first else output.transpose(0, 1)

    blocks[layer].forward = shortened
    result: Tensor = model(inputs)
    del blocks[layer].forward
    return result


@pytest.mark.parametrize("name", ["clip", "torchvision"])
def test_copies_and_pickles(name: str) -> None:
    model = compressed(MODELS[name](), {0: "drop_ratio: 0.3"})
    inputs = images(model.model)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(inputs), model(inputs))
        assert torch.equal(pickle.load(io.BytesIO(pickle.dumps(model)))(inputs), model(inputs))


def test_site_names_are_those_of_the_modules() -> None:
    for build in (clip, tv_vit, timm_vit):
        model = build()
        for site in match(model).sites(model):
            assert model.inner.get_submodule(site.name) is site.block


def test_models_of_the_library_are_compressed_as_they_are() -> None:
    for model in (clip().inner, clip().inner.visual, tv_vit().inner):
        layers = {0: "drop_ratio: 0.3"}
        inputs = images(model)
        with torch.no_grad():
            dense = model(inputs)
            reduced = compressed(model, layers)(inputs)
        first, other = (dense[0], reduced[0]) if isinstance(dense, tuple) else (dense, reduced)
        assert first.shape == other.shape
        assert not torch.allclose(first, other)


@pytest.mark.parametrize("build", [clip, tv_vit])
def test_merging_is_refused(build: Callable[[], Any]) -> None:
    with pytest.raises(RecipeError, match=r"nn\.MultiheadAttention of VisionTransformer cannot weight tokens by size"):
        compressed(build(), {0: "drop_ratio: 0.3"}, more="reducer: {kind: merge}\n")


@pytest.mark.parametrize("build", [clip, tv_vit])
def test_queries_and_keys_are_refused(build: Callable[[], Any]) -> None:
    with pytest.raises(RecipeError, match=r"nn\.MultiheadAttention .* computes queries and keys without a module"):
        compressed(build(), {0: "drop_ratio: 0.3"}, "{kind: class_attention}")


def test_what_is_not_supported_is_refused() -> None:
    stem = [ConvStemConfig(8, 3, 2), ConvStemConfig(8, 3, 2), ConvStemConfig(8, 3, 2)]
    for model, reason in (
        (tv_vit(conv_stem_configs=stem), "several convolutions"),
        (clip(pool_type="none"), "returns all tokens"),
        (clip(attentional_pool="cascade", attn_pooler_heads=4), "pools them twice"),
    ):
        with pytest.raises(ModelError, match=reason):
            match(model)
    with pytest.raises(ModelError, match="CLIP are not supported"):
        match(CLIP(24, {**VISION, "layers": [1, 1, 1, 1]}, dict(TEXT)))


def timm_vit(pool: Any = "token", proj: str = "linear") -> Any:
    model = timm_trunk("test_vit", timm_proj=proj)
    shape: dict[str, Any] = {"img_size": 160, "embed_dim": 64, "depth": 3, "num_heads": 2, "num_classes": 0}
    trunk = TimmTransformer(**shape, global_pool=pool, class_token=pool == "token")
    model.inner.visual.trunk = trunk.eval()
    return model


TRUNKS: dict[str, Callable[[], Any]] = {
    "token": timm_vit,
    "map": lambda: timm_vit("map"),
    "average": lambda: timm_vit("avg"),
    "mlp": lambda: timm_vit(proj="mlp"),
    "convnext": lambda: timm_trunk("test_convnext", ""),
}


@pytest.mark.parametrize("name", TRUNKS)
def test_models_of_timm_inside_open_clip(name: str) -> None:
    model = TRUNKS[name]()
    inputs, family = images(model), match(model)
    sites = family.layout(model).sites
    assert family.macs(model, None) == count_macs(model, inputs.shape[1:])
    with torch.no_grad():
        expected = model(inputs)
        reduced = compressed(model, {sites[0].layer: "drop_ratio: 0.3"})
        assert reduced.macs() == count_macs(reduced, inputs.shape[1:])
        assert reduced.plan.sites[0].site.startswith("visual.trunk.")
        assert not torch.allclose(reduced(inputs), expected)
        assert torch.equal(reduced.detach()(inputs), expected)


def test_timm_inside_open_clip_merges() -> None:
    model = timm_vit("map")
    alone = copy.deepcopy(model).inner.visual
    trunk = compressed(alone.trunk, {0: "drop_ratio: 0.3"}, more="reducer: {kind: merge}\n")
    reduced = compressed(model, {0: "drop_ratio: 0.3"}, more="reducer: {kind: merge}\n")
    inputs = images(model)
    assert reduced.macs() == count_macs(reduced, inputs.shape[1:])
    with torch.no_grad():
        assert torch.equal(reduced(inputs), alone.head(trunk(inputs)))


def test_timm_inside_open_clip_is_refused_with_the_reason() -> None:
    with pytest.raises(ModelError, match="described for images of"):
        match(timm_trunk("test_convnext", "", image_size=128))
    with pytest.raises(ModelError, match=r"without global pooling|by attention"):
        match(timm_trunk("resnet18", "rot_attn"))


@pytest.mark.parametrize(("block", "layers"), [(BasicBlock, [2, 2, 1, 1]), (Bottleneck, [1, 2, 2, 1])])
def test_resnets_of_torchvision(block: Any, layers: list[int]) -> None:
    torch.manual_seed(0)
    model = ResNet(block, layers, num_classes=5).eval()
    inputs, family = torch.randn(3, 3, 224, 224), match(model)
    assert family.macs(model, None) == count_macs(model, (3, 224, 224))
    site = family.layout(model).sites[0]
    with torch.no_grad():
        expected = model(inputs)
        reduced = compressed(model, {site.layer: "drop_ratio: 0.3"}, "{kind: representation_shift, operation: block}")
        assert reduced.macs() == count_macs(reduced, (3, 224, 224))
        assert reduced(inputs).shape == expected.shape
        assert torch.equal(reduced.detach()(inputs), expected)


def test_a_resnet_of_torchvision_computes_what_that_of_timm_computes() -> None:
    import timm

    torch.manual_seed(0)
    ours = ResNet(Bottleneck, [1, 2, 1, 1], num_classes=5).eval()
    kind: Any = timm.models.resnet.Bottleneck
    model = timm.models.resnet.ResNet(kind, (1, 2, 1, 1), num_classes=5).eval()
    model.load_state_dict(ours.state_dict())
    inputs = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(inputs), model(inputs))
