"""UMT (Unmasked Teacher, arXiv 2303.16058): text-video retrieval and video question answering.

The vision encoder attends over all patches of all frames at once. Parameters have the names of the authors'
checkpoints, so those load unchanged. Frames, image size and heads, which a checkpoint does not store, are arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from repshift_cli.models.bert import TextDecoder, TextEncoder, TextShape
from repshift_cli.ops.attention import attend_projected, backend_of
from repshift_cli.ops.tokens import Sized

Pooling = Literal["frames", "all"]

_NORM_EPS = 1e-6
_MAX_TOKENS = 1 << 15
"""Maximum tokens of a clip: the time of attention grows with their square. The authors' models take 2352."""

_TEMPERATURE, _MIN_TEMPERATURE = 0.07, 0.001


@dataclass(frozen=True)
class VisionShape:
    """Sizes of a vision encoder.

    Attributes:
        img_size, patch_size: height and width of a frame and of a patch, in pixels.
        hidden: channels inside the MLP.
        checkpoint_frames: number of frames from which positions are interpolated in time; None computes them for
            `frames` directly.
    """

    img_size: int = 224
    frames: int = 12
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    checkpoint_frames: int | None = None

    @property
    def side(self) -> int:
        """Patches along one side of a frame."""
        return self.img_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Tokens of a clip."""
        return self.frames * self.side**2


class Attention(nn.Module):
    """Attention over all tokens of a clip; queries and values have a bias, keys have none.

    `fused_attn` uses a fused kernel, `flash_attn` that of the package flash-attn rather than torch's.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.head_dim = width // heads
        self.fused_attn = True
        self.flash_attn = False
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.qkv = _BiasedLinear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, sizes: Tensor | None = None) -> Tensor:
        """`[B, N, C]` to the same; a merged token of size s counts s times as a key."""
        projected = self.qkv(tokens, torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias)))
        heads = projected.unflatten(2, (3, self.num_heads, self.head_dim))
        mixed = attend_projected(heads, sizes, backend=backend_of(self.fused_attn, self.flash_attn))
        output: Tensor = self.proj(mixed)
        return output


