"""timm's `VisionTransformer` and its subclasses: ViT, DeiT, DINOv2, SigLIP and others.

All of them pass a stream `[B, T, C]` through `model.blocks`. Each kind of block has one function here that returns its
probes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import (
    Block,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import Tensor, nn

from repshift_cli.measure.macs import count_macs
from repshift_cli.models import timm_attention
from repshift_cli.ops.attention import size_bias
from repshift_cli.ops.tokens import mean_by_size
from repshift_cli.planning.layout import Layout, PatchGrid, SiteInfo
from repshift_cli.planning.plan import Plan
from repshift_cli.reduction.families.base import (
    ATTENTION_TENSORS,
    Family,
    LastBlockParts,
    Probe,
    Site,
    TensorEdit,
    query_and_key,
    weight_count,
)
from repshift_cli.reduction.stream import Stream
from repshift_cli.reduction.token_stream import TokenStream


class TimmViT(Family):
    """ViTs with class token, distillation token, registers, mean pooling or attention pooling."""

    name: ClassVar[str] = "timm_vit"
    covers: ClassVar[str] = "timm's Vision Transformers: ViT, DeiT, DINOv2, SigLIP and others"
    shows: ClassVar[frozenset[str]] = ATTENTION_TENSORS
    format_version: ClassVar[int] = 1

    def accepts(self, model: nn.Module) -> bool:
        return isinstance(model, VisionTransformer)

    def refusal(self, model: Any) -> str | None:
        for index, block in enumerate(model.blocks):
            if type(block) not in _PROBES:
                known = ", ".join(kind.__name__ for kind in _PROBES)
                return f"blocks.{index} is a {type(block).__name__}, which is not supported (supported: {known})"
        if model.global_pool == "prr":
            return "its pooling (prr) arranges all patch tokens in a fixed grid"
        return None

    def layout(self, model: Any) -> Layout:
        return Layout(
            family=self.name,
            prefix_tokens=int(model.num_prefix_tokens),
            patch_tokens=math.prod(_grid(model)),
            class_token=bool(model.has_class_token),
            sites=tuple(SiteInfo(f"blocks.{index}", index) for index in range(len(model.blocks))),
        )

    def sites(self, model: Any) -> list[Site]:
        return [self._site(model, index, block) for index, block in enumerate(model.blocks)]

    def _site(self, model: Any, index: int, block: nn.Module) -> Site:
        probes, attentions = _PROBES.get(type(block), lambda _: {})(block), _attentions(block)
        return Site(
            name=f"blocks.{index}",
            layer=index,
            block=block,
            probes=probes,
            missing=_missing(block, probes),
            attention_channels=sum(part.num_heads * part.head_dim for part in attentions),
            width=int(model.embed_dim),
            head=int(attentions[0].head_dim) if attentions else 0,
            grid=_grid(model),
        )

    def stream(self, model: Any) -> Stream:
        return TokenStream(int(model.num_prefix_tokens))

    def restore_refusal(self, model: Any) -> str | None:
        return None

    def reads_class_token(self, model: Any) -> bool:
        return bool(model.global_pool == "token")

    def last_block(self, model: Any) -> LastBlockParts | str:
        if type(model) not in (VisionTransformer, VisionTransformerDistilled):
            return f"what the forward pass of {type(model).__name__} reads is not known"
        if not self.reads_class_token(model):
            return "the output is not computed from the class token alone"
        block = model.blocks[-1]
        if type(block) not in (Block, ResPostBlock):
            return f"a {type(block).__name__} computes all its tokens in one product"
        if not timm_attention.is_attention(block.attn) or type(block.attn.qkv) is not nn.Linear:
            return f"the {type(block.attn).__name__} of the last block is not supported"
        reader = block.norm1 if type(block) is Block else block.attn
        return LastBlockParts(model, block, reader, block.attn, _prefix_suffices)

    def merge_refusal(self, model: Any, restore: bool = False) -> str | None:
        for index, block in enumerate(model.blocks):
            attentions = _attentions(block)
            unknown = [part for part in attentions if not timm_attention.is_attention(part)]
            if unknown or not attentions:
                name = type(unknown[0] if unknown else block).__name__
                return f"blocks.{index} attends by {name}, which cannot weight tokens by size"
        return None

    def use_proportional_attention(self, model: Any, stream: Stream) -> tuple[list[TensorEdit], Callable[[], None]]:
        assert isinstance(stream, TokenStream)
        attentions = [part for block in model.blocks for part in _attentions(block)]
        timm_attention.use_proportional_attention(attentions, stream)
        edits = [] if stream.restores else _pooling_edits(model, stream)
        return edits, partial(timm_attention.use_proportional_attention, attentions, None)

    def macs(self, model: Any, plan: Plan | None) -> int:
        tokens = self.tokens_entering(model, plan)
        embedding = _embedding_macs(model)
        body = sum(_block_macs(block, count) for block, count in zip(model.blocks, tokens, strict=False))
        if plan is not None and plan.last_block == "exact":
            body -= _saved_macs(model.blocks[-1], tokens[-2], plan.prefix_tokens)
        heads = (getattr(model, "head", None), getattr(model, "head_dist", None))
        classifiers = sum(weight_count(head) for head in heads if isinstance(head, nn.Linear))
        return embedding + body + _pool_macs(model, tokens[-1]) + classifiers

    def patch_grid(self, model: Any) -> PatchGrid:
        patches = super().patch_grid(model)
        rows, columns = _grid(model)
        return replace(patches, rows=rows, columns=columns)


def _grid(model: Any) -> tuple[int, int]:
    """Rows and columns of the patches, also where the image size is not the one of the position table."""
    embedding = model.patch_embed
    dynamic = getattr(model, "dynamic_img_size", False)
    rows, columns = embedding.dynamic_feat_size(embedding.img_size) if dynamic else embedding.grid_size
    return int(rows), int(columns)


def _pre_norm_probes(block: Any) -> dict[str, Probe]:
    """`x += ls1(attn(norm1(x))); x += ls2(mlp(norm2(x)))`."""
    return {
        "attention_update": Probe(block.ls1),
        "mlp_update": Probe(block.ls2),
        "mlp_stream": Probe(block.norm2, "input"),
        **_attention_probes(block.attn),
    }


def _post_norm_probes(block: Any) -> dict[str, Probe]:
    """`x += norm1(attn(x)); x += norm2(mlp(x))`."""
    return {
        "attention_update": Probe(block.norm1),
        "mlp_update": Probe(block.norm2),
        "mlp_stream": Probe(block.mlp, "input"),
        **_attention_probes(block.attn),
    }


def _parallel_scaling_probes(block: Any) -> dict[str, Probe]:
    """`x += ls(attn_out_proj(a) + mlp_out_proj(m))`, both branches read the same normed `x`."""
    norms = (block.q_norm, block.k_norm)
    probes = {
        "mlp_stream": Probe(block.in_norm, "input"),
        **query_and_key(block.in_proj, block.num_heads, block.head_dim, block.in_split[0], *norms),
    }
    if block.out_proj is None:
        probes["attention_update"] = Probe(block.attn_out_proj, "output", block.ls)
        probes["mlp_update"] = Probe(block.mlp_out_proj, "output", block.ls)
    return probes


def _parallel_things_probes(block: Any) -> dict[str, Probe]:
    """Several attentions in parallel, then several MLPs: only the whole block is one update."""
    return {"mlp_stream": Probe(block.ffns[0], "input")}


_PROBES: dict[type[nn.Module], Callable[[Any], dict[str, Probe]]] = {
    Block: _pre_norm_probes,
    ResPostBlock: _post_norm_probes,
    ParallelScalingBlock: _parallel_scaling_probes,
    ParallelThingsBlock: _parallel_things_probes,
}


def _missing(block: nn.Module, probes: dict[str, Probe]) -> dict[str, str]:
    if isinstance(block, ParallelThingsBlock):
        return {"*": "it runs several branches in parallel"}
    if "attention_update" not in probes:
        return {"*": "it projects attention and MLP in one matrix product"}
    return {"*": f"the queries and keys of {type(getattr(block, 'attn', block)).__name__} are not supported"}


def _attention_probes(attention: Any) -> dict[str, Probe]:
    """Queries and keys of timm's `Attention`, parts of the output of its fused projection."""
    projection = getattr(attention, "qkv", None)
    if not timm_attention.is_attention(attention) or not isinstance(projection, nn.Linear):
        return {}
    norms = (attention.q_norm, attention.k_norm)
    return query_and_key(projection, attention.num_heads, attention.head_dim, 0, *norms)


