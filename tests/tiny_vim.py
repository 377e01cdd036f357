"""Small Vision Mambas, and a naive Vim: token by token, each direction alone, one image at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from repshift_cli.models.vim import VisionMamba

__all__ = ["DEPTH", "VARIANTS", "Naive", "naive_vim", "tiny_vim", "vim_images"]

DEPTH = 4
CLASSES = 10

VARIANTS: dict[str, dict[str, Any]] = {
    "middle": {},
    "double": {"class_token": "double"},
    "odd": {"img_size": (24, 40)},
    "odd_double": {"img_size": (40, 24), "class_token": "double"},
    "overlapping": {"img_size": (20, 28), "stride": 4},
    "no_head": {"num_classes": 0},
}
"""By name: what differs from `tiny_vim()`. `odd` has 15 patches, of which 7 are before the class token."""


def tiny_vim(*, seed: int = 0, **options: Any) -> VisionMamba:
    """A Vim of 4 layers and 16 patches in eval mode, with weights large enough that its tokens differ."""
    defaults = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": DEPTH, "d_state": 4, "num_classes": CLASSES}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VisionMamba(**{**defaults, **options})
        for name, parameter in model.named_parameters():
            if name.endswith("_log"):
                nn.init.uniform_(parameter, -1, 1)
            elif name.endswith("dt_proj.bias") or name.endswith("dt_proj_b.bias"):
                nn.init.uniform_(parameter, -2, 1)
            elif parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.25)
            else:
                parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def vim_images(model: VisionMamba, count: int = 2, seed: int = 1) -> Tensor:
    """Noise of the size and in the dtype that the model takes."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, *model.patch_embed.img_size, generator=generator)
    return images.to(model.pos_embed.dtype)


@dataclass
class Naive:
    """The state of one image in the model.

    Attributes:
        hidden, residual: `[T, C]` as each layer returns them, before tokens are dropped.
        labels: of each layer, what its tokens are: the place of a patch in the grid, or a name of a class token.
        logits: `[classes]`.
    """

    hidden: list[Tensor] = field(default_factory=list)
    residual: list[Tensor] = field(default_factory=list)
    labels: list[list[int | str]] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))

    def patches(self, layer: int) -> list[int]:
        """Rows of the patch tokens."""
        return [row for row, label in enumerate(self.labels[layer]) if isinstance(label, int)]


def naive_vim(
    weights: Mapping[str, Tensor], image: Tensor, *, stride: int | None = None, kept: Mapping[int, Any] | None = None
) -> Naive:
    """Vim on one image, in the dtype of the weights.

    Args:
        weights: under the authors' keys.
        image: `[3, H, W]`.
        stride: of the patches; None for the patch size.
        kept: after these layers only these patches (places in the grid) and the class tokens are left.
    """
    kernel = weights["patch_embed.proj.weight"]
    patches = functional.conv2d(image[None], kernel, weights["patch_embed.proj.bias"], stride or kernel.shape[-1])
    tokens = [*patches[0].flatten(1).T]
    labels: list[int | str] = [*range(len(tokens))]
    for name, place in (("cls_token", len(tokens) // 2), ("cls_token_head", 0), ("cls_token_tail", len(tokens) + 1)):
        if name in weights:
            tokens.insert(place, weights[name][0, 0])
            labels.insert(place, name)
    hidden = torch.stack(tokens) + weights["pos_embed"][0]
    residual = torch.zeros_like(hidden)
    found = Naive()
    depth = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("layers."))
    for index in range(depth):
        layer = {key.split(".", 2)[2]: value for key, value in weights.items() if key.startswith(f"layers.{index}.")}
        residual = residual + hidden
        hidden = _mixer(layer, _rms_norm(residual, layer["norm.weight"]))
        found.hidden.append(hidden)
        found.residual.append(residual)
        found.labels.append(labels)
        if kept is not None and index in kept:
            stay = {int(place) for place in kept[index]}
            rows = [row for row, label in enumerate(labels) if isinstance(label, str) or label in stay]
            hidden, residual, labels = hidden[rows], residual[rows], [labels[row] for row in rows]
    classes = [row for row, label in enumerate(labels) if isinstance(label, str)]
    pooled = _rms_norm(hidden + residual, weights["norm_f.weight"])[classes].mean(0)
    found.logits = weights["head.weight"] @ pooled + weights["head.bias"] if "head.weight" in weights else pooled
    return found


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * weight


def _mixer(layer: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    xz = tokens @ layer["mixer.in_proj.weight"].T
    forward, backward = _direction(layer, xz, ""), _direction(layer, xz.flip(0), "_b").flip(0)
    return (forward + backward) / 2 @ layer["mixer.out_proj.weight"].T


def _direction(layer: Mapping[str, Tensor], xz: Tensor, end: str) -> Tensor:
    x, z = xz.chunk(2, dim=-1)
    convolution, rates = layer[f"mixer.conv1d{end}.weight"][:, 0], -layer[f"mixer.A{end}_log"].exp()
    width, size = rates.shape
    rank = math.ceil(len(layer["norm.weight"]) / 16)
    state, outputs = x.new_zeros(width, size), []
    for t in range(len(x)):
        seen = layer[f"mixer.conv1d{end}.bias"]
        for tap in range(4):
            if t - 3 + tap >= 0:
                seen = seen + convolution[:, tap] * x[t - 3 + tap]
        u = seen * torch.sigmoid(seen)
        dt, b, c = (layer[f"mixer.x_proj{end}.weight"] @ u).split((rank, size, size))
        raw = layer[f"mixer.dt_proj{end}.weight"] @ dt + layer[f"mixer.dt_proj{end}.bias"]
        delta = torch.log1p(raw.exp())
        state = torch.exp(delta[:, None] * rates) * state + (delta * u)[:, None] * b
        y = state @ c + layer[f"mixer.D{end}"] * u
        outputs.append(y * z[t] * torch.sigmoid(z[t]))
    return torch.stack(outputs)