class _BiasedLinear(nn.Linear):
    """A projection whose bias is an input. As a module, it can be hooked like any other projection."""

    def forward(self, inputs: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[..., in]` and `[out]` to `[..., out]`."""
        return functional.linear(inputs, self.weight, bias)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[B, N, C]` to the same."""
        output: Tensor = self.fc2(functional.gelu(self.fc1(tokens)))
        return output


class Block(nn.Module):
    """`x += attn(norm1(x)); x += mlp(norm2(x))`; a hook on the identity `attended` can drop tokens before the MLP."""

    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.width, eps=_NORM_EPS)
        self.attn = Attention(shape.width, shape.heads)
        self.attended = nn.Identity()
        self.norm2 = nn.LayerNorm(shape.width, eps=_NORM_EPS)
        self.mlp = Mlp(shape.width, shape.hidden)

    def forward(self, stream: Sized) -> Sized:
        """`[B, N, C]` to the same, unless a hook drops or merges tokens."""
        attended = stream.tokens + self.attn(self.norm1(stream.tokens), stream.sizes)
        tokens, sizes = self.attended(Sized(attended, stream.sizes))
        return Sized(tokens + self.mlp(self.norm2(tokens)), sizes)


class PatchEmbed(nn.Module):
    """Patch embedding of each frame."""

    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        side = shape.patch_size
        self.proj = nn.Conv3d(3, shape.width, (1, side, side), (1, side, side))

    def forward(self, video: Tensor) -> Tensor:
        """`[B, T, 3, H, W]` to `[B, T * patches, C]`, frame by frame, row by row."""
        weight = self.proj.weight.squeeze(2)
        patches = functional.conv2d(video.flatten(0, 1), weight, self.proj.bias, stride=weight.shape[-2:])
        return patches.flatten(2).mT.unflatten(0, video.shape[:2]).flatten(1, 2)


class _Transformer(nn.Module):
    img_positions: Tensor
    positions: Tensor

    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(shape)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.width, eps=_NORM_EPS)
        self.register_buffer("positions", position_table(shape), persistent=False)
        self.register_buffer("img_positions", position_table(replace(shape, frames=1)), persistent=False)

    def forward(self, video: Tensor) -> Tensor:
        """`[B, T, 3, H, W]` to `[B, N, C]`; N is T * patches unless tokens are dropped or merged."""
        positions = self.img_positions if video.shape[1] == 1 else self.positions
        stream = Sized(self.patch_embed(video) + positions)
        for block in self.blocks:
            stream = block(stream)
        output: Tensor = self.norm(stream.tokens)
        return output


class VisionEncoder(nn.Module):
    """The transformer, and the norm after pooling if the model pools."""

    def __init__(self, shape: VisionShape, pools: bool) -> None:
        super().__init__()
        self.encoder = _Transformer(shape)
        if pools:
            self.pool_norm = nn.LayerNorm(shape.width, eps=_NORM_EPS)

    def forward(self, video: Tensor) -> Tensor:
        """`[B, T, 3, H, W]` to `[B, N, C]`."""
        tokens: Tensor = self.encoder(video)
        return tokens


class UmtModel(nn.Module):
    """Base of both models: a vision encoder, and a text encoder whose upper layers attend to its tokens.

    Attributes:
        pooling: over the tokens of each frame, as the authors evaluate retrieval, or over all tokens. After dropping or
            merging there are no whole frames.
        averaged: identity on the mean over all tokens; a hook on it can weight them by size.
    """

    def __init__(self, vision: VisionShape, text: TextShape, pools: bool) -> None:
        super().__init__()
        _check(vision)
        self.vision, self.text = vision, text
        self.pooling: Pooling = "frames"
        self.averaged = nn.Identity()
        self.vision_encoder = VisionEncoder(vision, pools)
        self.text_encoder = TextEncoder(text, vision.width)
        self.pretrained_cfg: dict[str, Any] = pretrained_cfg(vision)

    @property
    def img_size(self) -> tuple[int, int]:
        """Height and width of a frame."""
        return (self.vision.img_size, self.vision.img_size)

    @property
    def frames(self) -> int:
        """Frames per clip."""
        return self.vision.frames

    @property
    def checkpoint_frames(self) -> int | None:
        """See `VisionShape`."""
        return self.vision.checkpoint_frames

    @property
    def temperature(self) -> float:
        """Divisor of similarities before a softmax."""
        learned = getattr(self, "temp", None)
        return _TEMPERATURE if learned is None else max(float(learned), _MIN_TEMPERATURE)

    @property
    def blocks(self) -> list[Block]:
        """The blocks of the vision encoder."""
        return list(self.vision_encoder.encoder.blocks)  # type: ignore[arg-type]

    def restore_buffers(self) -> None:
        """Compute the buffers that checkpoints do not store, for a model that was built on the meta device."""
        encoder = self.vision_encoder.encoder
        encoder.positions = position_table(self.vision)
        encoder.img_positions = position_table(replace(self.vision, frames=1))
        for module in self.modules():
            if (types := getattr(module, "token_type_ids", None)) is not None:
                module.token_type_ids = torch.zeros(types.shape, dtype=types.dtype)

    def encode_video(self, video: Tensor) -> Tensor:
        """`[B, T, 3, H, W]` to tokens `[B, N, C]`. Raises ValueError for another number or size of frames."""
        expected = (self.vision.frames, 3, *self.img_size)
        if tuple(video.shape[1:]) not in (expected, (1, *expected[1:])):
            raise ValueError(f"invalid clip shape {tuple(video.shape[1:])}: must be {expected}")
        tokens: Tensor = self.vision_encoder(video)
        return tokens

    def pool(self, tokens: Tensor) -> Tensor:
        """`[B, N, C]` to `[B, F, C]`: the mean over each frame, or (F = 1) over all tokens; see `pooling`."""
        per_frame = self.vision.side**2
        if self.pooling == "all" or tokens.shape[1] % per_frame:
            mean: Tensor = self.averaged(tokens.mean(dim=1, keepdim=True))
            return mean
        return tokens.unflatten(1, (-1, per_frame)).mean(dim=2)


class UmtRetrieval(UmtModel):
    """Retrieval: embeddings of videos and texts, and a head that scores whether a pair matches."""

    def __init__(self, vision: VisionShape, text: TextShape, embed_dim: int = 512) -> None:
        super().__init__(vision, text, pools=True)
        self.vision_proj = nn.Linear(vision.width, embed_dim)
        self.text_proj = nn.Linear(text.width, embed_dim)
        self.itm_head = nn.Linear(text.width, 2)
        self.temp = nn.Parameter(torch.tensor(_TEMPERATURE))

    def forward(self, video: Tensor) -> Tensor:
        """`[B, T, 3, H, W]` to `[B, E]`: the mean of the embeddings of the frames."""
        return self.project_video(self.encode_video(video)).mean(dim=1)

    def pool(self, tokens: Tensor) -> Tensor:
        pooled: Tensor = self.vision_encoder.pool_norm(super().pool(tokens))
        return pooled

    def project_video(self, tokens: Tensor) -> Tensor:
        """`[B, N, C]` to embeddings of norm 1, `[B, F, E]`."""
        return functional.normalize(self.vision_proj(self.pool(tokens)), dim=-1)

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """int64 `[B, L]` and its mask to hidden states `[B, L, D]`."""
        return self.text_encoder.read(ids, mask)

    def project_text(self, hidden: Tensor) -> Tensor:
        """`[B, L, D]` to embeddings of norm 1, `[B, E]`."""
        return functional.normalize(self.text_proj(hidden[:, 0]), dim=-1)

    def match_logits(self, hidden: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        """Logits that pairs do not match and match, `[n, 2]`.

        `hidden` and `mask` are of n texts, `tokens` of m videos; the first n / m texts belong to the first, and so on.
        """
        logits: Tensor = self.itm_head(self.text_encoder.fuse(hidden, mask, tokens)[:, 0])
        return logits

    def match(self, hidden: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        """The matching logit of each pair, `[n]`; arguments as `match_logits`."""
        return self.match_logits(hidden, mask, tokens)[:, 1]


class UmtAnswering(UmtModel):
    """Question answering: a decoder ranks the answers of a list, given the hidden states of the question.

    If `tied`, the decoder and its head share the word embeddings, as in the authors' models.
    """

    def __init__(self, vision: VisionShape, text: TextShape, tied: bool = True) -> None:
        super().__init__(vision, text, pools=False)
        self.pooling = "all"
        self.text_decoder = TextDecoder(text)
        if tied:
            self._tie()

    def forward(self, video: Tensor) -> Tensor:
        """`[B, T, 3, H, W]` to `[B, C]`: the mean of the tokens."""
        return self.pool(self.encode_video(video)).mean(dim=1)

    def restore_buffers(self) -> None:
        super().restore_buffers()
        self._tie(only_equal=True)

    def _tie(self, only_equal: bool = False) -> None:
        """Share the word embeddings and the bias of the decoder and its head; optionally only those that are equal."""
        embeddings: Any = self.text_decoder.bert["embeddings"]
        head: Any = self.text_decoder.cls.predictions
        words = embeddings.word_embeddings
        if not only_equal or torch.equal(head.decoder.weight, words.weight):
            head.decoder.weight = words.weight
        if not only_equal or torch.equal(head.decoder.bias, head.bias):
            head.decoder.bias = head.bias

    def encode_question(self, ids: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        """int64 `[B, L]`, its mask and the tokens of the videos `[B, N, C]` to hidden states `[B, L, D]`."""
        states: Tensor = self.text_encoder(ids, mask, tokens)
        return states

    def first_token_probabilities(self, states: Tensor, mask: Tensor, start: int) -> Tensor:
        """`[B, L, D]`, `[B, L]` to `[B, vocabulary]`: next-token probabilities after `start` ([CLS])."""
        ids = torch.full((states.shape[0], 1), start, dtype=torch.int64, device=states.device)
        logits: Tensor = self.text_decoder(ids, torch.ones_like(ids), states, mask)
        return logits[:, 0].softmax(dim=-1)

    def answer_loss(self, states: Tensor, mask: Tensor, answer_ids: Tensor, answer_mask: Tensor) -> Tensor:
        """Cross-entropy of each answer, summed over its tokens after the first: `[n, L, D]`, ..., `[n, A]` to `[n]`."""
        logits = self.text_decoder(answer_ids, answer_mask, states, mask)[:, :-1]
        targets = answer_ids[:, 1:].masked_fill(answer_mask[:, 1:] == 0, -100)
        return functional.cross_entropy(logits.mT, targets, ignore_index=-100, reduction="none").sum(dim=1)


def position_table(shape: VisionShape) -> Tensor:
    """Fixed sine and cosine positions of a clip, float32 `[1, tokens, C]` (Vaswani et al. 2017, section 3.5).

    Positions are counted over all patches of all frames. With `checkpoint_frames` the table is computed for that many
    frames and interpolated in time.
    """
    computed = shape
    if shape.checkpoint_frames is not None and shape.frames > 1:
        computed = replace(shape, frames=shape.checkpoint_frames)
    places = torch.arange(computed.tokens, dtype=torch.float64).unsqueeze(1)
    channels = torch.arange(shape.width, dtype=torch.float64) // 2 * 2
    angles = places / 10000 ** (channels / shape.width)
    even = torch.arange(shape.width) % 2 == 0
    table = torch.where(even, angles.sin(), angles.cos()).float()
    if computed.frames != shape.frames:
        in_time = table.unflatten(0, (computed.frames, -1)).permute(1, 2, 0)  # [patches, C, frames]
        table = functional.interpolate(in_time, size=shape.frames, mode="linear").permute(2, 0, 1).flatten(0, 1)
    return table.unsqueeze(0)


_BASE, _LARGE = VisionShape(), VisionShape(width=1024, depth=24, heads=16, hidden=4096)
_TEXT_BASE = TextShape()
_TEXT_LARGE = TextShape(width=1024, depth=24, heads=16, hidden=4096, fusion_layer=19)

MODELS: dict[str, tuple[VisionShape, TextShape, int]] = {
    "umt_base": (_BASE, _TEXT_BASE, 512),
    "umt_large": (_LARGE, _TEXT_LARGE, 768),
    "umt_base_qa": (_BASE, _TEXT_BASE, 0),
    "umt_large_qa": (_LARGE, _TEXT_LARGE, 0),
}
"""The authors' models: sizes, and channels of the embeddings (0 for question answering)."""


def create(name: str, **changes: Any) -> UmtModel:
    """One of `MODELS` with random weights; `changes` are `img_size`, `frames` or `checkpoint_frames`."""
    vision, text, embed_dim = MODELS[name]
    return build(asdict(replace(vision, **changes)), asdict(text), embed_dim)


def build(
    vision: Mapping[str, Any], text: Mapping[str, Any], embed_dim: int = 0, pooling: Pooling | None = None
) -> UmtModel:
    """A model with random weights; `vision` and `text` are fields of `VisionShape` and `TextShape`.

    Without `embed_dim`, the channels of the embeddings, it is a question answering model. `pooling` is as it was
    trained, None for the authors'. Raises TypeError or ValueError for an unknown or invalid size.
    """
    shapes = VisionShape(**vision), TextShape(**text)
    model: UmtModel = UmtRetrieval(*shapes, embed_dim) if embed_dim else UmtAnswering(*shapes)
    if pooling is not None:
        if pooling not in get_args(Pooling):
            raise ValueError(f"unknown pooling {pooling!r}: allowed: {', '.join(get_args(Pooling))}")
        model.pooling = pooling
    return model


def _check(shape: VisionShape) -> None:
    if min(shape.img_size, shape.frames, shape.patch_size, shape.width, shape.depth, shape.heads, shape.hidden) < 1:
        raise ValueError("invalid size of the vision encoder: all must be at least 1")
    if shape.checkpoint_frames is not None and shape.checkpoint_frames < 1:
        raise ValueError(f"invalid checkpoint_frames={shape.checkpoint_frames}: must be at least 1")
    tokens = max(shape.frames, shape.checkpoint_frames or 1) * shape.side**2
    if tokens > _MAX_TOKENS:
        raise ValueError(f"invalid size of the vision encoder: {tokens} tokens, must be at most {_MAX_TOKENS}")
    if shape.img_size % shape.patch_size:
        raise ValueError(f"invalid img_size={shape.img_size}: must be a multiple of patch_size={shape.patch_size}")
    if shape.width % shape.heads:
        raise ValueError(f"invalid heads={shape.heads}: must divide width={shape.width}")


def pretrained_cfg(shape: VisionShape) -> dict[str, Any]:
    """Preprocessing of the authors' evaluation, in timm's words, and the number of frames."""
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    return {
        "input_size": (3, shape.img_size, shape.img_size),
        "num_classes": 0,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "frames": shape.frames,
    }