def _pooling_edits(model: Any, stream: TokenStream) -> list[TensorEdit]:
    """A mean over patches weights each by its size, attention pooling its keys.

    Pooling by class token or by maximum needs no edit.
    """
    if model.attn_pool is not None:
        return [TensorEdit(model.attn_pool, "mask", partial(_pool_bias, stream=stream))]
    if model.global_pool not in ("avg", "avgmax"):
        return []
    first = 0 if model.pool_include_prefix else int(model.num_prefix_tokens)
    pooled = partial(_pool_sized, stream=stream, first=first, with_max=model.global_pool == "avgmax")
    return [
        TensorEdit(model.norm, "output", stream.remember),
        TensorEdit(model.fc_norm, "input", pooled),
    ]


def _pool_sized(pooled: Tensor, stream: TokenStream, first: int, with_max: bool) -> Tensor:
    """`[B, C]`, the mean weighted by size in place of the plain mean over the tokens from `first` on."""
    sizes, normed = stream.last(), stream.normed
    stream.normed = None  # a head that is called alone must not use the tokens of this pass
    if sizes is None or normed is None or normed.shape[0] != pooled.shape[0]:
        return pooled
    mean = mean_by_size(normed[:, first:], sizes[:, first:])
    return 0.5 * (normed[:, first:].amax(dim=1) + mean) if with_max else mean


