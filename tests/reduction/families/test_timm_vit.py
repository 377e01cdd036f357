"""ViTs of timm with a convolutional network in the patch embedding."""

from __future__ import annotations

import pytest
import timm
import torch

from repshift_cli import Recipe, compress
from repshift_cli.checkpoints.create import on_meta
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.measure.macs import count_macs
from repshift_cli.reduction.families.base import match

RECIPE = "version: 1\nmetric: {kind: token_norm}\nreducer: {kind: prune}\nlayers: [{layer: 0, drop_ratio: 0.25}]\n"


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_r_s16_p8_224", "vit_small_resnet26d_224", "vit_base_mci_224", "vitamin_small_224", "vitamin_xlarge_256"],
)
def test_macs_are_those_of_the_counter(name: str) -> None:
    with on_meta():
        model = timm.create_model(name, depth=2).eval()
    size = Preprocessing.of_model(model).input_size
    assert size[0] == 3
    dense = match(model).macs(model, None)
    assert dense == count_macs(model, size)
    compressed = compress(model, Recipe.parse(RECIPE))
    assert compressed.macs() == count_macs(compressed, size) < dense


def test_a_hybrid_runs() -> None:
    model = timm.create_model("vit_tiny_r_s16_p8_224", depth=2, img_size=96).eval()
    compressed = compress(model, Recipe.parse(RECIPE))
    with torch.no_grad():
        assert compressed(torch.randn(2, 3, 96, 96)).shape == (2, 1000)
    assert compressed.macs() == count_macs(compressed, (3, 96, 96))
