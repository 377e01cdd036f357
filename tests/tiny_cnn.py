"""Small convolutional networks of each supported kind, and plans for them."""

from __future__ import annotations

from functools import partial
from typing import Any

import timm
import torch
from timm.layers import GroupNorm
from torch import Tensor, nn

from repshift_cli.models.tensor_model import library_model
from repshift_cli.planning.layout import Grid
from repshift_cli.planning.plan import Plan
from repshift_cli.planning.recipe import Recipe
from repshift_cli.planning.resolve import resolve
from repshift_cli.reduction.compressed_model import CompressedModel, Trace, attach
from repshift_cli.reduction.families.base import match

__all__ = [
    "CNNS",
    "SHIFT",
    "SIZE",
    "compressed_cnn",
    "drawn",
    "every_site",
    "line_plan",
    "photos",
    "shrink",
    "tiny_cnn",
]

SIZE = (97, 130)
"""Odd and not square; 25x33 positions after a stem of stride 4."""

SHIFT = "{kind: representation_shift, operation: block}"

_BASIC: dict[str, Any] = {"channels": (8, 16, 16, 24), "layers": (2, 2, 2, 2)}
_NARROW: dict[str, Any] = {"channels": (4, 4, 8, 8), "layers": (2, 2, 2, 2)}
_DEEP: dict[str, Any] = {"stem_width": 8}
_GROUPS: dict[str, Any] = {"norm_layer": partial(GroupNorm, num_groups=4)}
_CONVNEXT: dict[str, Any] = {"depths": (2, 1, 2, 1), "dims": (8, 8, 16, 16), "kernel_sizes": 3}
_REGNET: dict[str, Any] = {"w0": 8, "wa": 6.0, "wm": 2.0, "depth": 9, "group_size": 4, "stem_width": 8}

CNNS: dict[str, tuple[str, dict[str, Any]]] = {
    "basic": ("resnet18", _BASIC),
    "basic_d": ("resnet18d", {**_BASIC, "stem_width": 4}),
    "bottleneck": ("resnet50", _NARROW),
    "bottleneck_d": ("resnet50d", {**_NARROW, **_DEEP}),
    "deep_stem": ("resnet50c", {**_NARROW, **_DEEP}),
    "tiered_stem": ("resnet26t", {**_NARROW, **_DEEP}),
    "resnext": ("resnext50_32x4d", {**_NARROW, "cardinality": 2, "base_width": 32}),
    "wide": ("wide_resnet50_2", _NARROW),
    "squeeze_basic": ("seresnet18", _BASIC),
    "squeeze_bottleneck": ("seresnet50", _NARROW),
    "senet": ("senet154", {**_NARROW, **_DEEP, "cardinality": 2, "base_width": 64}),
    "strided_stem": ("resnetrs50", {**_NARROW, **_DEEP}),
    "eca": ("ecaresnet26t", {**_NARROW, **_DEEP}),
    "effective_squeeze": ("resnet50", {**_NARROW, "block_args": {"attn_layer": "ese"}}),
    "group_norm": ("resnet50_gn", {**_NARROW, **_GROUPS}),
    "blur_basic": ("resnetblur18", _BASIC),
    "blur": ("resnetblur50", _NARROW),
    "blur_d": ("resnetblur50d", {**_NARROW, **_DEEP}),
    "max_pooling": ("resnet18", {**_BASIC, "global_pool": "catavgmax"}),
    "no_head": ("resnet18", {**_BASIC, "num_classes": 0}),
    "convnext": ("convnext_atto", _CONVNEXT),
    "convnext_large_kernel": ("convnext_atto", {**_CONVNEXT, "kernel_sizes": (7, 5, 3, 3), "conv_mlp": False}),
    "convnext_overlapping_stem": ("convnext_atto_ols", _CONVNEXT),
    "convnext_norm_first": ("convnext_tiny", {**_CONVNEXT, "head_norm_first": True}),
    "convnext_hidden_head": ("convnext_tiny", {**_CONVNEXT, "head_hidden_size": 12}),
    "convnext_v2": ("convnextv2_tiny", _CONVNEXT),
    "convnext_v2_conv_mlp": ("convnextv2_tiny", {**_CONVNEXT, "conv_mlp": True}),
    "regnet_x": ("regnetx_002", _REGNET),
    "regnet_y": ("regnety_002", _REGNET),
    "regnet_z": ("regnetz_005", {**_REGNET, "bottle_ratio": 2.0, "num_features": 24}),
    "regnet_v": ("regnetv_040", _REGNET),
    "regnet_v_average": ("regnetv_064", _REGNET),
}
"""By kind: timm's name and smaller sizes."""


