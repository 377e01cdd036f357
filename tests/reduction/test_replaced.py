"""Replaced parameters are those of the compressed model only: the dense model and its copies keep their own."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import compressed, images, tiny_vit
from torch import Tensor, nn

from repshift_cli.errors import ModelError
from repshift_cli.reduction.baselines import dense_copy, shared_copy
from repshift_cli.reduction.compressed_model import CompressedModel, detach

NAMES = ("norm.weight", "blocks.1.mlp.fc1.bias", "head.weight")


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture
def model() -> nn.Module:
    return tiny_vit().requires_grad_(False)


@pytest.fixture
def replaced(model: nn.Module) -> CompressedModel:
    found = compressed(model)
    found.replace_parameters({name: model.get_parameter(name) + 0.5 for name in NAMES})
    return found


@torch.no_grad()
def test_the_dense_model_has_its_own(replaced: CompressedModel) -> None:
    plain = tiny_vit()
    expected = compressed(tiny_vit())(images())
    assert not torch.allclose(replaced(images()), expected)
    before = bits(replaced)
    with replaced.dense() as dense, replaced.dense():
        assert torch.equal(dense(images()), plain(images()))
        assert same(bits(dense), bits(plain))
    assert same(before, bits(replaced))
    assert not same(before, bits(plain))


@torch.no_grad()
def test_detach_gives_the_same_objects_back(model: nn.Module) -> None:
    before = dict(model.named_parameters())
    found = compressed(model)
    found.replace_parameters({name: model.get_parameter(name) + 0.5 for name in NAMES})
    assert model.get_parameter("norm.weight") is not before["norm.weight"]
    found.replace_parameters({"norm.bias": model.get_parameter("norm.bias") + 1})
    detach(model)
    assert all(after is before[name] for name, after in model.named_parameters())


@torch.no_grad()
def test_copies_that_share_weights(replaced: CompressedModel) -> None:
    """`bench --against` and `advise` attach and detach plans on such copies."""
    output = replaced(images())
    assert torch.equal(dense_copy(replaced)(images()), tiny_vit()(images()))
    twin = shared_copy(replaced)
    assert isinstance(twin, CompressedModel)
    assert torch.equal(twin(images()), output)
    twin.detach()
    assert torch.equal(copy.deepcopy(replaced)(images()), output)
    assert torch.equal(replaced(images()), output)


def test_another_dtype(replaced: CompressedModel) -> None:
    replaced.model.double()
    with torch.inference_mode(), replaced.dense() as dense:
        assert {value.dtype for value in dense.parameters()} == {torch.float64}
        assert torch.equal(dense(images().double()), tiny_vit().double()(images().double()))
    assert not any(value.is_inference() for value in replaced.parameters())


def test_save_is_refused(replaced: CompressedModel) -> None:
    with pytest.raises(ModelError, match="recovered weights"):
        replaced.save("x.safetensors")
