"""Specs of a user: the permute test decides."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import make_recipe
from tiny_transformers import SMALL, tiny_transformer
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

import repshift_cli
from repshift_cli.errors import ModelError
from repshift_cli.reduction.specs import registered
from repshift_cli.reduction.specs.spec import BlockSpec, Output, Spec

RECIPE = make_recipe()


class Layer(nn.Module):
    """A pre-norm block without an attention of a library."""

    def __init__(self, ordered: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.mlp = nn.Linear(32, 32)
        self.ordered = ordered

    def forward(self, tokens: Tensor) -> Tensor:
        update = self.mlp(self.norm(tokens))
        if self.ordered:  # neighbours are mixed, so the order matters
            update = update + tokens.roll(1, dims=1)
        return tokens + update


class Own(nn.Module):
    """A tower that no library has."""

    def __init__(self, ordered: bool = False) -> None:
        super().__init__()
        self.image_size, self.heads = 32, 2
        self.stem = nn.Conv2d(3, 32, 8, 8)
        self.cls = nn.Parameter(torch.randn(1, 1, 32))
        self.layers = nn.ModuleList(Layer(ordered) for _ in range(4))
        self.head = nn.Linear(32, 5)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.stem(images).flatten(2).mT
        tokens = torch.cat((self.cls.expand(len(tokens), -1, -1), tokens), dim=1)
        for layer in self.layers:
            tokens = layer(tokens)
        logits: Tensor = self.head(tokens.mean(dim=1))
        return logits


SPEC = Spec(
    library=Own.__module__.partition(".")[0],
    tower="Own",
    blocks="layers",
    block=BlockSpec(mlp_update="mlp", mlp_stream="norm"),
    patches="stem",
    heads="heads",
    size="image_size",
    outputs={"Own": Output(logits=True)},
    pooling="mean",
)


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registered, "SPECS", [])


def test_a_model_of_a_registered_spec_is_reduced() -> None:
    with pytest.raises(ModelError, match="models of the kind Own are not supported"):
        repshift_cli.compress(Own().eval(), RECIPE)
    repshift_cli.register(SPEC)
    model = repshift_cli.compress(Own().eval(), RECIPE)
    images = torch.randn(3, 3, 32, 32)
    assert [kept.shape[1] for kept in model.trace(images).kept.values()] == [12, 5]


def test_a_spec_that_fails_the_permute_test_is_refused() -> None:
    repshift_cli.register(SPEC)
    with pytest.raises(ModelError, match=r"fails the permute test behind layers\.0: outputs differ"):
        repshift_cli.compress(Own(ordered=True).eval(), RECIPE)


def test_a_wrong_path_is_named_and_can_be_corrected() -> None:
    model = Own().eval()
    repshift_cli.register(replace(SPEC, block=BlockSpec(mlp_update="feed_forward")))
    with pytest.raises(ModelError, match="names 'feed_forward', which this model does not have"):
        repshift_cli.compress(model, RECIPE)
    repshift_cli.register(SPEC)
    repshift_cli.compress(model, RECIPE)


class Classifier(nn.Module):
    """A head of a user on an encoder of a library."""

    def __init__(self, grid: bool) -> None:
        super().__init__()
        self.encoder = Dinov2Model(Dinov2Config(**{key: SMALL[key] for key in SMALL if key != "num_labels"}))
        self.head = nn.Linear(32, 5)
        self.grid = grid

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.encoder(images).last_hidden_state
        if self.grid:
            weights = torch.arange(float(tokens.shape[1]))
            return self.head((tokens * weights[:, None]).sum(dim=1))
        return self.head(tokens[:, 0])


def test_a_head_of_a_user_is_tested() -> None:
    model = repshift_cli.compress(Classifier(grid=False).eval(), make_recipe("[{layer: 0, drop_ratio: 0.5}]"))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    with pytest.raises(ModelError, match="fails the permute test"):
        repshift_cli.compress(Classifier(grid=True).eval(), make_recipe("[{layer: 0, drop_ratio: 0.5}]"))


def test_a_library_spec_of_a_user_replaces_ours() -> None:
    model = tiny_transformer("ViTModel")
    repshift_cli.register(replace(SPEC, library="transformers", tower="ViTModel", blocks="no_such_list"))
    with pytest.raises(ModelError, match="no_such_list"):
        repshift_cli.compress(model, RECIPE)
