"""Recovery trains norms, biases and the last layer, and keeps the result only if held-out images confirm it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import images, make_plan, make_recipe, tiny_vit
from tiny_cnn import compressed_cnn
from tiny_cnn import photos as maps
from tiny_transformers import as_function, tiny_inputs, tiny_transformer
from tiny_vim import tiny_vim, vim_images
from torch import Tensor, nn

from repshift_cli.calibration import recover as recovery
from repshift_cli.calibration.recover import Recovery, recover
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.data.inputs import load_inputs
from repshift_cli.errors import CheckFailed, DataError, ModelError, UsageError
from repshift_cli.models.tensor_model import library_model
from repshift_cli.reduction.compressed_model import CompressedModel, attach
from repshift_cli.reduction.plans import resolve_for
from repshift_cli.utils.progress import Silent

STRONG = "[{layer: 0, drop_ratio: 0.5}, {layer: 1, drop_ratio: 0.4}]"
FEW = images(16)


def compressed(model: nn.Module, layers: str = "[{layer: 0, drop_ratio: 0.5}]") -> CompressedModel:
    return attach(model, resolve_for(model, make_recipe(layers, "{kind: token_norm}")))


def run(model: CompressedModel, given: Tensor = FEW, passes: int = 1, seed: int = 0) -> Recovery:
    return recover(model, given, {"where": "tensor"}, passes, seed, Silent())


def values(model: CompressedModel) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def changed(model: CompressedModel) -> set[str]:
    now = dict(library_model(model.model).named_parameters())
    with model.dense() as dense:
        before = dict(library_model(dense).named_parameters())
    return {name for name in now if not torch.equal(now[name], before[name])}


@pytest.fixture
def keep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every result: random weights have nothing to recover."""
    monkeypatch.setattr(recovery, "CLEAR_SIGMAS", -math.inf)
    monkeypatch.setattr(recovery.Deviation, "agreement", None)


class TestTrained:
    """On a trained model and images of its kind."""

    @pytest.fixture
    def found(self, keep: None) -> tuple[CompressedModel, Recovery, nn.Module]:
        loaded = load_checkpoint("builtin:vit-digits-small")
        batch = load_inputs(None, 16, loaded.description.preprocessing, 0)
        model = compressed(loaded.model, STRONG)
        return model, run(model, batch.tensor), load_checkpoint("builtin:vit-digits-small").model

    def test_only_norms_biases_and_the_last_layer(self, found: tuple[CompressedModel, Recovery, nn.Module]) -> None:
        model, result, _ = found
        assert changed(model) <= set(result.tensors)
        assert {"head.weight", "head.bias", "norm.weight", "blocks.0.attn.qkv.bias"} <= changed(model)
        left = {name.rpartition(".")[2] for name in dict(model.model.named_parameters()).keys() - changed(model)}
        assert not {name for name in changed(model) if "norm" not in name and not name.endswith("bias")} - {
            "head.weight"
        }
        assert {"cls_token", "pos_embed", "weight"} <= left

    def test_the_dense_model_is_the_same(self, found: tuple[CompressedModel, Recovery, nn.Module]) -> None:
        model, _, plain = found
        with model.dense() as dense:
            assert all(torch.equal(value, plain.state_dict()[key]) for key, value in dense.state_dict().items())
        assert not any(value.requires_grad for value in model.parameters())


def test_a_result_that_is_not_better_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "CLEAR_SIGMAS", math.inf)
    model = compressed(tiny_vit().requires_grad_(False))
    before = dict(model.model.named_parameters())
    result = run(model)
    assert not result.kept
    assert model.replaced is None
    assert all(after is before[name] for name, after in model.model.named_parameters())
    assert all(torch.equal(value, tiny_vit().get_parameter(name)) for name, value in before.items())


@pytest.mark.usefixtures("keep")
class TestAnyModel:
    def test_equal_seeds_give_equal_bits(self) -> None:
        runs = []
        for seed in (0, 0, 1):
            model = compressed(tiny_vit().requires_grad_(False))
            run(model, seed=seed, passes=2)
            runs.append(values(model))
        assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])
        assert not all(torch.equal(runs[0][key], runs[2][key]) for key in runs[0])

    @pytest.mark.parametrize("variant", [{"class_token": False, "global_pool": "avg"}, {"num_classes": 0}])
    @pytest.mark.parametrize("reducer", ["prune", "merge"])
    def test_poolings_and_reducers(self, variant: dict[str, Any], reducer: str) -> None:
        model = tiny_vit(**variant).requires_grad_(False)
        found = attach(model, make_plan(model, make_recipe(metric="{kind: token_norm}", reducer=reducer)))
        assert set(run(found).tensors) >= changed(found) != set()

    def test_vim(self) -> None:
        model = tiny_vim().requires_grad_(False)
        found = compressed(model)
        assert set(run(found, vim_images(model, 16)).tensors) >= changed(found) != set()

    def test_cnn(self) -> None:
        found = compressed_cnn()
        found.model.requires_grad_(False)
        assert set(run(found, maps(16)).tensors) >= changed(found)
        assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed(found)} > {"fc", "bn1"}

    def test_transformers(self) -> None:
        model = as_function(tiny_transformer("ViTForImageClassification").requires_grad_(False))
        found = compressed(model)
        result = run(found, tiny_inputs(model, 16))
        assert "classifier.weight" in result.tensors
        assert set(result.tensors) >= changed(found)


class TestRefused:
    def test_too_few_images(self) -> None:
        with pytest.raises(DataError, match="at least 8 images"):
            run(compressed(tiny_vit()), images(7))

    def test_more_than_a_checkpoint_stores(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(recovery, "_MOST_VALUES", 100)
        with pytest.raises(UsageError, match="stores at most 100"):
            run(compressed(tiny_vit()))

    def test_a_model_without_gradients(self) -> None:
        model: Any = tiny_vit().requires_grad_(False)
        found = compressed(model)
        model.head.register_forward_hook(lambda module, args, output: output.detach())
        with pytest.raises(ModelError, match="cannot be trained here"):
            run(found)
        assert found.replaced is None

    def test_outputs_that_are_not_finite(self) -> None:
        model: Any = tiny_vit().requires_grad_(False)
        model.head.weight.fill_(math.nan)
        with pytest.raises(CheckFailed, match="not finite"):
            run(compressed(model))
