"""Small models of every variant of timm's Vision Transformer, and recipes and plans for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import (
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import Tensor, nn

from repshift_cli.planning.plan import Plan
from repshift_cli.planning.recipe import Recipe
from repshift_cli.planning.resolve import resolve
from repshift_cli.reduction.compressed_model import CompressedModel, attach
from repshift_cli.reduction.families.base import match

__all__ = [
    "DEPTH",
    "DROPS",
    "KEEP_ALL",
    "PATCHES",
    "VARIANTS",
    "compressed",
    "images",
    "make_plan",
    "make_recipe",
    "save_weights",
    "tiny_vit",
]

DEPTH = 4
PATCHES = 16
DROPS = "[{layer: 0, drop_ratio: 0.25}, {layer: 2, keep_tokens: 5}]"
KEEP_ALL = "[{layer: 0, keep_tokens: 16}, {layer: 2, keep_tokens: 16}]"

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mean_pooling": {"class_token": False, "global_pool": "avg"},
    "mean_pooling_with_class_token": {"global_pool": "avg"},
    "registers": {"reg_tokens": 3},
    "registers_without_position": {"reg_tokens": 2, "no_embed_class": True},
    "map_pooling": {"class_token": False, "global_pool": "map"},
    "map_pooling_with_prefix": {"global_pool": "map", "reg_tokens": 1, "pool_include_prefix": True},
    "layer_scale": {"init_values": 0.3},
    "qk_norm": {"qk_norm": True},
    "pre_norm": {"pre_norm": True},
    "no_head": {"num_classes": 0},
    "post_norm_block": {"block_fn": ResPostBlock, "init_values": 0.7},
    "parallel_scaling_block": {"block_fn": ParallelScalingBlock, "init_values": 0.3, "qk_norm": True},
    "parallel_things_block": {"block_fn": ParallelThingsBlock},
    "differential_attention": {"attn_layer": "diff"},
    "distilled": {"distilled": True},
}
"""By name: what differs from `tiny_vit()`."""


def tiny_vit(*, seed: int = 0, distilled: bool = False, **options: Any) -> nn.Module:
    """A ViT of 4 blocks and 16 patches in eval mode, with weights large enough that its tokens differ."""
    defaults = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": DEPTH, "num_heads": 2, "num_classes": 10}
    kind = VisionTransformerDistilled if distilled else VisionTransformer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = kind(**{**defaults, **options})
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
            elif "gamma" not in name:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def images(count: int = 2, size: int = 32, seed: int = 1) -> Tensor:
    """Noise `[count, 3, size, size]`."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def make_recipe(layers: str = DROPS, metric: str = "{kind: representation_shift}", reducer: str = "prune") -> Recipe:
    """A recipe from the YAML of its parts."""
    return Recipe.parse(f"version: 1\nmetric: {metric}\nreducer: {{kind: {reducer}}}\nlayers: {layers}\n")


def make_plan(model: nn.Module, recipe: Recipe | None = None) -> Plan:
    """The plan of the recipe for the model."""
    return resolve(recipe or make_recipe(), match(model).layout(model))


def compressed(model: nn.Module | None = None, recipe: Recipe | None = None) -> CompressedModel:
    """The model with the recipe attached."""
    model = model if model is not None else tiny_vit()
    return attach(model, make_plan(model, recipe))


def save_weights(model: nn.Module, path: Path) -> Path:
    """The weights of the model as safetensors, without any metadata."""
    # tied weights share memory, which safetensors does not support
    save_file({key: value.clone().contiguous() for key, value in model.state_dict().items()}, path)
    return path
