"""Vision Mamba (Vim, arXiv 2401.09417): a bidirectional state space model on image patches.

Parameters have the names of the authors' checkpoints. Layers pass on a `VimStream`, in which the class token may be at
any position, so that tokens can be removed.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from repshift_cli.errors import UsageError
from repshift_cli.ops import mamba_kernels
from repshift_cli.ops.selective_scan import selective_scan

MODELS: dict[str, dict[str, Any]] = {
    "vim_tiny_patch16_224": {"embed_dim": 192},
    "vim_small_patch16_224": {"embed_dim": 384},
    "vim_base_patch16_224": {"embed_dim": 768},
    "vim_tiny_patch16_stride8_224": {"embed_dim": 192, "stride": 8},
    "vim_small_patch16_stride8_224": {"embed_dim": 384, "stride": 8},
    "vim_base_patch16_stride8_224": {"embed_dim": 768, "stride": 8},
}
"""The authors' models: bidirectional ("v2"), class token in the middle, both directions averaged ("div2")."""

CONV_WIDTH = 4
_NORM_EPS = 1e-5

ClassToken = Literal["middle", "double"]


def create(name: str, **args: Any) -> VisionMamba:
    """One of `MODELS` with random weights; `args` change what `VisionMamba` is built with (errors as there)."""
    return VisionMamba(**{**MODELS[name], **args})


class VimStream(NamedTuple):
    """The input and output of a layer.

    `hidden` `[B, T, C]` is the output of the last mixer, not yet added to the stream, `residual` `[B, T, C]`, float32,
    the stream before it, and `place`, int64 `[B, n]`, the ascending positions of the n class tokens among the T.
    """

    hidden: Tensor
    residual: Tensor
    place: Tensor