def tiny_cnn(kind: str = "basic", size: Grid = SIZE, seed: int = 0, **options: Any) -> nn.Module:
    """A network of the kind (or by timm's name) in eval mode, with weights large enough that its outputs differ."""
    name, smaller = CNNS.get(kind, (kind, {}))
    return drawn(timm.create_model(name, **{"num_classes": 10, **smaller, **options}), size, seed)


def drawn(model: nn.Module, size: Grid = SIZE, seed: int = 0) -> nn.Module:
    """The model in eval mode, with weights as in `tiny_cnn`."""
    config: Any = getattr(model, "pretrained_cfg", {})
    model.pretrained_cfg = {**config, "input_size": (3, *size)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=(2 / parameter[0].numel()) ** 0.5)
            elif key.endswith("bias"):
                nn.init.normal_(parameter, std=0.3)
            else:
                nn.init.uniform_(parameter, 0.4, 1.2)
        for key, buffer in model.named_buffers():
            if key.endswith("running_mean"):
                nn.init.normal_(buffer, std=0.3)
            elif key.endswith("running_var"):
                nn.init.uniform_(buffer, 0.5, 2.0)
    return model.eval()


def photos(count: int = 2, size: Grid = SIZE, seed: int = 1) -> Tensor:
    """Coarse patterns and noise, `[count, 3, *size]`: lines differ, as in a photo."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 6, 6, generator=generator)
    fine = torch.randn(count, 3, *size, generator=generator)
    return nn.functional.interpolate(coarse, size, mode="bicubic") + 0.5 * fine


def line_plan(model: nn.Module, layers: str, metric: str = SHIFT) -> Plan:
    """The plan of a recipe, from the YAML of its parts."""
    text = f"version: 1\nmetric: {metric}\nlayers: {layers}\n"
    return resolve(Recipe.parse(text, "r.yaml"), match(model).layout(model))


def shrink(model: nn.Module, lines: dict[int, Grid], metric: str = SHIFT) -> Plan:
    """The plan that drops these numbers of rows and columns after the sites with these indices."""
    layout, kept, layers = match(model).layout(model), {}, []
    for index, (rows, columns) in sorted(lines.items()):
        site = layout.sites[index]
        height, width = next(grid for found, grid in layout.grids(kept) if found == site)
        kept[site.layer] = (height - rows, width - columns)
        layers.append(f"{{layer: {site.name}, keep_grid: [{height - rows}, {width - columns}]}}")
    return line_plan(model, f"[{', '.join(layers)}]", metric)


def every_site(model: nn.Module) -> Plan:
    """The plan that drops one row, one column or both after each site, in turn; nothing of the last maps."""
    count = len(match(model).layout(model).sites)
    turns: tuple[Grid, ...] = ((1, 0), (0, 1), (1, 2))
    return shrink(model, {index: turns[index % 3] if index < count - 2 else (0, 0) for index in range(count)})


def traced_grids(wrapped: CompressedModel, images: Tensor) -> tuple[Trace, dict[str, tuple[int, ...]]]:
    """A trace, and the size of the map that arrives at each site."""
    seen: dict[str, tuple[int, ...]] = {}

    def note(module: nn.Module, args: Any, output: Tensor, *, at: str) -> None:
        seen[at] = tuple(output.shape[2:])

    library = library_model(wrapped.model)
    handles = [
        library.get_submodule(site.name).register_forward_hook(partial(note, at=site.name), prepend=True)
        for site in wrapped.layout.sites
    ]
    trace = wrapped.trace(images)
    for handle in handles:
        handle.remove()
    return trace, seen


def compressed_cnn(kind: str = "basic", lines: dict[int, Grid] | None = None, metric: str = SHIFT) -> CompressedModel:
    """A network of the kind that drops lines after the sites with these indices."""
    model = tiny_cnn(kind)
    return attach(model, shrink(model, lines or {0: (3, 5), 2: (1, 2)}, metric))