def _pool_bias(tokens: Tensor, stream: TokenStream) -> Tensor | None:
    """The mask for attention pooling over the last of the tokens, `[B, 1, 1, T]`."""
    sizes, count = stream.last(), tokens.shape[1]
    # a head that is called alone may get tokens of another pass
    if sizes is None or count not in (sizes.shape[1], sizes.shape[1] - stream.prefix):
        return None
    return size_bias(sizes[:, -count:], tokens.dtype)[:, None, None, :]


def _block_macs(block: nn.Module, tokens: int) -> int:
    """Every linear layer on every token, and the products `q k^T` and `attention v` of T x T x channels."""
    attention = sum(_attention_channels(part) for part in _attentions(block))
    return tokens * weight_count(block, nn.Linear) + tokens * tokens * attention


def _saved_macs(block: Any, tokens: int, prefix: int) -> int:
    """Of a block that computes only the prefix tokens: all but the keys and values of the others."""
    attention = block.attn
    keys_and_values = 2 * attention.num_heads * attention.head_dim * attention.qkv.in_features
    per_token = weight_count(block, nn.Linear) - keys_and_values + tokens * _attention_channels(attention)
    return (tokens - prefix) * int(per_token)


def _prefix_suffices(model: Any) -> bool:
    """A checkpointed block runs again in the backward pass, when the forward pass of the model is over."""
    return bool(model.global_pool == "token" and not model.grad_checkpointing)


def _attentions(block: nn.Module) -> list[Any]:
    """The attention modules; a parallel block is one itself."""
    return [part for part in block.modules() if hasattr(part, "head_dim")]


def _attention_channels(attention: Any) -> int:
    """Channels of `q k^T` and of `attention v` together, over all heads."""
    width = int(attention.num_heads * attention.head_dim)
    # Differential attention runs two maps, each on half-size queries and full-size values: 2 * (1 + 2) of its width.
    return 6 * width if hasattr(attention, "lambda_init") else 2 * width


_STEM_MACS: WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], int]] = WeakKeyDictionary()
"""Image size and multiply-accumulates of patch embeddings with a network in them, which take long to count."""


def _embedding_macs(model: Any) -> int:
    """Of the patch embedding; a hybrid has a convolutional network there, with a map size for each layer."""
    embedding = model.patch_embed
    if not hasattr(embedding, "backbone"):
        return math.prod(_grid(model)) * weight_count(embedding)
    size = tuple(embedding.img_size)
    if _STEM_MACS.get(embedding, ((), 0))[0] != size:
        channels = next(part.in_channels for part in embedding.modules() if isinstance(part, nn.Conv2d))
        _STEM_MACS[embedding] = size, count_macs(embedding, (channels, *size))
    return _STEM_MACS[embedding][1]


def _pool_macs(model: Any, tokens: int) -> int:
    """Attention pooling (SigLIP's `map`): a few latent queries against all remaining tokens."""
    pool = model.attn_pool
    if pool is None:
        return 0
    seen = tokens if model.pool_include_prefix else tokens - int(model.num_prefix_tokens)
    latents, width = int(pool.latent_len), int(pool.num_heads * pool.head_dim)
    per_token = weight_count(pool.kv)
    per_latent = weight_count(pool, nn.Linear) - per_token
    return latents * per_latent + seen * per_token + 2 * latents * seen * width