class PatchEmbed(nn.Module):
    """Patches as tokens in row-major order; they overlap if `stride` is smaller than `patch_size`."""

    def __init__(self, img_size: tuple[int, int], patch_size: int, stride: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.img_size = img_size
        self.patch_size = (patch_size, patch_size)
        self.stride = (stride, stride)
        rows, columns = ((side - patch_size) // stride + 1 for side in img_size)
        self.grid_size = (rows, columns)
        self.num_patches = rows * columns
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride)

    def forward(self, images: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, N, D]`. Raises UsageError for images of another size."""
        if tuple(images.shape[-2:]) != self.img_size:
            height, width = images.shape[-2:]
            raise UsageError(f"the model takes images of {self.img_size[0]}x{self.img_size[1]}, not {height}x{width}")
        patches: Tensor = self.proj(images)
        return patches.flatten(2).transpose(1, 2)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight`, computed in float32, returned in the dtype of the weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., C]` to the same shape."""
        normed = functional.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), _NORM_EPS)
        return normed.to(self.weight.dtype)


class Mixer(nn.Module):
    """A selective state space model that reads the tokens forwards and backwards (Vim, algorithm 1).

    Names with `_b` belong to the backward direction. Both directions read the same projection and run as one batch.
    """

    def __init__(self, width: int, d_state: int, expand: int = 2) -> None:
        super().__init__()
        inner, rank = expand * width, math.ceil(width / 16)
        self.d_state, self.rank = d_state, rank
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.conv1d, self.conv1d_b = (
            nn.Conv1d(inner, inner, CONV_WIDTH, groups=inner, padding=CONV_WIDTH - 1) for _ in range(2)
        )
        self.x_proj, self.x_proj_b = (nn.Linear(inner, rank + 2 * d_state, bias=False) for _ in range(2))
        self.dt_proj, self.dt_proj_b = (nn.Linear(rank, inner) for _ in range(2))
        decay = torch.arange(1, d_state + 1, dtype=torch.float32).log().repeat(inner, 1)  # S4D-Real, in every channel
        self.A_log, self.A_b_log = (nn.Parameter(decay.clone()) for _ in range(2))
        self.D, self.D_b = (nn.Parameter(torch.ones(inner)) for _ in range(2))
        self._initialise_steps()

    def forward(self, tokens: Tensor) -> Tensor:
        """`[B, T, C]` to `[B, T, C]`."""
        x, z = self.in_proj(tokens).chunk(2, dim=-1)
        mixed = self._with_kernels(x) if mamba_kernels.usable(x, self.d_state) else self._both_directions(x)
        out: Tensor = self.out_proj(mixed * functional.silu(z) * 0.5)
        return out

    def _both_directions(self, x: Tensor) -> Tensor:
        """The two scans of `[B, T, E]`, summed token by token."""
        u = self._convolved(torch.stack((x, x.flip(1))))
        # one product per direction: [2, B*T, E] x [2, E, R + 2N]
        read = torch.bmm(u.flatten(1, 2), self._pair("x_proj", "weight").mT)
        steps, b, c = read.split((self.rank, self.d_state, self.d_state), dim=-1)
        delta = torch.baddbmm(self._pair("dt_proj", "bias").unsqueeze(1), steps, self._pair("dt_proj", "weight").mT)
        delta = functional.softplus(delta).unflatten(1, x.shape[:2])
        b, c = (part.unflatten(1, x.shape[:2]) for part in (b, c))
        rates = torch.stack((self.A_log, self.A_b_log))
        rates = -rates.to(torch.promote_types(rates.dtype, torch.float32)).exp()
        y = selective_scan(u, delta, rates, b, c)
        y = torch.addcmul(y, u, torch.stack((self.D, self.D_b))[:, None, None].to(u.dtype))
        return y[0] + y[1].flip(1)

    def _convolved(self, x: Tensor) -> Tensor:
        """Causal depthwise convolution and SiLU of each direction, `[2, B, T, E]` to the same shape.

        As shifted products, so that the channels stay last, as for the other operations.
        """
        weight, bias = self._pair("conv1d", "weight")[:, :, 0], self._pair("conv1d", "bias")
        taps = weight.permute(2, 0, 1)[:, :, None, None]
        tokens = x.shape[2]
        mixed = torch.addcmul(bias[:, None, None].to(x.dtype), x, taps[-1])
        for back in range(1, min(CONV_WIDTH, tokens)):
            mixed = mixed + functional.pad(x[:, :, : tokens - back] * taps[-1 - back], (0, 0, back, 0))
        return functional.silu(mixed)

    def _with_kernels(self, x: Tensor) -> Tensor:
        """As `_both_directions`, with the CUDA kernels of Mamba's authors."""
        total = None
        for end, turn in (("", False), ("_b", True)):
            conv, project, step = (getattr(self, f"{name}{end}") for name in ("conv1d", "x_proj", "dt_proj"))
            part = x.flip(1) if turn else x
            u = mamba_kernels.causal_conv(part.mT, conv.weight[:, 0], conv.bias)
            rank, b, c = project(u.mT).split((self.rank, self.d_state, self.d_state), dim=-1)
            decay = -getattr(self, f"A{end}_log").float().exp()
            skip = getattr(self, f"D{end}").float()
            delta, bias = step.weight @ rank.mT, step.bias.float()
            y = mamba_kernels.selective_scan(u, delta, decay, b.mT, c.mT, skip=skip, bias=bias).mT
            y = y.flip(1) if turn else y
            total = y if total is None else total + y
        assert total is not None
        return total

    def _pair(self, module: str, name: str) -> Tensor:
        return torch.stack((getattr(getattr(self, module), name), getattr(getattr(self, f"{module}_b"), name)))

    @torch.no_grad()
    def _initialise_steps(self) -> None:
        """Initialise steps between 0.001 and 0.1, as in Mamba (arXiv 2312.00752, section 3.6)."""
        for step in (self.dt_proj, self.dt_proj_b):
            nn.init.uniform_(step.weight, -(self.rank**-0.5), self.rank**-0.5)
            delta = torch.empty_like(step.bias).uniform_(math.log(1e-3), math.log(1e-1)).exp_()
            step.bias.copy_(delta + torch.log(-torch.expm1(-delta)))  # the inverse of softplus


class VimBlock(nn.Module):
    """Adds `hidden` to the stream, normalises it and mixes; the next block adds the mixer's output."""

    def __init__(self, width: int, d_state: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.mixer = Mixer(width, d_state)

    def forward(self, stream: VimStream) -> VimStream:
        """`[B, T, C]` to the same shape."""
        residual = stream.residual + stream.hidden
        return VimStream(self.mixer(self.norm(residual)), residual, stream.place)


class VisionMamba(nn.Module):
    """Vim with one class token in the middle of the patches, or one at each end.

    Args:
        stride: of the patches; None for `patch_size`.
        class_token: `middle` is after half of the patches, `double` is one before and one after all of them.
        d_state: size N of the state of each channel.

    Raises ValueError if the patches do not fit the image.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
        depth: int = 24,
        embed_dim: int = 192,
        d_state: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        class_token: ClassToken = "middle",  # noqa: S107 (not a password)
    ) -> None:
        super().__init__()
        size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        stride = stride or patch_size
        _check_sizes(size, patch_size, stride, class_token)
        self.num_classes, self.embed_dim, self.class_token = num_classes, embed_dim, class_token
        self.patch_embed = PatchEmbed(size, patch_size, stride, in_chans, embed_dim)
        self.num_prefix_tokens = 2 if class_token == "double" else 1  # noqa: S105
        if class_token == "double":  # noqa: S105
            self.cls_token_head = nn.Parameter(torch.zeros(1, 1, embed_dim))
            self.cls_token_tail = nn.Parameter(torch.zeros(1, 1, embed_dim))
        else:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        length = self.patch_embed.num_patches + self.num_prefix_tokens
        self.pos_embed = nn.Parameter(torch.zeros(1, length, embed_dim))
        self.layers = nn.ModuleList(VimBlock(embed_dim, d_state) for _ in range(depth))
        self.norm_f = RMSNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.pretrained_cfg = _configuration((in_chans, *size), num_classes)
        self._initialise()

    def forward(self, images: Tensor) -> Tensor:
        """`[B, C, H, W]` to logits `[B, classes]`, or features `[B, C]` without a head."""
        logits: Tensor = self.head(self.pool(self.forward_features(images)))
        return logits

    def forward_features(self, images: Tensor) -> VimStream:
        """Through all layers."""
        stream = self.embed(images)
        for layer in self.layers:
            stream = layer(stream)
        return stream

    def embed(self, images: Tensor) -> VimStream:
        """Patches with class tokens and position embeddings."""
        patches = self.patch_embed(images)
        batch, count = patches.shape[:2]
        if self.class_token == "double":  # noqa: S105
            parts = [self.cls_token_head.expand(batch, -1, -1), patches, self.cls_token_tail.expand(batch, -1, -1)]
            place = torch.arange(2, device=images.device) * (count + 1)
        else:
            half = count // 2
            parts = [patches[:, :half], self.cls_token.expand(batch, -1, -1), patches[:, half:]]
            place = torch.full((1,), half, device=images.device)
        tokens = torch.cat(parts, dim=1) + self.pos_embed
        return VimStream(tokens, torch.zeros_like(tokens, dtype=torch.float32), place.expand(batch, -1))

    def pool(self, stream: VimStream) -> Tensor:
        """The class token after the last norm (the mean of the two), `[B, C]`."""
        at = stream.place.unsqueeze(-1).expand(-1, -1, stream.hidden.shape[-1])
        classes = stream.hidden.gather(1, at) + stream.residual.gather(1, at)
        pooled: Tensor = self.norm_f(classes).mean(dim=1)
        return pooled

    def patch_features(self, stream: VimStream) -> Tensor:
        """All patch tokens of the dense model after the last norm, `[B, N, C]`."""
        normed: Tensor = self.norm_f(stream.hidden + stream.residual)
        if self.class_token == "double":  # noqa: S105
            return normed[:, 1:-1]
        half = (normed.shape[1] - 1) // 2
        return torch.cat((normed[:, :half], normed[:, half + 1 :]), dim=1)

    @torch.no_grad()
    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if name.startswith(("cls_token", "pos_embed", "head.weight")):
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.endswith("out_proj.weight"):
                # each layer adds to the stream once, so weights are scaled by the root of the number of layers
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
                parameter.div_(math.sqrt(len(self.layers)))
            elif name == "head.bias":
                nn.init.zeros_(parameter)


def _check_sizes(size: tuple[int, int], patch_size: int, stride: int, class_token: str) -> None:
    if class_token not in ("middle", "double"):
        raise ValueError(f"invalid class_token={class_token!r}: must be middle or double")
    if min(*size, patch_size, stride) < 1 or min(size) < patch_size:
        raise ValueError(f"patches of {patch_size} at stride {stride} do not fit an image of {size[0]}x{size[1]}")
    if any((side - patch_size) % stride for side in size):
        raise ValueError(f"patches of {patch_size} at stride {stride} leave a rest of an image of {size[0]}x{size[1]}")


def _configuration(input_size: tuple[int, int, int], num_classes: int) -> dict[str, Any]:
    """Preprocessing of the authors' evaluation, as a timm configuration."""
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    return {
        "input_size": input_size,
        "num_classes": num_classes,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "crop_mode": "center",
    }
